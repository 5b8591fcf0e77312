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


def attend_along_rows(q: torch.Tensor, kv: torch.Tensor, strip_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K^ beside V^, (A, H, W, 2·D), and S, (A, H, W), of rows without the strip of the query.

    From queries (A, H, W, D) and keys beside values (A, H, W, 2·D).
    """
    W, D = q.shape[2], q.shape[3]
    # sums and logarithms in float32
    dtype = torch.promote_types(q.dtype, torch.float32)
    strip = torch.arange(W, device=q.device) // strip_width
    # far below every logit, but finite, so that 0 log 0 is 0
    beyond = torch.zeros([W, W], device=q.device, dtype=dtype).masked_fill(strip.unsqueeze(1) == strip, -1e30)
    logits = torch.matmul(q, kv[..., :D].transpose(2, 3)).to(dtype)
    log_p = torch.add(beyond, logits, alpha=D**-0.5).log_softmax(3)
    p = log_p.exp()
    return torch.matmul(p.to(kv.dtype), kv), -(p * log_p).sum(3)


def attend_down_strips(
    q: torch.Tensor,
    kv: torch.Tensor,
    row_kv: torch.Tensor,
    entropy: torch.Tensor,
    prefix_kv: torch.Tensor,
    strip_width: int,
    rate: float,
) -> torch.Tensor:
    """Y, (A, W, H, D), of W columns in strips of equal width.

    From queries (A, W, H, D), keys beside values of these columns, (A, W, H, 2·D), and of the prefix tokens,
    (A, 1, P, 2·D), and what ``attend_along_rows`` gives, (A, W, H, ·).
    """
    A, W, H, D = q.shape
    n, c = W // strip_width, strip_width
    near_kv = torch.cat([prefix_kv.expand(-1, n, -1, -1), kv.reshape(A, n, c * H, 2 * D)], dim=2)
    near = torch.matmul(q.reshape(A, n, c * H, D), near_kv[..., :D].transpose(2, 3))
    far = torch.matmul(q, row_kv[..., :D].transpose(2, 3)).reshape(A, n, c * H, H)
    entropy = entropy.unsqueeze(2).expand(A, W, H, H).reshape(A, n, c * H, H)
    logits = torch.cat([near.to(entropy.dtype)* D**-0.5, torch.add(entropy, far, alpha=D**-0.5)], dim=3)
    weights = dropout(logits.softmax(3).to(kv.dtype), rate, rate > 0.0)
    near, far = weights.split([near_kv.shape[2], H], dim=3)
    y = torch.matmul(near, near_kv[..., D:]).reshape(A, W, H, D)
    return y + torch.matmul(far.reshape(A, W, H, H), row_kv[..., D:])


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
    """Attention of the patches: q, k, v (B, h, N, D) -> (B, h, H·W, D)."""
    B, h, _, D = q.shape
    P, (H, W) = num_prefix_tokens, grid
    q = q[:, :, P:].unflatten(2, (H, W))
    kv = torch.cat([k, v], dim=3)
    prefix_kv, kv = kv[:, :, :P].reshape(B * h, 1, P, 2 * D), kv[:, :, P:].unflatten(2, (H, W))
    if columns_first:
        q, kv = q.transpose(2, 3), kv.transpose(2, 3)
    q, kv = q.flatten(0, 1), kv.flatten(0, 1)
    row_kv, entropy = attend_along_rows(q, kv, strip_width)
    q, kv, row_kv, entropy = q.transpose(1, 2), kv.transpose(1, 2), row_kv.transpose(1, 2), entropy.transpose(1, 2)
    # a last strip may be narrower
    length = q.shape[1]
    whole = length - length % strip_width
    outs: list[torch.Tensor] = []
    for start, stop in ((0, whole), (whole, length)):
        if start < stop:
            s = slice(start, stop)
            width = min(strip_width, stop - start)
            outs.append(attend_down_strips(q[:, s], kv[:, s], row_kv[:, s], entropy[:, s], prefix_kv, width, rate))
    y = torch.cat(outs, dim=1).unflatten(0, (B, h))
    return (y if columns_first else y.transpose(2, 3)).flatten(2, 3)


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
        if P > 0:
            y = torch.cat([scaled_dot_product_attention(q[:, :, :P], k, v), y], dim=2)
        return y
