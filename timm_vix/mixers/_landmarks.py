"""Attention of all tokens to m landmarks, which are pooled from them: what Nyström attention and Linformer share.

    K~, V~ = landmarks' keys and values                  pooled keys and values, or values fitted to queries as well
    Y = softmax(Q K~^T / sqrt(D) + c) V~                 c: log of the number of tokens that a landmark stands for

The methods here work on projected heads. A ViT can pool before it projects and fuse attention with its projections
(``slots/landmark_slot.py``), with fewer operations. The result is the same unless queries and keys are normalised, or
Linformer's learned averages don't sum to one: then pooled heads have another bias.

Shapes: B images, N = P + H·W tokens, h heads, D width of queries and keys, E of values, m landmarks: the P prefix
tokens and the cells of a coarser grid.
"""

from typing import Optional

import torch
from torch.nn.functional import scaled_dot_product_attention

from .._checks import InputError, check_integer
from ._attention import attention
from ._layout import Grid, TokenLayout, count_bias
from ._masks import MaskedPooling, added_to_logits, landmark_bias, pool_by, tokens_read
from ._mechanism import AttentionMechanism, AttentionShape
from ._windows import landmarks_and_windows, masked_biases, window_biases


class LandmarkAttention(AttentionMechanism):
    """Attention to landmarks.

    Args:
        window_size: side of the windows of the patch grid within which attention is exact; 0: none.
    """

    one_grid_keywords = ("window_size", "conv_residual")
    supports_key_mask = True
    takes_sequences = True
    exports_one_grid = True
    # whether landmarks have queries, whose exact attention decides their values
    needs_queries: torch.jit.Final[bool] = False

    def __init__(self, shape: AttentionShape, window_size: int) -> None:
        super().__init__(shape)
        check_integer("window_size", window_size, 0)
        grids = shape.queries.grid, shape.keys.grid
        queries, keys = ("x".join(map(str, grid)) for grid in grids)
        if window_size and queries != keys:
            raise InputError(
                f"window_size={window_size}: {queries} queries have no windows among {keys} keys; allowed is 0"
            )
        self.window_size = window_size
        if window_size:
            self.takes_sequences = False
        # pooling is the same for all heads, so it may come before the projections; and for queries, keys and values
        self.pools_tokens = True
        self.pools_once = True

    def cells(self, grid: Grid) -> Grid:
        """Rows and columns of the cells over a patch grid."""
        raise NotImplementedError

    def pool(
        self,
        x: torch.Tensor,
        layout: TokenLayout,
        cells: Grid,
        values: bool,
        masked: Optional[MaskedPooling] = None,
    ) -> torch.Tensor:
        """Pool tokens or heads to landmarks: (..., N, C) -> (..., m, C); ``values``: whether they are for values."""
        if masked is not None:
            return pool_by(masked.values if values else masked.keys, x, layout.num_prefix_tokens)
        return self.pool_all(x, layout, cells, values)

    def pool_all(self, x: torch.Tensor, layout: TokenLayout, cells: Grid, values: bool) -> torch.Tensor:
        """``pool`` where no token is masked."""
        raise NotImplementedError

    def pool_masked(self, read: torch.Tensor, layout: TokenLayout, cells: Grid, like: torch.Tensor) -> MaskedPooling:
        """How to pool where only some tokens are read, (B, N)."""
        raise NotImplementedError

    def bias(
        self, like: torch.Tensor, layout: TokenLayout, cells: Grid, masked: Optional[MaskedPooling]
    ) -> torch.Tensor:
        """c of the module's docstring, (B, g, 1, P + m), in the dtype of ``like``."""
        if masked is None:
            return count_bias(like, layout, cells[0] * cells[1])
        return landmark_bias(masked, layout.num_prefix_tokens, like)

    def attend_exactly(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """Attention where each landmark is a token."""
        bias = None if attn_mask is None else added_to_logits(attn_mask, q.dtype)
        rate = self.dropout if self.training else 0.0
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate)

    def fit(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        exact: torch.Tensor,
        bias: torch.Tensor,
        masked: bool = False,
    ) -> torch.Tensor:
        """Values of the landmarks, (B, h, m, E), given the exact attention of their queries, (B, h, m, E).

        ``masked``: landmarks of which nothing is read are masked by the bias.
        """
        return v

    def is_exact(self, layout: TokenLayout) -> bool:
        """Whether each landmark is a single token, so that attention to landmarks is attention to all tokens."""
        return False

    def can_fuse(self) -> bool:
        """Whether keys and values of single tokens aren't needed, so that projections can be fused."""
        return self.window_size == 0 and self.conv is None and self.locality == 0.0

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: TokenLayout,
        keys: TokenLayout,
        attn_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        if self.is_exact(keys):
            return self.attend_exactly(q, k, v, attn_mask)
        cells = self.cells(keys.grid)
        masked: Optional[MaskedPooling] = None
        if attn_mask is not None:
            masked = self.pool_masked(tokens_read(attn_mask, q.shape[0]), keys, cells, q)
        q_m = self.pool(q, queries, cells, False, masked) if self.needs_queries else q
        k_m, v_m = self.pool(k, keys, cells, False, masked), self.pool(v, keys, cells, True, masked)
        return self.attend(q, k, v, q_m, k_m, v_m, keys, masked)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_m: torch.Tensor,
        k_m: torch.Tensor,
        v_m: torch.Tensor,
        keys: TokenLayout,
        masked: Optional[MaskedPooling] = None,
    ) -> torch.Tensor:
        """Attention of all tokens, given the landmarks' own queries, keys and values (B, h, m, ·)."""
        cells = self.cells(keys.grid)
        bias = self.bias(k_m, keys, cells, masked)
        if self.needs_queries:
            token_bias = None if masked is None else added_to_logits(masked.read[:, None, None, :], q.dtype)
            v_m = self.fit(q_m, k_m, v_m, attention(q_m, k, v, token_bias), bias, masked is not None)
        dropout = self.dropout if self.training else 0.0
        if self.window_size == 0:
            return attention(q, k_m, v_m, bias, dropout)
        P, grid = keys.num_prefix_tokens, keys.grid
        size = min(self.window_size, max(grid[0], grid[1]))  # more would be padding
        if masked is None:
            biases = window_biases(q, P, grid, cells, size)
        else:
            biases = masked_biases(masked, q, P, grid, cells, size)
        y = landmarks_and_windows(q[:, :, P:], k[:, :, P:], v[:, :, P:], k_m, v_m, biases, grid, size, dropout)
        if P > 0:
            y = torch.cat([attention(q[:, :, :P], k_m, v_m, bias, dropout), y], dim=2)
        return y
