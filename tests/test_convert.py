"""Conversion of timm's own models: exact where it must be, refused with a reason where it can't be, and saved whole."""

import copy
import json
import pickle
import re
import shutil
from functools import partial

import numpy as np
import pytest
import timm
import torch
from conftest import FEW, condition, distance, gradients, lively, rounding, scripted, vit, with_each_mixer
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from timm.layers import Attention
from timm.models import save_for_hf

import timm_vix
from timm_vix._checks import InputError
from timm_vix.conversion.convert import attention_sites
from timm_vix.mixers import MIXERS
from timm_vix.mixers._mechanism import AttentionMechanism
from timm_vix.slots.landmark_slot import LandmarkSlot
from timm_vix.slots.model import mixer_name
from timm_vix.train.hub import write_hub


def eva(**kwargs):
    small = dict(img_size=56, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    return timm.create_model("eva02_tiny_patch14_224", **{**small, **kwargs}).eval()


def giant(**kwargs):
    """A host without positions of its own in attention, and with biases apart from the joint projection."""
    small = dict(img_size=56, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return timm.create_model("eva_giant_patch14_224", **{**small, **kwargs}).eval()


# the hosts with the mixers that they take: EVA-02's rotary positions need queries and keys
CONVERSIONS = [(host, mixer) for host in (vit, eva, giant) for mixer in MIXERS]
CONVERSIONS = [pair for pair in CONVERSIONS if pair[0] is not eva or MIXERS[pair[1]].supports_rotary]


def images(model, batch=2):
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def converted(model):
    return [i for i, block in enumerate(model.blocks) if not isinstance(block.attn, Attention)]


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("all", [0, 1, 2, 3]),
        ("first-1", [0]),
        ("last-3", [1, 2, 3]),
        ("every-2", [1, 3]),
        ("every-3", [2]),
        ([2, 0], [0, 2]),
        ((3,), [3]),
        ({1: "fnet", "3": {"mixer": "linformer"}}, [1, 3]),
        ({0: "softmax", 2: "performer"}, [2]),
    ],
)
def test_layers(layers, expected):
    model = vit()
    report = timm_vix.convert(model, "nystrom", layers)
    assert converted(model) == expected
    assert [row.layer for row in report.rows if row.changed] == expected
    assert len(report.rows) == 4
    assert len(report.table().splitlines()) == 5


def test_a_mapping_mixes_mechanisms_and_keywords():
    model = vit()
    layers = {0: "linformer", 1: {"mixer": "nystrom", "num_landmarks": 4}, 2: "nystrom", 3: {"mixer": "performer"}}
    report = timm_vix.convert(model, layers=layers, num_landmarks=9, num_features=24)
    assert [mixer_name(block.attn) for block in model.blocks] == ["linformer", "nystrom", "nystrom", "performer"]
    assert [row.config.get("num_landmarks") for row in report.rows] == [None, 4, 9, None]
    assert model.blocks[3].attn.core.num_features == 24


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(layers="last-0"), ["last-0", "1 to 4"]),
        (dict(layers="first-5"), ["first-5", "1 to 4"]),
        (dict(layers="some"), ["'some'", "every-n"]),
        (dict(layers=[4]), ["4 is no layer", "0 to 3"]),
        (dict(layers=[-1]), ["-1 is no layer"]),
        (dict(layers=[True]), ["True is no layer"]),
        (dict(layers=[]), ["names no layer"]),
        (dict(layers={}), ["names no layer"]),
        (dict(layers=3), ["layers=3"]),
        (dict(layers={0: "windows"}), ["'windows'", "nystrom"]),
        (dict(layers={0: {"mixer": "fnet", "num_landmarks": 3}}), ["fnet", "num_landmarks"]),
        (dict(layers={0: 7}), ["layer 0", "7"]),
        (dict(layers={0: "fnet", "0": "fnet"}), ["layer 0"]),
        (dict(mixer="windows"), ["'windows'", "nystrom"]),
        (dict(num_features=8), ["nystrom", "num_features belongs to mixer='performer'"]),
        (dict(merge_keys=0.5), ["nystrom", "merge_keys belongs to mixer='softmax'"]),
        (dict(layers="last-2", merge=2), ["layers='last-2'", "none is named", "mixer="]),
        (dict(layers=[1], scale_logits=4), ["layers=[1]", "none is named", "mixer="]),
        (dict(mixer="softmax", conv_residual=True, merge=2), ["SoftmaxAttention with conv_residual"]),
        (
            dict(layers={0: "nystrom", 3: {"mixer": "performer", "num_features": 0}}),
            ["blocks.3.attn", "num_features=0"],
        ),
    ],
    ids=str,
)
def test_wrong_arguments_change_nothing(arguments, words):
    model = vit()
    before, x = copy.deepcopy(model), images(model)
    with pytest.raises(ValueError) as error:
        timm_vix.convert(model, **arguments)
    assert all(word in str(error.value) for word in words), error.value
    assert converted(model) == [] and torch.equal(model(x), before(x))
    assert model._model_args == before._model_args and not model.patch_embed._forward_hooks


def test_a_residual_convolution_begins_as_nothing_and_learns():
    plain, local, x = vit(), vit(), torch.randn(2, 3, 32, 32)
    local.load_state_dict(plain.state_dict())
    timm_vix.convert(plain, "nystrom", num_landmarks=4)
    timm_vix.convert(local, "nystrom", num_landmarks=4, conv_residual=True)
    assert distance(local(x), plain(x)) < 1e-6
    local(x).square().sum().backward()
    # the last block's class token, which is classified, sees no patch's convolution
    assert all(block.attn.core.conv.weight.grad.abs().max() > 0 for block in local.blocks[:-1])


def test_a_model_of_ours_whose_mixer_was_overridden_comes_back(tmp_path):
    """Its own keywords and those of the conversion have the same names."""
    model = timm.create_model("vix_nystrom_cifar", mixer="softmax", depth=2, img_size=8).eval()
    timm_vix.convert(model, "linformer", layers=[1], num_proj_tokens=9)
    x = images(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    timm_vix.revert(again)
    timm_vix.revert(model)
    assert torch.equal(again(x), model(x))
    assert again._model_args["mixer"] == "softmax" and "layers" not in again._model_args


def check_scripted(model):
    """Scripted at another size than it was built for it is the same function."""
    patch = model.patch_embed.patch_size[0]
    size = (3 * patch, 5 * patch)
    model.set_input_size(size)
    x = torch.randn(2, 3, *size)
    assert distance(scripted(model)(x), model(x)) < 1e-5


@pytest.mark.slow
def test_all_mixers_are_scripted_in_a_host_with_rotary_positions():
    check_scripted(with_each_mixer(eva, [mixer for host, mixer in CONVERSIONS if host is eva]))


@pytest.mark.slow
@pytest.mark.parametrize("host, mixer", CONVERSIONS)
def test_torchscript(host, mixer):
    model = host()
    timm_vix.convert(model, mixer, **FEW.get(mixer, {}))
    check_scripted(model)


@pytest.mark.parametrize("host", [vit, eva])
def test_softmax_is_the_identity(host):
    model = host()
    x = images(model)
    y, keys = model(x), list(model.state_dict())
    timm_vix.convert(model, "softmax")
    assert torch.equal(model(x), y) and list(model.state_dict()) == keys
    assert not model.patch_embed._forward_hooks and "source" not in model._model_args


@pytest.mark.parametrize("mixer", MIXERS)
def test_there_and_back(mixer):
    model = vit()
    x, weights, args, cfg = images(model), dict(model.named_parameters()), model._model_args, model.pretrained_cfg
    y = model(x)
    timm_vix.convert(model, mixer, **FEW.get(mixer, {}))
    if issubclass(MIXERS[mixer], AttentionMechanism):
        assert all(dict(model.named_parameters())[name] is p for name, p in weights.items()), "weights are shared"
    if mixer == "softmax":
        with pytest.raises(ValueError, match="nothing to revert"):
            timm_vix.revert(model)
        return
    assert distance(model(x), y) > 1e-6
    timm_vix.revert(model)
    assert torch.equal(model(x), y)
    assert dict(model.named_parameters()).keys() == weights.keys()
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert (model._model_args, model.pretrained_cfg) == (args, cfg)
    with pytest.raises(ValueError, match="nothing to revert"):
        timm_vix.revert(model)


@pytest.mark.parametrize("host", [vit, eva])
def test_back_after_training_moving_and_copying(host):
    model = host()
    timm_vix.convert(model, "nystrom", "last-2", num_landmarks=4)
    model.train()(images(model)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model = pickle.loads(pickle.dumps(copy.deepcopy(model))).double().eval()
    fresh = host().double()
    fresh.load_state_dict(model.state_dict())
    x = images(model).double()
    timm_vix.revert(model)
    assert torch.equal(model(x), fresh(x))


def test_converting_again_starts_from_the_attention():
    model, direct = vit(), vit()
    direct.load_state_dict(model.state_dict())
    timm_vix.convert(model, "performer")
    timm_vix.convert(model, "nystrom", "first-2", num_landmarks=4)
    report = timm_vix.convert(model, "softmax", [3])
    timm_vix.convert(direct, layers={0: "nystrom", 1: "nystrom", 2: "performer"}, num_landmarks=4)
    x = images(model)
    assert torch.equal(model(x), direct(x))
    assert [row.changed for row in report.rows] == [False, False, False, True]
    assert model._model_args["layers"] == direct._model_args["layers"]


def test_softmax_layers_that_have_a_slot_keep_it():
    model = vit()
    timm_vix.convert(model, "softmax", merge=2)
    slots = [block.attn for block in model.blocks]
    report = timm_vix.convert(model, "performer", layers=[0])
    assert [block.attn is slot for block, slot in zip(model.blocks, slots)] == [False, True, True, True]
    assert [row.changed for row in report.rows] == [True, False, False, False]


FUSED = {
    "class": vit,
    "average": partial(vit, class_token=False, global_pool="avg"),
    "distilled": partial(vit, "deit_tiny_distilled_patch16_224"),
    "eva_biases": giant,
}


@pytest.mark.parametrize("scale", [0, 9])
@pytest.mark.parametrize("mixer, few", [("nystrom", {"num_landmarks": 2}), ("linformer", {"num_proj_tokens": 2})])
@pytest.mark.parametrize("kind", FUSED)
def test_fused_projections_are_those_of_the_host(kind, mixer, few, scale, monkeypatch):
    """Outputs and gradients with and without queries, keys and values of single tokens."""
    model = lively(FUSED[kind]()).double()
    x = images(model).double()
    timm_vix.convert(model, mixer, scale_logits=scale, **few)
    prefix = model.num_prefix_tokens
    landmarks = torch.zeros(1, 2, prefix + 2, 16)
    assert model.blocks[0].attn.can_fuse_projections(prefix + 16, landmarks, None)
    fused = model(x), gradients(model, x)
    monkeypatch.setattr(LandmarkSlot, "can_fuse_projections", lambda *_: False)
    for mine, other in zip(fused, (model(x), gradients(model, x))):
        assert distance(mine, other) < rounding(torch.float64, 100)


@pytest.mark.parametrize(
    "kwargs", [{}, {"qkv_fused": False}, {"num_reg_tokens": 2}, {"qk_norm": True}, {"qkv_bias": False}]
)
@pytest.mark.parametrize(
    "kind", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224", "vit_small_patch16_dinov3"]
)
def test_rotary_positions_of_the_host_reach_the_mixer(kind, kwargs):
    patch = 14 if "14" in kind else 16
    size = (4 * patch, 3 * patch)
    model = timm.create_model(kind, img_size=size, embed_dim=64, depth=2, num_heads=2, num_classes=5, **kwargs)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    y = model(x)
    timm_vix.convert(model, "nystrom", num_landmarks=12)
    assert distance(model(x), y) < 1e-8
    timm_vix.convert(model, "linformer", num_proj_tokens=12)
    assert distance(model(x), y) < 1e-8
    # one window over the grid, and windows of one token, which with gates of 1 add nothing
    timm_vix.convert(model, "atrous", dilations=(1, 4), window_size=4)
    assert distance(model(x), y) < 1e-8
    # a table for other positions changes the function
    attn, rope = model.blocks[0].attn, torch.randn(12, 64, dtype=torch.float64)
    tokens = torch.randn(1, 12 + model.num_prefix_tokens, 64, dtype=torch.float64)
    assert distance(attn(tokens, rope=rope), attn(tokens)) > 1e-3


def test_pooled_rotary_positions_turn_by_the_centre_of_a_cell():
    from timm.layers import RotaryEmbeddingCat

    from timm_vix.mixers._resample import table_of_cells

    def table(shape, offset):
        rope = RotaryEmbeddingCat(16, in_pixels=False, feat_shape=shape, grid_offset=offset, temperature=100.0)
        return rope.get_embed()

    # cells of 2x2 patches on a 6x4 grid have their centres at 0.5, 2.5, 4.5
    from timm.layers import freq_bands

    bands = freq_bands(4, 100.0, 1)
    rows, columns = torch.tensor([0.5, 2.5, 4.5]), torch.tensor([0.5, 2.5])
    places = torch.cartesian_prod(rows, columns)
    angles = torch.cat([places[:, :1] * bands, places[:, 1:] * bands], 1).repeat_interleave(2, 1)
    expected = torch.cat([angles.sin(), angles.cos()], 1)
    assert distance(table_of_cells(table((6, 4), 0), 0, (6, 4), (3, 2)), expected) < 1e-4
    with_prefix = table_of_cells(table((6, 4), 0), 2, (6, 4), (3, 2))
    assert with_prefix.shape == (8, 32) and torch.equal(with_prefix[:2, :16], torch.zeros(2, 16))


def test_mechanisms_without_queries_refuse_rotary_hosts():
    without = [mixer for mixer, kind in MIXERS.items() if not kind.supports_rotary]
    assert without
    for mixer in without:
        with pytest.raises(ValueError, match="rotary positions of Eva"):
            timm_vix.convert(eva(), mixer)


@pytest.mark.parametrize("host, patch", [(vit, 8), (eva, 14)])
@pytest.mark.parametrize("mixer", ["nystrom", "linformer"])
def test_other_resolutions(host, patch, mixer):
    fixed, dynamic = host(), host(dynamic_img_size=True)
    timm_vix.convert(fixed, mixer)
    timm_vix.convert(dynamic, mixer)
    dynamic.load_state_dict(fixed.state_dict())
    size = (3 * patch, 6 * patch)
    x = torch.randn(2, 3, *size)
    y = dynamic(x)
    fixed.set_input_size(size)
    # a table of rotary positions that is made anew differs in rounding
    assert distance(fixed(x), y) < 1e-5


# plain ViTs, and some of the models that are refused
BY_DEFAULT = (
    "vision_transformer", "deit", "eva", "beit", "vision_transformer_sam", "naflexvit", "cait", "xcit", "hiera",
    "levit", "swin_transformer", "pit",
)  # fmt: skip


def registry():
    modules = [
        "vision_transformer", "vision_transformer_hybrid", "deit", "eva", "beit", "vision_transformer_sam",
        "vision_transformer_relpos", "naflexvit", "cait", "xcit", "hiera", "volo", "deepseek_vit", "vitamin", "levit",
        "crossvit", "pit", "twins", "convit", "tnt", "swin_transformer", "coat", "visformer", "nest", "tiny_vit",
    ]  # fmt: skip
    for module in modules:
        names = timm.list_models(module=module)
        for start in range(0, len(names), 40):
            marks = [] if start == 0 and module in BY_DEFAULT else [pytest.mark.slow]
            yield pytest.param(module, names[start : start + 40], id=f"{module}-{start}", marks=marks)


REFUSALS = (
    "relative position bias|subtracts one softmax|joint projections|grouped queries|works in windows|"
    "none of timm's Attention|not prefix tokens and one patch grid|has no attention"
)


# modules of which nearly all models are converted, and compared: 90 % of any 40 at least, with timm 1.0.31
PLAIN_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "naflexvit")


@pytest.mark.parametrize("module, names", list(registry()))
def test_every_vit_of_the_registry_is_converted_rightly_or_refused_with_a_reason(module, names):
    compared = 0
    for name in names:
        patch = int((re.findall(r"patch(\d+)", name) or [16])[0])
        small = dict(img_size=4 * patch, embed_dim=128, depth=1, num_heads=2, num_classes=3)
        try:
            model = timm.create_model(name, **small)
        except Exception:  # other classes take other keywords: at full size, without memory
            with torch.device("meta"):
                try:
                    model = timm.create_model(name)
                except (RuntimeError, NotImplementedError):
                    continue  # some of timm's models can't be built without values
        # the layer scale starts too small to show a wrong attention
        for parameter in model.parameters():
            if not parameter.is_meta:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        meta = next(model.parameters()).is_meta
        original = copy.deepcopy(model) if not meta else model
        try:
            patches = getattr(getattr(model, "patch_embed", None), "num_patches", 16)
            timm_vix.convert(model, "nystrom", **({} if meta else {"num_landmarks": patches}))
            refusal = None
        except ValueError as error:
            refusal = str(error)
        if refusal is not None:
            assert re.search(REFUSALS, refusal), (name, refusal)
            assert type(model).__name__ in refusal or "blocks." in refusal, (name, refusal)
            continue
        assert any(isinstance(part, MIXERS["nystrom"]) for part in model.modules()), name
        if not meta:
            size = model.patch_embed.img_size if hasattr(model, "patch_embed") else 2 * (4 * patch,)
            x = torch.randn(1, 3, *size, dtype=torch.float64)
            y, expected = model.double().eval()(x), original.double().eval()(x)
            assert y.isfinite().all() and distance(y, expected) < 1e-10, name
            # Nyström attention is computed as softmax then; Linformer pools and projects in its slot
            timm_vix.convert(model, "linformer", num_proj_tokens=patches)
            assert distance(model(x), expected) < 1e-8, name  # tables of rotary positions are in float32
            compared += 1
    assert module not in PLAIN_MODULES or compared >= 0.85 * len(names)


def test_unconvertible_models_name_module_and_reason():
    for name, words in {
        "beit_base_patch16_224": ["Beit", "blocks.0.attn", "relative position bias"],
        "samvit_base_patch16": ["VisionTransformerSAM", "relative position"],
        "vit_dlittle_patch16_reg1_gap_256": ["blocks.0.attn", "DiffAttention", "subtracts"],
        "vit_base_patch16_xp_224": ["blocks.0", "ParallelScalingBlock", "joint projections"],
        "resnet18": ["ResNet", "no attention"],
        "vix_nystrom_tiny": ["blocks.0.attn", "NystromAttention", "mixer="],
    }.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(ValueError) as error:
            timm_vix.convert(model)
        assert all(word in str(error.value) for word in words), error.value


def test_dropped_patches_are_refused():
    with pytest.raises(ValueError, match=r"patch_drop_rate=0.5.*nystrom"):
        timm_vix.convert(vit(patch_drop_rate=0.5), "nystrom")


def test_parallel_blocks_and_features():
    model = vit("vit_small_patch16_18x2_224", depth=2)
    timm_vix.convert(model, "nystrom", "last-1", num_landmarks=4)
    slots = attention_sites(model)
    assert [len(block) for block in slots] == [2, 2]
    modules = [getattr(site.parent, site.name) for block in slots for site in block]
    kinds = [type(getattr(module, "core", module)).__name__ for module in modules]
    assert kinds == ["Attention"] * 2 + ["NystromAttention"] * 2
    arguments = dict(img_size=64, depth=4, num_landmarks=4)
    torch.manual_seed(0)
    wrapped = timm.create_model("vix_from_timm", features_only=True, **arguments).eval()
    torch.manual_seed(0)
    whole, x = timm.create_model("vix_from_timm", **arguments).eval(), torch.randn(1, 3, 64, 64)
    expected = whole.forward_intermediates(x, indices=3, norm=False, intermediates_only=True)
    for found, wanted in zip(wrapped(x), expected, strict=True):
        assert torch.equal(found, wanted)


# --- by name, and from a folder


def test_by_name_it_is_the_same_model(deit):
    overlay = dict(file=str(deit))
    source = dict(img_size=64, pretrained=True, pretrained_cfg_overlay=overlay)
    named = timm.create_model(
        "vix_from_timm", source="deit_tiny_patch16_224", mixer="nystrom", layers="last-6", num_landmarks=9, **source
    ).eval()
    model = timm.create_model("deit_tiny_patch16_224", **source).eval()
    timm_vix.convert(model, "nystrom", "last-6", num_landmarks=9)
    x = images(model)
    assert torch.equal(named(x), model(x))
    assert named.pretrained_cfg["architecture"] == model.pretrained_cfg["architecture"] == "vix_from_timm"


def by_name(**keywords):
    """A small conversion by name of a source that was trained at 16 px, with 5 tokens."""
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    size["pretrained_cfg_overlay"] = dict(input_size=(3, 16, 16))
    return timm.create_model("vix_from_timm", source="vit_tiny_patch16_224", **{**size, **keywords}).eval()


@pytest.mark.parametrize(
    "keywords, resized",
    [
        (dict(mixer="softmax", scale_logits="log", img_size=64), None),  # 17 tokens, of 5 in training
        (dict(mixer="softmax", merge=0.5), None),
        (dict(mixer="linformer", layers="all", num_proj_tokens=12), 24),  # 9 patches are left
        (dict(mixer="performer", layers="last-1", feature_seed=2**40, redraw_interval=10**6), None),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_model_that_was_built_by_name_comes_back(keywords, resized, tmp_path):
    """timm lays what the caller gave over what the model notes of itself, and that may mean something else later."""
    model = by_name(**keywords)
    if resized:
        model.set_input_size(resized)
    x = images(model)
    save_for_hf(model, tmp_path / "first", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True).eval()
    assert distance(again(x), model(x)) < 1e-6
    save_for_hf(again, tmp_path / "second", safe_serialization=True)
    assert distance(timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True).eval()(x), model(x)) < 1e-6
    write_hub(tmp_path / "settled", again, {}, ModelCard("---\nlicense: mit\n---\n"))
    assert "conversion" not in (tmp_path / "settled" / "config.json").read_text()
    settled = timm.create_model(f"local-dir:{tmp_path / 'settled'}", pretrained=True).eval()
    assert distance(settled(x), model(x)) < 1e-6
    if resized:  # only our loader resamples matrices
        return
    # as Transformers' wrapper builds it, from the configuration alone
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    built = timm.create_model(config["architecture"], **{**config["model_args"], "num_classes": 5}).eval()
    built.load_state_dict(model.state_dict())
    assert distance(built(x), model(x)) < 1e-6


@pytest.mark.parametrize(
    "keywords, changed",
    [
        (dict(mixer="softmax", scale_logits="log", img_size=64), dict(scale_logits=0)),
        (dict(mixer="softmax", scale_logits="log", img_size=64), dict(scale_logits=9)),
        (dict(mixer="softmax", merge=0.5), dict(merge=0)),
        (dict(mixer="nystrom", num_landmarks=4), dict(num_landmarks=9)),
        (dict(mixer="nystrom", num_landmarks=4, merge=0), dict(layers="last-1")),
        (dict(mixer=None, layers={1: "nystrom"}, scale_logits="log", img_size=64), dict(layers="all")),
        (dict(mixer=None, layers="last-1", num_landmarks=4, merge=0), dict(num_landmarks=9)),
    ],
    ids=str,
)
@torch.no_grad()
def test_who_loads_a_model_that_was_built_by_name_may_change_it(keywords, changed, tmp_path):
    model = lively(by_name(**keywords))
    x = images(model)
    save_for_hf(model, tmp_path / "first", safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True, **changed).eval()
    expected = by_name(**{**keywords, **changed, "mixer": keywords["mixer"] or "nystrom"})
    expected.load_state_dict(model.state_dict())
    assert distance(loaded(x), expected(x)) < 1e-6 < distance(model(x), expected(x))
    save_for_hf(loaded, tmp_path / "second", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True).eval()
    assert distance(again(x), expected(x)) < 1e-6


@torch.no_grad()
def test_attention_that_comes_back_has_the_present_grid():
    expected = vit("vix_softmax_cifar", depth=2, rope="axial")
    model = copy.deepcopy(expected)
    timm_vix.convert(model, "nystrom", num_landmarks=4)
    for host in (expected, model):
        host.set_input_size((48, 40))
    timm_vix.revert(model)
    x = images(model)
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("form", ["file", "state_dict"])
def test_weights_of_a_configuration_are_the_sources(form, tmp_path) -> None:
    source = timm.create_model("deit_tiny_patch16_224", depth=2, embed_dim=24, num_classes=5)
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    config = {"file": str(tmp_path / "source.safetensors")} if form == "file" else {"state_dict": source.state_dict()}
    model = timm.create_model(
        "vix_from_timm", pretrained=True, pretrained_cfg=config, mixer="pool", depth=2, embed_dim=24, num_classes=5
    )
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def saved():
    """By default each mixer as safetensors, and one in the other formats, which know nothing of mixers."""
    for host, mixer in CONVERSIONS:
        for safe in (True, False, "both"):
            by_default = safe is True or (host is vit and mixer == "nystrom")
            if host is not giant and mixer != "softmax":
                yield pytest.param(host, mixer, safe, marks=[] if by_default else pytest.mark.slow)


@pytest.mark.parametrize("host, mixer, safe", list(saved()))
def test_saved_and_loaded_it_is_the_same_function(host, mixer, safe, tmp_path):
    model = host()
    keywords = {"feature_seed": 7} if mixer == "performer" else FEW.get(mixer, {})
    timm_vix.convert(model, layers={0: mixer, 2: {"mixer": mixer}}, **keywords)
    for tensor in model.state_dict().values():
        tensor.add_(0.05 * torch.randn_like(tensor))
    save_for_hf(model, tmp_path / "hub", safe_serialization=safe)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    x = images(model)
    assert torch.equal(loaded(x), model(x))
    size = (56, 70) if host is eva else (32, 40)
    other = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=3, img_size=size).eval()
    resized, larger = copy.deepcopy(model), images(other)
    resized.set_input_size(size)
    bound = rounding(torch.float32, condition(type(resized).forward_features, resized, larger))
    assert distance(other.forward_features(larger), resized.forward_features(larger)) < bound
    assert other(larger).shape == (2, 3)
    if issubclass(MIXERS[mixer], AttentionMechanism):
        timm_vix.revert(loaded)
        timm_vix.revert(model)
        assert torch.equal(loaded(x), model(x))
    else:
        with pytest.raises(ValueError, match="no softmax attention to go back to"):
            timm_vix.revert(loaded)


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a downloaded file ran')",))


def no_weights(folder):
    pass


def pickled(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))


def zipped_pickle(folder):
    torch.save({"blocks.0": Hostile()}, folder / "pytorch_model.bin")


def renamed_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Hostile()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = vit()
    timm_vix.convert(model, "nystrom", "last-2", num_landmarks=4)
    save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(mixer="evil"), ["'evil'", "nystrom"]),
        (dict(layers={"0": {"mixer": "evil"}}), ["'evil'", "nystrom"]),
        (dict(layers={"99": {"mixer": "nystrom"}}), ["'99' is no layer"]),
        (dict(layers="first-99"), ["first-99"]),
        (dict(layers={"0": {"mixer": "nystrom", "num_landmarks": 10**9}}), ["1000000000"]),
        (dict(layers={"0": {"mixer": "performer", "num_features": 60_000}}), ["don't fit"]),
        (dict(source="../../etc/passwd"), ["../../etc/passwd", "not registered in timm"]),
        (dict(source="hf-hub:somebody/else"), ["no model of timm itself"]),
        (dict(source="vix_from_timm"), ["no model of timm itself"]),
        (dict(source=["deit_tiny_patch16_224"]), ["not registered in timm"]),
        (dict(embed_dim=64), ["don't fit"]),
        (dict(depth=5), ["don't fit"]),
        (dict(depth=10**6), ["depth=1000000", "1000"]),
        (dict(embed_dim=10**9), ["embed_dim"]),
        (dict(embed_dim=65_536, num_heads=64), ["far more than the weights"]),
        (dict(img_size=[60_000, 60_000]), ["far more than the weights"]),
        (dict(depth="four"), ["don't build"]),
        (dict(layers={"0": {"mixer": "nystrom", "num_landmarks": 10**6}}), ["num_landmarks=1000000", "65536"]),
        (dict(conversion={"mixer": "pool"}), ["conversion=", "given. and .found"]),
        (dict(conversion=""), ["conversion=''", "given. and .found"]),
        (dict(conversion=0), ["conversion=0", "given. and .found"]),
        (dict(conversion=[]), [r"conversion=\[\]", "given. and .found"]),
        (dict(layers="plan.json"), ["names no file"]),
        (dict(unknown=3), ["unknown"]),
        (dict(checkpoint_path="/etc/passwd"), ["checkpoint_path"]),
        (dict(device="cpu", embed_dim=65_536), ["device", "may not say where"]),
        (dict(source_kwargs={"dtype": "float64"}), ["dtype", "may not say where"]),
        (dict(source_kwargs="depth"), ["source_kwargs='depth'", "by name"]),
        (
            dict(conversion={"given": {}, "found": dict.fromkeys(("mixer", "layers", "merge", "scale_logits"))}),
            ["conversion=", "given. and .found"],
        ),
    ],
    ids=str,
)
def test_a_hostile_configuration_is_refused(saved, changes, words, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    config["model_args"].update(changes)
    shutil.copy(saved / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert all(re.search(word, str(error.value)) for word in words), error.value


@pytest.mark.parametrize("write", [no_weights, pickled, zipped_pickle, renamed_pickle], ids=lambda f: f.__name__)
def test_only_tensors_are_read(saved, write, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match="readable weights"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_truncated_file_is_refused(saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="readable weights"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_an_unknown_source_names_near_ones():
    with pytest.raises(ValueError, match="near names: deit_tiny_patch16_224"):
        timm.create_model("vix_from_timm", source="deit_tiny_patch16_24")


@pytest.mark.parametrize("kind", ["hook", "pre_hook", "forward"])
def test_attention_with_hooks_is_not_lost(kind):
    """Neither when it is replaced, nor by what leaves it its mechanism, nor when a mixer goes."""
    model, x = vit(), torch.randn(2, 3, 32, 32)

    def watch(attn):
        if kind == "forward":
            attn.forward = type(attn).forward.__get__(attn)
            return lambda: attn.__dict__.pop("forward")
        return getattr(attn, f"register_forward_{kind}")(lambda *_: None).remove

    value, remove = model(x), watch(model.blocks[2].attn)
    for keywords in (dict(mixer="linformer", num_proj_tokens=4), dict(merge=2), dict(scale_logits=5)):
        with pytest.raises(ValueError, match="blocks.2.attn has hooks or a forward of its own, which would be lost"):
            timm_vix.convert(model, **keywords)
        assert torch.equal(model(x), value) and not converted(model)
    timm_vix.convert(model, "linformer", layers=[0], num_proj_tokens=4)  # of another layer
    remove()
    timm_vix.convert(model, "linformer", num_proj_tokens=4)
    remove = watch(model.blocks[2].attn)
    with pytest.raises(ValueError, match="blocks.2.attn has hooks"):
        timm_vix.revert(model)
    assert converted(model) == [0, 1, 2, 3]
    remove()
    timm_vix.revert(model)
    assert torch.equal(model(x), value)


@pytest.mark.parametrize("part", ["blocks", "blocks.1.attn.attn_drop", "blocks.1.attn.qkv"])
def test_hooks_beside_attention_are_not_lost(part):
    """In the container of the blocks, whose place one that merges takes, and in a part that a mixer doesn't call."""
    model, x = vit(), torch.randn(2, 3, 32, 32)
    value, handle = model(x), model.get_submodule(part).register_forward_hook(lambda *_: None)
    if part == "blocks":
        timm_vix.convert(model, "performer")  # the container stays
        with pytest.raises(ValueError, match="blocks has hooks or a forward of its own, which would be lost"):
            timm_vix.convert(model, merge=2)
        timm_vix.revert(model)
    else:
        with pytest.raises(ValueError, match=f"{part} has hooks or a forward of its own, which would be lost"):
            timm_vix.convert(model, "fnet")
    assert torch.equal(model(x), value) and not converted(model)
    handle.remove()
    timm_vix.convert(model, merge=2)
    handle = model.blocks.register_forward_hook(lambda *_: None)
    timm_vix.convert(model, "linformer", layers=[0], num_proj_tokens=4)  # merges as before, in the same container
    with pytest.raises(ValueError, match="blocks has hooks"):
        timm_vix.revert(model)
    handle.remove()
    assert not model.blocks.training and not model.training
    timm_vix.revert(model)
    assert torch.equal(model(x), value) and not model.blocks.training


def test_hooks_of_all_modules_see_blocks_that_merge():
    model, x = vit(), torch.randn(1, 3, 32, 32)
    timm_vix.convert(model, merge=2)
    seen = []
    handle = torch.nn.modules.module.register_module_full_backward_pre_hook(lambda module, _: seen.append(module))
    try:
        model(x).sum().backward()
    finally:
        handle.remove()
    assert set(model.blocks.children()) <= set(seen)


def test_dropout_that_was_switched_on_stays_on():
    """As for samples of predictions: in eval mode, but for dropout."""
    model = vit(proj_drop_rate=0.1)
    timm_vix.convert(model, "linformer", num_proj_tokens=4)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    with pytest.raises(ValueError, match="nonsense"):
        timm_vix.convert(model, "nonsense")
    timm_vix.convert(model, "nystrom", num_landmarks=4)
    timm_vix.revert(model)
    assert all(block.attn.proj_drop.training and not block.attn.training for block in model.blocks)


@pytest.mark.parametrize("name", ["vix_softmax_cifar", "pin_cifar", "convix_gpsa_tiny"])
def test_layers_that_cannot_be_saved_are_refused_by_name(name):
    for layers in (range(2), {0, 1}):
        with pytest.raises(ValueError, match="expected text, a list of indices, or a mapping from index to mixer"):
            timm.create_model(name, layers=layers)
    with pytest.raises(ValueError, match=r"layers='plan.json': a plan is for timm_vix.convert and vix_from_timm"):
        timm.create_model(name, layers="plan.json")


def test_layers_of_a_conversion_that_cannot_be_saved_are_refused(tmp_path):
    for layers in (range(2), tmp_path / "plan.json"):
        with pytest.raises(ValueError, match="expected text, a list of indices, or a mapping from index to mixer"):
            timm.create_model("vix_from_timm", source="vit_tiny_patch16_224", layers=layers, mixer="linformer")
    timm_vix.convert(model := vit(), "linformer", layers=range(2), num_proj_tokens=4)  # recorded as a mapping
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert converted(timm.create_model(f"local-dir:{tmp_path}", pretrained=True)) == [0, 1]


def test_blocks_that_are_one_module_are_refused():
    model = vit()
    model.blocks[2] = model.blocks[0]
    before, x = copy.deepcopy(model), images(model)
    for change in (dict(mixer="axial", layers=[3]), dict(merge=2)):
        with pytest.raises(ValueError, match="blocks.2 is the same module as blocks.0"):
            timm_vix.convert(model, **change)
    assert len(model.blocks) == 4 and torch.equal(model(x), before(x))


@pytest.mark.parametrize(
    "back", [timm_vix.revert, partial(timm_vix.convert, mixer="softmax")], ids=["revert", "softmax"]
)
@pytest.mark.parametrize("mixer", ["fnet", "nystrom"])
def test_what_was_frozen_is_frozen_when_it_comes_back(mixer, back):
    model = vit()
    timm_vix.convert(model, mixer)
    model.requires_grad_(False)
    back(model)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_keyword_changes_a_saved_model(in_place, tmp_path):
    """Whether it was converted after it had been created, or by name."""
    sizes = dict(depth=2, img_size=32, patch_size=8, num_classes=4)
    if in_place:
        model = timm.create_model("vit_tiny_patch16_224", **sizes)
        timm_vix.convert(model, "nystrom", num_landmarks=9)
    else:
        model = timm.create_model(
            "vix_from_timm", source="vit_tiny_patch16_224", mixer="nystrom", num_landmarks=9, **sizes
        )
    save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    folder = f"local-dir:{tmp_path / 'hub'}"
    for keywords, wanted in (({}, 9), (dict(num_landmarks=4), 4)):
        loaded = timm.create_model(folder, pretrained=True, **keywords)
        assert [block.attn.config()["num_landmarks"] for block in loaded.blocks] == [wanted] * 2
    save_for_hf(loaded, tmp_path / "again", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), loaded.eval()(x))


def test_a_mixer_changes_the_layers_of_a_model_that_was_converted_in_place(tmp_path):
    expected = lively(timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, patch_size=8).eval())
    model = copy.deepcopy(expected)
    timm_vix.convert(model, layers={0: "axial", 2: {"mixer": "nystrom", "num_landmarks": 4}})
    save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    folder = f"local-dir:{tmp_path / 'hub'}"
    x = images(model)
    for mixer, keywords in (("axial", dict(strip_width=1)), ("softmax", dict(merge_keys=0.5))):
        loaded = timm.create_model(folder, pretrained=True, mixer=mixer, **keywords).eval()
        timm_vix.convert(expected, mixer, layers=(0, 2), **keywords)
        assert distance(loaded(x), expected(x)) < 1e-6 < distance(model(x), expected(x))
        timm_vix.revert(expected)
    # the weights of its projections are in no file
    with pytest.raises(ValueError, match="the weights don't fit"):
        timm.create_model(folder, pretrained=True, mixer="linformer")


NYSTROM = {"mixer": "nystrom", "num_landmarks": 4}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    "layers, changes, expected",
    [
        ({0: NYSTROM, 1: NYSTROM}, dict(mixer="softmax"), {}),
        (
            {0: NYSTROM, 1: NYSTROM},
            dict(mixer="axial", strip_width=1),
            {i: dict(mixer="axial", strip_width=1) for i in (0, 1)},
        ),
        ({0: NYSTROM, 1: NYSTROM}, dict(layers="first-1"), {0: NYSTROM}),
        ({0: NYSTROM, 1: NYSTROM}, dict(layers={1: "nystrom"}, num_landmarks=2), {1: {**NYSTROM, "num_landmarks": 2}}),
        ({0: "axial", 1: NYSTROM}, dict(mixer="softmax"), {}),
        ({0: "axial", 1: NYSTROM}, dict(num_landmarks=2), {0: "axial", 1: {**NYSTROM, "num_landmarks": 2}}),
        ({0: "axial", 1: NYSTROM}, dict(layers={0: "nystrom", 1: "axial"}), {0: NYSTROM, 1: "axial"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_is_given_for_a_saved_model_is_saved_again(layers, changes, expected, in_place, tmp_path):
    sizes = dict(depth=2, img_size=32, patch_size=8, embed_dim=32, num_heads=2, num_classes=4)
    plain = lively(timm.create_model("vit_tiny_patch16_224", **sizes).eval())
    if in_place:
        model = copy.deepcopy(plain)
        timm_vix.convert(model, layers=layers)
    else:
        model = timm.create_model("vix_from_timm", source="vit_tiny_patch16_224", layers=layers, **sizes).eval()
        model.load_state_dict(plain.state_dict())
    if expected:
        timm_vix.convert(plain, layers=expected)
    x = torch.randn(2, 3, 32, 32)
    place, given = tmp_path / "first", changes
    for again in ("second", "third"):
        save_for_hf(model, place, safe_serialization=True)
        model = timm.create_model(f"local-dir:{place}", pretrained=True, **given).eval()
        assert distance(model(x), plain(x)) < 1e-6
        place, given = tmp_path / again, {}


def test_a_model_with_another_mixer_than_its_name_is_saved_and_loaded(tmp_path):
    model = timm.create_model("vix_nystrom_cifar", depth=2, patch_size=8, num_landmarks=4, conv_residual=False)
    save_for_hf(model, tmp_path / "first", safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True, mixer="axial", layers=[0]).eval()
    save_for_hf(model, tmp_path / "second", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True).eval()
    assert mixer_name(again.blocks[0].attn) == "axial" and type(again.blocks[1].attn) is Attention
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("in_place", [True, False])
def test_layers_for_a_saved_model_without_a_mixer_are_refused(in_place, tmp_path):
    sizes = dict(depth=2, img_size=32, patch_size=8, num_classes=4)
    name, source = ("vit_tiny_patch16_224", {}) if in_place else ("vix_from_timm", {"source": "vit_tiny_patch16_224"})
    model = timm.create_model(name, **source, **sizes, **({} if in_place else {"merge": 0.5}))
    if in_place:
        timm_vix.convert(model, merge=0.5)
    save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="layers='first-1': these are layers for a mixer, and none is named"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, layers="first-1")


def test_a_saved_model_may_have_an_argument_of_its_source_in_two_places(tmp_path):
    arguments = dict(source="vit_tiny_patch16_224", mixer="nystrom", layers="last-1", img_size=32, num_classes=3)
    model = timm.create_model("vix_from_timm", **arguments, source_kwargs=dict(depth=2)).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert len(again.blocks) == 2 and torch.equal(again(x := images(model)), model(x))
    with pytest.raises(ValueError, match="depth=3 and source_kwargs: depth=2 differ"):
        timm.create_model("vix_from_timm", **arguments, depth=3, source_kwargs=dict(depth=2))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(layers=["0", 0]), "names layer 0 twice"),
        (dict(layers=np.array([0, 1]), merge=3), "these are layers for a mixer"),
        (dict(scale_logits=np.array([5, 6])), "scale_logits=array"),
        (dict(mixer="nystrom", num_landmarks=np.int64(4)), "num_landmarks=np.int64(4): expected a Python int"),
        (dict(layers={0: {"mixer": "nystrom", "x": 1, 5: 3}}), "mixer='nystrom' takes"),
    ],
    ids=str,
)
def test_arrays_and_keys_that_are_no_text_are_one_line(arguments, words):
    with pytest.raises(InputError) as error:
        timm_vix.convert(vit(), **arguments)
    assert words in str(error.value)


def test_what_is_no_model_is_named():
    for call in (timm_vix.convert, timm_vix.revert):
        with pytest.raises(InputError, match="model=None: expected a model of timm"):
            call(None)
