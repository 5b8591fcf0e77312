"""Wavelet scattering against SciPy's filters and complex arithmetic; perfect reconstruction; the filters' equations."""

import numpy as np
import pytest
import torch
from conftest import LAYOUTS, check_equal, distance, gradients, image, rounding, small
from scipy.ndimage import correlate1d
from torch.nn.functional import interpolate, pad

from timm_vix.mixers import scattering

GRIDS = [(7, 5), (1, 6), (5, 1), (1, 1), (2, 3), (4, 4)]


def taps(response):
    """The symmetric filter with a response, given by its coefficients of powers of t = cos(frequency)."""
    half = np.polynomial.chebyshev.poly2cheb(response) / [1, *[2] * (len(response) - 1)]
    return np.concatenate([half[:0:-1], half])


MIRROR = (-1.0) ** np.arange(4)
LOW = np.polynomial.polynomial.polymul([1, 1], [0.7, -0.2])
LOW_INVERSE = np.polynomial.polynomial.polymul([1, 1], np.array([50, -9, -6]) / 70)
ANALYSIS, SYNTHESIS = (LOW, LOW_INVERSE * MIRROR), (LOW_INVERSE, LOW * MIRROR[:3])


def test_the_equation_of_the_filters_holds():
    products = (np.polynomial.polynomial.polymul(a, b) for a, b in zip(ANALYSIS, SYNTHESIS))
    np.testing.assert_allclose(sum(products), [1, 0, 0, 0, 0, 0], atol=1e-15)
    np.testing.assert_allclose(taps(LOW), [-1 / 20, 1 / 4, 3 / 5, 1 / 4, -1 / 20], atol=1e-15)


def dense(responses, length):
    """Filters as matrices; "reflect" is SciPy's name for half-sample symmetry."""
    return [torch.from_numpy(correlate1d(np.eye(length), taps(r), axis=0, mode="reflect")) for r in responses]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_filter_matrices(length):
    like = torch.empty(0, dtype=torch.float64)
    assert distance(scattering.analysis_matrix(length, like), torch.cat(dense(ANALYSIS, length))) < 1e-14
    assert distance(scattering.synthesis_matrix(length, like), torch.cat(dense(SYNTHESIS, length), dim=1)) < 1e-14


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bands_are_put_together_perfectly(grid):
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    assert distance(scattering.synthesise(scattering.analyse(x)), x) < 1e-14
    assert distance(scattering.from_complex(scattering.to_complex(x), *grid), x) < 1e-14
    assert distance(scattering.synthesise(scattering.analyse(x.float())), x) < rounding(torch.float32)


@pytest.mark.parametrize("layout", ["class", "no_prefix", "registers"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_begins_as_the_identity(grid, layout):
    model = small("scattering", img_size=(2 * grid[0], 2 * grid[1]), **LAYOUTS[layout])
    module = model.blocks[0].attn
    module.core.reset_parameters()
    P = module.num_prefix_tokens
    x = torch.randn(2, module.num_tokens, 32)
    y = module(x)
    assert distance(y[:, P:], x[:, P:]) < rounding(torch.float32)
    if P:
        assert distance(y[:, :P], x[:, :P] + x[:, P:].mean(1, keepdim=True)) < rounding(torch.float32)


def mixed(z, s, blocks):
    """z + W2 ReLU(W1 z + b1) + b2 for complex z (..., C), block by block."""
    parts = []
    for i, part in enumerate(z.chunk(blocks, dim=-1)):
        w1, w2, b1, b2 = (torch.complex(*s[name][:, i]) for name in ("weight1", "weight2", "bias1", "bias2"))
        hidden = part @ w1.T + b1
        parts.append(part + torch.complex(hidden.real.relu(), hidden.imag.relu()) @ w2.T + b2)
    return torch.cat(parts, dim=-1)


def by_matrices(core, x, P, grid, blocks):
    """The mixer by dense filter matrices and quads in a loop: (B, N, C) -> (B, N, C)."""
    (H, W), s = grid, dict(core.named_parameters())
    rows, columns = (dense(ANALYSIS, n) for n in grid)
    back_rows, back_columns = (dense(SYNTHESIS, n) for n in grid)
    patches = x[:, P:].unflatten(1, grid)
    y = 0
    for a in (0, 1):
        for b in (0, 1):
            band = torch.einsum("ij,bjkc,lk->bilc", rows[a], patches, columns[b])
            if a == b == 0:
                band = band * s["low_weight"].permute(1, 2, 0)
            else:
                even = pad(band.movedim(3, 1), (0, W % 2, 0, H % 2), mode="replicate").movedim(1, 3)
                out = torch.zeros_like(even)
                for i in range(0, even.shape[1], 2):
                    for j in range(0, even.shape[2], 2):
                        p, q, r, t = even[:, i, j], even[:, i, j + 1], even[:, i + 1, j], even[:, i + 1, j + 1]
                        one, two = (
                            mixed(torch.complex(real, imaginary) / 2**0.5, s, blocks) / 2**0.5
                            for real, imaginary in ((p - t, q + r), (p + t, q - r))
                        )
                        out[:, i, j], out[:, i + 1, j + 1] = one.real + two.real, two.real - one.real
                        out[:, i, j + 1], out[:, i + 1, j] = one.imag + two.imag, one.imag - two.imag
                band = out[:, :H, :W]
            y = y + torch.einsum("ij,bjkc,lk->bilc", back_rows[a], band, back_columns[b])
    y = y.flatten(1, 2)
    if not P:
        return y
    read = x[:, :P] + s["read_prefix"] * y.mean(1, keepdim=True)
    return torch.cat([read, y + (s["write_prefix"] * x[:, :P]).sum(1, keepdim=True)], dim=1)


@pytest.mark.parametrize("layout, blocks", [("class", 4), ("no_prefix", 1), ("registers", 2)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_dense_filter_matrices(grid, layout, blocks):
    model = small("scattering", img_size=(2 * grid[0], 2 * grid[1]), num_blocks=blocks, **LAYOUTS[layout]).double()
    module = model.blocks[0].attn
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    expected = by_matrices(module.core, x, module.num_prefix_tokens, grid, blocks)
    check_equal(module(x), expected, (x, *module.core.parameters()), 1e-12)


def test_a_patch_sees_six_rows_and_columns_to_each_side():
    module = small("scattering", img_size=32, class_token=False, global_pool="avg").double().blocks[0].attn
    x = torch.randn(1, 16, 16, 32, dtype=torch.float64, requires_grad=True)
    y = module(x.flatten(1, 2)).unflatten(1, (16, 16))
    seen = torch.zeros(16, 16, dtype=torch.bool)
    for i, j in [(7, 7), (7, 8), (8, 7), (8, 8)]:  # each place in a quad
        (gradient,) = torch.autograd.grad(y[0, i, j].sum(), x, retain_graph=True)
        rows, columns = gradient[0].abs().sum(2).nonzero().unbind(1)
        near = torch.maximum((rows - i).abs(), (columns - j).abs())
        assert near.max() == 6
        seen[rows, columns] = True
    assert not seen[0].any() and not seen[:, 15].any() and seen[1:15, 1:15].all()


def test_another_grid_resamples_the_low_weight():
    model = small("scattering")
    weight = model.blocks[0].attn.core.low_weight.detach().clone()
    model.set_input_size((20, 12))
    expected = interpolate(weight.unsqueeze(0), (10, 6), mode="bilinear")[0]
    assert torch.equal(model.blocks[0].attn.core.low_weight, expected)
    assert gradients(model, image(model)).isfinite().all()


@pytest.mark.parametrize("value, allowed", [(5, "a divisor of the 32 channels"), (0, "at least 1"), (2.0, "integer")])
def test_wrong_blocks_are_named(value, allowed):
    with pytest.raises(ValueError, match=f"num_blocks={value}: expected.*{allowed}"):
        small("scattering", num_blocks=value)
