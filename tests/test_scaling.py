"""Logits that grow with the number of tokens: against the same model whose query weights carry the factor."""

import copy
import json
import math
from functools import partial

import pytest
import timm
import torch
from conftest import FEW, distance, lively, rounding
from timm.models import save_for_hf

import timm_vix
from timm_vix._checks import InputError
from timm_vix.mixers import MIXERS

SIZE = dict(img_size=(56, 40), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
WITH_LOGITS = [name for name, mixer in MIXERS.items() if mixer.has_logits]
# (7·5 + 1) tokens, of a model that was trained with 3·3 + 1
FACTOR = math.log(36) / math.log(10)


def host(name="vit_tiny_patch16_224", **kwargs):
    """A small model of 7x5 patches, whose configuration says that it was trained with 3x3."""
    torch.manual_seed(0)
    overlay = dict(pretrained_cfg_overlay=dict(input_size=(3, 24, 24)))
    return lively(timm.create_model(name, **{**SIZE, **overlay, **kwargs}).eval())


@torch.no_grad()
def with_larger_queries(model, factor):
    """A copy whose queries are ``factor`` times as large."""
    larger = copy.deepcopy(model)
    for block in larger.blocks:
        attn = block.attn
        if not isinstance(attn.q_norm, torch.nn.Identity):
            attn.q_norm.weight *= factor
            attn.q_norm.bias *= factor
        elif attn.qkv is None:
            attn.q_proj.weight *= factor
            attn.q_proj.bias *= factor
        else:
            attn.qkv.weight[: attn.qkv.weight.shape[0] // 3] *= factor
            bias = getattr(attn, "q_bias", None)
            bias = attn.qkv.bias[: attn.qkv.weight.shape[0] // 3] if bias is None else bias
            bias *= factor
    return larger


HOSTS = {
    "class": partial(host),
    "qk_norm": partial(host, qk_norm=True, reg_tokens=3),
    "eva": partial(host, "eva02_tiny_patch14_224"),
    "eva_biases": partial(host, "eva_giant_patch14_224"),
}


@pytest.mark.parametrize(
    "kind, mixer", [("class", name) for name in WITH_LOGITS] + [(kind, "softmax") for kind in list(HOSTS)[1:]]
)
@torch.no_grad()
def test_logits_are_multiplied_by_the_ratio_of_logarithms(kind: str, mixer: str) -> None:
    model = HOSTS[kind]().double()
    prefix = model.num_prefix_tokens
    factor = math.log(35 + prefix) / math.log(9 + prefix)
    images = torch.randn(2, 3, 56, 40, dtype=torch.float64)
    reference, plain = with_larger_queries(model, factor), copy.deepcopy(model)
    few = FEW.get(mixer, {})
    timm_vix.convert(reference, mixer, **few)
    timm_vix.convert(plain, mixer, **few)
    timm_vix.convert(model, mixer, scale_logits="log", **few)
    if mixer in ("nystrom", "linformer"):  # whose queries of single tokens aren't computed here
        assert model.blocks[0].attn.can_fuse_projections(prefix + 35, torch.zeros(1, 2, prefix + 4, 16), None)
    assert distance(model(images), reference(images)) < rounding(torch.float64, 10)
    assert distance(plain(images), reference(images)) > 1e-4


@pytest.mark.parametrize(
    "mixer, options",
    [
        ("nystrom", dict(num_landmarks=6, window_size=2)),
        ("linformer", dict(num_proj_tokens=6, window_size=2)),
        ("performer", dict(merge=5)),
        ("softmax", dict(merge=5)),
    ],
)
@torch.no_grad()
def test_windows_beside_landmarks_and_merged_tokens_are_scaled_too(mixer: str, options: dict) -> None:
    model, images = host().double(), torch.randn(2, 3, 56, 40, dtype=torch.float64)
    reference, plain = with_larger_queries(model, FACTOR), copy.deepcopy(model)
    timm_vix.convert(reference, mixer, **options)
    timm_vix.convert(plain, mixer, **options)
    timm_vix.convert(model, mixer, **options, scale_logits="log")
    # counts of merged tokens are in float32, and the same in both
    assert distance(model(images), reference(images)) < rounding(torch.float64, 10)
    assert distance(plain(images), reference(images)) > 1e-4


@torch.no_grad()
def test_the_factor_follows_the_size_and_is_never_below_one() -> None:
    model = host(dynamic_img_size=True)
    reference = copy.deepcopy(model)
    report = timm_vix.convert(model, "softmax", scale_logits=30)
    assert "multiplied by 1.054: the model was trained with 30" in report.table()
    small, large = torch.randn(1, 3, 24, 24), torch.randn(1, 3, 64, 48)
    assert distance(model(small), reference(small)) < 1e-6
    larger = with_larger_queries(reference, math.log(49) / math.log(30))
    assert distance(model(large), larger(large)) < 1e-5
    model.set_input_size((24, 24))
    assert "logits stay as they are" in timm_vix.convert(model, "softmax").table()


@torch.no_grad()
def test_a_hybrid_counts_the_patches_of_its_backbone() -> None:
    model = timm.create_model("vit_small_r26_s32_224", img_size=448, device="meta")
    report = timm_vix.convert(model, scale_logits="log")
    assert report.trained_tokens == 7 * 7 + 1


def test_saved_loaded_and_reverted(tmp_path) -> None:
    model = host()
    original, images = copy.deepcopy(model), torch.randn(1, 3, 56, 40)
    timm_vix.convert(model, "nystrom", layers=[1], scale_logits="log", num_landmarks=6)
    scaled = model(images)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["scale_logits"] == 10
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), scaled)
    copied = copy.deepcopy(model)
    timm_vix.convert(copied, "nystrom", layers=[1], scale_logits=0, num_landmarks=6)
    assert distance(copied(images), scaled) > 1e-4
    timm_vix.convert(model, "softmax")  # what was asked for once stays
    assert distance(model(images), with_larger_queries(original, FACTOR)(images)) < 1e-5
    timm_vix.revert(model)
    assert torch.equal(model(images), original(images))
    by_name = timm.create_model(
        "vix_from_timm", source="vit_tiny_patch16_224", mixer="softmax", scale_logits="log", **SIZE
    )
    assert by_name.blocks[0].attn.trained_tokens == 28 * 28 + 1  # patches of 8 px at 224 px


def test_a_model_of_ours_with_softmax_keeps_its_scaling(tmp_path) -> None:
    model = lively(timm.create_model("vix_softmax_cifar", img_size=48, depth=2, embed_dim=32, num_heads=2).eval())
    original, images = copy.deepcopy(model), torch.randn(1, 3, 48, 48)
    timm_vix.convert(model, "softmax", scale_logits="log")
    assert distance(model(images), original(images)) > 1e-5
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model(images))


@pytest.mark.parametrize("mixer, merge", [("softmax", None), ("nystrom", None), ("axial", None), ("softmax", 4)])
@torch.no_grad()
def test_models_are_built_by_name_with_scaled_logits(mixer, merge, tmp_path) -> None:
    """As the model whose queries are so many times as large; also when it is saved, loaded and loses the scaling."""
    name, size = f"vix_{mixer}_cifar", dict(img_size=48, patch_size=8, depth=2, embed_dim=32, num_heads=2, merge=merge)
    model = lively(timm.create_model(name, scale_logits=17, qkv_bias=True, **size).eval())
    plain = timm.create_model(name, qkv_bias=True, **size).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 48, 48)
    assert distance(model(images), plain(images)) > 1e-5
    larger = with_larger_queries(copy.deepcopy(plain).double(), math.log(37) / math.log(17))
    # tokens merge by their keys, which are the same in both
    scaled = copy.deepcopy(model).double()(images.double())
    assert distance(scaled, larger(images.double())) < rounding(torch.float64, 10)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model(images))
    without = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, scale_logits=0).eval()
    assert torch.equal(without(images), plain(images))
    if mixer != "softmax" or merge:
        return
    # which a conversion couldn't record, nor take back
    value = model(images)
    for other in (0, 19):
        with pytest.raises(
            InputError, match=f"scale_logits={other}: the model was created with 17; pass another to create_model"
        ):
            timm_vix.convert(model, layers={0: "linformer"}, num_proj_tokens=4, scale_logits=other)
    assert torch.equal(model(images), value)
    timm_vix.convert(model, layers={0: "linformer"}, num_proj_tokens=4, scale_logits=17)
    timm_vix.revert(model)
    assert torch.equal(model(images), value)


def test_a_name_wants_the_number_of_tokens() -> None:
    with pytest.raises(InputError, match="scale_logits='log': here the number of tokens .* such as 197"):
        timm.create_model("vix_softmax_cifar", scale_logits="log")
    with pytest.raises(InputError, match="blocks.0.attn has FourierMixing, which computes no logits"):
        timm.create_model("vix_fnet_cifar", scale_logits=65)


@pytest.mark.parametrize("value", ["linear", 1, -3, True, 2.5, [197]])
def test_other_values_change_nothing(value) -> None:
    model = host()
    with pytest.raises(InputError, match=r"scale_logits=.*expected 'log', or the number of tokens"):
        timm_vix.convert(model, "softmax", scale_logits=value)
    assert type(model.blocks[0].attn).__name__ == "Attention"


def test_a_mixer_without_queries_has_no_logits() -> None:
    with pytest.raises(InputError, match="scale_logits=.*: blocks.1.attn has FourierMixing, which computes no logits"):
        timm_vix.convert(host(), "fnet", layers=[1], scale_logits="log")
    model = timm.models.vision_transformer.VisionTransformer(depth=1, embed_dim=32, num_heads=2)
    with pytest.raises(InputError, match="has no pretrained_cfg that tells the size with which it was trained"):
        timm_vix.convert(model, "softmax", scale_logits="log")
