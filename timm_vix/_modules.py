"""What other code may have done to a module: hooks, adapters, parametrisations, quantisation."""

from typing import Any

import torch
from torch import nn

# weights that can be read and multiplied elsewhere: quantised, sharded and other tensors have classes of their own
PLAIN_TENSORS = (torch.Tensor, nn.Parameter, torch._subclasses.FakeTensor)
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def has_hooks(module: nn.Module, ignored: tuple[type, ...] = ()) -> bool:
    """Is the module called with hooks, as for pruning, or with an overridden forward?

    Args:
        ignored: classes of hooks that don't count.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    if "forward" in module.__dict__:
        return True
    return any(hooks) and any(not isinstance(hook, ignored) for kind in hooks for hook in kind.values())


def is_plain_linear(module: Any) -> bool:
    """Is it a linear layer of floating-point weights, without adapter, parametrisation, quantisation or hook?"""
    return (
        type(module) is nn.Linear
        and type(module.weight) in PLAIN_TENSORS
        and module.weight.dtype in PLAIN_DTYPES
        and not has_hooks(module)
    )
