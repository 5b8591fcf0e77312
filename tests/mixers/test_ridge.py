"""The small linear systems of Nyström attention, against torch.linalg in float64."""

import pytest
import torch
from conftest import condition, distance, rounding

from timm_vix.mixers._ridge import Inverse, newton_inverse, ridge_solve

RIDGE, ITERATIONS = 0.05, 40


def attention_weights(dtype=torch.float64):
    return torch.randn(2, 3, 6, 6, dtype=dtype).mul(2).softmax(3)


def system(A):
    return A.mT @ A + RIDGE * torch.eye(A.shape[-1], dtype=A.dtype)


def solved(A, y):
    return torch.linalg.inv(system(A.double())) @ y.double()


@pytest.mark.parametrize("scripted", [False, True], ids=["LAPACK", "Newton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_solution(dtype, scripted):
    function = torch.jit.script(ridge_solve) if scripted else ridge_solve
    A, y = attention_weights(dtype), torch.randn(2, 3, 6, 4, dtype=dtype)
    known = condition(lambda a, b: solved(a, b), A, y)
    assert distance(function(A, y, RIDGE, ITERATIONS), solved(A, y)) < rounding(dtype, known)


@pytest.mark.parametrize("inverse", [newton_inverse, Inverse.apply, torch.jit.script(newton_inverse)])
def test_inverse_and_its_derivatives(inverse):
    """Also of the function that accelerators use in training, which keeps no step of the iteration."""
    M = system(attention_weights()).flatten(0, 1)
    v = torch.randn_like(M)
    found = []
    for function in (torch.linalg.inv, lambda m: inverse(m, RIDGE, ITERATIONS)):
        at = M.clone().requires_grad_()
        Z = function(at)
        (gradient,) = torch.autograd.grad(Z.pow(2).sum(), at, create_graph=True)
        found.append([Z, gradient, torch.autograd.grad((gradient * v).sum(), at)[0]])
    for mine, wanted in zip(*reversed(found)):
        assert distance(mine, wanted) < 1e-6


def test_inverse_under_vmap_and_forward_derivatives():
    M = system(attention_weights()).flatten(0, 1)
    tangent = torch.randn_like(M)
    tangent = tangent + tangent.mT

    def inverse(m):
        return Inverse.apply(m, RIDGE, ITERATIONS)

    assert distance(torch.vmap(inverse)(M[:, None]), torch.linalg.inv(M)[:, None]) < 1e-10
    _, moved = torch.func.jvp(inverse, (M,), (tangent,))
    Z = torch.linalg.inv(M)
    assert distance(moved, -Z @ tangent @ Z) < 1e-10


@pytest.mark.parametrize("lowest", [1e-3, 0.05, 1.0])
def test_the_scale_of_a_step_lifts_the_lowest_eigenvalue_most(lowest):
    """The scales that Pan and Schreiber's section 4 gives from step to step, here on eigenvalues themselves."""
    eigenvalues = torch.linspace(lowest, 1.0, 6, dtype=torch.float64)
    steps, low, error = 6, lowest, eigenvalues.clone()
    for step in range(steps):
        scale = 2.0 / (1.0 + low) if step < steps - 1 else 1.0  # the last step is plain
        error, low = (error * scale) * (2.0 - error * scale), scale * low * (2.0 - scale * low)
    found = newton_inverse(torch.diag(eigenvalues)[None], lowest, steps)[0]
    assert distance(found.diagonal() * eigenvalues, error) < 1e-10


@pytest.mark.slow
def test_compiles_however_many_steps():
    """A recursion of numbers is written out as a tree by torch.compile: with so many steps it would never end."""
    M = system(attention_weights(torch.float32)).flatten(0, 1)
    compiled = torch.compile(lambda m: newton_inverse(m, RIDGE, 12))
    assert distance(compiled(M), torch.linalg.inv(M.double())) < rounding(torch.float32, condition(torch.linalg.inv, M))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_a_ridge_a_singular_matrix_gives_numbers(dtype):
    A = torch.full((1, 1, 8, 8), 1 / 8, dtype=dtype)
    y = torch.randn(1, 1, 8, 3, dtype=dtype)
    x = ridge_solve(A, A.mT @ y, 0.0, ITERATIONS)
    assert x.isfinite().all()
    assert distance(A @ x, A @ torch.linalg.pinv(A) @ y) < 0.1
