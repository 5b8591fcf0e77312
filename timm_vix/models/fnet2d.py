"""FNet on maps: a Fourier transform over channels and both axes of the image in place of attention.

    Y = Re(F_H F_W F_C X)                              cost in N: N log N

Jeevan & Sethi 2022 (arXiv 2107.02239, "2DFNet") after Lee-Thorp et al. 2021 (arXiv 2105.03824). Each layer adds
MLP(BatchNorm(Y)) to its input, the MLP of 1x1 convolutions; no positions, no class token; five layers of 128 channels,
every pixel of a 32 px image a token, and the mean of the map classified.

*Differs:* the paper's stem of two convolutions without activation is one linear convolution; here it is the
convolutional stem of the family, with normalisation and GELU. The transform is computed in float32 at least, and it is
orthonormal: the paper's sums over N·C entries, of which batch normalisation removes the scale. The code's dropout of
0.5 in the MLP is a keyword, ``proj_drop_rate=0.5``: the model has none by default, and the reproduction leaves it out.

Shapes: maps (B, C, H, W).
"""

from typing import Any, Optional, Union

import torch
from timm.layers import (
    ConvMlp,
    DropPath,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
)
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from .._checks import check_choice, check_integer
from ..stems import MAP_STEMS, STEMS
from ._arguments import check_sizes, first_convolution
from ._build import build_xformer
from ._register import CIFAR10
from .checkpoints import check_keys, tensors_of


@register_notrace_function
def fourier_mix_map(x: torch.Tensor) -> torch.Tensor:
    """Re(F_H F_W F_C X), orthonormal: (B, C, H, W) -> (B, C, H, W), in the dtype of x."""
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling() and x.shape[0] == 0:
        return x  # libraries have no transform of an empty batch
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.fft.fftn(wide, dim=(1, 2, 3), norm="ortho").real.to(x.dtype)


class Block(nn.Module):
    """A transform of all axes, batch normalisation and an MLP on each pixel, with a residual."""

    def __init__(self, dim: int, mlp_ratio: float, drop: float, drop_path: float, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU, drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.mlp(self.norm(fourier_mix_map(x))))


class FourierMap(nn.Module):
    """A stem, blocks of one width, and the mean of the map classified.

    Args:
        stem: a name in ``STEMS``, with patches of ``patch_size``.

    Raises:
        ValueError: for an unknown name or wrong value, naming what is allowed.
    """

    def __init__(
        self,
        img_size: Union[int, tuple[int, int]] = 32,
        patch_size: int = 1,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        embed_dim: int = 128,
        depth: int = 5,
        mlp_ratio: float = 2.0,
        stem: str = "conv",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice("stem", stem, MAP_STEMS)
        check_pooling(global_pool, num_classes)
        check_sizes(img_size, patch_size, False)
        for name, value in (("embed_dim", embed_dim), ("depth", depth)):
            check_integer(name, value, 1)
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_embed = STEMS[stem](
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, flatten=False,
            strict_img_size=False, **dd,
        )  # fmt: skip
        self._traits = {"first_conv": first_convolution(stem)}
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*(Block(embed_dim, mlp_ratio, proj_drop_rate, rate, **dd) for rate in rates))
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [dict(num_chs=embed_dim, reduction=reduction, module=f"blocks.{i}") for i in range(depth)]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.grad_checkpointing = False

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r"^patch_embed", blocks=r"^blocks\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Take another number of classes, and another pooling if given."""
        global_pool = self.global_pool if global_pool is None else global_pool
        check_pooling(global_pool, num_classes)
        self.num_classes, self.global_pool = num_classes, global_pool
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def prune_intermediate_layers(
        self, indices: Union[int, list[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one that is asked for, as timm's models do."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        if prune_head or last < len(self.blocks) - 1:
            self.reset_classifier(0, "")
        self.blocks = self.blocks[: last + 1]
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
        """The maps of blocks, as timm's models give them."""
        check_choice("output_fmt", output_fmt, ("NCHW",))
        taken, last = feature_take_indices(len(self.blocks), indices)
        maps = []
        x = self.patch_embed(x)
        for i, block in enumerate(self.blocks):
            if i > last and stop_early:
                break
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
            if i in taken:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def check_pooling(global_pool: str, num_classes: int) -> None:
    """Raise ValueError unless the map is pooled, or is the result: a classifier wants one vector for each image."""
    check_choice("global_pool", global_pool, ("avg", "") if num_classes == 0 else ("avg",))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: FourierMap) -> dict[str, Any]:
    """Raise ValueError unless the checkpoint fits, with the keys that are missing, unexpected or of another shape."""
    state_dict = tensors_of(state_dict)
    check_keys(state_dict, model, model.state_dict())
    return state_dict


default_cfgs = generate_default_cfgs(
    {
        "fnet2d_cifar": dict(
            CIFAR10,
            pool_size=None,
            interpolation="bicubic",
            first_conv="patch_embed.proj.0.conv",
            classifier="head",
            license="apache-2.0",
        )
    }
)


@register_model
def fnet2d_cifar(pretrained: bool = False, **kwargs: Any) -> FourierMap:
    """The paper's Fourier mixing of maps for 32 px, corrected (see module; arXiv 2107.02239, after 2105.03824)."""
    feature_cfg = dict(feature_cls="getter", out_indices=kwargs.pop("out_indices", 3))
    return build_xformer(FourierMap, "fnet2d_cifar", pretrained, kwargs, checkpoint_filter_fn, feature_cfg)
