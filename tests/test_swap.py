"""The primitive: what it keeps, what it refuses, and that a refusal changes nothing."""

import copy

import pytest
import timm
import torch
from conftest import distance
from timm.layers import Attention

from timm_vix.conversion.replace import mixer_options, swap_attention
from timm_vix.mixers import MIXERS
from timm_vix.mixers._slot import AttentionMixer


def vit(**kwargs):
    arguments = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return timm.create_model("vit_tiny_patch16_224", **{**arguments, **kwargs}).eval()


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}, {"reg_tokens": 4}, {"dynamic_img_size": True}], ids=str)
def test_softmax_changes_nothing(kwargs):
    model = vit(**kwargs)
    expected, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    swap_attention(model, "softmax")
    assert all(type(block.attn) is Attention for block in model.blocks)
    assert torch.equal(model(x), expected(x))
    assert list(model.state_dict()) == list(expected.state_dict())


@pytest.mark.parametrize("rope", [None, "axial"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_are_shared_not_copied(mixer, rope):
    if rope and not issubclass(MIXERS[mixer], AttentionMixer):
        return
    model = vit(qk_norm=True, scale_attn_norm=True)
    before = dict(model.named_parameters())
    swap_attention(model, mixer, rope)
    after = dict(model.named_parameters())
    if issubclass(MIXERS[mixer], AttentionMixer):
        assert set(before) <= set(after)
    assert all(after[name] is before[name] for name in before if name in after)
    assert {name for name in before if ".attn." not in name} <= set(after)
    assert all(type(block.attn) is MIXERS[mixer] for block in model.blocks) or (mixer == "softmax" and rope is None)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_swapped_vit_is_the_registered_model(mixer):
    options = dict(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, mlp_ratio=4, qkv_bias=True
    )
    swapped, registered = vit(), timm.create_model("vix_softmax_cifar", mixer=mixer, **options).eval()
    swap_attention(swapped, mixer)
    registered.load_state_dict(swapped.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(swapped(x), registered(x))


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixer_options_are_what_the_mixer_takes(mixer):
    options = mixer_options(mixer)
    assert not {"attn", "grid", "num_prefix_tokens", "rope", "self"} & set(options)
    for other in set().union(*map(mixer_options, MIXERS)) - set(options):
        with pytest.raises(ValueError, match=other):
            swap_attention(vit(), mixer, **{other: 1})


@pytest.mark.parametrize(
    "arguments, options, words",
    [
        (("sofmax",), {}, ["'sofmax'", "nystrom", "linformer"]),
        ((None,), {}, ["None", "nystrom"]),
        (("nystrom", "polar"), {}, ["'polar'", "axial", "1d"]),
        (("softmax", "polar"), {}, ["'polar'", "axial", "1d"]),
        (("nystrom",), {"num_features": 3}, ["num_features", "num_landmarks", "nystrom"]),
        (("softmax",), {"num_features": 3}, ["num_features", "no keywords"]),
        (("fnet", "axial"), {}, ["rope"]),
        (("mixer", "1d"), {}, ["rope"]),
        (("nystrom",), {"num_landmarks": 17}, ["num_landmarks=17", "16"]),
    ],
    ids=str,
)
def test_a_refusal_says_why_and_changes_nothing(arguments, options, words):
    model = vit()
    before, x = {name: id(m) for name, m in model.named_modules()}, torch.randn(1, 3, 32, 32)
    expected = model(x)
    with pytest.raises(ValueError) as error:
        swap_attention(model, *arguments, **options)
    assert not [word for word in words if word not in str(error.value)]
    assert {name: id(m) for name, m in model.named_modules()} == before
    assert torch.equal(model(x), expected)


def test_a_model_without_timm_attention_is_refused():
    with pytest.raises(ValueError, match="ResNet has no timm Attention"):
        swap_attention(timm.create_model("resnet10t"), "nystrom")
    model = vit()
    swap_attention(model, "nystrom")
    with pytest.raises(ValueError, match="no timm Attention"):
        swap_attention(model, "nystrom")


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_dynamic_vit_stays_dynamic(mixer):
    model = vit(dynamic_img_size=True)
    swap_attention(model, mixer)
    fixed = vit(img_size=(24, 40))
    swap_attention(fixed, mixer)
    small, large = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 24, 40)
    first = model(small)
    assert model(large).isfinite().all()
    assert distance(model(small), first) < 1e-6
