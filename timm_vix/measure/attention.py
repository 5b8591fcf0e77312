"""Softmax attention without fused kernels, in every model that calls ``scaled_dot_product_attention``."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def unfused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Optional[torch.Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` as two matrix products with a softmax between them.

    This is how timm's ``Attention`` computes it with ``fused_attn=False``. torch's own fallback, ``SDPBackend.MATH``,
    is slower: it looks each row over for a mask that hides the whole of it, and computes bfloat16 in float32. And
    ``torch.compile`` replaces it by a fused kernel.

    Args:
        query: (.., Nq, D).
        key: (.., Nk, D).
        value: (.., Nk, E).
        attn_mask: (.., Nq, Nk), added to the logits; a boolean one is True where a query attends to a key.

    Returns:
        (.., Nq, E).
    """
    logits = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if hidden else logits + attn_mask
    weights = logits.softmax(dim=-1)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value


class UnfusedAttention(TorchFunctionMode):
    """Context in which ``scaled_dot_product_attention`` is ``unfused_attention``, compiled or not.

    Example:
        >>> with UnfusedAttention():
        ...     logits = model(images)
    """

    def __torch_function__(
        self,
        function: Callable,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Optional[dict[str, Any]] = None,
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            function = unfused_attention
        return function(*args, **(kwargs or {}))
