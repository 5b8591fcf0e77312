"""Solve (A^T A + r I) x = y for small matrices A whose rows sum to one: Nyström attention's values of its landmarks.

A CPU has LAPACK. Elsewhere, and in compiled or exported models, the inverse comes from Newton's iteration, which takes
matrix products only.
"""

from typing import Any

import torch


def newton_step(M: torch.Tensor, Z: torch.Tensor, eye: torch.Tensor) -> torch.Tensor:
    """Z (2 I - M Z), whose distance to the inverse is the square of that of Z."""
    return torch.bmm(Z, torch.baddbmm(2.0 * eye, M, Z, alpha=-1.0))


def newton_inverse(M: torch.Tensor, lowest: float, iterations: int) -> torch.Tensor:
    """M^-1 by Newton's iteration Z <- a Z (2 I - a M Z): (n, m, m), symmetric with eigenvalues from ``lowest`` on.

    The eigenvalues of M Z lie in [low, 1]; a = 2 / (1 + low) is the scale that lifts the lowest one most (Pan &
    Schreiber 1991, "An improved Newton iteration for the generalized inverse of a matrix", section 4). A step takes low
    to 4 low / (1 + low)^2. So step i has a = 1 + 1 / cosh(2^i p), where p = 2 artanh(sqrt(low)) at first.
    """
    eye = torch.eye(M.shape[1], device=M.device, dtype=M.dtype)
    with torch.no_grad():
        norm = M.abs().sum(2, keepdim=True).amax(1, keepdim=True)
        # with a ridge near zero the lowest eigenvalue is unknown, and this one is as good as any
        low = (max(lowest, 1e-3) / norm).clamp(max=1.0)
        Z = eye / norm
        # not from step to step: torch.compile writes such a recursion out as a tree, which took it minutes
        p = 2.0 * torch.atanh(low.sqrt())
        for i in range(iterations - 1):
            if i > 0:
                Z = newton_step(M, Z, eye)
            Z = (1.0 + 1.0 / torch.cosh(2.0**i * p)) * Z
    # The inverse is a fixed point of a step: the last two steps have its derivatives up to the third order, and earlier
    # ones need not be kept for the gradient.
    if iterations > 1:
        Z = newton_step(M, Z, eye)
    return newton_step(M, Z, eye)


class Inverse(torch.autograd.Function):
    """``newton_inverse`` with the derivative of an inverse, -Z dM Z, to any order; no step of the iteration is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(M: torch.Tensor, lowest: float, iterations: int) -> torch.Tensor:
        return newton_inverse(M, lowest, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        # Z is this function's own output, so that a gradient of the gradient comes back here
        (Z,) = ctx.saved_tensors
        transposed = Z.transpose(1, 2)
        return -torch.bmm(torch.bmm(transposed, gradient), transposed), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *rest: Any) -> torch.Tensor:
        (Z,) = ctx.saved_tensors
        return -torch.bmm(torch.bmm(Z, tangent), Z)


def ridge_solve(A: torch.Tensor, y: torch.Tensor, ridge: float, iterations: int) -> torch.Tensor:
    """(A^T A + ridge I)^-1 y: (B, h, m, m), (B, h, m, n) -> (B, h, m, n)."""
    B, h, m, _ = A.shape
    A, y = A.reshape(B * h, m, m), y.reshape(B * h, m, y.shape[3])
    eye = torch.eye(m, device=A.device, dtype=A.dtype)
    # rounding can make the lowest eigenvalue of A^T A negative, and the iteration would blow it up
    ridge = max(ridge, m * (2.2e-16 if A.dtype == torch.float64 else 1.2e-7))
    M = torch.baddbmm(ridge * eye, A.transpose(1, 2), A)
    # TorchScript and torch.compile don't take what follows, and ONNX has no solver
    if torch.jit.is_scripting() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        x = torch.bmm(newton_inverse(M, ridge, iterations), y)
    elif M.device.type in ("cpu", "meta"):  # _ex raises nothing, as the steps don't
        x = torch.linalg.solve_ex(M, y)[0]
    else:  # without a gradient the bookkeeping of Inverse would be lost time
        inverse = Inverse.apply if torch.is_grad_enabled() else newton_inverse
        x = torch.bmm(inverse(M, ridge, iterations), y)
    return x.reshape(B, h, m, y.shape[2])
