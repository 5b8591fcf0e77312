"""ReLU attention against its dense matrix of weights."""

import copy

import pytest
import timm
import torch
from conftest import LAYOUTS, check_equal, distance, heads_of, joined, rounding, small
from einops import rearrange
from torch.nn.functional import interpolate

from timm_vix.mixers import MIXERS
from timm_vix.mixers._layout import TokenLayout
from timm_vix.mixers._mechanism import AttentionShape


def dense(module, x: torch.Tensor, positions: torch.Tensor, rope: str | None) -> torch.Tensor:
    """The slot with an N x N matrix of weights, each row divided by its sum; positions (h, H·W, D)."""
    P = module.num_prefix_tokens
    q, k, v = heads_of(module, x)
    if rope is not None:
        layout = TokenLayout(P, module.grid)
        q, k = module.rotate(q, layout, layout.grid), module.rotate(k, layout, layout.grid)
    k = torch.cat([k[:, :, :P], k[:, :, P:] + positions], dim=2)
    weights = torch.einsum("bhid,bhjd->bhij", q.clamp(min=0), k.clamp(min=0))
    y = weights / (weights.sum(3, keepdim=True) + 1e-6) @ v
    local = torch.nn.functional.conv2d(
        rearrange(v[:, :, P:], "b h (r c) d -> b (h d) r c", c=module.grid[1]),
        module.core.conv.weight,
        padding=2,
        groups=32,
    )
    y[:, :, P:] += rearrange(local, "b (h d) r c -> b h (r c) d", h=2)
    return joined(module, y)


@pytest.mark.parametrize("rope", [None, "axial"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(14, 10), (2, 10), (10, 2)], ids=str)
def test_equals_the_dense_matrix(size, layout, rope):
    module = small("relu", rope, img_size=size, **LAYOUTS[layout]).double().blocks[0].attn
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    positions = rearrange(module.core.key_positions, "(h d) r c -> h (r c) d", h=2)
    inputs = (x, module.core.key_positions, module.core.conv.weight, module.qkv.weight)
    check_equal(module(x), dense(module, x, positions, rope), inputs, 1e-12)


@pytest.mark.parametrize("negative", ["queries", "keys"])
def test_a_query_that_meets_no_key_gives_0(negative):
    module = small("relu", conv_residual=False).double().blocks[0].attn
    first = {"queries": 0, "keys": 32}[negative]
    module.qkv.bias.data[first : first + 32] = -1e3
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    y = module(x)
    assert torch.equal(y, module.proj.bias.expand_as(y))
    assert not torch.autograd.grad(y.sum(), x)[0].any()


def test_positions_of_keys_are_interpolated_on_another_grid():
    model = small("relu", img_size=(8, 6)).double()
    module = model.blocks[0].attn
    positions = interpolate(module.core.key_positions[None], (7, 5), mode="bilinear")[0].detach()
    model.set_input_size((14, 10))
    x = torch.randn(2, 36, 32, dtype=torch.float64)
    expected = dense(module, x, rearrange(positions, "(h d) r c -> h (r c) d", h=2), None)
    assert distance(module(x), expected) < 1e-12


def test_fewer_queries_than_keys_and_wider_values():
    queries, keys = TokenLayout(1, (4, 3)), TokenLayout(1, (7, 5))
    core = MIXERS["relu"].build(AttentionShape(32, 2, 8, 12, queries, keys)).double()
    assert core.conv is None  # values of another grid can't be added
    core.key_positions.data.normal_()
    q, k, v = (torch.randn(2, 2, n, d, dtype=torch.float64) for n, d in ((13, 8), (36, 8), (36, 12)))
    positions = rearrange(core.key_positions, "(h d) r c -> h (r c) d", h=2)
    weights = q.relu() @ torch.cat([k[:, :, :1], k[:, :, 1:] + positions], 2).relu().transpose(2, 3)
    assert distance(core(q, k, v, queries, keys), weights @ v / (weights.sum(3, keepdim=True) + 1e-6)) < 1e-12


def test_sums_are_taken_in_float32():
    """A sum over 1,500 keys in bfloat16, whose steps are a hundredth, would stop growing."""
    module = small("relu", img_size=(60, 100)).blocks[0].attn
    x = torch.randn(1, module.num_tokens, 32)
    half = copy.deepcopy(module).bfloat16()
    assert distance(half(x.bfloat16()), module(x)) < 0.02
    assert distance(module(x), module.double()(x.double())) < rounding(torch.float32)


def test_the_published_convolution_is_the_default_and_can_be_left_out():
    arguments = dict(depth=1, device="meta")
    assert timm.create_model("vix_relu_cifar", **arguments).blocks[0].attn.config() == {"conv_residual": True}
    assert timm.create_model("vix_relu_cifar", conv_residual=False, **arguments).blocks[0].attn.core.conv is None
