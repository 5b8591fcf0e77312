"""pytorch-grad-cam draws what a class looks at, on the patch grid of a block."""

import pytest
import torch
from conftest import distance
from small_models import KINDS, build
from torch.nn.functional import interpolate

cam = pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is in the extra 'ecosystem'")
targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
pytestmark = pytest.mark.slow


def to_grid(tokens: torch.Tensor) -> torch.Tensor:
    """The patch tokens as a map: (B, 1 + 16, C) -> (B, C, 4, 4)."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


def to_unit(maps: torch.Tensor) -> torch.Tensor:
    """Each map (B, H, W) from 0 to 1."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_is_that_of_the_paper(kind):
    """Relu of the channels' sum, each weighted by its mean gradient (Selvaraju et al. 2017, arXiv 1610.02391)."""
    model, x = build(kind), torch.randn(2, 3, 32, 32)
    layer = model.blocks[1].norm1
    with cam.GradCAM(model=model, target_layers=[layer], reshape_transform=to_grid) as method:
        found = method(input_tensor=x, targets=[targets.ClassifierOutputTarget(3)] * 2)
    kept = []
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(x)[:, 3].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(logits, kept)
    weights = to_grid(gradient).mean((2, 3), keepdim=True)
    expected = to_unit((weights * to_grid(kept[0])).sum(1).relu())
    enlarged = interpolate(expected[:, None], size=(32, 32), mode="bilinear")[:, 0]
    assert distance(torch.from_numpy(found), to_unit(enlarged)) < 1e-4
