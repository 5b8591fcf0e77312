"""Convolutional vision transformers with another token mixer: CvN, CvP and CvT.

Wu et al. 2021 (arXiv 2103.15808): three stages, each of which embeds the tokens' map by an overlapping convolution and
projects it to queries, keys and values by depthwise ones, keys and values on half the grid. No positions. Jeevan &
Sethi 2022 (arXiv 2107.02239) put Nyström (CvN) and Performer (CvP) attention into it; CvT is the softmax control.
``13`` is CvT-13 for 224 px; the names of its parameters are those of the published weights.

``cifar`` is the paper's model: 128 channels and every pixel of a 32 px image a token in all stages, of 1, 1 and 2
layers, and the mean of the tokens classified. The paper's code lacks the convolutional projection and ignores the
arguments for it. ``projection="conv"`` adds it (in CvN with ``key_stride=1`` or ``conv_residual=False``, since the
residual convolution needs as many values as queries).

*Differs:* ``vit.py`` lists what ``cifar`` corrects in the official code. Here also any image size can be built, and
there is a last normalisation.
"""

from typing import Any, Optional, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates, get_device_dtype, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import nn

from .._checks import InputError, check_choice, is_integer
from ..mixers._layout import Grid
from ..slots.hooks import update_hooks
from ..slots.model import hosts_of, no_decay_names
from ._arguments import check_sizes, projected_keywords
from ._build import build_xformer, overridden
from ._convolutional import Stage, check_image, embed_padding, to_image
from ._register import CIFAR10, ModelName, register_names
from .checkpoints import complete_checkpoint, mixer_keys, new_keys, tensors_of
from .vit import NYSTROM, PERFORMER

SIZES: dict[str, dict[str, Any]] = {
    "13": dict(
        embed_dims=(64, 192, 384), depths=(1, 2, 10), num_heads=(1, 3, 6), embed_kernels=(7, 3, 3),
        embed_strides=(4, 2, 2), mlp_ratio=4.0,
    ),
    "cifar": dict(
        img_size=32, embed_dims=(128, 128, 128), depths=(1, 1, 2), num_heads=(4, 4, 4), embed_kernels=(3, 3, 3),
        embed_strides=(1, 1, 1), mlp_ratio=2.0, projection="linear", class_token=False, qkv_bias=False,
    ),
}  # fmt: skip


def check_three(name: str, values: Any) -> None:
    """Raise ValueError unless ``values`` are three positive integers, one for each stage."""
    valid = isinstance(values, (tuple, list)) and len(values) == 3
    if not valid or any(not is_integer(value) or value < 1 for value in values):
        raise InputError(f"{name}={values!r}: expected three positive integers, one for each stage")


class ConvolutionalXformer(nn.Module):
    """CvT with a token mixer chosen by name.

    Args:
        mixer: a name in ``MIXERS`` of a mechanism with queries, keys and values.
        projection: "conv" or "linear": of queries, keys and values.
        key_stride: stride of the convolutions of keys and values.
        embed_strides: of the three embeddings; the first is the patch size of other models.
        class_token: in the last stage; without, the mean of the tokens is classified.
        **kwargs: the mixer's keywords.

    Raises:
        ValueError: for an unknown name or wrong value, naming what is allowed.
        TypeError: for a keyword that neither takes.
    """

    def __init__(
        self,
        img_size: Union[int, tuple[int, int]] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Optional[str] = None,
        mixer: str = "softmax",
        projection: str = "conv",
        key_stride: int = 2,
        embed_dims: tuple[int, ...] = (64, 192, 384),
        depths: tuple[int, ...] = (1, 2, 10),
        num_heads: tuple[int, ...] = (1, 3, 6),
        embed_kernels: tuple[int, ...] = (7, 3, 3),
        embed_strides: tuple[int, ...] = (4, 2, 2),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_token: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        keywords = projected_keywords(mixer, kwargs, separate=True)
        if kwargs:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(kwargs)}")
        check_choice("projection", projection, ("conv", "linear"))
        check_choice("class_token", class_token, (True, False))
        check_choice("key_stride", key_stride, (1, 2))
        stages = dict(
            embed_dims=embed_dims, depths=depths, num_heads=num_heads, embed_kernels=embed_kernels,
            embed_strides=embed_strides,
        )  # fmt: skip
        for name, values in stages.items():
            check_three(name, values)
        if any(dim % heads for dim, heads in zip(embed_dims, num_heads)):
            raise InputError(f"num_heads={num_heads}: expected divisors of embed_dims={embed_dims}")
        global_pool = ("token" if class_token else "avg") if global_pool is None else global_pool
        check_choice("global_pool", global_pool, ("token", "avg", "") if class_token else ("avg", ""))
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_prefix_tokens = int(class_token)
        self.num_stages = 3
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[2]
        self.feature_info: list[dict[str, Any]] = []
        self.grids: list[Grid] = []
        check_sizes(img_size, 1, False)
        self.img_size = height, width = to_2tuple(img_size)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        before, reduction = in_chans, 1
        for i in range(3):
            kernel, stride = embed_kernels[i], embed_strides[i]
            pad = embed_padding(kernel)
            height, width = (height + 2 * pad - kernel) // stride + 1, (width + 2 * pad - kernel) // stride + 1
            if min(height, width) < 1:
                raise InputError(
                    f"img_size={img_size} leaves no token in stage {i}, with embed_strides={embed_strides}"
                )
            stage = Stage(
                before, embed_dims[i], kernel, stride, depths[i], class_token and i == 2, rates[i],
                num_heads=num_heads[i], grid=(height, width), mixer=mixer, keywords=keywords, projection=projection,
                key_stride=key_stride, qkv_bias=qkv_bias, mlp_ratio=mlp_ratio, drop=proj_drop_rate, **dd,
            )  # fmt: skip
            setattr(self, f"stage{i}", stage)
            before, reduction = embed_dims[i], reduction * stride
            self.grids.append((height, width))
            self.feature_info.append(dict(num_chs=before, reduction=reduction, module=f"stage{i}"))
        self.norm = nn.LayerNorm(before, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(before, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(needs_reset=False)
        update_hooks(self)

    def init_weights(self, needs_reset: bool = True) -> None:
        """CvT's initialisation: truncated normal weights of standard deviation 0.02 for linear layers and class token.

        Convolutions keep torch's own.
        """
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.stage2.cls_token is not None:
            trunc_normal_(self.stage2.cls_token, std=0.02)
        for host in hosts_of(self).values():  # Linformer's averages and learned features are no such weights
            if hasattr(host.core, "reset_parameters"):
                host.core.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"stage2.cls_token"} | no_decay_names(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [(r"^stage(\d+)\.blocks\.(\d+)", None), (r"^stage(\d+)", (0,)), (r"^norm", (99999,))]
        return dict(stem=r"^stage0\.patch_embed", blocks=r"^stage(\d+)" if coarse else fine)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in (self.stage0, self.stage1, self.stage2):
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Take another number of classes, and another pooling if given."""
        if global_pool is not None:
            check_choice("global_pool", global_pool, ("token", "avg", "") if self.num_prefix_tokens else ("avg", ""))
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def prune_intermediate_layers(
        self, indices: Union[int, list[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one that is asked for, as timm's models do."""
        taken, last = feature_take_indices(self.num_stages, indices)
        shorter = last < self.num_stages - 1
        self.num_stages = last + 1
        for i in range(self.num_stages, 3):
            setattr(self, f"stage{i}", nn.Identity())
            self.num_prefix_tokens = 0  # the class token was in the last stage
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return taken

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, list[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of stages, as timm's models give them, after the last tokens unless ``intermediates_only``."""
        check_choice("output_fmt", output_fmt, ("NCHW",))
        taken, last = feature_take_indices(self.num_stages, indices)
        check_image(x, self.img_size)
        maps = []
        for i, stage in enumerate((self.stage0, self.stage1, self.stage2)):
            if i >= self.num_stages or (i > last and stop_early):
                break
            done = i
            tokens = stage(x)
            x = to_image(tokens[:, tokens.shape[1] - self.grids[i][0] * self.grids[i][1] :], self.grids[i])
            if i in taken:
                final = norm and i == 2
                maps.append(to_image(self.norm(tokens)[:, self.num_prefix_tokens :], self.grids[i]) if final else x)
        return maps if intermediates_only else (self.norm(tokens) if done == 2 else tokens, maps)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        check_image(x, self.img_size)
        x = self.stage0(x)
        if self.num_stages > 1:
            x = self.stage1(to_image(x, self.grids[0]))
        if self.num_stages > 2:
            x = self.stage2(to_image(x, self.grids[1]))
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ConvolutionalXformer) -> dict[str, Any]:
    """Fit a checkpoint to the model: one of ours, or CvT's published weights, with another mixer's own weights fresh.

    Raises:
        ValueError: if it is neither, with the keys that are missing, unexpected or of another shape.
    """
    state_dict = tensors_of(state_dict)
    new = new_keys(state_dict, model)
    ours = bool(mixer_keys(model) & state_dict.keys())
    return complete_checkpoint(state_dict, model, new, ours)


def create_convolutional(row: ModelName, pretrained: bool, kwargs: dict[str, Any]) -> ConvolutionalXformer:
    """Build the model of a registered name: its architecture, overridden by the user's ``kwargs``."""
    arguments = overridden(row, SIZES, kwargs)
    feature_cfg = dict(feature_cls="getter", out_indices=arguments.pop("out_indices", (0, 1, 2)))
    return build_xformer(ConvolutionalXformer, row.name, pretrained, arguments, checkpoint_filter_fn, feature_cfg)


def describe(row: ModelName) -> str:
    """The architecture of a row, for the documentation of its model."""
    return "The paper's CvT for 32 px, corrected (see module)" if row.size == "cifar" else "CvT-13 for 224 px"


def _cfgs() -> dict[str, dict[str, Any]]:
    shared = dict(pool_size=None, interpolation="bicubic", fixed_input_size=True, license="apache-2.0")
    shared.update(first_conv="stage0.patch_embed.proj", classifier="head")
    large = dict(num_classes=1000, input_size=(3, 224, 224), crop_pct=0.875)
    large.update(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    sizes = {"cifar": {**shared, **CIFAR10}, "13": dict(shared, **large)}
    return {f"{family}_{size}": cfg for family in ("cvn", "cvp", "cvt") for size, cfg in sizes.items()}


default_cfgs = generate_default_cfgs(_cfgs())

# name, mixer, stem, size, rotary positions, keywords
NAMES = [
    ModelName("cvn_cifar", "nystrom", None, "cifar", None, NYSTROM),
    ModelName("cvn_13", "nystrom", None, "13"),
    ModelName("cvp_cifar", "performer", None, "cifar", None, PERFORMER),
    ModelName("cvp_13", "performer", None, "13"),
    ModelName("cvt_cifar", "softmax", None, "cifar"),
    ModelName("cvt_13", "softmax", None, "13"),
]

register_names(__name__, NAMES, create_convolutional, describe)
