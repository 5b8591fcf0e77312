"""Captum attributes a class to pixels through the mixers."""

import pytest
import torch
from conftest import distance
from small_models import KINDS, build

attr = pytest.importorskip("captum.attr", reason="Captum is in the extra 'ecosystem'")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_are_complete(kind):
    """Attributions sum to the difference from the baseline (Sundararajan et al. 2017, arXiv 1703.01365, axiom 1)."""
    model, x = build(kind).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    target, baseline = torch.tensor([1, 4]), torch.zeros_like(x)
    attributions = attr.IntegratedGradients(model).attribute(x, baseline, target, n_steps=64, internal_batch_size=64)
    with torch.no_grad():
        change = (model(x) - model(baseline)).gather(1, target[:, None])[:, 0]
    assert change.abs().max() > 0.01
    assert distance(attributions.sum((1, 2, 3)), change) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_attributed_by_its_gradient(kind):
    """Gradient times activation of the first block's attention, which is a slot in a converted model."""
    model, x = build(kind).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    attn = model.blocks[0].attn
    found = attr.LayerGradientXActivation(model, attn).attribute(x, target=2)
    kept = []
    handle = attn.register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(x)[:, 2].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(logits, kept)
    assert distance(found, gradient * kept[0]) < 1e-10
