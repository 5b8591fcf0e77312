"""Wrong inputs: the call, the error, and the words that its message must hold."""

import copy
import re

import numpy as np
import pytest
import timm
import torch
from conftest import image, small

from timm_vix.mixers import MIXERS
from timm_vix.mixers._keywords import mixer_keywords

# (name, keywords, words); images are 224 px with patches of 16 unless a row says otherwise: 196 patch tokens
BUILDS = [
    ("vix_nystrom_tiny", {"num_landmarks": 0}, ["num_landmarks=0", "at least 1"]),
    ("vix_nystrom_tiny", {"num_landmarks": -1}, ["num_landmarks=-1", "at least 1"]),
    ("vix_nystrom_tiny", {"num_landmarks": True}, ["num_landmarks=True", "integer"]),
    ("vix_nystrom_tiny", {"num_landmarks": "64"}, ["num_landmarks='64'", "integer"]),
    ("vix_nystrom_tiny", {"num_landmarks": 64.0}, ["num_landmarks=64.0", "integer"]),
    ("vix_nystrom_tiny", {"ridge": -1}, ["ridge=-1", "at least 0"]),
    ("vix_nystrom_tiny", {"ridge": float("nan")}, ["ridge=nan", "at least 0"]),
    ("vix_nystrom_tiny", {"ridge": np.float32(0.5)}, ["ridge=", "0.5", "a Python number of at least 0"]),
    *[
        ("vix_softmax_cifar", dict(stem=stem, patch_size=8, embed_dim=3, num_heads=1), ["embed_dim=3", "at least 4"])
        for stem in ("hmlp", "conv", "conv_linear", "sope")
    ],
    ("vix_nystrom_tiny", {"ridge": "small"}, ["ridge='small'", "number"]),
    ("vix_nystrom_tiny", {"pinv_iterations": 0}, ["pinv_iterations=0", "at least 1"]),
    ("vix_nystrom_tiny", {"conv_residual": "yes"}, ["conv_residual='yes'"]),
    ("vix_performer_tiny", {"num_features": 0}, ["num_features=0", "at least 1"]),
    ("vix_performer_tiny", {"num_features": None, "feature_seed": -1}, ["feature_seed=-1", "from 0 to"]),
    ("vix_performer_tiny", {"redraw_interval": -1}, ["redraw_interval=-1", "at least 0"]),
    ("vix_linformer_tiny", {"num_proj_tokens": 0}, ["num_proj_tokens=0", "at least 1"]),
    ("vix_linformer_tiny", {"sharing": "all"}, ["sharing='all'", "none", "headwise", "kv"]),
    ("vix_atrous_tiny", {"dilations": ()}, ["dilations=()", "at least 1", "(1, 2, 4)"]),
    ("vix_atrous_tiny", {"dilations": "1,x"}, ["dilations='1,x'", "at least 1"]),
    ("vix_atrous_tiny", {"dilations": [1, 1]}, ["dilations=[1, 1]", "different"]),
    ("vix_atrous_tiny", {"dilations": (1, 0)}, ["dilations=(1, 0)", "at least 1"]),
    ("vix_atrous_tiny", {"dilations": (1, 2.0)}, ["dilations=(1, 2.0)", "integers"]),
    ("vix_atrous_tiny", {"dilations": True}, ["dilations=True", "integers"]),
    ("vix_atrous_tiny", {"dilations": [[1]]}, ["dilations=[[1]]", "integers"]),
    ("vix_atrous_tiny", {"dilations": "[[1, 2]]"}, ["dilations='[[1, 2]]'", "integers"]),
    ("vix_atrous_tiny", {"dilations": {}}, ["dilations={}", "integers"]),
    ("vix_atrous_tiny", {"window_size": 0}, ["window_size=0", "at least 1"]),
    ("vix_atrous_tiny", {"window_size": "8"}, ["window_size='8'", "integer"]),
    ("vix_atrous_tiny", {"attn_drop_rate": 0.1}, ["attn_drop_rate=0.1", "allowed is 0"]),
    ("vix_atrous_tiny", {"patch_drop_rate": 0.5}, ["patch_drop_rate=0.5", "atrous"]),
    ("vix_mixer_tiny", {"tokens_mlp_ratio": 0}, ["tokens_mlp_ratio=0"]),
    ("vix_mixer_tiny", {"tokens_mlp_ratio": "half"}, ["tokens_mlp_ratio='half'"]),
    ("vix_nystrom_tiny", {"mixer": "sofmax"}, ["mixer='sofmax'", *MIXERS]),
    ("vix_nystrom_tiny", {"stem": "convolution"}, ["stem='convolution'", "linear", "conv_linear"]),
    ("vix_nystrom_tiny", {"rope": "2d"}, ["rope='2d'", "axial", "1d"]),
    ("vix_nystrom_tiny", {"rope": True}, ["rope=True", "axial", "1d"]),
    ("vix_nystrom_tiny", {"rope": "axial", "num_heads": 32}, ["rope='axial'", "multiple of 4", "6"]),
    ("vix_nystrom_tiny", {"rope": "1d", "num_heads": 64}, ["rope='1d'", "multiple of 2", "3"]),
    ("vix_fnet_tiny", {"rope": "axial"}, ["rope"]),
    ("vix_mixer_tiny", {"rope": "1d"}, ["rope"]),
    ("vix_nystrom_tiny", {"num_features": 64}, ["num_features", "nystrom", "num_landmarks"]),
    ("hybrid_vit_tiny", {"num_landmarks": 64}, ["num_landmarks=64", "softmax", "merge_keys, conv_residual, locality"]),
    ("vix_nystrom_tiny", {"img_size": 100}, ["img_size=100", "patch_size=16"]),
    ("vix_nystrom_tiny", {"img_size": (224, 100)}, ["img_size=(224, 100)", "patch_size=16"]),
    ("vix_nystrom_tiny", {"img_size": 0}, ["img_size=0", "positive"]),
    ("vix_nystrom_tiny", {"img_size": -32}, ["img_size=-32", "positive"]),
    ("vix_nystrom_tiny", {"img_size": (224, 224, 3)}, ["img_size=(224, 224, 3)", "pair"]),
    ("vix_nystrom_tiny", {"img_size": "224"}, ["img_size='224'"]),
    ("vix_nystrom_tiny", {"patch_size": 0}, ["patch_size=0", "positive"]),
    ("hybrid_vin_tiny", {"patch_size": 3, "img_size": 96}, ["patch_size=3", "1, 2, 4, 8 or 16"]),
    ("vix_nystrom_tiny", {"patch_drop_rate": 0.5}, ["patch_drop_rate=0.5", "nystrom"]),
    ("vix_linformer_tiny", {"patch_drop_rate": 0.5}, ["patch_drop_rate=0.5", "linformer"]),
    ("vix_mixer_tiny", {"patch_drop_rate": 0.5}, ["patch_drop_rate=0.5", "mixer"]),
    ("vix_softmax_tiny_rope", {"patch_drop_rate": 0.5}, ["patch_drop_rate=0.5"]),
    ("vix_performer_tiny_rope", {"patch_drop_rate": 0.5}, ["patch_drop_rate=0.5"]),
    ("cvp_cifar", {"feature_seed": 2**63}, ["feature_seed=9223372036854775808", "from 0 to 9223372036854775807"]),
]


def missing_words(error, words):
    return [word for word in words if word not in str(error.value)]


@pytest.mark.parametrize(
    "name, keywords, words", BUILDS, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_a_wrong_keyword_is_named(name, keywords, words):
    with pytest.raises(ValueError) as error:
        timm.create_model(name, device="meta", **keywords)
    assert not missing_words(error, words), error.value


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_keyword_of_every_other_mixer_is_refused(mixer):
    for name in set().union(*map(mixer_keywords, MIXERS)) - set(mixer_keywords(mixer)):
        with pytest.raises(ValueError) as error:
            small(mixer, **{name: 1})
        assert not missing_words(error, [name, mixer])


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_unknown_keyword_is_a_type_error(mixer):
    with pytest.raises(TypeError, match="num_landmark"):
        small(mixer, num_landmark=3)


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "softmax"])
@pytest.mark.parametrize("keyword", ["attn_mask", "is_causal"])
def test_a_mask_is_refused_where_it_cannot_be_honoured(mixer, keyword):
    model = small(mixer)
    value = {"attn_mask": torch.ones(36, 36, dtype=torch.bool), "is_causal": True}[keyword]
    with pytest.raises(ValueError, match="attn_mask.*is_causal"):
        model(image(model), **{keyword: value})
    with pytest.raises(ValueError, match="attn_mask.*is_causal"):
        model.blocks[0].attn(torch.randn(1, 36, 32), **{keyword: value})


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("length", [1, 35, 37])
def test_a_sequence_has_the_length_of_the_layout_or_any(mixer, length):
    module = small(mixer).blocks[0].attn
    x = torch.randn(2, length, 32)
    try:
        y = module(x)
    except ValueError as error:
        assert MIXERS[mixer].uses_grid, "doesn't need to know where a token lies"
        assert re.search(f"{length} tokens.*36 tokens", str(error))  # noqa: PT017  the others have a value instead
        return
    # the same as in a model with as many tokens
    layout = {"class_token": False, "global_pool": "avg", "img_size": (2 * length, 2)}
    built = small(mixer, **layout).blocks[0].attn
    built.load_state_dict(module.state_dict())
    assert torch.equal(y, built(x))


@pytest.mark.parametrize("mixer", [name for name, kind in MIXERS.items() if kind.supports_rotary])
def test_a_rotated_sequence_has_the_length_of_the_layout(mixer):
    module = small(mixer, "axial").blocks[0].attn
    with pytest.raises(ValueError, match="35 tokens.*36 tokens"):
        module(torch.randn(2, 35, 32))


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_another_image_size_is_refused_in_forward(mixer, stem):
    model = small(mixer, stem=stem)
    with pytest.raises((ValueError, AssertionError), match="16.*14|14.*16"):
        model(torch.randn(1, 3, 16, 10))
    assert model(torch.randn(1, 3, 14, 10)).isfinite().all()


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_dynamic_image_that_patches_do_not_divide_is_refused(mixer, stem):
    model = small(mixer, stem=stem, dynamic_img_size=True)
    x = torch.randn(1, 3, 14, 10)
    expected = model(x)
    with pytest.raises((ValueError, AssertionError), match="13"):
        model(torch.randn(1, 3, 13, 10))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "keywords",
    [{"img_size": 13}, {"img_size": 0}, {"img_size": (14, 9)}, {"patch_size": 0}, {"img_size": 12, "patch_size": 5}],
    ids=str,
)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_refused_size_changes_nothing(mixer, keywords):
    model = small(mixer, rope="axial" if MIXERS[mixer].supports_rotary else None)
    x, before = image(model), copy.deepcopy(model.state_dict())
    expected = model(x)
    with pytest.raises(ValueError, match="_size"):
        model.set_input_size(**keywords)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
