"""Latent attention: exact within a group of patches; patches of other groups are attended to through latents.

The patch grid is cut into groups of s x s patches. Each group g has m latents, pooled from its patches as Nyström's
landmarks are: Q~_l is the mean query of a cell of the group. Softmax attention of a query q to some tokens or latents
needs two functions of q: the log-sum-exp of their logits, log sum_j e^(q K_j^T / sqrt(D) + c_j), and their attended
value. Both are computed at the latent's query. For another query the first is expanded to first order,
q K^T / sqrt(D) + S, where K is the attended key, and the second is kept:

    read:    p_l = softmax_j∈g(Q~_l K_j^T / sqrt(D))                            latents attend to their group's patches
             K^_l, V^_l = sum_j p_lj (K_j, V_j),         S^_l = -sum_j p_lj log p_lj
    global:  r_l = softmax_n∉g(Q~_l K^_n^T / sqrt(D) + S^_n - log m)            latents attend to the other groups'
             K'_l, V'_l = sum_n r_ln (K^_n, V^_n),       S'_l = sum_n r_ln (S^_n - log m - log r_ln)
    write:   Y_i = softmax(Q_i [K_P | K_g | K'_g]^T / sqrt(D) + [0 | 0 | S'_g - log m]) [V_P | V_g | V'_g]

for a patch i of group g, with P the prefix tokens, which attend to all tokens themselves. With L = s^2 patches in a
group, cost in N: N·(L + m) + (N·m/L)^2. On a grid of one group this is softmax attention.

After FIT (Chen & Li 2023, arXiv 2305.12689), whose layers run inside groups, read from a group to its latents, run on
all latents, and write back.

*Names:* ``group_size`` = s, ``latents_per_group`` = m.

*Differs:* FIT's latents are learned tokens, with projections, residuals and feed-forward layers of their own, and live
from layer to layer. Here the three attentions are one layer without parameters. Queries, keys and values are the
host's, and the logit of a latent holds the log-sum-exp of its tokens, so that a trained ViT keeps most of its accuracy.
Latents attend to those of other groups only, and not to prefix tokens: the patches that attend to a latent attend to
their own group and to prefix tokens themselves, so that no token counts twice. Groups are as equal as the grid allows,
and the last ones may be smaller. A cell without patches has no latent; m is the number of latents that a group has.
Dropout acts on the last of the attentions, and on that of prefix tokens. Attention weights of long sequences are
computed again for the gradient.

A mask of keys, or any number that is added to their logits, acts on patches where latents read them and where patches
of their group attend to them. A latent's query is the mean over its cell's unmasked patches, and a cell whose patches
are all masked has no latent. A group whose patches are all masked still reads the others, by latents with the query 0.

*Speed:* a whole ViT-Ti is 0.76, 1.14, 1.56 and 3.07 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.83, 1.06, 1.49 and 4.08 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, h heads, A = B·h, N = P + H·W tokens, D head width, G groups of L patches with m latents each.
"""

from typing import Optional

import torch
from torch.nn.functional import dropout, scaled_dot_product_attention

from .._checks import check_integer
from ._attention import takes_bias
from ._dilated import axis_layout, from_windows, to_windows
from ._gradients import checkpoint_if_long
from ._layout import Grid, TokenLayout, cell_grid
from ._masks import added_in_both_dtypes, is_read, lowest
from ._mechanism import AttentionMechanism, AttentionShape, with_prefix_rows
from ._resample import averages
from ._windows import LONG


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    """Attended keys and values of scaled queries, and S of the module's docstring in the dtype of the bias."""
    weights = (torch.matmul(q, k.transpose(2, 3)).to(bias.dtype) + bias).log_softmax(3)
    p = weights.exp()
    offset = (p * (bias - weights)).sum(3)
    p = p.to(v.dtype)
    return [torch.matmul(p, k), torch.matmul(p, v), offset]


def log_share(exists: torch.Tensor) -> torch.Tensor:
    """-log m for the m latents of a group that exist, 1 in (.., G, m), and far below every logit for others."""
    return lowest(exists.dtype) * (1.0 - exists) - exists.sum(2, keepdim=True).clamp(min=1.0).log()


def pool_groups(
    grid: Grid, group_size: int, latents_per_group: int, added: Optional[torch.Tensor], like: torch.Tensor
) -> list[torch.Tensor]:
    """How latents are pooled from the patches of their groups, in the dtype of ``like``.

    Args:
        added: (A, G, L), what a mask adds to the logits of the patches; None: there is no mask.

    Returns:
        ``near`` (1 or A, G, L), what is added to the logits of a group's own patches; ``weight`` (1 or A, G, m, L),
        which averages the unmasked patches of each latent's cell; and twice (1 or A, G, m) -log m, for latents that are
        attended to, and for latents that patches read: a group whose patches are all masked has the latter only.
    """
    rows, columns = axis_layout(grid[0], 1, group_size), axis_layout(grid[1], 1, group_size)
    # which places of a group are patches, (1, G, L), and the weights that sum them in cells, (m, L)
    ones = torch.ones([1, grid[0] * grid[1], 1], device=like.device, dtype=like.dtype)
    inside = to_windows(ones, grid, rows, columns)[..., 0]
    cells = cell_grid(latents_per_group, (rows[1], columns[1]))
    rows_of, columns_of = averages(rows[1], cells[0], ones), averages(columns[1], cells[1], ones)
    pooled = (rows_of[:, None, :, None] * columns_of[None, :, None, :]).flatten(2).flatten(0, 1)
    near = lowest(like.dtype) * (1.0 - inside)
    whole = torch.matmul(inside, pooled.transpose(0, 1))  # the share of a cell that is on the grid, (1, G, m)
    share = whole  # and unmasked
    if added is not None:
        near, inside = near + added, inside * is_read(added).to(like.dtype)
        share = torch.matmul(inside, pooled.transpose(0, 1))
    exists = (share > 0).to(like.dtype)
    weight = pooled * inside.unsqueeze(2) / share.unsqueeze(3).clamp(min=1e-6)
    once = log_share(exists)
    read = once
    if added is not None:
        read = torch.where(exists.sum(2, keepdim=True) > 0, once, log_share((whole > 0).to(like.dtype)))
    return [near, weight, once, read]


def attend_to_other_groups(
    latents: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mass: torch.Tensor
) -> list[torch.Tensor]:
    """K', V' (A, G, m, D) and S' (A, G, m) of the module's docstring, from S^ - log m, ``mass`` (A, G, m)."""
    A, G, m, D = latents.shape
    group = torch.arange(G, device=latents.device).repeat_interleave(m)
    own = (group.unsqueeze(1) == group).to(mass.dtype)
    bias = lowest(mass.dtype) * own + mass.reshape(A, 1, 1, G * m)
    q, k, v = latents.reshape(A, 1, G * m, D), k.reshape(A, 1, G * m, D), v.reshape(A, 1, G * m, D)
    k, v, mass = attend(q, k, v, bias)
    return [k.reshape(A, G, m, D), v.reshape(A, G, m, D), mass.reshape(A, G, m)]


def attend_through_latents(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_prefix_tokens: int,
    grid: Grid,
    group_size: int,
    latents_per_group: int,
    rate: float,
    mask: Optional[torch.Tensor],
) -> torch.Tensor:
    """Attention of the patches: q, k, v (B, h, N, D), mask (B, 1, 1, N) of keys -> (B, h, H·W, D)."""
    B, h, P, D = q.shape[0], q.shape[1], num_prefix_tokens, q.shape[3]
    rows, columns = axis_layout(grid[0], 1, group_size), axis_layout(grid[1], 1, group_size)
    prefix_k, prefix_v = k[:, :, :P].flatten(0, 1).unsqueeze(1), v[:, :, :P].flatten(0, 1).unsqueeze(1)
    q, k, v = [to_windows(t[:, :, P:].flatten(0, 1), grid, rows, columns) for t in (q * D**-0.5, k, v)]
    A, G = q.shape[0], q.shape[1]
    # sums and logarithms in float32
    like = torch.empty([0], device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    prefix = torch.zeros([A, 1, P], device=q.device, dtype=like.dtype)
    of_patches: Optional[torch.Tensor] = None
    if mask is not None:
        added = mask.expand(B, h, 1, -1).reshape(A, -1, 1)
        prefix, of_patches = added[:, :P].transpose(1, 2), to_windows(added[:, P:], grid, rows, columns)[..., 0]
    near, weight, once, read = pool_groups(grid, group_size, latents_per_group, of_patches, like)
    latents = torch.matmul(weight.to(q.dtype), q)

    latent_k, latent_v, mass = attend(latents, k, v, near.unsqueeze(2))  # read
    latent_k, latent_v, mass = attend_to_other_groups(latents, latent_k, latent_v, mass + once)  # global
    k = torch.cat([prefix_k.expand(-1, G, -1, -1), k, latent_k], dim=2)  # write
    v = torch.cat([prefix_v.expand(-1, G, -1, -1), v, latent_v], dim=2)
    bias = torch.cat([prefix.expand(-1, G, -1), near.expand(A, -1, -1), mass + read], dim=2).unsqueeze(2)
    if takes_bias(q, v, like.dtype):
        y = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate, scale=1.0)
    else:
        weights = (torch.matmul(q, k.transpose(2, 3)).to(like.dtype) + bias).softmax(3).to(v.dtype)
        y = torch.matmul(dropout(weights, rate, rate > 0.0), v)
    return from_windows(y, grid, rows, columns).reshape(B, h, grid[0] * grid[1], D)


class LatentAttention(AttentionMechanism):
    """Attention in groups, and through their latents.

    Args:
        group_size: the largest side of a group, in patches.
        latents_per_group: latents of a group; the largest number, at most this and that of its patches, that lies
            evenly over it is taken (``cell_grid``).

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    title = "latent attention"
    source = "after Chen & Li 2023, arXiv 2305.12689"
    needs_self_attention = True
    supports_key_mask = True
    exports_one_grid = True
    candidates = ({}, {"group_size": 4})

    def __init__(self, shape: AttentionShape, group_size: int = 8, latents_per_group: int = 4) -> None:
        super().__init__(shape)
        check_integer("group_size", group_size, 1)
        check_integer("latents_per_group", latents_per_group, 1)
        self.group_size = group_size
        self.latents_per_group = latents_per_group

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: TokenLayout,
        keys: TokenLayout,
        attn_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        P, grid, size, m = keys.num_prefix_tokens, keys.grid, self.group_size, self.latents_per_group
        mask, attn_mask = added_in_both_dtypes(attn_mask, q.dtype)
        rate = self.dropout if self.training else 0.0
        if max(grid[0], grid[1]) <= size:
            return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=rate)
        if torch.jit.is_scripting():
            y = attend_through_latents(q, k, v, P, grid, size, m, rate, mask)
        else:
            y = checkpoint_if_long(attend_through_latents, q.shape[2] >= LONG, q, k, v, P, grid, size, m, rate, mask)
        return with_prefix_rows(y, q, k, v, P, attn_mask, rate)
