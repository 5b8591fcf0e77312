"""Slots for mechanisms with queries, keys and values: project, rotate, call the mechanism, merge the heads.

Shapes: B images, N = P + H·W tokens, h heads of width D, A = h·D, C channels, m landmarks.
"""

import math
from typing import Any, Optional

import torch
from einops.layers.torch import Rearrange
from timm.layers import apply_rot_embed_cat, register_notrace_module
from torch import nn

from .._modules import is_plain_linear
from ..mixers._layout import Grid, TokenLayout, num_tokens
from ..mixers._mechanism import AttentionMechanism
from ..mixers._resample import table_of_cells
from .slot import MixerSlot


def logit_factor(num_tokens: int, trained_tokens: int) -> float:
    """The factor of the logits: log N / log N_train, and at least 1. It is 1 if ``trained_tokens`` is 0."""
    if trained_tokens == 0:
        return 1.0
    return max(1.0, math.log(num_tokens) / math.log(trained_tokens))


@register_notrace_module
class AttentionSlot(MixerSlot):
    """A slot for a mechanism with queries, keys and values.

    Of the attention's modules it leaves out ``attn_drop``: no N x N attention weights pass through it, and a hook that
    reads them there would never be called.

    Args:
        core: the mechanism.
        attn: timm ``Attention``, ``AttentionRope`` or ``EvaAttention``, or another slot of this kind.
        layout: of the tokens.
        rope: rotary positions shared by the blocks of a model, or None.
    """

    def __init__(
        self, core: AttentionMechanism, attn: nn.Module, layout: TokenLayout, rope: Optional[nn.Module] = None
    ) -> None:
        super().__init__(core, layout)
        self.set_core(core)
        # rotary positions belong to the grid, so a rotated sequence must have its length
        self.uses_grid: torch.jit.Final[bool] = core.uses_grid or rope is not None
        self.num_heads = attn.num_heads
        self.head_dim = attn.head_dim
        self.attn_dim = attn.num_heads * attn.head_dim
        self.qkv = attn.qkv
        self.q_proj: Any = getattr(attn, "q_proj", None)
        self.k_proj: Any = getattr(attn, "k_proj", None)
        self.v_proj: Any = getattr(attn, "v_proj", None)
        # EVA's biases of the joint projection; its keys have none
        self.q_bias = getattr(attn, "q_bias", None)
        self.v_bias = getattr(attn, "v_bias", None)
        self.q_norm = attn.q_norm
        self.k_norm = attn.k_norm
        self.norm = attn.norm
        self.gate = getattr(attn, "gate", None)
        self.proj = attn.proj
        self.proj_drop = attn.proj_drop
        # t of queries, keys and values at once, to heads and back
        self.split_heads = Rearrange("b n (t h d) -> t b h n d", h=self.num_heads, d=self.head_dim)
        self.merge_heads = Rearrange("b h n d -> b n (h d)")
        self.rope = rope
        self.rotate_half = getattr(attn, "rotate_half", False)
        # tokens with which the weights were trained, where logits grow with the log of their number; 0: they don't
        self.trained_tokens = 0

    def init_from_inputs(self, x: torch.Tensor, rope: Optional[torch.Tensor] = None) -> None:
        """Initialise weights of the mechanism before training, from inputs (B, N, C) in a trained model."""
        layout = self.layout_of(x, None, False)
        q, k, v = self.project(x, 0, 3)
        q, k = self.rotate(q, layout, layout.grid, rope), self.rotate(k, layout, layout.grid, rope)
        q, k, _ = self.core.localise(self.scale_queries(q, layout), k, v, layout, layout)
        self.core.init_from_inputs(q, k)

    def bias_of_qkv(self) -> Optional[torch.Tensor]:
        """The bias of the joint projection, (3·A)."""
        if self.q_bias is not None and self.v_bias is not None:
            return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.qkv.bias

    def has_plain_qkv(self) -> bool:
        """Whether rows of the joint projection can be read apart."""
        if torch.jit.is_scripting():
            return True
        return is_plain_linear(self.qkv)

    def project(self, x: torch.Tensor, first: int, last: int) -> list[torch.Tensor]:
        """Project to those of queries (0), keys (1) and values (2) that are in ``range(first, last)``.

        (B, N, C) -> list of (B, h, N, D). Only the needed rows of a plain joint weight are multiplied. Queries and keys
        are normalised.
        """
        start, stop = first * self.attn_dim, last * self.attn_dim
        if self.qkv is None:
            parts: list[torch.Tensor] = []
            if first == 0:
                parts.append(self.q_proj(x))
            if first <= 1 < last:
                parts.append(self.k_proj(x))
            if last == 3:
                parts.append(self.v_proj(x))
            y = torch.cat(parts, dim=2)
        elif last - first < 3 and self.has_plain_qkv():
            bias = self.bias_of_qkv()
            y = nn.functional.linear(x, self.qkv.weight[start:stop], None if bias is None else bias[start:stop])
        else:
            y = self.qkv(x)
            if self.q_bias is not None:
                bias = self.bias_of_qkv()
                assert bias is not None
                y = y + bias
            y = y[..., start:stop]
        out: list[torch.Tensor] = []
        # one gradient for all parts: indexing would fill a tensor of all of them with zeros for each
        for i, part in enumerate(self.split_heads(y).unbind(0), first):
            out.append(self.q_norm(part) if i == 0 else self.k_norm(part) if i == 1 else part)
        return out

    def rotary_table(
        self,
        layout: TokenLayout,
        cells: Grid,
        rope: Optional[torch.Tensor],
        cell_weight: Optional[torch.Tensor] = None,
    ) -> Optional[torch.Tensor]:
        """Sine and cosine for the P prefix tokens and n cells, (P + n, 2·D) or one for each head; None: no positions.

        ``rope`` is the table that the host hands on for its patches, (H·W, 2·D) or one for each head or image, if it
        has one; ``cell_weight`` (B, 1, n, H·W) averages it over the patches of each cell that aren't masked.
        """
        if self.rope is not None:
            return self.rope(layout.grid, cells, cell_weight)
        if rope is not None:
            return table_of_cells(rope, layout.num_prefix_tokens, layout.grid, cells, cell_weight)
        return None

    def rotate(
        self,
        x: torch.Tensor,
        layout: TokenLayout,
        cells: Grid,
        rope: Optional[torch.Tensor] = None,
        cell_weight: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Rotate queries or keys (B, h, P + n, D) by their positions, or by the mean ones of ``cells``."""
        table = self.rotary_table(layout, cells, rope, cell_weight)
        return x if table is None else apply_rot_embed_cat(x, table, half=self.rotate_half).type_as(x)

    def scale_queries(self, q: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Multiply queries or, in their place, keys (B, h, n, D) by ``logit_factor`` of the layout's tokens."""
        factor = logit_factor(num_tokens(layout), self.trained_tokens)
        return q if factor == 1.0 else q * factor

    def merge(self, heads: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Join the heads as timm's attention does: (B, h, N, D) and the slot's input (B, N, C) -> (B, N, C)."""
        y = self.norm(self.merge_heads(heads))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))

    def attend_tokens(
        self,
        x: torch.Tensor,
        layout: TokenLayout,
        attn_mask: Optional[torch.Tensor],
        is_causal: bool,
        rope: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """Project, rotate, call the mechanism and merge: (B, N, C) -> (B, N, C)."""
        q, k, v = self.project(x, 0, 3)
        q, k = self.rotate(q, layout, layout.grid, rope), self.rotate(k, layout, layout.grid, rope)
        return self.merge(self.mix(self.scale_queries(q, layout), k, v, layout, layout, x, attn_mask, is_causal), x)

    def attend(
        self,
        x: torch.Tensor,
        layout: TokenLayout,
        attn_mask: Optional[torch.Tensor],
        is_causal: bool,
        rope: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """The output of the slot: (B, N, C) -> (B, N, C)."""
        return self.attend_tokens(x, layout, attn_mask, is_causal, rope)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
        rope: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        return self.attend(x, self.layout_of(x, attn_mask, is_causal), attn_mask, is_causal, rope)
