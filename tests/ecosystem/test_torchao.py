"""torchao stores weights in eight bits."""

import copy
import io

import pytest
import torch
from conftest import distance
from small_models import KINDS, build

quantization = pytest.importorskip("torchao.quantization", reason="torchao is in the extra 'ecosystem'")
pytestmark = pytest.mark.slow


def dequantized(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the weights that eight bits stand for: steps of 1/127 of each row's largest one."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                step = module.weight.abs().amax(1, keepdim=True) / 127.5
                module.weight.copy_((module.weight / step).round().clamp(-128, 127) * step)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_int8_weights(kind):
    model, x = build(kind), torch.randn(4, 3, 32, 32)
    quantized = copy.deepcopy(model)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    projections = [name for name, module in quantized.named_modules() if type(module) is torch.nn.Linear]
    assert len(projections) >= 9  # of two blocks and the head
    assert all(type(quantized.get_submodule(name).weight) is not torch.nn.Parameter for name in projections)
    assert 0 < distance(quantized(x), model(x)) < 0.05
    assert distance(quantized(x), dequantized(model)(x)) < 0.01
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    again = build(kind)
    again.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(again(x), quantized(x))
