"""Fourier mixing of maps: the transform against matrices, the model as a model."""

import math

import pytest
import timm
import torch
from conftest import distance, lively, rounding
from timm.models import save_for_hf

from timm_vix.models.fnet2d import fourier_mix_map


def small(**kwargs):
    arguments = dict(img_size=(14, 10), embed_dim=16, depth=2, num_classes=5)
    return lively(timm.create_model("fnet2d_cifar", **{**arguments, **kwargs}).eval())


def test_registered_names():
    assert timm.list_models(module="fnet2d") == ["fnet2d_cifar"]
    model = timm.create_model("fnet2d_cifar", device="meta")
    assert (len(model.blocks), model.embed_dim, model.patch_embed.grid_size) == (5, 128, (32, 32))
    assert "arXiv" in timm.model_entrypoint("fnet2d_cifar").__doc__


def test_the_transform_is_that_of_the_matrices():
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)

    def matrix(n):
        angles = 2 * math.pi * torch.outer(torch.arange(n), torch.arange(n)).double() / n
        return torch.polar(torch.ones_like(angles), -angles) / math.sqrt(n)

    expected = torch.einsum("ca,hb,wd,nabd->nchw", matrix(6), matrix(5), matrix(4), x.to(torch.complex128)).real
    ours = fourier_mix_map(x)
    assert distance(ours, expected) < 1e-12
    weight = torch.randn_like(ours)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, expected))
    assert distance(mine, theirs) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    x = torch.randn(2, 6, 5, 4)
    assert fourier_mix_map(x.to(dtype)).dtype == dtype
    assert distance(fourier_mix_map(x.to(dtype)).float(), fourier_mix_map(x)) < 0.01


@pytest.mark.parametrize("stem", ["linear", "conv", "conv_linear", "conv_pool"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_trains_and_comes_back(patch_size, stem, tmp_path):
    model = small(patch_size=patch_size, stem=stem).train()
    x = torch.randn(3, 3, 14, 10)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    model.eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    # no weight depends on the size
    other, x = small(patch_size=patch_size, stem=stem, img_size=(8, 6)), torch.randn(1, 3, 8, 6)
    other.load_state_dict(model.state_dict())
    assert distance(model(x), other(x)) < rounding(torch.float32)


def test_an_image_does_not_depend_on_its_batch_mates():
    model = small()
    x = torch.randn(4, 3, 14, 10)
    x[1:] *= 30
    assert distance(model(x[:1]), model(x)[:1]) < 1e-6


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"stem": "hmlp"}, ["'hmlp'", "conv_linear"]),
        ({"img_size": 13, "patch_size": 2}, ["img_size=13", "patch_size=2"]),
        ({"global_pool": "token"}, ["global_pool='token'", "avg"]),
        ({"global_pool": ""}, ["global_pool=''", "avg"]),
        ({"depth": 1.5}, ["depth=1.5", "at least 1"]),
        ({"depth": -1}, ["depth=-1", "at least 1"]),
        ({"embed_dim": -1}, ["embed_dim=-1", "at least 1"]),
    ],
    ids=str,
)
def test_a_wrong_keyword_is_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        timm.create_model("fnet2d_cifar", **kwargs)
    assert not [word for word in words if word not in str(error.value)], error.value


def test_patches_of_two_sides_have_the_longer_as_reduction():
    features = timm.create_model("fnet2d_cifar", patch_size=(2, 4), features_only=True, stem="linear")
    assert features.feature_info.reduction() == [4, 4, 4]


def test_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="num_landmark"):
        small(num_landmark=3)


def test_an_empty_batch():
    assert timm.create_model("fnet2d_cifar").eval()(torch.zeros(0, 3, 32, 32)).shape == (0, 10)
