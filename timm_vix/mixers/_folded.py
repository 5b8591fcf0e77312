"""Attention between all N tokens and a few, without queries, keys or values for all of them.

    softmax(X W_q k^T) v W_o  =  softmax(X (W_q k^T)) (v W_o)        N tokens ask m: 2·N·h·m·C multiplications
    softmax(q (X W_k)^T) X W_v  =  softmax((q W_k^T) X^T) X W_v      m tokens ask N: the same

Both hold exactly, since nothing stands between a projection and the product that follows. They cost less than
projecting first, 2·N·C·(C + m), while h·m < C + m, and are a few large matrix products. A bias of the keys moves all
logits of a query alike, and one of the values passes through, since weights sum to one.

For long sequences training computes the attention weights again for their gradient, as fused softmax attention does:
they are most of what would be kept.

Shapes: x (B, N, C); q, k, v of the few (B, h, m, D); weights as in ``torch.nn.Linear``; A = h·D.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# From so many tokens on, training computes attention weights twice rather than keep them for the gradient: a tenth of
# a step's time for a tenth of its memory.
LONG = 2048


def keep_little(function: Callable[..., torch.Tensor], long: bool, *inputs: Any) -> torch.Tensor:
    """The function of the inputs; of a ``long`` sequence only the inputs are kept for the gradient."""
    if long and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def all_ask_few(
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logit_bias: torch.Tensor,
    weight_q: torch.Tensor,
    bias_q: Optional[torch.Tensor],
    weight_out: torch.Tensor,
    bias_out: Optional[torch.Tensor],
    dropout: float = 0.0,
) -> torch.Tensor:
    """Multi-head attention of every token to m keys, output projection included -> (B, N, C).

    logit_bias broadcasts to (B, h, 1, m); weight_q (A, C); weight_out (C, A); dropout of the attention weights.
    """
    if torch.jit.is_scripting():
        return read_few(x, k, v, logit_bias, weight_q, bias_q, weight_out, bias_out, dropout)
    else:  # noqa: RET505  TorchScript leaves out this branch, but not what follows an if
        return keep_little(
            read_few, x.shape[1] >= LONG, x, k, v, logit_bias, weight_q, bias_q, weight_out, bias_out, dropout
        )


def few_ask_all(
    x: torch.Tensor,
    q: torch.Tensor,
    weight_k: torch.Tensor,
    weight_v: torch.Tensor,
    bias_v: Optional[torch.Tensor],
) -> torch.Tensor:
    """Multi-head attention of m queries to all tokens, before the output projection -> (B, h, m, D)."""
    _, h, _, D = q.shape
    if torch.jit.is_scripting():
        seen = read_all(x, q, weight_k)
    else:
        seen = keep_little(read_all, x.shape[1] >= LONG, x, q, weight_k)
    # not within what is computed again: that ends before its last product, and the one with all tokens is the large one
    y = torch.matmul(seen, weight_v.reshape(h, D, x.shape[2]).transpose(1, 2))
    return y if bias_v is None else y + bias_v.reshape(h, 1, D)


def read_few(
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logit_bias: torch.Tensor,
    weight_q: torch.Tensor,
    bias_q: Optional[torch.Tensor],
    weight_out: torch.Tensor,
    bias_out: Optional[torch.Tensor],
    dropout: float,
) -> torch.Tensor:
    """The work of ``all_ask_few``."""
    B, N, C = x.shape
    _, h, m, D = k.shape
    k = k * D**-0.5
    asked = torch.matmul(k, weight_q.reshape(h, D, C)).reshape(B, h * m, C)
    offset = logit_bias.to(k.dtype)
    if bias_q is not None:
        offset = offset + torch.matmul(k, bias_q.reshape(h, D, 1)).transpose(2, 3)
    offset = offset.expand(B, h, 1, m).reshape(B, 1, h * m)
    weights = torch.baddbmm(offset, x, asked.transpose(1, 2)).reshape(B, N, h, m).softmax(3)
    weights = F.dropout(weights, dropout, dropout > 0.0)
    # (B, h, C, m), and kept with C before m: a product with a transposed matrix is the fast one in half precision
    given = torch.matmul(weight_out.reshape(-1, h, D).transpose(0, 1), v.transpose(2, 3))
    given = given.transpose(1, 2).flatten(2).to(weights.dtype)
    if bias_out is None:
        return torch.bmm(weights.flatten(2), given.transpose(1, 2))
    return torch.baddbmm(bias_out, weights.flatten(2), given.transpose(1, 2))


def read_all(x: torch.Tensor, q: torch.Tensor, weight_k: torch.Tensor) -> torch.Tensor:
    """The tokens as each of the m queries of a head sees them: (B, h, m, C)."""
    B, _, C = x.shape
    _, h, m, D = q.shape
    asking = torch.matmul(q * D**-0.5, weight_k.reshape(h, D, C)).reshape(B, h * m, C)
    weights = torch.matmul(asking, x.transpose(1, 2)).softmax(2)
    return torch.matmul(weights.to(x.dtype), x).reshape(B, h, m, C)
