"""Gated positional attention against its formula with dense matrices, and its start beside trained weights."""

import pytest
import timm
import torch
from conftest import LAYOUTS, check_equal, heads_of, joined, small
from safetensors.torch import save_file

import timm_vix


def head_by_formula(q, k, v, P, grid, gating, weights):
    """One head by the formula, with N x N matrices: q, k, v (N, D) -> (N, D)."""
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).to(q)
    dy, dx = (place.unsqueeze(0) - place.unsqueeze(1)).unbind(2)
    logits = torch.stack([dx, dy, dx**2 + dy**2], 2) @ weights
    gate = 1 / (1 + torch.exp(-gating))
    y = (q @ k.T * q.shape[1] ** -0.5).softmax(1) @ v
    return torch.cat([y[:P], (1 - gate) * y[P:] + gate * logits.softmax(1) @ v[P:]])


@pytest.mark.parametrize("size", [(10, 6), (2, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_dense_formula(layout, size):
    module = small("gpsa", img_size=size, **LAYOUTS[layout]).double().blocks[0].attn
    (H, W), P, core = module.grid, module.num_prefix_tokens, module.core
    x = torch.randn(2, P + H * W, 32, dtype=torch.float64, requires_grad=True)
    q, k, v = heads_of(module, x)
    own = list(zip(core.gating_param, core.pos_proj))
    heads = [
        torch.stack([head_by_formula(q[i, t], k[i, t], v[i, t], P, (H, W), *own[t]) for t in (0, 1)]) for i in (0, 1)
    ]
    expected = joined(module, torch.stack(heads))
    check_equal(module(x), expected, (x, core.gating_param, core.pos_proj), 1e-12)


def convit(**kwargs):
    return timm.create_model("convit_tiny", num_classes=5, depth=1, local_up_to_layer=1, embed_dim=8, **kwargs)


@pytest.mark.parametrize("num_heads, strength", [(1, 1.0), (4, 1.0), (4, 0.5), (9, 1.0), (11, 1.0)])
def test_starts_as_timms_convit(num_heads, strength):
    core = small("gpsa", num_heads=num_heads, embed_dim=4 * num_heads, locality_strength=strength).blocks[0].attn.core
    core.reset_parameters()
    reference = convit(num_heads=num_heads, locality_strength=strength).blocks[0].attn
    local = 9 if num_heads > 9 else num_heads
    assert torch.equal(core.pos_proj[:local], reference.pos_proj.weight[:local])
    assert not core.pos_proj[local:].any() and torch.equal(core.gating_param, reference.gating_param)


def test_a_gate_opens_little_beside_trained_weights(tmp_path):
    options = dict(img_size=32, embed_dim=32, depth=2, num_heads=4, num_classes=1000)
    softmax = timm.create_model("deit_tiny_patch16_224", **options)
    save_file(softmax.state_dict(), tmp_path / "deit.safetensors")
    overlay = {"file": str(tmp_path / "deit.safetensors")}
    loaded = timm.create_model("vix_gpsa_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    timm_vix.convert(softmax, "gpsa")
    for model in (loaded, softmax):
        core = model.blocks[1].attn.core
        assert (core.gating_param.sigmoid() < 0.05).all()
        assert core.pos_proj[0].tolist() == [-1, -1, -1], "the places are those of a new model"


@pytest.mark.parametrize("wrong", [-1, "1", float("inf")], ids=str)
def test_a_wrong_strength_is_named(wrong):
    with pytest.raises(ValueError, match=f"locality_strength={wrong!r}.*at least 0"):
        small("gpsa", locality_strength=wrong)
