"""Convolutional stems: total stride, the linear one against its own folding, timm's padding and layout."""

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
    embed = STEMS[stem](img_size=(8 * patch_size, 10 * patch_size), patch_size=patch_size, embed_dim=32).eval()
    x = torch.randn(1, 3, 8 * patch_size, 10 * patch_size)
    tokens = embed(x).reshape(8, 10, 32)
    down = embed(x.roll(patch_size, 2)).reshape(8, 10, 32)
    right = embed(x.roll(patch_size, 3)).reshape(8, 10, 32)
    edge = 3
    assert distance(down[edge + 1 : -edge, edge:-edge], tokens[edge : -edge - 1, edge:-edge]) < 1e-5
    assert distance(right[edge:-edge, edge + 1 : -edge], tokens[edge:-edge, edge : -edge - 1]) < 1e-5
    assert distance(down[edge:-edge, edge:-edge], tokens[edge:-edge, edge:-edge]) > 0.01


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stem, affine", [("conv", False), ("conv_linear", True)])
def test_only_the_linear_stem_is_affine(stem, affine, patch_size):
    embed = STEMS[stem](img_size=32, patch_size=patch_size, embed_dim=32).eval()
    x, y = torch.randn(2, 1, 3, 32, 32)
    blend = embed(0.25 * x + 0.75 * y)
    assert (distance(0.25 * embed(x) + 0.75 * embed(y), blend) < 1e-5) == affine


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
