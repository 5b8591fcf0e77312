"""Whether a backward pass may follow, and long sequences whose activations it computes again."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def may_need_gradients() -> bool:
    """Whether a backward pass may follow. None follows a trace: torch traces again without gradients to check it."""
    if torch.jit.is_scripting():
        return torch.is_grad_enabled()
    else:
        return torch.is_grad_enabled() and not torch.jit.is_tracing()


def may_compute_again() -> bool:
    """Whether a backward pass may follow that can compute activations again.

    This needs hooks on saved tensors, which transforms of ``torch.func`` refuse. Not for TorchScript.
    """
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return may_need_gradients() and torch._C._functorch.peek_interpreter_stack() is None


def checkpoint_if_long(function: Callable[..., Any], long: bool, *inputs: Any) -> Any:
    """Call the function; for a ``long`` sequence only its inputs are kept for the backward pass."""
    if long and may_compute_again():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
