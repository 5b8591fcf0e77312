"""Where sums and exponentials need float32, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch


def is_half(x: torch.Tensor) -> bool:
    """Whether a tensor is of half precision."""
    return x.dtype in (torch.float16, torch.bfloat16)


def dtype_of_products(values: torch.Tensor) -> torch.dtype:
    """The dtype of products with values: theirs, but float32 for float16, whose largest number a sum may exceed."""
    return torch.float32 if values.dtype == torch.float16 else values.dtype


def outside_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast; not for TorchScript, which knows autocast for constant devices only."""
    # the meta device has no autocast to switch off; asking torch which has one would break a compiled graph
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def logits_of_one_key(queries: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The logits of one key (.., 1, D), scaled, in float32 at least: (.., L, 1). Weights of branches depend on them."""
    if is_half(queries):
        return (queries.float() * key.float()).sum(3, keepdim=True)
    return torch.matmul(queries, key.transpose(2, 3))
