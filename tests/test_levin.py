"""LeViT with another mechanism: timm's LeViT where the two coincide, and the paper's single stage."""

import logging

import pytest
import timm
import torch
from conftest import PROJECTED, distance, lively
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.levit import Attention, AttentionDownsample

from timm_vix.mixers import MIXERS
from timm_vix.mixers._mechanism import AttentionMechanism

NAMES = ["levin_cifar", "levin_128s", "levip_cifar", "levip_128s"]
SHAPE = dict(img_size=(80, 48), embed_dim=(32, 64), key_dim=8, num_heads=(2, 4), depth=(1, 2), num_classes=5)
EXACT = {"num_landmarks": 999}


def settled(model):
    """In eval mode, with statistics as after training."""
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return lively(model.eval())


def without_biases(model):
    for module in model.modules():
        if hasattr(module, "attention_biases"):
            module.attention_biases.data.zero_()
    return model


def test_registered_names():
    assert set(timm.list_models(module="levin")) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_what_is_built(name):
    model = timm.create_model(name, device="meta")
    cores = [m for m in model.modules() if type(m) in PROJECTED.values()]
    assert {type(m) for m in cores} == {PROJECTED["nystrom" if "levin" in name else "performer"]}
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state
    if "cifar" in name:
        assert len(cores) == 4 and model.num_features == 128 and model.feature_info[0]["reduction"] == 1
        assert model.stem.grid_size == (32, 32) and model.num_classes == 10
    else:
        assert len(cores) == 2 + 3 + 4 + 2  # layers, and two between stages
        assert cfg["hf_hub_id"] == "timm/levit_128s.fb_dist_in1k" and len(cfg["classifier"]) == 2
    assert "arXiv" in timm.model_entrypoint(name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_every_name_takes_another_mixer(name):
    for mixer in PROJECTED:
        model = timm.create_model(name, mixer=mixer, device="meta")
        expected = set() if mixer == "softmax" else {PROJECTED[mixer]}
        assert {type(m) for m in model.modules() if type(m) in PROJECTED.values()} == expected


ON_ONE_GRID = [
    name for name, kind in MIXERS.items() if issubclass(kind, AttentionMechanism) and kind.needs_self_attention
]


def test_axial_attention_of_whole_strips_is_levits_but_for_the_biases_of_layers(tmp_path):
    """Values are wider than keys, and the attention between stages stays LeViT's."""
    reference = settled(timm.create_model("levit_128s", **SHAPE))
    for module in reference.modules():
        if isinstance(module, Attention):
            module.attention_biases.data.zero_()
    x, state = torch.randn(2, 3, 80, 48, dtype=torch.float64), reference.state_dict()
    exact = loaded(state, tmp_path, "levin_128s", mixer="axial", strip_width=9).double()
    assert distance(exact(x), reference.double()(x)) < 1e-10
    model = loaded(state, tmp_path, "levin_128s", mixer="axial", strip_width=1).double()
    assert 1e-7 < distance(model(x), reference(x)) < 0.1
    assert sum(isinstance(m, AttentionDownsample) for m in model.modules()) == 1


@pytest.mark.parametrize("mixer", ON_ONE_GRID)
def test_the_papers_levit_takes_mechanisms_on_one_grid(mixer):
    model = timm.create_model("levin_cifar", mixer=mixer, img_size=6, depth=(2,))
    assert sum(type(m) is MIXERS[mixer] for m in model.modules()) == 2
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and x.grad.abs().max() > 0


def test_wide_values_are_refused_where_a_mechanism_has_none():
    with pytest.raises(ValueError, match="needs values as wide as queries; here they have 16 and 8 channels"):
        timm.create_model("levin_128s", mixer="retention", **SHAPE)


@pytest.mark.parametrize("name", ["levin_128s", "levip_128s"])
def test_weights_are_those_of_timms_levit(name, tmp_path, caplog):
    """With a landmark for each token Nyström attention is LeViT's, but for the biases."""
    reference = without_biases(settled(timm.create_model("levit_128s", **SHAPE)))
    save_file(reference.state_dict(), tmp_path / "levit.safetensors")
    overlay = {"file": str(tmp_path / "levit.safetensors"), "num_classes": 5}
    options = EXACT if name == "levin_128s" else {"num_features": 4096}
    with caplog.at_level(logging.WARNING):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SHAPE, **options).eval()
    (line,) = [record.message for record in caplog.records]
    assert "needs fine-tuning" in line and "attention_biases" in line
    x = torch.randn(2, 3, 80, 48, dtype=torch.float64)
    assert distance(model.double()(x), reference.double()(x)) < (1e-10 if name == "levin_128s" else 0.1)
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "levit.safetensors")
    with pytest.raises(ValueError, match="doesn't fit"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SHAPE)


def loaded(state, tmp_path, name, **kwargs):
    """A model of ``SHAPE`` that takes weights as ``pretrained=True`` does."""
    save_file(state, tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 5}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**SHAPE, **kwargs}).eval()


def test_an_inherited_models_convolution_starts_as_nothing(tmp_path, caplog):
    state = settled(timm.create_model("levit_128s", **SHAPE)).state_dict()
    with caplog.at_level(logging.WARNING):
        model = loaded(state, tmp_path, "levin_128s", num_landmarks=2, conv_residual=True)
    (line,) = [record.message for record in caplog.records]
    told = "stages.0.blocks.*.attn.core.conv.weight, stages.1.blocks.*.attn.core.conv.weight."
    assert f"Newly initialized: {told}" in line
    plain = loaded(state, tmp_path, "levin_128s", num_landmarks=2)
    x = torch.randn(2, 3, 80, 48)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(
    "saved, name, fresh",
    [
        ("levin_128s", "levip_128s", "Newly initialized: stages.0.blocks.*.attn.core.features"),
        ("levin_128s", "levin_128s", None),
        ("levip_128s", "levip_128s", None),
    ],
)
def test_weights_of_another_mixer_are_told(saved, name, fresh, tmp_path, caplog):
    state = settled(timm.create_model(saved, **SHAPE)).state_dict()
    with caplog.at_level(logging.WARNING):
        loaded(state, tmp_path, name)
    lines = [record.message for record in caplog.records]
    assert len(lines) == (fresh is not None) and all(fresh in line for line in lines)


@pytest.mark.parametrize("name, key", [("levin_128s", "core.conv.weight"), ("levip_128s", "core.features")])
def test_a_checkpoint_that_lacks_a_mixers_weight_is_refused(name, key, tmp_path):
    kwargs = dict(conv_residual=True) if name == "levin_128s" else {}
    state = settled(timm.create_model(name, **SHAPE, **kwargs)).state_dict()
    del state[f"stages.1.blocks.0.attn.{key}"]
    with pytest.raises(ValueError, match=rf"doesn't fit {name}. Missing: stages.1.blocks.*{key}"):
        loaded(state, tmp_path, name, **kwargs)


def test_grey_images_with_levits_own_stem(tmp_path):
    arguments = dict(img_size=32, stem="levit", num_classes=5)
    coloured = settled(timm.create_model("levip_cifar", **arguments))
    assert coloured.stem.conv1.linear.in_channels == 3 and coloured.feature_info[0]["reduction"] == 16
    save_file(coloured.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 5}
    arguments |= dict(in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    grey = timm.create_model("levip_cifar", **arguments).eval()
    # a grey pixel is the same in three channels
    x = torch.randn(2, 1, 32, 32)
    assert distance(grey(x), coloured(x.expand(-1, 3, -1, -1))) < 1e-4


@pytest.mark.parametrize(
    "mixer, keywords", [("nystrom", dict(num_landmarks=4, ridge=1e9)), ("linformer", dict(num_proj_tokens=4))]
)
def test_windows_over_the_grid_are_softmax_with_wide_values(mixer, keywords):
    """LeViT's values are wider than its keys."""
    arguments = dict(SHAPE, img_size=(64, 64), depth=(1,), embed_dim=(32,), num_heads=(2,))
    model = settled(timm.create_model("levin_128s", mixer=mixer, window_size=4, **keywords, **arguments)).double()
    attn = model.stages[0].attn
    assert attn.val_dim > attn.key_dim
    softmax = settled(timm.create_model("levin_128s", mixer="softmax", locality=1e-9, **arguments)).double()
    softmax.load_state_dict({k: v for k, v in model.state_dict().items() if k in softmax.state_dict()})
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert distance(model(x), softmax(x)) < 1e-6


def test_softmax_is_timms_own():
    reference = settled(timm.create_model("levit_128s", **SHAPE))
    model = timm.create_model("levin_128s", mixer="softmax", **SHAPE).eval()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 80, 48)
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("kwargs", [{}, {"mixer": "nystrom"}, {"stem": "levit"}], ids=str)
@pytest.mark.parametrize("patch_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_single_stage_trains_and_comes_back(patch_size, kwargs, tmp_path):
    arguments = dict(img_size=(14, 10), patch_size=patch_size, embed_dim=(32,), num_classes=5, **kwargs)
    if kwargs:
        arguments["num_features"] = 16
    if kwargs.get("mixer"):
        arguments.pop("num_features")
    if "stem" in kwargs:
        arguments["img_size"] = (80, 64)
        arguments.pop("patch_size")
    name = "levin_cifar" if kwargs.get("mixer") else "levip_cifar"
    model = timm.create_model(name, **arguments)
    x = torch.randn(4, 3, *arguments["img_size"])
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    settled(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    last = model.forward_intermediates(x, indices=[3], intermediates_only=True)[0]
    tokens = model.forward_features(x)
    assert torch.equal(last.flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize(
    "name, kwargs, count",
    [
        ("levip_128s", {"redraw_interval": 2}, 4),
        ("levip_128s", {"redraw_interval": 2, "stem": "levit"}, 4),
        ("levin_128s", {"stem": "t2t", "stem_mixer": {"mixer": "performer", "redraw_interval": 2}}, 2),
    ],
    ids=str,
)
def test_features_are_drawn_anew_in_training(name, kwargs, count):
    model = timm.create_model(name, **SHAPE, **kwargs)
    cores = [module for module in model.modules() if isinstance(module, MIXERS["performer"])]
    before = [core.features.clone() for core in cores]
    for passes in (1, 2):
        model.eval()(torch.randn(1, 3, 80, 48))
        model.train()(torch.randn(4, 3, 80, 48))
        assert [int(core.passes) for core in cores] == [passes] * count
        assert [torch.equal(core.features, old) for core, old in zip(cores, before)] == [passes == 1] * count


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_features": 3}, ["num_features=3", "nystrom", "num_landmarks"]),
        ({"mixer": "fnet"}, ["fnet", "softmax", "nystrom", "performer"]),
        ({"stem": "hmlp"}, ["'hmlp'", "conv_linear"]),
        ({"img_size": 13, "patch_size": 2}, ["img_size=13", "patch_size=2"]),
        ({"img_size": 0}, ["img_size=0", "positive"]),
        ({"model_name": "levin_128s", "img_size": 100}, ["img_size=100", "16"]),
        ({"use_conv": True}, ["use_conv=True", "False"]),
        ({"depth": (2, 2)}, ["depth=(2, 2)", "embed_dim=(128,)", "one for each stage"]),
        ({"depth": 4}, ["depth=4", "positive integers"]),
        ({"model_name": "levin_128s", "num_heads": (4, 6)}, ["num_heads=(4, 6)", "one for each stage"]),
        ({"stem": "none"}, ["'none'", "levit", "conv"]),
        ({"embed_dim": 128}, ["embed_dim=128", "positive integers"]),
        ({"embed_dim": (128.0,)}, ["embed_dim=(128.0,)", "positive integers"]),
        ({"patch_size": (2, 2)}, ["patch_size=(2, 2)", "integer"]),
        ({"model_name": "levin_128s", "patch_size": 8}, ["patch_size=8", "16", "stem"]),
        ({"model_name": "levin_128s", "patch_size": 16, "stem_type": "s8"}, ["patch_size=16", "8", "stem"]),
    ],
    ids=str,
)
def test_a_wrong_keyword_is_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        timm.create_model(**{"model_name": "levin_cifar", **kwargs})
    assert not [word for word in words if word not in str(error.value)], error.value


@pytest.mark.parametrize("stem", ["levit", "conv"])
def test_another_image_size_is_refused(stem):
    """One of as many tokens would go through, its rows cut at the wrong places."""
    model = timm.create_model("levin_128s", **SHAPE, stem=stem, num_landmarks=4).eval()
    model(torch.zeros(1, 3, 80, 48))
    for size in ((48, 80), (160, 96)):
        for call in (model, model.forward_intermediates):
            with pytest.raises(AssertionError, match=rf"Input height \({size[0]}\) doesn't match model \(80\)"):
                call(torch.zeros(1, 3, *size))
