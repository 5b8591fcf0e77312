"""Fourier mixing against products with the discrete Fourier matrices."""

import numpy as np
import pytest
import torch
from conftest import distance, rounding, small

from timm_vix.mixers.fourier import fourier_mix


def fourier_matrix(n: int) -> np.ndarray:
    return np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n)


@pytest.mark.parametrize("N, C", [(197, 192), (50, 37), (64, 48), (1, 8), (7, 1), (2, 2), (1, 1), (13, 3)])
def test_equals_the_fourier_matrices(N, C):
    x = torch.randn(2, N, C, dtype=torch.float64)
    expected = torch.from_numpy((fourier_matrix(N) @ x.numpy() @ fourier_matrix(C)).real)
    assert distance(fourier_mix(x), expected) < rounding(torch.float64, 10)  # the matrices' own angles are rounded
    assert distance(fourier_mix(x.float()), expected) < rounding(torch.float32)


@pytest.mark.parametrize("N, C", [(197, 192), (50, 37), (7, 1), (2, 2)])
def test_gradient_is_the_same_transform(N, C):
    """The matrices are symmetric, so the adjoint of Re(F_N X F_C) is the map itself."""
    x, weight = torch.randn(2, 1, N, C, requires_grad=True)
    (gradient,) = torch.autograd.grad((fourier_mix(x) * weight).sum(), x)
    expected = torch.from_numpy((fourier_matrix(N) @ weight.detach().double().numpy() @ fourier_matrix(C)).real)
    assert distance(gradient, expected) < rounding(torch.float32)


def test_slot_mixes_all_tokens():
    model = small("fnet", reg_tokens=4)
    x = torch.randn(2, 40, 32)
    expected = torch.from_numpy((fourier_matrix(40) @ x.double().numpy() @ fourier_matrix(32)).real)
    assert distance(model.blocks[0].attn(x), expected) < rounding(torch.float32)
