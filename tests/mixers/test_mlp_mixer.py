"""The token MLP against two linear layers over the token axis."""

import math

import pytest
import timm
import torch
from conftest import LAYOUTS, check_equal, rounding, small
from torch import nn


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [0.5, 2, 1 / 32])
def test_equals_two_linear_layers(ratio, layout):
    module = small("mixer", tokens_mlp_ratio=ratio, **LAYOUTS[layout]).double().blocks[0].attn
    hidden, N = int(ratio * 32), module.num_tokens
    state = {name: t.detach() for name, t in module.core.named_parameters()}
    for name in ("read_prefix", "write_prefix"):
        state.setdefault(name, torch.zeros(hidden, 0, dtype=torch.float64))
    state.setdefault("prefix_bias", torch.zeros(1, 0, dtype=torch.float64))
    first, second = nn.Linear(N, hidden).double(), nn.Linear(hidden, N).double()
    first.weight.data = torch.cat([state["read_prefix"], state["read_patches"].flatten(1)], dim=1)
    first.bias.data = state["hidden_bias"]
    second.weight.data = torch.cat([state["write_prefix"], state["write_patches"].flatten(1)], dim=1).T.contiguous()
    second.bias.data = torch.cat([state["prefix_bias"], state["patch_bias"].flatten(1)], dim=1)[0]
    x = torch.randn(2, N, 32, dtype=torch.float64, requires_grad=True)
    theirs = second(nn.functional.gelu(first(x.transpose(1, 2)))).transpose(1, 2)
    check_equal(module(x), theirs, x, rounding(torch.float64))


def test_the_least_ratio_has_the_units_that_it_stands_for():
    """1 / 49 times 49 is a little below 1."""
    core = small("mixer", embed_dim=49, num_heads=1, depth=1, tokens_mlp_ratio=1 / 49).blocks[0].attn.core
    assert len(core.read_patches) == 1


@pytest.mark.parametrize("mixer", ["mixer", "fnet", "nystrom"])
def test_the_residual_convolution_starts_as_torchs(mixer):
    """Uniform within one over the root of its inputs, also where timm starts a model of the meta device anew."""
    model = timm.create_model("vix_nystrom_tiny", mixer=mixer, conv_residual=True, depth=4)
    for _ in range(2):
        weight = torch.cat([block.attn.core.conv.weight for block in model.blocks])
        bound = math.prod(weight.shape[1:]) ** -0.5
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        for parameter in model.parameters():
            parameter.data.fill_(9.0)
        model.init_weights(needs_reset=True)
