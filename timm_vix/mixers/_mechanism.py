"""Base classes of token mixers and of the modules around them.

- A *mixer* takes the place of softmax attention between the projections. It is a subclass of
  ``AttentionMechanism``, with queries, keys and values of each head, or of ``TokenMixing``, which maps the tokens
  themselves. Each mixer is one class in one file, with an entry in ``MIXERS``.
- A *host* contains a mixer. It is a timm model, or the module that has the mixer as its sub-module ``core``
  (``MechanismHost``). It does everything else: projections, rotary positions, merging of heads.
- A *slot* is the ``MechanismHost`` that takes the place of an attention module in ViT, Eva and PiT (``slots/slot.py``).
  The hosts in CvT and LeViT are in ``models/``.

Hosts create a mixer by ``build``. It adds the keywords that all mixers share (``_local.py``), so that a subclass
doesn't implement them.

Shapes: B images, N tokens, h heads, D width of a head's queries and keys, E of its values, C channels.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from timm.layers import register_notrace_module
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from .._checks import InputError, check_choice, check_number
from ._layout import Grid, TokenLayout
from ._local import CHANNELS, DepthwiseResidual, append_channels, locality_channels


class AttentionShape(NamedTuple):
    """What a mixer is built for.

    ``queries`` and ``keys`` are the layouts of their tokens, ``dropout`` is that of attention weights, and ``rotary``
    says that queries and keys come with rotary positions.
    """

    dim: int
    num_heads: int
    head_dim: int
    value_dim: int
    queries: TokenLayout
    keys: TokenLayout
    dropout: float = 0.0
    rotary: bool = False
    device: Any = None
    dtype: Any = None

    def parameter(self, *size: int) -> nn.Parameter:
        """An uninitialised parameter, on the device and in the dtype of the host."""
        return nn.Parameter(torch.empty(size, device=self.device, dtype=self.dtype))


class Mixer(nn.Module):
    """The base class of all token mixers, with the properties that hosts, plans, optimizers and conversions read.

    Each keyword of the constructor after ``shape`` is kept as an attribute of its name. ``build`` takes two more, see
    ``_local.py``: ``conv_residual``, and ``locality`` where there are queries and keys.

    Raises:
        ValueError: for what the mixer does not support.
    """

    # the name in errors and in the documentation of models, and the paper
    title = "this token mixer"
    source = ""
    # whether a token sees others at all
    mixes_tokens = True
    # whether tokens must be the whole patch grid, so that none may be dropped
    uses_grid = True
    # whether attention weights can be dropped, and masked or made causal
    supports_dropout = True
    supports_mask = False
    # whether a mask of keys, (B, 1, 1, N), is supported, see ``_masks.py``
    supports_key_mask = False
    # whether tokens may be a sequence of any length without positions on a grid, as in NaFlex models
    takes_sequences = False
    # whether keys may stand for several tokens each: ``forward`` takes what is added to their logits after the layouts
    supports_key_bias = False
    # whether queries and keys can be rotated
    supports_rotary = True
    # whether what patches attend to follows from logits, products of queries and keys, to be biased or scaled
    has_logits = False
    # the defaults of the keywords that all mixers share
    conv_residual = False
    locality = 0.0
    # whether an exported model takes one patch grid only, since its landmarks, rows or groups are fixed by the export
    exports_one_grid = False
    # keywords that are numbers of tokens: two mixers with more than there are patches are the same (``identity.py``)
    token_counts: tuple[str, ...] = ()
    # keywords that need queries on the grid of the keys: a host with other queries leaves them out
    one_grid_keywords: tuple[str, ...] = ("conv_residual",)
    # keywords with which a plan tries the mixer in a trained model; empty: a plan doesn't try it
    candidates: tuple[dict[str, Any], ...] = ()
    # initial values of parameters that a mixer adds to trained softmax attention
    added_init: dict[str, float] = {"conv.weight": 0.0}
    __jit_unused_properties__: tuple[str, ...] = ("counts_passes",)
    # parameters on a patch grid, and how each is moved to another grid
    grid_parameters: dict[str, Callable[[torch.Tensor, Grid], torch.Tensor]] = {}
    # parameters on another scale than weights, with the factor of their learning rate in a transfer
    learning_rates: dict[str, float] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_notrace_module(cls)  # torch.fx must not follow sizes and branches inside

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        if shape.rotary and not self.supports_rotary:
            raise InputError(f"rope: {self.title} has no queries and keys to rotate; allowed is rope=None")
        if shape.dropout > 0 and not self.supports_dropout:
            raise InputError(
                f"attn_drop_rate={shape.dropout}: {self.title} has no attention weights to drop; allowed is 0"
            )
        self.conv_residual = False
        self.locality = 0.0
        self.key_dim = shape.head_dim  # D without the channels of ``locality``
        self.conv: Optional[nn.Module] = None

    @classmethod
    def build(cls, shape: AttentionShape, **keywords: Any) -> Any:
        """The mixer with its own keywords and with those that all mixers share.

        Args:
            conv_residual: add a depthwise 5x5 convolution of the values, of the tokens in a mixer without values.
            locality: what is subtracted from a logit for each squared step between the two patches; 0: nothing.

        Raises:
            ValueError: for a wrong keyword, naming what is allowed, or for what the mixer does not support.
        """
        one_grid = shape.queries.grid == shape.keys.grid
        conv_residual = keywords.pop("conv_residual", cls.conv_residual and one_grid)
        locality = keywords.pop("locality", cls.locality) if cls.has_logits else 0.0
        check_choice("conv_residual", conv_residual, (True, False))
        check_number("locality", locality, 0)
        if conv_residual and not one_grid:
            queries, keys = ("x".join(map(str, layout.grid)) for layout in (shape.queries, shape.keys))
            raise InputError(
                f"conv_residual=True: values of a grid of {keys} can't be added to {queries} queries; allowed is "
                "conv_residual=False or, in a CvT, key_stride=1 or projection='linear'"
            )
        core = cls(widened(shape) if locality else shape, **keywords)
        core.conv_residual = bool(conv_residual)
        core.locality = float(locality)
        core.key_dim = shape.head_dim
        if conv_residual:
            core.conv = DepthwiseResidual(cls.channels_of_values(shape), shape.device, shape.dtype)
            core.supports_mask = False  # neighbours are added, masked or not
            core.supports_key_mask = False
        if conv_residual or locality:  # neighbours and places are those of the whole grid
            core.uses_grid = True
            core.takes_sequences = False
            core.supports_key_bias = False
        return core

    @classmethod
    def takes_merged_tokens(cls, **keywords: Any) -> bool:
        """Whether the mixer that these keywords build may stand where tokens have merged before it."""
        given = dict(conv_residual=cls.conv_residual, locality=cls.locality) | keywords
        return cls.supports_key_bias and not (given["conv_residual"] or given["locality"])

    @classmethod
    def keywords(cls) -> list[str]:
        """The keywords of the mixer, e.g. ``["num_landmarks", "pinv_iterations", ...]``."""
        own = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "shape")]
        return own + ["conv_residual"] + ["locality"] * cls.has_logits

    @staticmethod
    def channels_of_values(shape: AttentionShape) -> int:
        """How many channels ``conv_residual`` convolves."""
        return shape.num_heads * shape.value_dim

    def enhance(self, y: torch.Tensor, v: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Remove the channels of ``locality`` from the output y, and add the convolution of the values v, if any."""
        if self.locality > 0.0:
            y = y[..., : v.shape[-1]]
        return y if self.conv is None else y + self.conv(v, layout)

    def config(self) -> dict[str, Any]:
        """Every keyword with the value in force, as plain values that rebuild this mixer."""
        return {name: getattr(self, name) for name in self.keywords()}

    @property
    def counts_passes(self) -> bool:
        """Whether ``count_pass`` is to be called at the beginning of each forward pass."""
        return False

    def count_pass(self) -> None:
        """Count a forward pass."""

    def before_resampling(self, name: str, weight: torch.Tensor) -> None:
        """See a parameter of ``grid_parameters`` in a checkpoint before it is moved to this mixer's grid."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Take another patch grid permanently: parameters that live on it are resampled, frozen ones stay frozen."""
        for name, resample in self.grid_parameters.items():
            old = getattr(self, name)
            new = resample(old.detach(), grid).clone()
            setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))


def widened(shape: AttentionShape) -> AttentionShape:
    """The shape with the channels of ``locality``, see ``append_channels``."""
    same = shape.value_dim == shape.head_dim
    return shape._replace(head_dim=shape.head_dim + CHANNELS, value_dim=shape.value_dim + CHANNELS * same)


def with_prefix_rows(
    y: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    P: int,
    attn_mask: Optional[torch.Tensor] = None,
    rate: float = 0.0,
) -> torch.Tensor:
    """Outputs of all tokens, (B, h, N, E), from y of the N - P patches: the P prefix tokens attend to all exactly.

    ``rate`` of their attention weights is dropped; ``attn_mask`` (B, 1, 1, N) is added to their logits.
    """
    if P == 0:
        return y
    rows = scaled_dot_product_attention(q[:, :, :P], k, v, attn_mask=attn_mask, dropout_p=rate)
    return torch.cat([rows, y], dim=2)


class AttentionMechanism(Mixer):
    """Attention between projected heads.

    ``forward(q, k, v, queries, keys)``: q (B, h, Nq, D), k (B, h, Nk, D), v (B, h, Nk, E) and their layouts
    -> (B, h, Nq, E). Queries and keys come normalised and rotated. Some mechanisms take more arguments after these:
    with ``needs_tokens``, the tokens of the queries, (B, Nq, C), and ``attn_mask``; with ``supports_mask``,
    ``attn_mask`` and ``is_causal``; otherwise, with ``supports_key_mask``, ``attn_mask`` (B, 1, 1, Nk).
    """

    has_logits = True
    needs_tokens = False
    # whether queries and keys must be the same tokens
    needs_self_attention = False
    # whether such a mechanism takes values of another width
    takes_wide_values = False
    # whether queries and keys of patches have no effect, so that separate projections of them would learn nothing
    uses_values_only = False

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__(shape)
        if self.needs_self_attention and shape.queries != shape.keys:
            raise InputError(
                f"{self.title} needs queries and keys on one grid; here these are {shape.queries.grid} and "
                f"{shape.keys.grid}. A CvT has one by key_stride=1 or projection='linear'"
            )
        if self.needs_self_attention and not self.takes_wide_values and shape.head_dim != shape.value_dim:
            raise InputError(
                f"{self.title} needs values as wide as queries; here they have {shape.value_dim} and {shape.head_dim} "
                "channels a head"
            )
        self.dropout = float(shape.dropout)

    def init_from_inputs(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Initialise weights before training from queries and keys (B, h, N, D) of a trained model, where needed."""

    def localise(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: TokenLayout, keys: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values as the mechanism takes them: with the channels of ``locality``, if it is on."""
        if self.locality == 0.0:
            return q, k, v
        of_queries, of_keys = locality_channels(self.locality, q.shape[3], queries, keys, q)
        return append_channels(q, k, v, of_queries, of_keys)


class TokenMixing(Mixer):
    """Mixing of tokens without queries, keys and values: ``forward(x, layout)``, (B, N, C) -> (B, N, C)."""

    supports_dropout = False
    supports_rotary = False

    @staticmethod
    def channels_of_values(shape: AttentionShape) -> int:
        return shape.dim


class MechanismHost(nn.Module):
    """A module around a mixer, its sub-module ``core``. For attention it projects queries, keys and values."""

    supports_mask: torch.jit.Final[bool]
    supports_key_mask: torch.jit.Final[bool]
    needs_tokens: torch.jit.Final[bool]

    def set_core(self, core: AttentionMechanism) -> None:
        self.core = core
        self.supports_mask = core.supports_mask
        self.supports_key_mask = core.supports_key_mask
        self.needs_tokens = core.needs_tokens

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: TokenLayout,
        keys: TokenLayout,
        tokens: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Call the mechanism with the arguments that it takes, and apply the keywords that all mixers share."""
        q, k, wide = self.core.localise(q, k, v, queries, keys)
        # TorchScript compiles the branch of the constant alone
        if self.needs_tokens:
            y = self.core(q, k, wide, queries, keys, tokens, attn_mask)
        elif self.supports_mask:
            y = self.core(q, k, wide, queries, keys, attn_mask, is_causal)
        elif self.supports_key_mask:
            y = self.core(q, k, wide, queries, keys, attn_mask)
        else:
            y = self.core(q, k, wide, queries, keys)
        return self.core.enhance(y, v, keys)
