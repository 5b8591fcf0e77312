"""Low-rank adapters of PEFT around the projections of attention."""

import copy
import re

import pytest
import timm
import torch
from conftest import distance, lively
from small_models import KINDS, SIZE, build
from torch import nn

import timm_vix

peft = pytest.importorskip("peft", reason="PEFT is in the extra 'ecosystem'")
pytestmark = pytest.mark.slow

# not "proj" alone, which is a name of the patch embedding, too
PROJECTIONS = r"blocks\.\d+\.attn\.(qkv|proj)"
ADAPTERS = {"lora": {}, "dora": {"use_dora": True}}


def adapted(model: nn.Module, kind: str) -> nn.Module:
    """The model with adapters that are no longer at their initial value, at which they add nothing."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=PROJECTIONS, **ADAPTERS[kind]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model.eval()


def with_deltas(model: nn.Module, adapters: nn.Module) -> nn.Module:
    """A copy of the model whose projections hold what the adapters stand for.

    LoRA is W + (alpha / r)·B·A (Hu et al. 2021, arXiv 2106.09685). DoRA scales each row of that to a learned length
    (Liu et al. 2024, arXiv 2402.09353, equation 5).
    """
    model = copy.deepcopy(model)
    for path, module in model.named_modules():
        if not re.fullmatch(PROJECTIONS, path):
            continue
        layer = adapters.get_submodule(f"base_model.model.{path}")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = module.weight + 6 / 3 * b @ a
        if "default" in layer.lora_magnitude_vector:
            length = layer.lora_magnitude_vector["default"].weight
            weight = length[:, None] * weight / weight.norm(dim=1, keepdim=True)
        with torch.no_grad():
            module.weight.copy_(weight)
    return model


@torch.no_grad()
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_deltas_of_the_weights(kind, adapter, tmp_path):
    plain, x = build(kind).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = adapted(copy.deepcopy(plain), adapter)
    before, expected = plain(x), with_deltas(plain, model)(x)
    assert distance(expected, before) > 0.01
    assert distance(model(x), expected) < 1e-10
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert distance(again(x), expected) < 1e-10
    with model.disable_adapter():
        assert distance(model(x), before) < 1e-10
    merged = model.merge_and_unload()
    assert distance(merged(x), expected) < 1e-10
    assert merged.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_train(kind, adapter):
    model = adapted(build(kind), adapter).train()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@torch.no_grad()
def test_an_adapted_model_converts_and_reverts():
    """A conversion shares the projections with their adapters, and what is reverted has them still."""
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = lively(timm.create_model("vit_tiny_patch16_224", **SIZE).eval().double())
    vit = copy.deepcopy(plain)
    model = adapted(vit, "lora")
    softmax = model(x)
    expected = with_deltas(plain, model)
    for host in (vit, expected):
        timm_vix.convert(host, "nystrom", num_landmarks=4)
    assert distance(model(x), softmax) > 1e-6
    assert distance(model(x), expected(x)) < 1e-10
    timm_vix.revert(vit)
    assert torch.equal(model(x), softmax)
