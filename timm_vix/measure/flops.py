"""Floating-point operations of what really runs, by torch's own counter; a multiply-add is two.

torch counts matrix products, convolutions and fused attention. Added here: Fourier transforms, at the customary
5 n log2 n operations for n complex and half of that for n real numbers (a transform over several axes: n is their
product), the solution of linear systems, and the fused attention of a CPU where torch is too old to count it.
Element-wise operations and normalisations count nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def transform_flops(shape: tuple[int, ...], dims: list[int], scale: float) -> int:
    """Operations of Fourier transforms of a tensor over some axes: ``scale`` n log2 n for each n numbers."""
    return round(scale * math.prod(shape) * math.log2(max(1, math.prod(shape[dim] for dim in dims))))


# torch's counter hands over shapes instead of tensors
def complex_transform(x: Any, dim: list[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations of a complex transform."""
    return transform_flops(x, dim, 5.0)


def transform_of_real(x: Any, dim: list[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations of a transform of real numbers; half of those of complex ones."""
    return transform_flops(x, dim, 2.5)


def transform_to_real(x: Any, dim: list[int], *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations of a transform whose output is real."""
    return transform_flops(out_shape, dim, 2.5)


def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations of fused attention."""
    return sdpa_flop_count(query, key, value)


def attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Operations of the gradients of fused attention."""
    return sdpa_backward_flop_count(gradient, query, key, value)


def solution(matrix: Any, y: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Operations of the solution of linear systems (..., m, m), (..., m, n) or (..., m) by a triangular factorisation.

    Where one matrix serves several systems, torch factorises it for each.
    """
    m, solved = matrix[-1], out_shape[0]
    vectors = math.prod(solved) // m  # right-hand sides of all systems
    systems = vectors if solved[-1] == m and len(solved) == len(matrix) - 1 else math.prod(solved[:-2])
    return round(systems * 2 / 3 * m**3 + vectors * 2 * m**2)


FORMULAS: dict[Any, Callable[..., int]] = {
    aten._fft_c2c: complex_transform,
    aten._fft_r2c: transform_of_real,
    aten._fft_c2r: transform_to_real,
    aten._linalg_solve_ex: solution,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def counter() -> FlopCounterMode:
    """Context in which everything is counted; then ask its ``get_total_flops()``.

    Example:
        >>> with counter() as flops:
        ...     model(images)
        >>> flops.get_total_flops()
    """
    ours = {operator: formula for operator, formula in FORMULAS.items() if operator not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=ours)


def count_flops(call: Callable[[], Any]) -> int:
    """Operations of what a call runs.

    Example:
        >>> count_flops(lambda: model(images))
    """
    with counter() as flops:
        call()
    return flops.get_total_flops()


def has_fused_attention(counted: FlopCounterMode) -> bool:
    """Whether a fused kernel of ``scaled_dot_product_attention`` was among what was counted, on a CPU or CUDA."""
    return any("scaled_dot_product" in str(operator) for operator in counted.get_flop_counts().get("Global", {}))
