"""Replacing attention: what it keeps, what it refuses, and that a refusal changes nothing."""

import copy

import pytest
import timm
import torch
from conftest import FEW, distance, vit
from timm.layers import Attention

from timm_vix import convert, revert
from timm_vix.mixers import MIXERS
from timm_vix.mixers._keywords import mixer_keywords
from timm_vix.mixers._mechanism import AttentionMechanism
from timm_vix.slots.model import mixer_name, slots_of

MECHANISMS = [mixer for mixer in MIXERS if mixer != "softmax"]


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}, {"reg_tokens": 4}, {"dynamic_img_size": True}], ids=str)
def test_softmax_changes_nothing(kwargs):
    model = vit(**kwargs)
    expected, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    convert(model, "softmax")
    assert all(type(block.attn) is Attention for block in model.blocks)
    assert torch.equal(model(x), expected(x))
    assert list(model.state_dict()) == list(expected.state_dict())


@pytest.mark.parametrize("mixer", MECHANISMS)
def test_weights_are_shared_not_copied(mixer):
    model = vit(qk_norm=True, scale_attn_norm=True)
    before = dict(model.named_parameters())
    convert(model, mixer)
    after = dict(model.named_parameters())
    kept = {name for name in before if issubclass(MIXERS[mixer], AttentionMechanism) or ".attn." not in name}
    assert kept == before.keys() & after.keys()
    assert all(after[name] is before[name] for name in kept)
    assert {name.split(".attn.")[1].split(".")[0] for name in after.keys() - before.keys()} <= {"core"}
    assert [mixer_name(slot) for slot in slots_of(model).values()] == [mixer] * 4


@pytest.mark.parametrize("mixer", MECHANISMS)
def test_a_converted_vit_is_the_registered_model(mixer):
    few = FEW.get(mixer, {})
    converted, registered = vit(), vit("vix_softmax_cifar", mixer=mixer, mlp_ratio=4, qkv_bias=True, **few)
    convert(converted, mixer, **few)
    registered.load_state_dict(converted.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(converted(x), registered(x))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_keyword_of_another_mixer_is_refused(mixer):
    own = mixer_keywords(mixer)
    for other in set().union(*map(mixer_keywords, MIXERS)) - set(own):
        with pytest.raises(ValueError, match=other):
            convert(vit(), mixer, **{other: 1})


@pytest.mark.parametrize("mixer", MIXERS)
def test_config_rebuilds_the_mixer(mixer):
    """Every keyword has a value in force, and these values alone give the same function."""
    model, twin = vit(), vit()
    convert(model, mixer, **({"merge_keys": 0.5} if mixer == "softmax" else {}))  # without it, timm's attention stays
    configs = [slot.config() for slot in slots_of(model).values()]
    assert all(list(config) == mixer_keywords(mixer) for config in configs)
    assert None not in configs[0].values()
    convert(twin, mixer, **configs[0])
    assert [slot.config() for slot in slots_of(twin).values()] == configs
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize(
    "arguments, options, words",
    [
        (("sofmax",), {}, ["'sofmax'", "nystrom", "linformer"]),
        ((3,), {}, ["mixer=3", "nystrom"]),
        (("",), {}, ["mixer=''", "nystrom"]),
        (("nystrom",), {"num_features": 3}, ["num_features", "num_landmarks", "nystrom"]),
        (("softmax",), {"num_features": 3}, ["num_features", "merge_keys"]),
        (("nystrom",), {"num_landmarks": 0}, ["num_landmarks=0", "at least 1"]),
    ],
    ids=str,
)
def test_a_refusal_says_why_and_changes_nothing(arguments, options, words):
    model = vit()
    before, x = {name: id(m) for name, m in model.named_modules()}, torch.randn(1, 3, 32, 32)
    expected = model(x)
    with pytest.raises(ValueError) as error:
        convert(model, *arguments, **options)
    assert not [word for word in words if word not in str(error.value)]
    assert {name: id(m) for name, m in model.named_modules()} == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("rope", ["polar", 1])
@pytest.mark.parametrize("name", ["vix_nystrom_cifar", "vix_softmax_cifar", "pin_cifar"])
def test_unknown_positions_are_refused(name, rope):
    with pytest.raises(ValueError, match=f"rope={rope!r}.*'axial', '1d'"):
        timm.create_model(name, rope=rope)


@pytest.mark.parametrize("mixer", ["fnet", "mixer"])
def test_rotary_positions_need_queries_and_keys(mixer):
    with pytest.raises(ValueError, match="rope"):
        timm.create_model("vix_softmax_cifar", mixer=mixer, rope="axial")


@pytest.mark.parametrize("mixer", MECHANISMS)
def test_a_dynamic_vit_stays_dynamic(mixer):
    model = vit(dynamic_img_size=True)
    convert(model, mixer)
    fixed = vit(img_size=(24, 40))
    fixed.load_state_dict(convert_weights(model, fixed, mixer))
    small, large = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 24, 40)
    first = model(small)
    assert distance(model(large), fixed(large)) < 1e-5
    assert torch.equal(model(small), first)


def convert_weights(model, fixed, mixer):
    """The weights of a dynamic model for one of another size."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    from timm_vix.slots.model import resample_weights

    convert(fixed, mixer, **next(iter(slots_of(model).values())).config())
    state = checkpoint_filter_fn(model.state_dict(), fixed)
    resample_weights(state, fixed)
    return state


def test_a_model_of_mixers_is_refused():
    with pytest.raises(ValueError, match="ResNet has no attention"):
        convert(timm.create_model("resnet10t"), "nystrom")
    model = timm.create_model("vix_nystrom_cifar")
    with pytest.raises(ValueError, match="pass another mixer="):
        convert(model, "performer")


@pytest.mark.parametrize("name", ["vix_softmax_cifar_rope", "hybrid_vit_cifar_rope", "vix_softmax_cifar"])
def test_softmax_models_of_ours_convert_and_revert(name, tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model(name, img_size=16, patch_size=2, depth=2).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    convert(model, "nystrom", num_landmarks=64)  # a landmark for each patch: softmax attention exactly
    assert distance(model(x), expected) < 1e-5
    convert(model, "linformer", layers="last-1", num_proj_tokens=9)
    y = model(x)
    assert distance(y, expected) > 1e-4
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), y)
    revert(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("mixer, keyword", [("nystrom", "num_landmarks"), ("linformer", "num_proj_tokens")])
def test_more_landmarks_than_patches_are_as_many(mixer, keyword):
    """A reload at a smaller size has the same keywords; with a landmark for each patch it is softmax attention."""
    model, softmax = vit(), vit()
    softmax.load_state_dict(model.state_dict())
    convert(model, mixer, **{keyword: 17})
    x = torch.randn(2, 3, 32, 32)
    assert distance(model(x), softmax(x)) < 1e-5
