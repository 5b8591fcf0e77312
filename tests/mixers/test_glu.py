"""The gated linear unit against its formula, and what a model without token mixing can and can't see."""

import logging

import pytest
import timm
import torch
from conftest import LAYOUTS, check_equal, distance, image, lively, rounding, small
from torch.nn import functional as F

import timm_vix


def normalised(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("ratio", [1, 0.5, 2.5, 1 / 16])
def test_equals_the_formula(ratio):
    module = small("glu", ffn_ratio=ratio).double().blocks[0].attn
    s = module.core.state_dict()
    assert s["gate.weight"].shape == (int(32 * ratio), 32)
    x = torch.randn(2, 36, 32, dtype=torch.float64, requires_grad=True)
    gate = F.gelu(x @ s["gate.weight"].T + s["gate.bias"])
    value = x @ s["value.weight"].T + s["value.bias"]
    gate, value = (normalised(t, s["hidden_norm.weight"], s["hidden_norm.bias"]) for t in (gate, value))
    expected = (gate * value) @ s["out.weight"].T + s["out.bias"]
    check_equal(module(x), expected, x, rounding(torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_sees_another(layout):
    module = small("glu", **LAYOUTS[layout]).blocks[0].attn
    x = torch.randn(1, module.num_tokens, 32)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x).sum(2), x)[0, :, 0].abs().sum(2)
    assert (jacobian > 0).equal(torch.eye(len(jacobian), dtype=torch.bool))


@pytest.mark.parametrize("name", ["vix_glu_tiny", "vix_glu_cifar"])
def test_the_named_models_see_the_image(name, caplog):
    model = lively(timm.create_model(name, depth=1, img_size=32).eval())
    x = image(model)
    assert distance(*model(x).split(1)) > 1e-3
    assert not caplog.records


def test_a_class_token_that_sees_nothing_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        model = small("glu")
        x = image(model)
        assert torch.equal(*model(x).split(1)), "no image makes a difference"
        (line,) = (record.message for record in caplog.records)
        assert "'glu'" in line and "global_pool='token'" in line and "global_pool='avg'" in line
        caplog.clear()
        timm_vix.convert(small("softmax"), "glu")
        assert [record.message for record in caplog.records] == [line]


@pytest.mark.parametrize(
    "mixer, kwargs",
    [("glu", {"global_pool": "avg"}), ("glu", {"layers": [1]}), ("glu", {"layers": {0: "glu", 1: "nystrom"}})],
    ids=str,
)
def test_a_model_that_sees_the_image_is_not_warned_of(mixer, kwargs, caplog):
    model = small(mixer, **kwargs)
    assert distance(*model(image(model)).split(1)) > 1e-6
    assert not caplog.records


@pytest.mark.parametrize("wrong", [0, -1, 1 / 32, "2", float("inf")], ids=repr)
def test_wrong_ratios_are_named(wrong):
    with pytest.raises(ValueError, match=f"ffn_ratio={wrong!r}: expected a finite number of at least 0.0625"):
        small("glu", ffn_ratio=wrong)


def test_the_least_ratio_has_the_units_that_it_stands_for():
    """1 / 49 times 49 is a little below 1."""
    core = small("glu", embed_dim=49, num_heads=1, depth=1, ffn_ratio=2 / 49).blocks[0].attn.core
    assert len(core.gate.weight) == 2
