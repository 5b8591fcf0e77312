"""LeViT with another token mixer: LeViN and LeViP.

Graham et al. 2021 (arXiv 2104.01136): timm's LeViT. Jeevan & Sethi 2022 (arXiv 2107.02239) put Nyström (LeViN) and
Performer (LeViP) attention into it; ``mixer="softmax"`` is the control. ``128s`` is LeViT-128S for 224 px and takes its
weights. LeViT adds a learned bias for each distance to the logits, which is left out: it belongs to a pair of tokens,
while Nyström's landmarks are cells of tokens, and Performer has no logits. Between stages, only the
tokens of every second row and column have queries; the keys are all tokens. A mechanism that needs queries and keys
on one grid, such as axial attention, leaves LeViT's own softmax attention there.

``cifar`` is the paper's model: one stage of four layers of 128 channels with 4 heads, every pixel of a 32 px image a
token, and the mean of the tokens classified.

*Differs:* ``vit.py`` lists what ``cifar`` corrects in the official code. Here also stem and layers have batch
normalisation, as in LeViT. The code has no normalisation, so its stem is one linear convolution.
"""

from typing import Any, Optional, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import register_notrace_module, to_2tuple
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models.levit import Attention, AttentionDownsample, Levit, LevitDistilled
from timm.models.levit import checkpoint_filter_fn as levit_checkpoint_filter_fn
from torch import nn

from .._checks import InputError, check_choice, check_integer
from ..mixers import MIXERS
from ..mixers._keywords import is_plain_softmax
from ..mixers._layout import TokenLayout
from ..mixers._mechanism import AttentionShape, MechanismHost
from ..slots.hooks import update_hooks
from ..slots.model import no_decay_names
from ..stems import MAP_STEMS
from ._arguments import StemMixer, check_sizes, check_stages, first_convolution, projected_keywords, stem_class
from ._build import build_xformer, overridden
from ._convolutional import check_image
from ._register import CIFAR10, ModelName, register_names
from .checkpoints import complete_checkpoint, mixer_keys, new_keys, tensors_of
from .vit import NYSTROM

LEVITS = "levit"  # the stem that LeViT has itself

SIZES: dict[str, dict[str, Any]] = {
    "128s": dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 6, 8), depth=(2, 3, 4)),
    "cifar": dict(
        img_size=32, patch_size=1, stem="conv", distilled=False, embed_dim=(128,), key_dim=32, num_heads=(4,),
        depth=(4,), attn_ratio=1.0, mlp_ratio=2.0,
    ),
}  # fmt: skip


@register_notrace_module
class ProjectedAttention(MechanismHost):
    """LeViT's attention with another mechanism between its projections, whose modules it takes over."""

    def __init__(self, attn: Attention, mixer: str, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = attn.num_heads, attn.key_dim, attn.val_dim
        self.qkv = attn.qkv
        height, width = attn.resolution
        self.grid = (height, width)
        layout = TokenLayout(0, self.grid)
        self.set_core(build_core(attn, self.qkv.linear.weight, layout, layout, mixer, keywords))
        self.proj = attn.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).unflatten(2, (self.num_heads, 2 * self.key_dim + self.val_dim)).transpose(1, 2)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        layout = TokenLayout(0, self.grid)
        y = self.mix(q, k, v, layout, layout, x)
        return self.proj(y.transpose(1, 2).reshape(B, N, self.num_heads * self.val_dim))


@register_notrace_module
class ProjectedDownsampling(MechanismHost):
    """LeViT's downsampling attention between stages, with another mechanism between its projections."""

    def __init__(self, attn: AttentionDownsample, mixer: str, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = attn.num_heads, attn.key_dim, attn.val_dim
        self.kv, self.q = attn.kv, attn.q
        height, width = attn.resolution
        self.grid = ((height - 1) // attn.stride + 1, (width - 1) // attn.stride + 1)
        self.key_grid = (height, width)
        queries, keys = TokenLayout(0, self.grid), TokenLayout(0, self.key_grid)
        keywords = {name: value for name, value in keywords.items() if name not in MIXERS[mixer].one_grid_keywords}
        self.set_core(build_core(attn, self.kv.linear.weight, queries, keys, mixer, keywords))
        self.proj = attn.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kv = self.kv(x).unflatten(2, (self.num_heads, self.key_dim + self.val_dim)).transpose(1, 2)
        k, v = kv.split([self.key_dim, self.val_dim], dim=3)
        tokens = self.q(x)
        q = tokens.unflatten(2, (self.num_heads, self.key_dim)).transpose(1, 2)
        y = self.mix(q, k, v, TokenLayout(0, self.grid), TokenLayout(0, self.key_grid), tokens)
        return self.proj(y.transpose(1, 2).flatten(2))


def build_core(
    attn: nn.Module,
    weight: torch.Tensor,
    queries: TokenLayout,
    keys: TokenLayout,
    mixer: str,
    keywords: dict[str, Any],
) -> nn.Module:
    """A mechanism for the heads of a LeViT attention."""
    shape = AttentionShape(
        weight.shape[1],
        attn.num_heads,
        attn.key_dim,
        attn.val_dim,
        queries,
        keys,
        device=weight.device,
        dtype=weight.dtype,
    )
    return MIXERS[mixer].build(shape, **keywords)


PROJECTED_LAYERS = {Attention: ProjectedAttention, AttentionDownsample: ProjectedDownsampling}


def levit_arguments(
    img_size: Union[int, tuple[int, int]],
    patch_size: Optional[int],
    in_chans: int,
    stem: str,
    stem_mixer: StemMixer,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """What timm's class is to be built with for a stem of ours, which may have a stride of 1."""
    if stem == LEVITS:
        if stem_mixer is not None:
            raise InputError(f"stem_mixer={stem_mixer!r}: LeViT's own stem has no mixer inside; allowed is stem='t2t'")
        stride = 8 if kwargs.get("stem_type") == "s8" else 16
        if patch_size not in (None, stride):
            raise InputError(f"patch_size={patch_size!r}: LeViT's stem has {stride}; another size needs stem='conv'")
        # timm rounds the grid down and the stem's convolutions round it up
        check_sizes(img_size, stride, False)
        return dict(img_size=img_size, in_chans=in_chans, **kwargs)
    check_choice("stem", stem, (LEVITS, *MAP_STEMS))
    patch_size = 16 if patch_size is None else patch_size
    check_integer("patch_size", patch_size, 1)
    check_sizes(img_size, patch_size, False)
    dd = {key: kwargs.get(key) for key in ("device", "dtype")}
    width = kwargs.get("embed_dim", (192,))[0]  # timm's default
    backbone = stem_class(stem, stem_mixer)(
        img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=width, flatten=False, **dd
    )
    # the grid is what counts: timm divides the size by the stride, which it wants to be 2 at least
    size = tuple(2 * side for side in backbone.grid_size)
    return dict(img_size=size, in_chans=in_chans, stem_backbone=backbone, stem_stride=2, **kwargs)


class LevitXformer(Levit):
    """timm's ``Levit`` with a token mixer and a stem chosen by name.

    Args:
        mixer: a name in ``MIXERS`` of a mechanism with queries, keys and values; "softmax" is timm's own attention,
            unless keywords add to it.
        stem: "levit": LeViT's convolutions; or a name of ``STEMS``, with patches of ``patch_size``, None: 16.
        stem_mixer: for ``stem="t2t"`` the mixer inside it, as in ``VisionXformer``.
        **kwargs: the mixer's keywords and those of timm's class.

    Raises:
        ValueError: for an unknown name or wrong value, naming what is allowed.
        TypeError: for a keyword that neither takes.
    """

    def __init__(
        self,
        img_size: Union[int, tuple[int, int]] = 224,
        patch_size: Optional[int] = None,
        in_chans: int = 3,
        mixer: str = "softmax",
        stem: str = LEVITS,
        stem_mixer: StemMixer = None,
        **kwargs: Any,
    ) -> None:
        keywords = projected_keywords(mixer, kwargs)
        if kwargs.get("use_conv"):
            raise InputError("use_conv=True: token mixers work on sequences; allowed is False")
        super().__init__(**levit_arguments(img_size, patch_size, in_chans, stem, stem_mixer, kwargs))
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self._traits = {"first_conv": "stem.conv1.linear" if stem == LEVITS else first_convolution(stem, "stem")}
        if stem != LEVITS:
            for info in self.feature_info:
                info["reduction"] = info["reduction"] // 2 * (16 if patch_size is None else patch_size)
        if not is_plain_softmax(mixer, keywords):
            layers = dict(PROJECTED_LAYERS)
            if MIXERS[mixer].needs_self_attention:
                del layers[AttentionDownsample]
            for parent in list(self.modules()):
                for name, attn in list(parent.named_children()):
                    if type(attn) in layers:
                        setattr(parent, name, layers[type(attn)](attn, mixer, keywords))
        # a single stage has nothing to extract but its layers, so they take the stages' place
        self.shrinks = len(self.stages) > 1
        if not self.shrinks:
            (info,) = self.feature_info
            self.stages: nn.Module = nn.Sequential(*self.stages[0].blocks)
            self.feature_info: list[dict[str, Any]] = [
                dict(info, module=f"stages.{i}") for i in range(len(self.stages))
            ]
        update_hooks(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | no_decay_names(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return super().group_matcher(coarse) if self.shrinks else dict(stem=r"^stem", blocks=r"^stages\.(\d+)")

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """What timm's class computes, written out: TorchScript can't call ``super()``."""
        check_image(x, self.img_size)
        x = self.stem(x).flatten(2).transpose(1, 2)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x)
        return self.stages(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, list[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of stages, or of a single stage's layers, as timm's models give them."""
        check_image(x, self.img_size)
        if self.shrinks:
            return super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)
        check_choice("output_fmt", output_fmt, ("NCHW",))
        taken, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        shape, maps = x.shape, []
        x = x.flatten(2).transpose(1, 2)
        for i, layer in enumerate(self.stages):
            if i > last and stop_early:
                break
            x = checkpoint(layer, x) if self.grad_checkpointing and not torch.jit.is_scripting() else layer(x)
            if i in taken:
                maps.append(x.transpose(1, 2).reshape(shape))
        return maps if intermediates_only else (x, maps)


class LevitXformerDistilled(LevitXformer, LevitDistilled):
    """With timm's second classifier, for distillation."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: LevitXformer) -> dict[str, Any]:
    """Fit a checkpoint to the model: one of ours as it is, or LeViT's weights without the biases of its logits.

    Raises:
        ValueError: if it is neither, with the keys that are missing, unexpected or of another shape.
    """
    state_dict = levit_checkpoint_filter_fn(tensors_of(state_dict), model)
    own, new = mixer_keys(model), new_keys(state_dict, model)
    ours = bool(own & state_dict.keys())
    biases = {key for key in state_dict if key.endswith("attention_biases")}
    dropped = set() if ours else biases - model.state_dict().keys()
    state_dict = {key: value for key, value in state_dict.items() if key not in dropped}
    # without parameters of a mixer, attention biases identify a checkpoint of LeViT
    return complete_checkpoint(state_dict, model, new, ours or not (own or dropped), dropped)


def create_levit(row: ModelName, pretrained: bool, kwargs: dict[str, Any]) -> LevitXformer:
    """Build the model of a registered name: its architecture, overridden by the user's ``kwargs``."""
    arguments = overridden(row, SIZES, kwargs)
    if arguments.get("stem") == LEVITS and "patch_size" not in kwargs:
        arguments.pop("patch_size", None)  # it was that of another stem
    depth = arguments["depth"]
    check_stages(embed_dim=arguments["embed_dim"], depth=depth, num_heads=arguments["num_heads"])
    outputs = tuple(range(depth[0] if len(depth) == 1 else len(depth)))
    feature_cfg = dict(feature_cls="getter", out_indices=arguments.pop("out_indices", outputs))
    model_class = LevitXformerDistilled if arguments.pop("distilled", True) else LevitXformer
    return build_xformer(model_class, row.name, pretrained, arguments, checkpoint_filter_fn, feature_cfg)


def describe(row: ModelName) -> str:
    """The architecture of a row, for the documentation of its model."""
    title = "The paper's LeViT for 32 px, corrected (see module)" if row.size == "cifar" else "LeViT-128S"
    return f"{title} (Graham et al. 2021, arXiv 2104.01136)"


def _cfgs() -> dict[str, dict[str, Any]]:
    shared = dict(pool_size=None, interpolation="bicubic", fixed_input_size=True, license="apache-2.0")
    small = dict(CIFAR10, classifier="head.linear", first_conv="stem.proj.0.conv")
    large = dict(num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9, hf_hub_id="timm/levit_128s.fb_dist_in1k")
    large.update(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, first_conv="stem.conv1.linear")
    large.update(classifier=("head.linear", "head_dist.linear"))
    sizes = {"cifar": dict(shared, **small), "128s.fb_dist_in1k": dict(shared, **large)}
    return {f"{family}_{size}": cfg for family in ("levin", "levip") for size, cfg in sizes.items()}


default_cfgs = generate_default_cfgs(_cfgs())

# name, mixer, stem, size, rotary positions, keywords
NAMES = [
    ModelName("levin_cifar", "nystrom", None, "cifar", None, NYSTROM),
    ModelName("levin_128s", "nystrom", None, "128s"),
    ModelName("levip_cifar", "performer", None, "cifar", None, dict(num_features=110)),
    ModelName("levip_128s", "performer", None, "128s"),
]

register_names(__name__, NAMES, create_levit, describe)
