"""Compact convolutional transformers: their size against the paper's, their pooling against the formula."""

import pytest
import timm
import torch
from conftest import check_every_mixer, distance, lively
from timm.layers import Attention
from timm.models import save_for_hf

from timm_vix.mixers import MIXERS

MIXER = {"ccn": "nystrom", "ccp": "performer", "cct": "softmax"}
NAMES = [f"{family}_{size}" for family in MIXER for size in ("cifar", "7", "14")]


def test_registered_names():
    assert set(timm.list_models(module="cct")) == set(NAMES)


@pytest.mark.parametrize(
    "name, printed, ours",
    [
        # what the official code prints for 200 classes counts neither positions nor, here, another residual convolution
        ("ccn_cifar", 930_585, 1024 * 128 + 4 * (25 * 128 - 33 * 4)),
        ("ccp_cifar", 931_593, 1024 * 128),
    ],
)
def test_parameters_are_the_papers(name, printed, ours):
    model = timm.create_model(name, num_classes=200, device="meta")
    assert sum(p.numel() for p in model.parameters()) == printed + ours


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_what_is_built(name):
    family, size = name.split("_")
    model = timm.create_model(name, device="meta")
    depth, width, heads, pixels, tokens = {
        "cifar": (4, 128, 4, 32, 1024),
        "7": (7, 256, 4, 224, 196),
        "14": (14, 384, 6, 224, 196),
    }[size]
    assert (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads) == (depth, width, heads)
    assert model.patch_embed.img_size == (pixels, pixels) and model.pos_embed.shape[1] == tokens
    assert model.num_prefix_tokens == 0 and model.cls_token is None
    kind = Attention if MIXER[family] == "softmax" else MIXERS[MIXER[family]]
    assert [type(getattr(block.attn, "core", block.attn)) for block in model.blocks] == [kind] * depth
    assert "arXiv" in timm.model_entrypoint(name).__doc__


@pytest.mark.parametrize("name", [name for name in NAMES if "cifar" in name])
def test_every_name_takes_another_mixer(name):
    check_every_mixer(name)


def small(name="ccn_cifar", **kwargs):
    arguments = dict(img_size=(14, 10), patch_size=2, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    if name == "ccn_cifar":
        arguments["num_landmarks"] = 12
    return lively(timm.create_model(name, **{**arguments, **kwargs}).eval())


def test_sequence_pooling_is_its_formula():
    model = small().double()
    x = torch.randn(3, 3, 14, 10, dtype=torch.float64)
    tokens = model.forward_features(x)
    pooled = []
    for image in tokens:
        scores = torch.stack([token @ model.attn_pool.weight[0] + model.attn_pool.bias[0] for token in image])
        weights = scores.exp() / scores.exp().sum()
        pooled.append(sum(weight * token for weight, token in zip(weights, image)))
    pooled = torch.stack(pooled)
    assert distance(model.forward_head(tokens, pre_logits=True), pooled) < 1e-12
    assert distance(model(x), pooled @ model.head.weight.T + model.head.bias) < 1e-12


@pytest.mark.parametrize("kwargs", [{}, {"block": "parallel"}, {"rope": "axial"}, {"global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("name", ["ccn_cifar", "ccp_cifar", "cct_cifar"])
def test_a_saved_model_comes_back_at_another_size(name, kwargs, tmp_path):
    model = small(name, **kwargs)
    model.set_input_size((10, 18))
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 10, 18)
    assert torch.equal(again(x), model(x))


def test_every_parameter_gets_a_gradient():
    model = small().train()
    model(torch.randn(4, 3, 14, 10)).square().sum().backward()
    # all scores up or down is the same softmax
    dead = [n for n, p in model.named_parameters() if p.grad is None or (p.grad.norm() < 1e-6 and "attn_pool" not in n)]
    assert not dead


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_features": 3}, ["num_features", "nystrom"]),
        ({"patch_size": 3, "img_size": 12}, ["patch_size=3", "1, 2, 4, 8 or 16"]),
        ({"img_size": 13}, ["img_size=13", "patch_size=2"]),
        ({"mixer": "sofmax"}, ["sofmax", "nystrom"]),
    ],
    ids=str,
)
def test_a_wrong_keyword_is_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        small("ccn_cifar", **kwargs)
    assert not [word for word in words if word not in str(error.value)], error.value
