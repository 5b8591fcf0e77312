"""The slot for attention to landmarks, which pools before it projects, and fuses attention with the projections.

Shapes: B images, N = P + H·W tokens, h heads of width D, A = h·D, C channels, m landmarks.
"""

from typing import Optional

import torch
from timm.layers import register_notrace_module
from torch import nn

from .._modules import is_plain_linear
from ..mixers._attention import in_whole_vectors, is_half_on_cpu
from ..mixers._fused import fused_attend_from, fused_attend_to, is_cheaper
from ..mixers._gradients import may_need_gradients
from ..mixers._landmarks import LandmarkAttention
from ..mixers._layout import Grid, TokenLayout
from ..mixers._local import append_channels, locality_channels
from ..mixers._masks import MaskedPooling, added_to_logits, tokens_read
from ..mixers._precision import is_half
from .attention_slot import AttentionSlot


@register_notrace_module
class LandmarkSlot(AttentionSlot):
    """A slot for attention to landmarks, which pools before it projects, and fuses attention with the projections."""

    def __init__(
        self, core: LandmarkAttention, attn: nn.Module, layout: TokenLayout, rope: Optional[nn.Module] = None
    ) -> None:
        super().__init__(core, attn, layout, rope)
        # nothing acts on heads between the projections and the attention, so they can be multiplied together
        bare = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        self.bare = bare and isinstance(self.norm, nn.Identity) and self.gate is None and rope is None

    def can_fuse_projections(self, num_tokens: int, k_m: torch.Tensor, rope: Optional[torch.Tensor]) -> bool:
        """Whether attention to landmarks (B, h, m, D) can be fused with the projections, and takes less time so."""
        if not (self.bare and rope is None and self.core.can_fuse()):
            return False
        # the gradients are large products, too
        small_are_slow = is_half(k_m) and not may_need_gradients()
        cheaper = is_cheaper(num_tokens, k_m.shape[2], self.num_heads, self.head_dim, small_are_slow)
        if torch.jit.is_scripting():
            return cheaper
        return cheaper and is_plain_linear(self.qkv) and is_plain_linear(self.proj)

    def landmarks(
        self,
        x: torch.Tensor,
        layout: TokenLayout,
        cells: Grid,
        rope: Optional[torch.Tensor],
        masked: Optional[MaskedPooling] = None,
    ) -> list[torch.Tensor]:
        """Queries, keys and values of the landmarks, (B, h, m, D) each.

        Queries are scaled. Where the mechanism needs no queries of landmarks, the keys are returned in their place.
        """
        core = self.core
        if core.pools_tokens and core.pools_once:
            # the mean of a projection is the projection of the mean, for m instead of N tokens
            parts = self.project(core.pool(x, layout, cells, False, masked), 0 if core.needs_queries else 1, 3)
        elif core.pools_tokens:
            parts = self.project(core.pool(x, layout, cells, False, masked), 0 if core.needs_queries else 1, 2)
            parts = parts + self.project(core.pool(x, layout, cells, True, masked), 2, 3)
        else:
            parts = self.project(x, 0 if core.needs_queries else 1, 3)
            parts = [core.pool(part, layout, cells, i == len(parts) - 1, masked) for i, part in enumerate(parts)]
        weight = None if masked is None else masked.averages
        k = self.rotate(parts[len(parts) - 2], layout, cells, rope, weight)
        q = self.scale_queries(self.rotate(parts[0], layout, cells, rope, weight), layout) if core.needs_queries else k
        return [q, k, parts[len(parts) - 1]]

    def attend(
        self,
        x: torch.Tensor,
        layout: TokenLayout,
        attn_mask: Optional[torch.Tensor],
        is_causal: bool,
        rope: Optional[torch.Tensor],
    ) -> torch.Tensor:
        core = self.core
        cells = core.cells(layout.grid)
        if core.is_exact(layout):
            return self.attend_tokens(x, layout, attn_mask, is_causal, rope)
        masked: Optional[MaskedPooling] = None
        if attn_mask is not None:
            masked = core.pool_masked(tokens_read(attn_mask, x.shape[0]), layout, cells, x)
        q_m, k_m, v_m = self.landmarks(x, layout, cells, rope, masked)
        if self.can_fuse_projections(x.shape[1], k_m, rope):
            return self.attend_fused(x, layout, q_m, k_m, v_m, core.bias(k_m, layout, cells, masked), masked)
        if core.needs_queries or not core.can_fuse():
            q, k, v = self.project(x, 0, 3)
            k = self.rotate(k, layout, layout.grid, rope)
        else:  # keys and values of single tokens aren't read
            q = self.project(x, 0, 1)[0]
            k, v = q, q
        q = self.scale_queries(self.rotate(q, layout, layout.grid, rope), layout)
        wide = v
        if core.locality > 0.0:  # the mean logit of a cell's tokens is that of their mean channels
            of_queries, of_keys = locality_channels(core.locality, self.head_dim, layout, layout, q)
            q, k, wide = append_channels(q, k, v, of_queries, of_keys)
            of_queries = core.pool(of_queries, layout, cells, False, masked)
            of_keys = core.pool(of_keys, layout, cells, False, masked)
            q_m, k_m, v_m = append_channels(q_m, k_m, v_m, of_queries, of_keys)
        y = core.attend(q, k, wide, q_m, k_m, v_m, layout, masked)
        return self.merge(core.enhance(y, v, layout), x)

    def attend_fused(
        self,
        x: torch.Tensor,
        layout: TokenLayout,
        q_m: torch.Tensor,
        k_m: torch.Tensor,
        v_m: torch.Tensor,
        bias: torch.Tensor,
        masked: Optional[MaskedPooling],
    ) -> torch.Tensor:
        """The output (B, N, C), without queries, keys and values for all tokens, see ``_fused.py``."""
        A = self.attn_dim
        weight, proj = self.qkv.weight, self.proj
        qkv_bias = self.bias_of_qkv()
        bias_q, bias_v = (None, None) if qkv_bias is None else (qkv_bias[:A], qkv_bias[2 * A :])
        if self.core.needs_queries:
            token_bias = None if masked is None else added_to_logits(masked.read.unsqueeze(1), x.dtype)
            exact = fused_attend_from(x, q_m, weight[A : 2 * A], weight[2 * A :], bias_v, token_bias)
            v_m = self.core.fit(q_m, k_m, v_m, exact, bias, masked is not None)
        if is_half_on_cpu(k_m):
            k_m, v_m, bias = in_whole_vectors(k_m, v_m, bias)
        dropout = self.core.dropout if self.training else 0.0
        k_m = self.scale_queries(k_m, layout)  # in the place of the queries, which aren't computed
        return self.proj_drop(fused_attend_to(x, k_m, v_m, bias, weight[:A], bias_q, proj.weight, proj.bias, dropout))
