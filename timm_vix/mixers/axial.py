"""Axial attention with row mass: softmax attention in which each distant row is asked once for each column.

Later.
"""

import torch
from torch.nn.functional import dropout, scaled_dot_product_attention

from .._checks import check_choice, check_integer
from ._fused import checkpoint_if_long
from ._layout import Grid, TokenLayout
from ._mechanism import AttentionMechanism, AttentionShape

# as in ``_windows.py``
LONG = 512


def attend_along_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, strip_width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K^, V^ (A, H, W, ·) and the entropy S (A, H, W) of the rows outside of each token's strip, from (A, H, W, ·)."""
    strip = torch.arange(q.shape[2], device=q.device) // strip_width
    # sums and logarithms in float32; far below every logit, but finite: 0 log 0 is 0
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = torch.matmul(q, k.transpose(2, 3)).to(dtype)
    log_p = logits.masked_fill(strip.unsqueeze(1) == strip, -1e30).log_softmax(3)
    p = log_p.exp()
    entropy = -(p * log_p).sum(3)
    p = p.to(v.dtype)
    return torch.matmul(p, k), torch.matmul(p, v), entropy


def attend_down_strips(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_k: torch.Tensor,
    row_v: torch.Tensor,
    entropy: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    strip_width: int,
    rate: float,
) -> torch.Tensor:
    """Y (A, W, H, E) of whole strips, from (A, W, H, ·) and the prefix tokens (A, P, ·)."""
    A, W, H, _ = q.shape
    n, c = W // strip_width, strip_width
    tokens, values = [
        torch.cat([t.unsqueeze(1).expand(-1, n, -1, -1), u.reshape(A, n, c * H, u.shape[3])], dim=2)
        for t, u in ((prefix_k, k), (prefix_v, v))
    ]
    near = torch.matmul(q.reshape(A, n, c * H, q.shape[3]), tokens.transpose(2, 3))
    far = torch.matmul(q, row_k.transpose(2, 3)) + entropy.unsqueeze(2)
    w = torch.cat([near.to(far.dtype), far.reshape(A, n, c * H, H)], dim=3).softmax(3).to(v.dtype)
    w = dropout(w, rate, rate > 0.0)
    near_w, far_w = w.split([tokens.shape[2], H], dim=3)
    return torch.matmul(near_w, values).reshape(v.shape) + torch.matmul(far_w.reshape(A, W, H, H), row_v)


def attend_in_grid(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_prefix_tokens: int,
    grid: Grid,
    strip_width: int,
    columns_first: bool,
    rate: float,
) -> torch.Tensor:
    """Attention of the patches: q, k, v (B, h, N, ·) -> (B, h, H·W, E)."""
    P = num_prefix_tokens
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    q = q * q.shape[2] ** -0.5
    rows = [t[:, P:].unflatten(1, grid) for t in (q, k, v)]
    if columns_first:
        rows = [t.transpose(1, 2) for t in rows]
    row_k, row_v, entropy = attend_along_rows(rows[0], rows[1], rows[2], strip_width)
    columns = [t.transpose(1, 2) for t in (rows[0], rows[1], rows[2], row_k, row_v, entropy)]
    W = columns[0].shape[1]
    outs: list[torch.Tensor] = []
    whole = W - W % strip_width
    for start, stop, width in ((0, whole, strip_width), (whole, W, W - whole)):
        if stop > start:
            parts = [t[:, start:stop] for t in columns]
            outs.append(
                attend_down_strips(
                    parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], k[:, :P], v[:, :P], width, rate
                )
            )
    y = torch.cat(outs, dim=1)
    if not columns_first:
        y = y.transpose(1, 2)
    return y.flatten(1, 2)


class AxialAttention(AttentionMechanism):
    """Axial attention with row mass."""

    title = "axial attention"
    source = "x"
    needs_self_attention = True
    candidates = ({},)

    def __init__(self, shape: AttentionShape, strip_width: int = 1, first: str = "rows") -> None:
        super().__init__(shape)
        check_integer("strip_width", strip_width, 1)
        check_choice("first", first, ("rows", "columns"))
        self.strip_width = strip_width
        self.first = first

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: TokenLayout, keys: TokenLayout
    ) -> torch.Tensor:
        P, grid = keys.num_prefix_tokens, keys.grid
        columns_first = self.first == "columns"
        rate = self.dropout if self.training else 0.0
        if grid[0 if columns_first else 1] <= self.strip_width:
            return scaled_dot_product_attention(q, k, v, dropout_p=rate)
        if torch.jit.is_scripting():
            y = attend_in_grid(q, k, v, P, grid, self.strip_width, columns_first, rate)
        else:
            y = checkpoint_if_long(
                attend_in_grid, q.shape[2] >= LONG, q, k, v, P, grid, self.strip_width, columns_first, rate
            )
        y = y.unflatten(0, (q.shape[0], q.shape[1]))
        if P > 0:
            y = torch.cat([scaled_dot_product_attention(q[:, :, :P], k, v), y], dim=2)
        return y
