"""Axial attention: exact within the token's row and strip of columns, one summary key for each other row.

Softmax attention of the token in row i and column j is a sum over rows. Let R be the token's strip of w columns. From
the tokens of row r outside of R, the sum needs two functions of the query: the log-sum-exp l_r(q) of their logits, and
their attended value V_r(q),

    l_r(q) = log sum_{c not in R} e^(q K_rc^T / sqrt(D)),     dl_r/dq = K_r(q) / sqrt(D),
    K_r(q), V_r(q) = attended key and value of these tokens.

Both are computed at one query for each row and column, the one that row r itself has in column j; for another query in
that column l_r is expanded to first order, and V_r is kept:

    p_rj = softmax over c not in R of Q_rj K_rc^T / sqrt(D)            attention along the row
    K^_rj, V^_rj = sum_c p_rjc (K_rc, V_rc),     S_rj = -sum_c p_rjc log p_rjc
    l_r(Q_ij) ~ l_r(Q_rj) + (Q_ij - Q_rj) K^_rj^T / sqrt(D) = Q_ij K^_rj^T / sqrt(D) + S_rj
    Y_ij = softmax(Q_ij [K_P | K_R | K^_j]^T / sqrt(D) + [0 | 0 | S_j]) [V_P | V_R | V^_j]

P are the prefix tokens, K_R the keys of the strip in all rows, and K^_j the H attended keys of the rows. The attended
key of a row counts as e^S tokens, where S is the entropy of the attention along the row.

Cost in N: N^1.5, N·(W + (w + 1)·H) for an H x W grid. The token's own row is exact, since it is expanded at its own
query. So a grid of one row gives softmax attention, and so does one of w columns or fewer. Prefix tokens attend to all
tokens.

The two passes, along rows and then along columns, are those of Ho et al. 2019 (arXiv 1912.12180). Fan et al. 2023
(arXiv 2309.11523) decompose attention in the same way. MonarchAttention (Yaras et al. 2025, arXiv 2505.18698) is
related, and fits such factors in several rounds.

*Names:* ``strip_width`` = w; ``first="columns"`` exchanges rows and columns, for N·(H + (w + 1)·W).

*Differs:* in the paper the second pass doesn't use queries, keys and normalisers of the first. Here both passes are an
expansion of softmax attention without parameters, so a model with trained weights keeps most of its accuracy. Dropout
acts on the second pass and on the attention of prefix tokens. Attention weights of long sequences are computed again
for the gradient.

A mask of keys, or any number b_rc that is added to their logits, belongs to l_r: S_rj grows by sum_c p_rjc b_rc. Where
the token of row r in column j is masked, l_r is expanded at the mean query of the row's other tokens.

*Speed:* a whole ViT-Ti is 0.74, 1.12, 1.46 and 2.88 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.82, 1.02, 1.38 and 3.29 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: A images and heads (B·h), N = P + H·W tokens, head width D of queries and keys, E of values.
"""

from typing import Optional

import torch
from torch.nn.functional import dropout, scaled_dot_product_attention

from .._checks import check_choice, check_integer
from ._gradients import checkpoint_if_long
from ._layout import Grid, TokenLayout
from ._masks import added_in_both_dtypes, is_read, lowest, mean_of_read
from ._mechanism import AttentionMechanism, AttentionShape, with_prefix_rows
from ._precision import dtype_of_products

# As in ``_windows.py``: copies of queries, keys and values by rows and by columns would be kept besides the weights.
LONG = 512


def attend_along_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, strip_width: int, key_dim: int, bias: Optional[torch.Tensor]
) -> list[torch.Tensor]:
    """K^, (A, H, W, D), V^, (A, H, W, E), and S, (A, H, W), from scaled queries, keys (.., D) and values (.., E).

    ``bias`` (A, H, W) is added to the logits of the keys. Channels from ``key_dim`` on are those of ``locality``.
    """
    # sums and logarithms in float32
    dtype = torch.promote_types(q.dtype, torch.float32)
    strip = torch.arange(q.shape[2], device=q.device) // strip_width
    own = (strip.unsqueeze(1) == strip).to(dtype)
    if bias is not None:
        read = is_read(bias).unsqueeze(3)
        kept = read | (torch.arange(q.shape[3], device=q.device) >= key_dim)  # channels of ``locality`` tell the place
        q = torch.where(kept, q, mean_of_read(q, read, 2))
    logits = torch.matmul(q, k.transpose(2, 3)).to(dtype)
    logits = logits + lowest(dtype) * own
    if bias is not None:
        logits = logits + bias.unsqueeze(2)
    log_p = logits.log_softmax(3)
    p = log_p.exp()
    entropy = -(p * log_p).sum(3)
    if bias is not None:
        entropy = entropy + (p * bias.unsqueeze(2)).sum(3)
        nothing = logits.amax(3) < 0.1 * lowest(dtype)  # is left outside of the strip
        entropy = entropy.masked_fill(nothing, lowest(dtype))
    p = p.to(v.dtype)
    return [torch.matmul(p, k), torch.matmul(p, v), entropy]


def add_biases(logits: torch.Tensor, biases: list[torch.Tensor]) -> torch.Tensor:
    """Logits (A, n, L, P + L) of n strips with the biases of prefix tokens (A, P) and of patches (A, W, H), if any."""
    if len(biases) == 0:
        return logits
    A, n = logits.shape[:2]
    bias = torch.cat([biases[0].unsqueeze(1).expand(-1, n, -1), biases[1].reshape(A, n, logits.shape[2])], dim=2)
    return logits + bias.unsqueeze(2)


def attend_down_strips(
    columns: list[torch.Tensor], prefix: list[torch.Tensor], strip_width: int, rate: float, biases: list[torch.Tensor]
) -> torch.Tensor:
    """Y, (A, W, H, E), of W columns in strips of equal width.

    Args:
        columns: scaled Q, K, V, K^ and V^ of these columns, (A, W, H, D or E), and S, (A, W, H).
        prefix: K and V of the prefix tokens, (A, P, D or E).
        biases: what is added to the logits of prefix tokens, (A, P), and of these columns, (A, W, H); or none.
    """
    q, k, v, row_k, row_v, entropy = columns
    A, W, H, D = q.shape
    n, c = W // strip_width, strip_width
    k = torch.cat([prefix[0].unsqueeze(1).expand(-1, n, -1, -1), k.reshape(A, n, c * H, D)], dim=2)
    v = torch.cat([prefix[1].unsqueeze(1).expand(-1, n, -1, -1), v.reshape(A, n, c * H, v.shape[3])], dim=2)
    near = add_biases(torch.matmul(q.reshape(A, n, c * H, D), k.transpose(2, 3)).to(entropy.dtype), biases)
    far = torch.matmul(q, row_k.transpose(2, 3)).to(entropy.dtype).add_(entropy.unsqueeze(2))
    # one softmax over both, which are not joined: copies of so many weights would take as long as all products
    top = torch.maximum(near.detach().amax(3).reshape(A, W, H), far.detach().amax(3)).unsqueeze(3)
    near = near.sub_(top.reshape(A, n, c * H, 1)).exp_()
    far = far.sub_(top).exp_()
    total = near.sum(3).reshape(A, W, H).add_(far.sum(3)).unsqueeze(3)
    dtype = dtype_of_products(v)
    near, far = (dropout(weights.to(dtype), rate, rate > 0.0) for weights in (near, far))
    y = torch.matmul(near, v.to(dtype)).reshape(row_v.shape) + torch.matmul(far, row_v.to(dtype))
    return (y / total).to(v.dtype)


def attend_in_grid(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_prefix_tokens: int,
    grid: Grid,
    strip_width: int,
    columns_first: bool,
    rate: float,
    key_dim: int,
    mask: Optional[torch.Tensor],
) -> torch.Tensor:
    """Attention of the patches: q, k (B, h, N, D), v (B, h, N, E), mask (B, 1, 1, N) of keys -> (B, h, H·W, E)."""
    B, h, P = q.shape[0], q.shape[1], num_prefix_tokens
    prefix = [t[:, :, :P].flatten(0, 1) for t in (k, v)]
    rows = [t[:, :, P:].unflatten(2, grid) for t in (q * q.shape[3] ** -0.5, k, v)]
    if columns_first:
        rows = [t.transpose(2, 3) for t in rows]
    # products of many small matrices copy what isn't contiguous, each for itself
    rows = [t.contiguous().flatten(0, 1) for t in rows]
    row_bias: Optional[torch.Tensor] = None
    biases: list[torch.Tensor] = []
    if mask is not None:
        added = mask.expand(B, h, -1, -1).reshape(B * h, -1)
        row_bias = added[:, P:].unflatten(1, grid)
        if columns_first:
            row_bias = row_bias.transpose(1, 2)
        biases = [added[:, :P], row_bias.transpose(1, 2)]
    rows = rows + attend_along_rows(rows[0], rows[1], rows[2], strip_width, key_dim, row_bias)
    columns = [rows.pop(0).transpose(1, 2).contiguous() for _ in range(len(rows))]
    # the last strip may be narrower
    rest = columns[0].shape[1] % strip_width
    whole = columns[0].shape[1] - rest
    some = biases[:1] + [t[:, :whole] for t in biases[1:]]
    y = attend_down_strips([t[:, :whole] for t in columns], prefix, strip_width, rate, some)
    if rest > 0:
        some = biases[:1] + [t[:, whole:] for t in biases[1:]]
        y = torch.cat([y, attend_down_strips([t[:, whole:] for t in columns], prefix, rest, rate, some)], dim=1)
    y = y.unflatten(0, (B, h))
    return (y if columns_first else y.transpose(2, 3)).flatten(2, 3)


class AxialAttention(AttentionMechanism):
    """Axial attention, with one summary key for each row outside of a token's strip.

    Args:
        strip_width: columns of the strip in which each token attends exactly.
        first: "rows" or "columns", along which the first pass runs; with "columns" strips are of rows.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    title = "axial attention"
    source = "after Ho et al. 2019, arXiv 1912.12180"
    needs_self_attention = True
    takes_wide_values = True
    supports_key_mask = True
    exports_one_grid = True
    candidates = ({}, {"strip_width": 4})

    def __init__(self, shape: AttentionShape, strip_width: int = 2, first: str = "rows") -> None:
        super().__init__(shape)
        check_integer("strip_width", strip_width, 1)
        check_choice("first", first, ("rows", "columns"))
        self.strip_width = strip_width
        self.first = first

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
        columns_first = self.first == "columns"
        rate = self.dropout if self.training else 0.0
        if grid[0 if columns_first else 1] <= self.strip_width:
            return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=rate)
        if torch.jit.is_scripting():
            y = attend_in_grid(q, k, v, P, grid, self.strip_width, columns_first, rate, self.key_dim, mask)
        else:
            rest = (self.strip_width, columns_first, rate, self.key_dim, mask)
            y = checkpoint_if_long(attend_in_grid, q.shape[2] >= LONG, q, k, v, P, grid, *rest)
        return with_prefix_rows(y, q, k, v, P, attn_mask, rate)
