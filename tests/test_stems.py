"""Stems: total stride, the linear one against its own folding, who sees whom, timm's padding and layout."""

import pytest
import torch
from conftest import distance, small
from timm.layers import PatchEmbed

from timm_vix.stems import STEMS

CONVOLUTIONAL = [name for name, stem in STEMS.items() if stem is not PatchEmbed]


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stem", CONVOLUTIONAL)
def test_a_patch_is_the_stride(stem, patch_size):
    """A shift by a patch shifts the tokens by one, inside: the stride is the patch and tokens are in raster order."""
    edge = 6 if stem == "conv_pool" else 3  # from here on, padding isn't seen
    H, W = 2 * edge + 2, 2 * edge + 4
    embed = STEMS[stem](img_size=(H * patch_size, W * patch_size), patch_size=patch_size, embed_dim=32).eval()
    x = torch.randn(1, 3, H * patch_size, W * patch_size)
    tokens = embed(x).reshape(H, W, 32)
    down = embed(x.roll(patch_size, 2)).reshape(H, W, 32)
    right = embed(x.roll(patch_size, 3)).reshape(H, W, 32)
    assert distance(down[edge + 1 : -edge, edge:-edge], tokens[edge : -edge - 1, edge:-edge]) < 1e-5
    assert distance(right[edge:-edge, edge + 1 : -edge], tokens[edge:-edge, edge : -edge - 1]) < 1e-5
    assert distance(down[edge:-edge, edge:-edge], tokens[edge:-edge, edge:-edge]) > 0.01


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    "stem, affine", [("conv", False), ("conv_linear", True), ("conv_pool", False), ("hmlp", False)]
)
def test_only_the_linear_stem_is_affine(stem, affine, patch_size):
    embed = STEMS[stem](img_size=32, patch_size=patch_size, embed_dim=32).eval()
    x, y = torch.randn(2, 1, 3, 32, 32)
    blend = embed(0.25 * x + 0.75 * y)
    assert (distance(0.25 * embed(x) + 0.75 * embed(y), blend) < 1e-5) == affine


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stem, apart", [("linear", True), ("hmlp", True), ("conv", False), ("conv_pool", False)])
def test_patches_of_a_hierarchical_mlp_never_see_each_other(stem, apart, patch_size):
    p = patch_size
    embed = STEMS[stem](img_size=(4 * p, 5 * p), patch_size=p, embed_dim=32).eval()
    x = torch.randn(1, 3, 4 * p, 5 * p)
    y = x.clone()
    y[:, :, p : 2 * p, 2 * p : 3 * p] += torch.randn(3, p, p)
    changed = (embed(x) != embed(y)).any(dim=2).reshape(4, 5)
    assert changed[1, 2]
    assert (changed.sum() == 1) == apart
    # each pixel of the patch is seen
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(embed(x)[0, 7].square().sum(), x)
    seen = (gradient != 0).any(dim=1)[0]
    assert seen[p : 2 * p, 2 * p : 3 * p].all()
    assert (seen.sum() == p * p) == apart


def test_a_hierarchical_mlp_costs_what_the_paper_says():
    """17.73 G multiply-adds of ViT-B/16 instead of 17.58 with the linear embedding."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for stem in ("hmlp", "linear"):
        embed = STEMS[stem](img_size=224, patch_size=16, embed_dim=768).eval()
        with FlopCounterMode(display=False) as counter:
            embed(torch.zeros(1, 3, 224, 224))
        counts.append(counter.get_total_flops() / 2)
    assert counts[0] - counts[1] == pytest.approx(0.15e9, abs=0.01e9)


@pytest.mark.parametrize("stem", CONVOLUTIONAL)
def test_gradients_reach_every_parameter_and_pixel(stem):
    embed = STEMS[stem](img_size=32, patch_size=8, embed_dim=32)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    (embed(x) ** 3).sum().backward()
    # a bias before batch normalisation would get none
    assert not [
        name for name, p in embed.named_parameters() if p.grad is None or p.grad.norm() < 1e-4 * p.numel() ** 0.5
    ]
    assert (x.grad != 0).all()


@pytest.mark.parametrize("stem", STEMS)
def test_padding_is_that_of_zeros_to_the_next_patch(stem):
    padded = small("softmax", stem=stem, img_size=(12, 8), patch_size=4, dynamic_img_size=True, dynamic_img_pad=True)
    exact = small("softmax", stem=stem, img_size=(12, 8), patch_size=4)
    exact.load_state_dict(padded.state_dict())
    x = torch.randn(2, 3, 10, 7)
    assert distance(padded(x), exact(torch.nn.functional.pad(x, (0, 1, 0, 2)))) < 1e-6


@pytest.mark.parametrize("stem", CONVOLUTIONAL)
@pytest.mark.parametrize("patch_size", [3, 32, (4, 8), 0, 6])
def test_other_patch_sizes_are_refused(stem, patch_size):
    with pytest.raises(ValueError, match="patch_size"):
        STEMS[stem](img_size=96, patch_size=patch_size, embed_dim=32)


@pytest.mark.parametrize("stem", CONVOLUTIONAL)
def test_the_patch_size_stays(stem):
    model = small("softmax", stem=stem)
    with pytest.raises(ValueError, match="patch_size=4"):
        model.set_input_size(patch_size=4)
    assert model(torch.randn(1, 3, 14, 10)).isfinite().all()
