"""Atrous attention: softmax attention over windows of the patch grid at several dilations, joined by learned gates.

    W_d(i) = i's window among every d-th row and column of the grid, and the prefix tokens
    Y_i = sum_d g_d(X_i) sum_{j in W_d(i)} e^(s_ij) V_j / Z,   Z = sum_d g_d(X_i) sum_{j in W_d(i)} e^(s_ij)
    s_ij = Q_i K_j^T / sqrt(D) - [j = i or j a prefix token] log n,   g = n softmax(X G^T + b)    n dilations

Cost in N: linear, N·n·w^2 for windows of w x w. After ACC-ViT (Ibtehaz et al. 2024, arXiv 2403.04200): branches at
several dilations, exact attention in windows, fused by gates.

*Names:* ``dilations`` = the d, ``window_size`` = the largest w; ``gate_weight``, ``gate_bias`` = G, b, for each head.

*Differs:* ACC-ViT averages the branches' outputs by their gates. Here a gate multiplies exponentials: the branches are
one softmax, in which a window without a matching key weighs little. Gates start at 1, and what all windows hold, the
token itself and the prefix, counts once (log n). A window's normaliser is read off its attention: an extra key, the
mean of the window's keys, has the value 1 in a channel of its own, and its share of the attention gives the sum of all
exponentials. That share can be below float16's smallest number, so there windows are computed in float32; where a logit
is more than 85 above its window's mean, it is below float32's, and the window counts for less. Windows are equal and
the fewest of at most w a side, so that little is padded; padding is masked. Prefix tokens attend to all tokens. All
branches share queries, keys and values, which are a ViT's.

A mask of keys leaves tokens out of windows, prefix and mean keys. A window without an unmasked patch has the mean of
the prefix tokens' keys. A patch gets 0 if none of its windows has an unmasked key.

*Speed:* a whole ViT-Ti is 0.58, 0.83, 0.96 and 2.46 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.62, 0.89, 1.10 and 2.91 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D head width, A = B·h, G windows of L patches.
"""

from typing import Optional, Union

import torch
from torch import nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from .._checks import check_integer
from ._dilated import axis_layout, check_dilations, from_windows, to_windows
from ._layout import Grid, TokenLayout
from ._masks import added_to_logits, lowest, tokens_read
from ._mean_key import append_prefix_and_mean, mean_key, window_bias
from ._mechanism import AttentionMechanism, AttentionShape, with_prefix_rows
from ._precision import logits_of_one_key, outside_autocast

# Channels added to a head, of which the mean key's share needs one: kernels want a multiple of 8. A default of an
# argument below, since TorchScript reads no global numbers.
EXTRA = 8


def join_windows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Optional[torch.Tensor],
    num_prefix_tokens: int,
    grid: Grid,
    dilations: list[int],
    window_size: int,
    read: Optional[torch.Tensor],
    extra: int = EXTRA,
) -> torch.Tensor:
    """``attend_in_windows`` in a dtype that holds the share of the mean key: with gates not in float16."""
    B, h, N, D = q.shape
    P, scale = num_prefix_tokens, D**-0.5
    q, k, v = [pad(t, (0, extra)).flatten(0, 1) for t in (q[:, :, P:], k, v)]
    mark = pad(torch.ones([1, 1, 1, 1], device=v.device, dtype=v.dtype), (D, extra - 1)).expand(B * h, 1, 1, D + extra)
    real = torch.ones([1, N - P, 1], device=q.device, dtype=q.dtype)
    if read is not None:
        read = read.to(q.dtype).unsqueeze(1).expand(-1, h, -1).reshape(B * h, N, 1)
        real = read[:, P:]
    outs: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    for dilation in dilations:
        rows, columns = axis_layout(grid[0], dilation, window_size), axis_layout(grid[1], dilation, window_size)
        queries, keys, values = [to_windows(t, grid, rows, columns) for t in (q, k[:, P:], v[:, P:])]
        inside = to_windows(real, grid, rows, columns)
        padded = read is not None or inside.shape[1] * inside.shape[2] > N - P
        mean, nothing = mean_key(keys, inside, k[:, :P], read)
        y = scaled_dot_product_attention(
            queries,
            append_prefix_and_mean(keys, k[:, :P], mean),
            append_prefix_and_mean(values, v[:, :P], mark),
            attn_mask=window_bias(inside, P, len(dilations), padded, read),
            scale=scale,
        )
        outs.append(from_windows(y, grid, rows, columns))
        logit = logits_of_one_key(queries, mean * scale)
        if nothing is not None:  # such a branch is left out beside others
            logit = logit.masked_fill(nothing, lowest(logit.dtype))
        logits.append(from_windows(logit, grid, rows, columns))
    y = outs[0]
    if gates is not None:
        # a branch adds up to e^(logit of its mean key) / (that key's share), with the key itself
        dtype = torch.promote_types(y.dtype, torch.float32)
        share = torch.stack([y[..., D] for y in outs], dim=2).to(dtype)
        total = torch.cat(logits, dim=2).to(dtype) - share.clamp(min=1e-37).log()
        weight = torch.softmax(gates.flatten(0, 1).to(dtype) + total, dim=2).to(y.dtype)
        y = y * weight[..., :1]
        for i in range(1, len(outs)):
            y = torch.addcmul(y, outs[i], weight[..., i : i + 1])
    left = 1.0 - y[..., D : D + 1]
    left = left if read is None else torch.where(left > 0.0, left, 1.0)  # the mean of nothing has all of the attention
    return (y[..., :D] / left).reshape(B, h, N - P, D)


def attend_in_windows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Optional[torch.Tensor],
    num_prefix_tokens: int,
    grid: Grid,
    dilations: list[int],
    window_size: int,
    read: Optional[torch.Tensor],
) -> torch.Tensor:
    """Attention of the patches: q, k, v (B, h, N, D) and the gates' logits (B, h, H·W, n) -> (B, h, H·W, D).

    ``read`` (B, N): which tokens are attended to; None: all.
    """
    dtype = v.dtype
    # the gates' dtype is also that of autocast, of which normalised queries and keys know nothing
    half = gates is not None and gates.dtype == torch.float16
    if half:  # the share of the mean key is below float16's smallest number where logits are 17 apart
        q, k, v = q.float(), k.float(), v.float()
    elif gates is not None and gates.dtype == torch.bfloat16:  # or autocast would round the logits of mean keys, too
        q, k = q.to(torch.bfloat16), k.to(torch.bfloat16)
    if not torch.jit.is_scripting() and half:
        with outside_autocast(q.device):
            y = join_windows(q, k, v, gates, num_prefix_tokens, grid, dilations, window_size, read)
    else:
        y = join_windows(q, k, v, gates, num_prefix_tokens, grid, dilations, window_size, read)
    return y.to(dtype)


class AtrousAttention(AttentionMechanism):
    """Atrous attention; its gates are linear functions of the tokens.

    Args:
        dilations: the branches; a list or a string such as "1,2,4". None: 1, 2 and 4.
        window_size: the largest side of a window, in tokens of its branch.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    title = "atrous attention"
    source = "after Ibtehaz et al. 2024, arXiv 2403.04200"
    supports_dropout = False
    supports_key_mask = True
    needs_tokens = True
    needs_self_attention = True
    exports_one_grid = True
    candidates = ({}, {"dilations": [1], "window_size": 14})  # the second is exact attention in windows

    def __init__(
        self,
        shape: AttentionShape,
        dilations: Union[int, str, tuple[int, ...], None] = None,
        window_size: int = 8,
    ) -> None:
        super().__init__(shape)
        self.dilations = check_dilations(dilations)
        check_integer("window_size", window_size, 1)
        self.window_size = window_size
        self.num_heads = shape.num_heads
        num_gates = shape.num_heads * len(self.dilations)
        self.gate_weight: Optional[nn.Parameter] = None
        self.gate_bias: Optional[nn.Parameter] = None
        if len(self.dilations) > 1:
            self.gate_weight = shape.parameter(num_gates, shape.dim)
            self.gate_bias = shape.parameter(num_gates)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gate_weight is not None and self.gate_bias is not None:
            nn.init.zeros_(self.gate_weight)
            nn.init.zeros_(self.gate_bias)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: TokenLayout,
        keys: TokenLayout,
        tokens: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        P = queries.num_prefix_tokens
        gates = None
        if self.gate_weight is not None:
            gates = linear(tokens[:, P:], self.gate_weight, self.gate_bias)
            gates = gates.unflatten(2, (self.num_heads, len(self.dilations))).transpose(1, 2)
        read: Optional[torch.Tensor] = None
        if attn_mask is not None:
            read = tokens_read(attn_mask, q.shape[0])
            attn_mask = added_to_logits(attn_mask, q.dtype)
        y = attend_in_windows(q, k, v, gates, P, queries.grid, self.dilations, self.window_size, read)
        return with_prefix_rows(y, q, k, v, P, attn_mask)
