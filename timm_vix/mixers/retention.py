"""Retention: attention that decays with distance, along the rows of the patch grid and then down its columns.

    A^W_ij,c = softmax over c of Q_ij K_ic^T / sqrt(D) + |j - c| log gamma        attention along the row
    A^H_ij,r = softmax over r of Q_ij K_rj^T / sqrt(D) + |i - r| log gamma        attention down the column
    Y_ij = sum_r A^H_ij,r sum_c A^W_rj,c V_rc
    gamma = 1 - 2^-(a + b t / h)                                                  for head t = 0..h-1

Fan et al. 2023 (arXiv 2309.11523), section 3. Cost in N: N^1.5, N·(H + W) for an H x W grid. Both passes together decay
with the Manhattan distance of two patches, |i - r| + |j - c|.

*Names:* ``decay_start`` = a, ``decay_range`` = b. Published: a = 2 with b = 4 in the first two stages and b = 6 in the
others. With the default a = 6 the decay is slow: a patch 14 places away still has a factor of 0.8 or more. So a
trained softmax model keeps more of its accuracy.

*Differs:* the decay is added to the logits, as in the official code; the paper multiplies the weights by it. The paper
has no prefix tokens. Here they are keys in the pass down the columns, without decay. A row stands for several tokens
there, and as the paper's logits don't say for how many, its logit carries the log of

    n_j = sum_c gamma^|j - c|

the number of tokens that the decay leaves of it, W without decay. This is the same for all rows, so it cancels where
there are no prefix tokens. With a mask of keys, or any numbers that are added to their logits, n_rj is a sum over the
row's unmasked tokens, and a masked token's query and key in its column are the means of its row's other tokens. Prefix
tokens attend to all tokens, without decay. The decays don't learn. The paper's depthwise convolution of the values is
not part of this mechanism. Dropout acts on the second pass and on the attention of prefix tokens. Long sequences have
their attention weights computed again for the gradient.

*Speed:* a whole ViT-Ti is 0.77, 1.18, 1.58 and 3.02 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.87, 1.27, 1.57 and 3.90 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D head width.
"""

from typing import Optional

import torch
from torch.nn.functional import dropout

from .._checks import check_number
from . import _fused
from ._gradients import checkpoint_if_long
from ._layout import Grid, TokenLayout
from ._masks import added_in_both_dtypes, is_read, mean_of_read
from ._mechanism import AttentionMechanism, AttentionShape, with_prefix_rows


def log_decay(like: torch.Tensor, num_heads: int, length: int, start: float, span: float) -> torch.Tensor:
    """|i - j| log gamma, (h, n, n) for n = ``length`` places, on the device of ``like`` and in float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    head = torch.arange(num_heads, device=like.device, dtype=dtype)
    place = torch.arange(length, device=like.device, dtype=dtype)
    log_gamma = torch.log1p(-torch.exp2(-start - span * head / num_heads))
    return log_gamma.reshape(-1, 1, 1) * (place.unsqueeze(1) - place).abs()


def retain_in_grid(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_prefix_tokens: int,
    grid: Grid,
    start: float,
    span: float,
    rate: float,
    locality: float,
    key_dim: int,
    mask: Optional[torch.Tensor],
) -> torch.Tensor:
    """Retention of the patches: q, k, v (B, h, N, D), mask (B, 1, 1, N) of keys -> (B, h, H·W, D).

    ``locality`` is already in the products of q and k, by their channels from ``key_dim`` on; here it counts how much
    of a row is left.
    """
    P = num_prefix_tokens
    # one key and value for all columns, (B, h, 1, P, D)
    prefix_k, prefix_v = k[:, :, :P].unsqueeze(2), v[:, :, :P].unsqueeze(2)
    q, k, v = [t[:, :, P:].unflatten(2, grid) for t in (q * q.shape[3] ** -0.5, k, v)]
    along_row = log_decay(q, q.shape[1], grid[1], start, span).unsqueeze(1)
    down_column = log_decay(q, q.shape[1], grid[0], start, span).unsqueeze(1)
    place = torch.arange(grid[1], device=q.device, dtype=along_row.dtype)
    left = along_row - locality * (place.unsqueeze(1) - place).square()  # (h, 1, W, W)
    row_queries, column_keys = q, k
    prefix_bias: Optional[torch.Tensor] = None
    if mask is not None:
        prefix_bias, bias = mask[..., :P].unsqueeze(3), mask[..., P:].unflatten(3, grid).transpose(2, 3)
        along_row, left = along_row + bias, left + bias  # (B, h, H, W, W)
        read = is_read(bias).transpose(3, 4)
        kept = read | (torch.arange(q.shape[4], device=q.device) >= key_dim)  # channels of ``locality`` tell the place
        row_queries, column_keys = [torch.where(kept, t, mean_of_read(t, read, 3)) for t in (q, k)]

    weights = (torch.matmul(row_queries, k.transpose(3, 4)).to(along_row.dtype) + along_row).softmax(4)
    q, k, v = [t.transpose(2, 3) for t in (q, column_keys, torch.matmul(weights.to(v.dtype), v))]

    count = left.logsumexp(-1)  # log n, (h, 1, W) or (B, h, H, W)
    prefix_logits = torch.matmul(q, prefix_k.transpose(3, 4)).to(count.dtype)
    logits = torch.matmul(q, k.transpose(3, 4)).to(count.dtype) + down_column
    if prefix_bias is None:  # the same for all rows, so it may as well be taken from the prefix
        prefix_logits = prefix_logits - count.transpose(1, 2).unsqueeze(3)
    else:
        prefix_logits, logits = prefix_logits + prefix_bias, logits + count.transpose(2, 3).unsqueeze(3)
    weights = torch.cat([prefix_logits, logits], dim=4).softmax(4)
    prefix, rows = dropout(weights.to(v.dtype), rate, rate > 0.0).split([P, grid[0]], dim=4)
    y = torch.matmul(prefix, prefix_v) + torch.matmul(rows, v)
    return y.transpose(2, 3).flatten(2, 3)


class Retention(AttentionMechanism):
    """Retention with Manhattan decay.

    Args:
        decay_start: a, at least 1: a patch one place away counts at least half.
        decay_range: b, at least 0; 0: all heads decay alike.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    title = "retention"
    source = "Fan et al. 2023, arXiv 2309.11523"
    needs_self_attention = True
    supports_key_mask = True
    candidates = ({},)

    def __init__(self, shape: AttentionShape, decay_start: float = 6.0, decay_range: float = 4.0) -> None:
        super().__init__(shape)
        check_number("decay_start", decay_start, 1)
        check_number("decay_range", decay_range, 0)
        self.decay_start = float(decay_start)
        self.decay_range = float(decay_range)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: TokenLayout,
        keys: TokenLayout,
        attn_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        P, grid = keys.num_prefix_tokens, keys.grid
        mask, attn_mask = added_in_both_dtypes(attn_mask, q.dtype)
        start, span = self.decay_start, self.decay_range
        rate = self.dropout if self.training else 0.0
        if torch.jit.is_scripting():
            y = retain_in_grid(q, k, v, P, grid, start, span, rate, self.locality, self.key_dim, mask)
        else:
            long = q.shape[2] >= _fused.LONG
            local = (self.locality, self.key_dim, mask)
            y = checkpoint_if_long(retain_in_grid, long, q, k, v, P, grid, start, span, rate, *local)
        return with_prefix_rows(y, q, k, v, P, attn_mask, rate)
