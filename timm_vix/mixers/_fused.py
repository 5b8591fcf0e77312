"""Attention between all N tokens and m landmarks, fused with the projections of the N tokens.

    softmax(X W_q k^T) v W_o  =  softmax(X (W_q k^T)) (v W_o)        N queries, m keys: 2·N·h·m·C multiplications
    softmax(q (X W_k)^T) X W_v  =  softmax((q W_k^T) X^T) X W_v      m queries, N keys: the same

Both are exact, since nothing stands between a projection and the product that follows. They cost less than projecting
first, 2·N·C·(C + m), while h·m < C + m and N is much larger than D, since projecting the landmarks takes 2·D·h·m·C
multiplications (``is_cheaper``). A bias of the keys adds the same to all logits of a query. A bias of the values passes
through, since attention weights sum to one.

For long sequences training computes the attention weights again in the backward pass, as fused softmax attention does.
They would be most of the memory.

Shapes: x (B, N, C); q, k, v of the landmarks (B, h, m, D); weights as in ``torch.nn.Linear``; A = h·D.
"""

from typing import Optional

import torch
from torch.nn import functional as F

from ._gradients import checkpoint_if_long

# From so many tokens on, training computes attention weights twice rather than keep them for the gradient: a tenth of
# a step's time for a tenth of its memory.
LONG = 2048


def is_cheaper(num_tokens: int, num_landmarks: int, num_heads: int, head_dim: int, small_are_slow: bool) -> bool:
    """Whether attention to or from landmarks takes less time if it is fused with the projections of the tokens.

    ``small_are_slow``: in half precision matrix units do the large products with the tokens, and an operation of the
    small products with the landmarks takes about 16 times as long as one of these.
    """
    width = num_heads * num_landmarks
    of_landmarks = head_dim * (16 if small_are_slow else 1)
    return width * (num_tokens + of_landmarks) < num_tokens * (num_heads * head_dim + num_landmarks)


def fused_attend_to(
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
    """Multi-head attention of every token to m landmarks, output projection included -> (B, N, C).

    logit_bias broadcasts to (B, h, 1, m); weight_q (A, C); weight_out (C, A); dropout of the attention weights.
    """
    if torch.jit.is_scripting():
        return attend_to(x, k, v, logit_bias, weight_q, bias_q, weight_out, bias_out, dropout)
    else:
        return checkpoint_if_long(
            attend_to, x.shape[1] >= LONG, x, k, v, logit_bias, weight_q, bias_q, weight_out, bias_out, dropout
        )


def fused_attend_from(
    x: torch.Tensor,
    q: torch.Tensor,
    weight_k: torch.Tensor,
    weight_v: torch.Tensor,
    bias_v: Optional[torch.Tensor],
    token_bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Multi-head attention of m queries to all tokens, before the output projection -> (B, h, m, D).

    ``token_bias`` (B, 1, N) is added to the logits of the tokens.
    """
    _, h, _, D = q.shape
    if torch.jit.is_scripting():
        attended = attend_from(x, q, weight_k, token_bias)
    else:
        attended = checkpoint_if_long(attend_from, x.shape[1] >= LONG, x, q, weight_k, token_bias)
    # outside of the checkpoint, which doesn't compute its last product again: this is the large one, with all tokens
    y = torch.matmul(attended, weight_v.reshape(h, D, x.shape[2]).transpose(1, 2))
    return y if bias_v is None else y + bias_v.reshape(h, 1, D)


def attend_to(
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
    """``fused_attend_to`` without checkpointing."""
    B, N, C = x.shape
    _, h, m, D = k.shape
    k = k * D**-0.5
    key_weights = torch.matmul(k, weight_q.reshape(h, D, C)).reshape(B, h * m, C)
    offset = logit_bias.to(k.dtype)
    if bias_q is not None:
        offset = offset + (k * bias_q.reshape(h, 1, D)).sum(3).unsqueeze(2)
    offset = offset.expand(B, h, 1, m).reshape(B, 1, h * m)
    weights = torch.baddbmm(offset, x, key_weights.transpose(1, 2)).reshape(B, N, h, m).softmax(3)
    weights = F.dropout(weights, dropout, dropout > 0.0)
    # (B, h, C, m), and kept with C before m: a product with a transposed matrix is the fast one in half precision
    value_weights = torch.matmul(weight_out.reshape(-1, h, D).transpose(0, 1), v.transpose(2, 3))
    value_weights = value_weights.transpose(1, 2).flatten(2).to(weights.dtype)
    if bias_out is None:
        return torch.bmm(weights.flatten(2), value_weights.transpose(1, 2))
    return torch.baddbmm(bias_out, weights.flatten(2), value_weights.transpose(1, 2))


def attend_from(
    x: torch.Tensor, q: torch.Tensor, weight_k: torch.Tensor, token_bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Attention of m queries to all tokens, before the projection of the values: (B, h, m, C)."""
    B, _, C = x.shape
    _, h, m, D = q.shape
    query_weights = torch.matmul(q * D**-0.5, weight_k.reshape(h, D, C)).reshape(B, h * m, C)
    logits = torch.matmul(query_weights, x.transpose(1, 2))
    weights = (logits if token_bias is None else logits + token_bias).softmax(2)
    return torch.matmul(weights.to(x.dtype), x).reshape(B, h, m, C)
