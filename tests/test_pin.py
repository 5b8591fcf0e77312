"""Pooling-based transformers: timm's PiT where the two coincide, each stage on its own grid."""

import logging

import pytest
import timm
import torch
from conftest import check_every_mixer, distance, lively
from safetensors.torch import save_file
from timm.models import save_for_hf

from timm_vix.mixers import MIXERS
from timm_vix.models.pin import checkpoint_filter_fn
from timm_vix.slots.attention_slot import AttentionSlot

NAMES = [
    f"{stem}{family}_{size}" for stem in ("", "hybrid_") for family in ("pin", "pip") for size in ("tiny", "cifar")
]
SHAPE = dict(img_size=(20, 12), patch_size=4, stride=2, base_dims=(16, 16), depth=(1, 2), heads=(1, 2), num_classes=5)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_takes_another_mixer(name):
    check_every_mixer(name)


def pit(**kwargs):
    return lively(timm.create_model("pit_ti_224", **{**SHAPE, "mlp_ratio": 2.0, **kwargs}).eval())


def test_registered_names():
    assert set(timm.list_models(module="pin")) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_what_is_built(name):
    model = timm.create_model(name, device="meta")
    mixers = [m for m in model.modules() if isinstance(m, AttentionSlot)]
    assert {type(m.core) for m in mixers} == {MIXERS["nystrom" if "pin" in name else "performer"]}
    if "tiny" in name:
        grids = [(28, 28)] * 2 if "hybrid" in name else [(27, 27)] * 2
        grids += [(14, 14)] * 6 + [(7, 7)] * 4
    else:
        grids = [(32, 32), (16, 16), (16, 16), (8, 8)]
    assert [m.grid for m in mixers] == grids and {m.head_dim for m in mixers} == {32}
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state and cfg["num_classes"] == (1000 if "tiny" in name else 10)
    assert cfg.get("hf_hub_id") == ("timm/pit_ti_224.in1k" if "tiny" in name else None)
    assert "arXiv" in timm.model_entrypoint(name).__doc__


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    "mixer, options",
    [
        ("softmax", {}),
        ("linformer", {"num_proj_tokens": 99}),
        ("nystrom", {"num_landmarks": 99}),
        ("atrous", {"dilations": 1, "window_size": 9}),
    ],
)
def test_the_exact_limit_is_timms_pit(mixer, options, distilled, tmp_path):
    reference = pit(distilled=distilled)
    save_file(reference.state_dict(), tmp_path / "pit.safetensors")
    reference.double()
    overlay = {"file": str(tmp_path / "pit.safetensors"), "num_classes": 5}
    options = {**SHAPE, "mlp_ratio": 2.0, "distilled": distilled, "mixer": mixer, **options}
    model = timm.create_model("pip_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **options).eval().double()
    x = torch.randn(2, 3, 20, 12, dtype=torch.float64)
    assert distance(model(x), reference(x)) < 1e-10


@pytest.mark.parametrize("stem", ["linear", "conv", "conv_linear", "conv_pool"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_and_comes_back(mixer, stem, tmp_path):
    sizes = {} if stem == "linear" else {"img_size": (18, 10)}
    model = timm.create_model("pip_tiny", mixer=mixer, stem=stem, **{**SHAPE, **sizes})
    x = torch.randn(2, 3, *sizes.get("img_size", (20, 12)))
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))


def test_features_are_drawn_anew_in_training():
    model = timm.create_model("pip_tiny", **SHAPE, redraw_interval=2).train()
    mixer = model.transformers[1].blocks[0].attn
    before = mixer.core.features.clone()
    for _ in range(2):
        model(torch.randn(2, 3, 20, 12))
    assert mixer.grid == (5, 3) and int(mixer.core.passes) == 2 and not torch.equal(mixer.core.features, before)


def side_by_side(model, x: torch.Tensor) -> torch.Tensor:
    """A sequential model with layers 2 i and 2 i + 1 of each stage at once: attentions, then MLPs."""
    x, tokens = model.patch_embed(x) + model.pos_embed, model.cls_token.expand(len(x), -1, -1)
    for stage in model.transformers:
        if stage.pool is not None:
            x, tokens = stage.pool(x, tokens)
        shape = x.shape
        y = torch.cat([tokens, x.flatten(2).transpose(1, 2)], dim=1)
        for first in range(0, len(stage.blocks), 2):
            pair = stage.blocks[first : first + 2]
            y = y + sum(layer.attn(layer.norm1(y)) for layer in pair)
            y = y + sum(layer.mlp(layer.norm2(y)) for layer in pair)
        tokens, x = y[:, :1], y[:, 1:].transpose(1, 2).reshape(shape)
    return model.forward_head(model.norm(tokens))


@pytest.mark.parametrize("depth", [(2, 4), (1, 3)])
@pytest.mark.parametrize("mixer, options", [("softmax", {}), ("nystrom", {"num_landmarks": 4, "conv_residual": True})])
def test_layers_side_by_side_load_in_pairs_and_come_back(mixer, options, depth, tmp_path, caplog):
    arguments = {**SHAPE, "depth": depth, "mixer": mixer, **options}
    sequential = lively(timm.create_model("pin_tiny", **arguments).eval())
    save_file(sequential.state_dict(), tmp_path / "pit.safetensors")
    overlay = {"file": str(tmp_path / "pit.safetensors"), "num_classes": 5}
    arguments |= {"block": "parallel", "pretrained": True, "pretrained_cfg_overlay": overlay}
    with caplog.at_level(logging.WARNING):
        model = timm.create_model("pin_tiny", **arguments).eval()
    # the convolution of the values says that these weights are ours
    told = ["needs fine-tuning" in record.message for record in caplog.records]
    assert told == ([True] if mixer == "softmax" else [])
    assert [len(stage.blocks) for stage in model.transformers] == [(count + 1) // 2 for count in depth]
    x = torch.randn(2, 3, 20, 12)
    assert distance(model.double()(x.double()), side_by_side(sequential.double(), x.double())) < 1e-12
    save_for_hf(model.float(), tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    overlay["file"] = str(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"doesn't fit.*Unexpected: transformers\.0\.blocks\.\*\.attns"):
        timm.create_model("pin_tiny", **{**arguments, "block": "sequential"})


def test_weights_of_pit_load_at_another_grid(tmp_path, caplog):
    reference = pit()
    save_file(reference.state_dict(), tmp_path / "pit.safetensors")
    overlay = {"file": str(tmp_path / "pit.safetensors"), "num_classes": 5}
    arguments = {**SHAPE, "img_size": (36, 20), "mlp_ratio": 2.0}
    with caplog.at_level(logging.WARNING):
        model = timm.create_model("hybrid_pin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    (line,) = [record.message for record in caplog.records]
    assert "needs fine-tuning" in line and "patch_embed.proj.*" in line
    assert reference.pos_embed.shape == (1, 16, 9, 5)
    positions = torch.nn.functional.interpolate(reference.pos_embed, (18, 10), mode="bicubic", antialias=True)
    assert torch.equal(model.pos_embed, positions)
    assert torch.equal(model.transformers[1].pool.conv.weight, reference.transformers[1].pool.conv.weight)
    linformer = timm.create_model("pin_tiny", mixer="linformer", **arguments)
    save_file(linformer.state_dict(), tmp_path / "pit.safetensors")
    with pytest.raises(ValueError, match="Unexpected: transformers.*attn"):
        timm.create_model("pin_tiny", mixer="fnet", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "pit.safetensors")
    with pytest.raises(ValueError, match="doesn't fit"):
        timm.create_model("pin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_features": 3}, ["num_features", "nystrom", "num_landmarks"]),
        ({"num_landmarks": 0}, ["num_landmarks=0", "at least 1"]),
        ({"mixer": "sofmax"}, ["sofmax", "nystrom"]),
        ({"stem": "convolution"}, ["convolution", "conv_linear"]),
        ({"stem": "hmlp"}, ["'hmlp'", "conv_linear"]),
        ({"block": "side_by_side"}, ["block='side_by_side'", "'sequential'", "'parallel'"]),
        ({"img_size": "20"}, ["img_size='20'", "positive integer"]),
        ({"img_size": 224.0}, ["img_size=224.0", "positive integer"]),
        ({"patch_size": (16, 16)}, ["patch_size=(16, 16)", "integer"]),
        ({"stride": 0}, ["stride=0", "at least 1"]),
        ({"depth": (1, 2, 1)}, ["depth=(1, 2, 1)", "one for each stage"]),
        ({"heads": (2,)}, ["heads=(2,)", "one for each stage"]),
        ({"stem": "conv", "stride": 8}, ["img_size=(20, 12)", "stride=8"]),
        ({"stem": "conv", "stride": 3, "img_size": 12}, ["patch_size=3", "1, 2, 4, 8 or 16"]),
        ({"img_size": 3}, ["img_size=3", "patch_size=4"]),
    ],
    ids=str,
)
def test_a_wrong_keyword_is_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        timm.create_model("pin_tiny", **{**SHAPE, **kwargs})
    assert not [word for word in words if word not in str(error.value)], error.value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_in_half_precision_are_resampled(dtype):
    """torch has no antialiasing in half precision on a CPU."""
    state = timm.create_model("pin_cifar").state_dict()
    expected = timm.create_model("pin_cifar", img_size=64)
    expected.load_state_dict(checkpoint_filter_fn(dict(state), expected))
    model = timm.create_model("pin_cifar", img_size=64).to(dtype)
    model.load_state_dict(checkpoint_filter_fn({k: v.to(dtype) for k, v in state.items()}, model))
    assert (model.pos_embed.float() - expected.pos_embed).abs().max() <= 0.01 * expected.pos_embed.abs().max()
