"""Legendre memory against its recurrence in float64, what it remembers against polynomials, and its prefix tokens."""

import pytest
import torch
from conftest import LAYOUTS, check_equal, distance, heads_of, joined, small
from einops import rearrange
from torch.nn.functional import scaled_dot_product_attention

from timm_vix.mixers.legendre import discretise, impulse_response


def system(order, theta):
    """A and B from the series of the exponential of the system with its input held, [[a, b], [0, 0]]."""
    held = torch.zeros(order + 1, order + 1, dtype=torch.float64)
    for k in range(order):
        for j in range(order):
            held[k, j] = (2 * k + 1) / theta * (-1 if k < j else (-1) ** (k - j + 1))
        held[k, order] = (2 * k + 1) * (-1) ** k / theta
    term = total = torch.eye(order + 1, dtype=torch.float64)
    for n in range(1, 20):
        term = term @ held / 2**10 / n
        total = total + term
    total = torch.linalg.matrix_power(total, 2**10)
    return total[:order, :order], total[:order, order]


def remember(sequence, A, B, readout):
    """What is read of the memory at each token: (..., L), readout (C, order) -> (..., L)."""
    state, out = 0.0 * sequence[..., :1] * B, []
    for t in range(sequence.shape[-1]):
        state = state @ A.T + sequence[..., t, None] * B
        out.append((state.transpose(1, -2) * readout).transpose(1, -2).sum(-1))
    return torch.stack(out, dim=-1)


def by_recurrence(module, x, grid):
    """The slot's output, (B, N, C) -> (B, N, C)."""
    P, core = module.num_prefix_tokens, module.core
    A, B = system(core.order, core.theta)
    q, k, v = heads_of(module, x)
    prefix = scaled_dot_product_attention(q[:, :, :P], k, v)
    rows = rearrange(v[:, :, P:], "b h (y x) d -> b (h d) y x", y=grid[0])
    y = 0
    for axis, image in ((0, rows), (1, rows.transpose(2, 3))):
        forwards, backwards = core.readout[axis].split(core.order, dim=1)
        part = remember(image, A, B, forwards) + remember(image.flip(3), A, B, backwards).flip(3)
        y = y + (part if axis == 0 else part.transpose(2, 3))
    return joined(module, torch.cat([prefix, rearrange(y, "b (h d) y x -> b h (y x) d", h=2)], dim=2))


@pytest.mark.parametrize("options", [{}, {"order": 3, "theta": 5}, {"order": 1, "theta": 20.5}], ids=str)
@pytest.mark.parametrize("layout", ["class", "no_prefix", "registers"])
@pytest.mark.parametrize("size", [(14, 10), (2, 10), (10, 2), (2, 2)], ids=str)
def test_equals_the_recurrence(size, layout, options):
    module = small("legendre", img_size=size, depth=1, **options, **LAYOUTS[layout]).double().blocks[0].attn
    H, W = module.grid
    x = torch.randn(2, module.num_prefix_tokens + H * W, 32, dtype=torch.float64, requires_grad=True)
    expected = by_recurrence(module, x, (H, W))
    check_equal(module(x), expected, (x, *module.parameters()), 1e-12)


def test_another_grid_has_the_same_memory():
    model = small("legendre", depth=1, dynamic_img_size=True).double()
    module, seen = model.blocks[0].attn, []
    module.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    for H, W in ((4, 3), (8, 17)):
        model(torch.randn(1, 3, 2 * H, 2 * W, dtype=torch.float64))
        x, y = seen.pop()
        assert distance(y, by_recurrence(module, x, (H, W))) < 1e-12


def test_the_memory_gives_back_what_it_saw():
    """Legendre polynomials with the coefficients of a slow wave are the wave, all over the window."""
    order, theta, length = 12, 64, 300
    wave = torch.sin(torch.arange(length, dtype=torch.float64) / 12)
    memory = impulse_response(discretise(order, theta), length) @ wave.flip(0)
    at = torch.linspace(0, 1, 33, dtype=torch.float64)  # 0: the last token, 1: theta tokens before
    window = torch.special.legendre_polynomial_p(2 * at - 1, torch.arange(order).unsqueeze(1)).T @ memory
    assert (window - torch.sin((length - 0.5 - theta * at) / 12)).abs().max() < 0.05


@pytest.mark.parametrize("wrong", [{"order": 0}, {"order": 2.5}, {"theta": 0}, {"theta": "long"}], ids=str)
def test_wrong_keywords_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected .* of at least 1"):
        small("legendre", **wrong)
