"""Softmax attention in the way that is fastest: by torch's fused kernel, or by products.

Shapes: q (B, h, L, D), k (B, h, n, D), v (B, h, n, E); a bias of the logits broadcasts to (B, h, L, n).
"""

from typing import Optional

import torch
from torch.nn import functional as F

from ._gradients import may_need_gradients
from ._precision import is_half


def takes_bias(q: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether ``scaled_dot_product_attention`` is fused for these queries and values and a bias of ``dtype``.

    The kernels need values as wide as the queries, and compute no gradient of a bias. Only the CPU's kernel takes a
    bias in float32 with queries of half precision. This isn't used in exported models, which may run on another
    device, nor under autocast, which would round the bias.
    """
    if may_need_gradients() or q.shape[3] != v.shape[3]:
        return False
    same = q.dtype == dtype
    here = same or q.device.type == "cpu"
    if torch.jit.is_scripting():
        return here
    else:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or q.device.type == "meta":
            return same
        return here and not torch.is_autocast_enabled(q.device.type)


def is_half_on_cpu(x: torch.Tensor) -> bool:
    """Whether a tensor is of half precision and on a CPU, whose kernels have ways of their own for it."""
    return x.device.type == "cpu" and is_half(x)


def in_whole_vectors(
    k: torch.Tensor, v: torch.Tensor, bias: Optional[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad keys, values and bias with masked keys to a multiple of 32 keys.

    A CPU's register of 512 bits holds 32 numbers of half precision, and the remainder of a row is slow: softmax over 50
    keys takes up to twice as long as over 64.
    """
    missing = -k.shape[2] % 32
    bias = torch.zeros([1, 1, 1, k.shape[2]], device=k.device, dtype=k.dtype) if bias is None else bias
    bias = F.pad(bias, (0, missing), value=-float("inf"))
    return F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing)), bias


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Optional[torch.Tensor] = None, dropout: float = 0.0
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v for few queries or few keys.

    Fused kernels need values as wide as the keys. With other values ``scaled_dot_product_attention`` also checks
    whether a row is fully masked, which takes a tenth of LeViT's time, so the products are computed here. On a CPU
    the gradient of the fused kernel in half precision takes twice as long as that of the products.
    """
    half_on_cpu = is_half_on_cpu(q)
    if q.shape[3] == v.shape[3] and not (half_on_cpu and may_need_gradients()):
        if half_on_cpu and k.shape[2] < q.shape[2]:
            k, v, bias = in_whole_vectors(k, v, bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    logits = torch.matmul(q * q.shape[3] ** -0.5, k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32))
    weights = torch.softmax(logits if bias is None else logits + bias, dim=3).to(v.dtype)
    return torch.matmul(F.dropout(weights, dropout, dropout > 0.0), v)
