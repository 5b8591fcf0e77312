"""Registered names, image sizes, checkpoints: what a user of timm meets."""

import csv
import io
import json
import logging
import tarfile

import pytest
import timm
import torch
from conftest import (
    FEW_VARIANTS,
    LAYOUTS,
    PLAIN,
    REGISTERED,
    VARIANTS,
    condition,
    distance,
    image,
    is_narrow,
    lively,
    on_meta,
    rounding,
    small,
    small_arguments,
    vit,
    without_values,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.layers import Attention
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn

import timm_vix
from timm_vix.mixers import MIXERS
from timm_vix.models.checkpoints import mixer_keys, stem_keys
from timm_vix.slots.model import hosts_of
from timm_vix.stems import STEMS

# Of the plain ViT with a mixer and a stem; of these, the ones that differ in more than their widths.
NAMES = [name for name in REGISTERED if name.startswith(("vix_", "hybrid_", "t2t_")) and "_pi" not in name]
NAMES.remove("vix_from_timm")
NARROW = [name for name in NAMES if is_narrow(name)]
TINY = [name for name in NAMES if "_tiny" in name]
# width, depth, heads, patch, pixels: Touvron et al. 2021 table 1, Dosovitskiy et al. 2021 table 1, Jeevan & Sethi 2022
SIZES = {
    "tiny": (192, 12, 3, 16, 224),
    "small": (384, 12, 6, 16, 224),
    "base": (768, 12, 12, 16, 224),
    "cifar": (128, 4, 4, 1, 32),
}
HYBRIDS = {"vit": "softmax", "vil": "linformer", "vip": "performer", "vin": "nystrom", "via": "atrous"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_what_is_built(name):
    family, mixer, size, *rope = name.split("_")
    mixer = HYBRIDS.get(mixer, mixer)
    model = on_meta(name)
    width, depth, heads, patch, pixels = SIZES[size]
    kind = Attention if mixer == "softmax" and not rope else MIXERS[mixer]
    assert [type(getattr(block.attn, "core", block.attn)) for block in model.blocks] == [kind] * depth
    assert all(getattr(block.attn, "num_heads", heads) == heads for block in model.blocks)
    assert type(model.patch_embed) is STEMS[{"vix": "linear", "hybrid": "conv", "t2t": "t2t"}[family]]
    assert model.patch_embed.patch_size == (patch, patch) and model.patch_embed.img_size == (pixels, pixels)
    assert model.embed_dim == width and model.num_classes == (10 if size == "cifar" else 1000)
    assert (model.pos_embed is None) == bool(rope)
    assert all((getattr(block.attn, "rope", None) is not None) == bool(rope) for block in model.blocks)
    assert "arXiv" in timm.model_entrypoint(name).__doc__


@pytest.mark.parametrize("name", NARROW)
def test_every_name_takes_another_mixer(name):
    for mixer in (mixer for mixer, kind in MIXERS.items() if kind.supports_rotary or "_rope" not in name):
        model = without_values(name, mixer=mixer, depth=1)
        kind = Attention if mixer == "softmax" and "_rope" not in name else MIXERS[mixer]
        assert type(getattr(model.blocks[0].attn, "core", model.blocks[0].attn)) is kind


@pytest.mark.parametrize("family", ["vix_softmax_cifar", "pin_cifar"])
@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_biases_and_features_keep_their_size_in_training(mixer, rope, options, family):
    model = without_values(family, mixer=mixer, rope=rope, **options)
    optimizer = create_optimizer_v2(model, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert any(name.endswith("fc1.weight") for name in names)
    spared = ("bias", "features", "pos_embed", "cls_token")
    assert not [name for name in names if name.rstrip("0123456789").endswith(spared)]


@pytest.mark.parametrize("name", NAMES)
def test_default_configuration(name):
    model = on_meta(name)
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert f"{cfg['classifier']}.weight" in state
    if name.startswith("t2t_"):  # which normalises pieces of the image first, so nothing there takes other channels
        assert cfg.get("first_conv") is None and cfg["input_size"][0] == 3
    else:
        assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0] == 3
    assert cfg["input_size"][1:] == model.patch_embed.img_size and cfg["num_classes"] == model.num_classes
    size = name.split("_")[2]
    if size == "cifar":
        assert not cfg.get("tag") and not cfg.get("hf_hub_id")
        return
    tags = [tag.split(".")[1] for tag in timm.list_pretrained(f"{name}.*")]
    assert sorted(tags) == ["augreg_in21k_ft_in1k", "deit_fb_in1k"]
    assert cfg["tag"] == "augreg_in21k_ft_in1k"
    assert cfg["hf_hub_id"] == f"timm/vit_{size}_patch16_224.augreg_in21k_ft_in1k"
    assert timm.get_pretrained_cfg(f"{name}.deit_fb_in1k").hf_hub_id == f"timm/deit_{size}_patch16_224.fb_in1k"


@pytest.mark.parametrize("name", ["vix_nystrom_tiny", "hybrid_vil_cifar", "vix_performer_small_rope"])
def test_feature_extraction_agrees_with_the_model(name):
    model = lively(timm.create_model(name, img_size=32, depth=3).eval())
    features = timm.create_model(name, img_size=32, depth=3, features_only=True, out_indices=(0, 2)).eval()
    features.model.load_state_dict({k: v for k, v in model.state_dict().items() if "head" not in k}, strict=False)
    x = torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=[0, 2], norm=False, intermediates_only=True)
    for maps, wanted in zip(features(x), expected, strict=True):
        assert distance(maps, wanted) < rounding(torch.float32)


def in_other_size(mixer, rope, options, size, **kwargs):
    """A dynamic model and one that was set to ``size``, with the same weights, in float64."""
    dynamic = small(mixer, rope, **options, dynamic_img_size=True, **kwargs).double()
    fixed = small(mixer, rope, **options, **kwargs).double()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size(size)
    return dynamic, fixed


@pytest.mark.parametrize(
    "mixer, rope, options, layout",
    [
        pytest.param(*v.values, layout, id=f"{v.id}-{layout}")
        for layout in LAYOUTS
        for v in FEW_VARIANTS
        if layout == "class" or v in PLAIN
    ],
)
def test_a_dynamic_model_equals_one_set_to_the_size(mixer, rope, options, layout):
    for size in ((10, 18), (8, 6), (28, 20)):
        dynamic, fixed = in_other_size(mixer, rope, options, size, **LAYOUTS[layout])
        x, built = torch.randn(2, 3, *size).double(), torch.randn(1, 3, 14, 10).double()
        first = dynamic(built)
        assert distance(dynamic(x), fixed(x)) < rounding(torch.float32), size  # positions are resampled in float32
        assert torch.equal(dynamic(built), first)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("mixer, rope, options", PLAIN)
def test_dynamic_padding_with_each_stem(mixer, rope, options, stem):
    dynamic, fixed = in_other_size(mixer, rope, options, (10, 18), stem=stem, dynamic_img_pad=True)
    x = torch.randn(2, 3, 9, 17).double()
    assert distance(dynamic(x), fixed(torch.nn.functional.pad(x, (0, 1, 0, 1)))) < rounding(torch.float32)


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_training_on_changing_sizes(mixer, rope, options):
    """Gradients of one model that sees several sizes are those of models that were set to each."""
    options = {**options, **({"redraw_interval": 0} if "redraw_interval" in options else {})}
    model = small(mixer, rope, **options, dynamic_img_size=True).double().train()
    for size in ((14, 10), (8, 6), (10, 18)):
        fixed = small(mixer, rope, **options).double()
        fixed.load_state_dict(model.state_dict())
        fixed.set_input_size(size)
        x = torch.randn(2, 3, *size).double()
        for trained in (model, fixed.train()):
            trained.zero_grad()
            trained(x).square().sum().backward()
        compared = set()
        for name, p in fixed.named_parameters():
            mine = model.get_parameter(name).grad
            assert mine.isfinite().all()
            if mine.shape == p.shape:  # others live on the grid and were resampled
                assert (mine - p.grad).norm() < rounding(torch.float32) * (1 + p.grad.norm()), (name, size)
                compared.add(name)
        assert {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "head.weight"} <= compared


# keywords of which none is a default, and none follows the grid
KEYWORDS = {
    "linformer": {"num_proj_tokens": 12},
    "nystrom": {"num_landmarks": 12, "ridge": 0.02},
    "performer": {"num_features": 20, "feature_seed": 3},
    "mixer": {"tokens_mlp_ratio": 1.5},
}


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_set_input_size_there_and_back(mixer, rope, options):
    """The model is then one that was built at that size, and what was frozen stays frozen."""
    options = {**options, **KEYWORDS.get(mixer, {})}
    model = small(mixer, rope, **options)
    for p in model.parameters():
        p.requires_grad_(p is model.head.weight)
    for size, before in (((28, 20), (14, 10)), ((14, 10), (28, 20))):
        model.set_input_size(size)
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trains - {"pos_embed"} == {"head.weight"}  # timm makes new positions, which train
        built = small(mixer, rope, **options, img_size=size)
        built.load_state_dict(model.state_dict())
        x = image(built)
        assert torch.equal(model(x), built(x))
        with pytest.raises((ValueError, AssertionError), match="14|28"):
            model(torch.randn(1, 3, *before))


@pytest.mark.parametrize("mixer", [name for name, kind in MIXERS.items() if not kind.uses_grid])
def test_dropped_patches_are_not_read(mixer):
    """17 of 35 patches stay: as a model of so many patches behind the embedding, and no other pixel has a gradient."""
    model = small(mixer, patch_drop_rate=0.5, global_pool="avg").double().train()
    fewer = small(mixer, img_size=(34, 2), global_pool="avg").double().train()
    state = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    assert fewer.load_state_dict(state, strict=False).missing_keys == ["pos_embed"]
    left, x = [], image(model).double().requires_grad_()
    model.patch_drop.register_forward_hook(lambda module, inputs, tokens: left.append(tokens))
    y = model(x)
    assert left[0].shape[1] == 1 + 17
    expected = fewer.forward_head(fewer.norm(fewer.blocks(fewer.norm_pre(left[0]))))
    assert distance(y, expected) < rounding(torch.float64)
    (slope,) = torch.autograd.grad(y.square().sum(), x)
    patches = slope.unfold(2, 2, 2).unfold(3, 2, 2).abs().amax((1, 4, 5))
    assert (patches > 0).sum((1, 2)).tolist() == [17, 17]


RELOADS = [None, (28, 20), (10, 18), (18, 10), (14, 6), (6, 4), (30, 2)]


@pytest.mark.parametrize("size", RELOADS, ids=str)
@pytest.mark.parametrize("mixer, rope, options", FEW_VARIANTS)
def test_a_saved_model_comes_back(mixer, rope, options, size, tmp_path):
    keywords = KEYWORDS.get(mixer, {})
    model = small(mixer, rope, **options, **keywords, stem="linear" if rope else "conv", reg_tokens=1)
    if size:
        model.set_input_size(size)
    x = image(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "vix_softmax_cifar"
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_defaults_that_follow_the_grid_survive_a_reload(mixer, rope, options, tmp_path):
    """49 landmarks or projections are a default of 14 x 14 patches, and less of fewer."""
    for size in ((14, 10), (4, 6), (28, 28)):
        model = small(mixer, rope, **options, img_size=28, patch_size=2)
        model.set_input_size(size)
        save_for_hf(model, tmp_path, safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        x = image(model)
        assert torch.equal(again(x), model(x)), size


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_a_saved_model_comes_back_at_another_size(mixer, rope, options, tmp_path):
    model = small(mixer, rope, **options)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(28, 20)).eval()
    model.set_input_size((28, 20))
    x = image(model)
    assert distance(again(x), model(x)) < rounding(torch.float32, condition(nn.Module.__call__, model, x))


# Weights of a softmax ViT ------------------------------------------------------------------------------------------


def converted(name, file, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs).eval()


@pytest.mark.parametrize("name", TINY)
def test_inherited_weights_are_those_of_the_file(name, deit, caplog):
    with caplog.at_level(logging.WARNING):
        model = converted(name, deit)
    weights, state = load_file(deit), model.state_dict()
    own = mixer_keys(model) | stem_keys(model)
    inherited = set(state) - own
    assert inherited <= set(weights)
    assert all(torch.equal(state[key], weights[key]) for key in inherited)
    # what isn't inherited has no counterpart: a linear embedding, positions, or attention under FNet and token MLPs
    for key in set(weights) - inherited:
        assert key.startswith("patch_embed.") or key == "pos_embed" or ".attn." in key
    assert len(inherited) >= (152 - 12 * 4 - 3)
    lines = [record.message for record in caplog.records]
    (line,) = lines
    assert name in line and "needs fine-tuning" in line
    for key in own:
        # blocks and the convolutions of a stem are folded in the line
        assert ("patch_embed.proj.*" if key.startswith("patch_embed.") else key.split(".", 2)[-1]) in line


@pytest.mark.parametrize("name", [name for name in TINY if "_rope" not in name])
def test_own_weights_keep_their_initial_value(name, deit):
    """But for a convolution of values that know nothing of it, which starts as nothing."""
    torch.manual_seed(3)
    model = converted(name, deit)
    torch.manual_seed(3)
    state = timm.create_model(name).state_dict()
    for path, host in hosts_of(model).items():
        for parameter, value in host.core.added_init.items():
            if f"{path}.core.{parameter}" in state:
                state[f"{path}.core.{parameter}"].fill_(value)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in (mixer_keys(model) | stem_keys(model)))


@pytest.mark.parametrize("name", ["vix_nystrom_tiny", "vix_mixer_tiny", "hybrid_vil_tiny", "vix_performer_tiny_rope"])
def test_other_labels_channels_and_sizes(name, deit):
    kwargs = {"num_classes": 101, "img_size": (160, 96), "depth": 12}
    weights, model = load_file(deit), converted(name, deit, **kwargs)
    assert model.head.weight.shape == (101, 192)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, weights["blocks.3.mlp.fc1.weight"])
    twin = timm.create_model(
        "deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(deit)}, **kwargs
    )
    if model.pos_embed is not None:
        assert torch.equal(model.pos_embed, twin.pos_embed)
    x = torch.randn(1, 3, 160, 96)
    if name == "vix_nystrom_tiny":  # which has no weights of its own
        timm_vix.convert(twin.eval(), "nystrom", **model.blocks[0].attn.config())
        assert torch.equal(model.forward_features(x), twin.forward_features(x))
    else:
        assert model(x).isfinite().all()
    if name.startswith("vix"):
        grey = converted(name, deit, in_chans=1)
        assert distance(
            grey.patch_embed.proj.weight, weights["patch_embed.proj.weight"].sum(1, keepdim=True)
        ) < rounding(torch.float32)


@pytest.mark.parametrize("stem", ["linear", "conv", "conv_linear", "conv_pool"])
@pytest.mark.parametrize(
    "name", ["vix_performer_cifar", "hybrid_vip_cifar", "ccp_cifar", "levip_cifar", "hybrid_pip_cifar"]
)
def test_grey_images_with_every_stem(name, stem, tmp_path):
    arguments = dict(img_size=8, stem=stem)
    coloured = lively(timm.create_model(name, **arguments))
    save_file(coloured.state_dict(), tmp_path / "model.safetensors")
    grey = converted(name, tmp_path / "model.safetensors", in_chans=1, **arguments)
    # a grey pixel is the same in three channels
    x = torch.randn(2, 1, 8, 8).double()
    expected = coloured.double().eval()(x.expand(-1, 3, -1, -1))
    assert distance(grey.double()(x), expected) < rounding(torch.float32, 3)  # channels were added in float32


def test_a_local_directory_of_softmax_weights(deit, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(deit)
    config = {"architecture": "vix_nystrom_tiny", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    config["pretrained_cfg"].update(first_conv="patch_embed.proj", classifier="head", num_classes=1000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    weights = load_file(deit)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def wrong_checkpoint(kind, deit):
    weights = load_file(deit)
    if kind == "a key too few":
        del weights["blocks.7.mlp.fc1.weight"]
    elif kind == "a key too many":
        weights["blocks.7.mlp.fc3.weight"] = torch.zeros(2)
    elif kind == "another width":
        weights = timm.create_model("deit_small_patch16_224").state_dict()
    elif kind == "another depth":
        weights = {key: value for key, value in weights.items() if ".11." not in key}
    elif kind == "another architecture":
        weights = timm.create_model("resnet10t").state_dict()
    return weights


@pytest.mark.parametrize("name", ["vix_nystrom_tiny", "vix_linformer_tiny", "hybrid_mixer_tiny", "vix_fnet_tiny"])
@pytest.mark.parametrize(
    "kind, words",
    [
        ("a key too few", ["Missing: blocks.*.mlp.fc1.weight"]),
        ("a key too many", ["Unexpected: blocks.*.mlp.fc3.weight"]),
        ("another width", ["shape", "cls_token"]),
        ("another depth", ["Missing", "blocks.*.mlp.fc1.weight"]),
        ("another architecture", ["Missing", "Unexpected", "conv1"]),
    ],
)
def test_a_wrong_checkpoint_is_refused(kind, words, name, deit, tmp_path):
    save_file({k: v.contiguous() for k, v in wrong_checkpoint(kind, deit).items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError) as error:
        converted(name, tmp_path / "wrong.safetensors")
    assert not [word for word in ("doesn't fit", name, *words) if word not in str(error.value)], error.value


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("content", ["truncated", "empty", "garbage"])
def test_a_damaged_file_is_named(content, suffix, deit, tmp_path):
    path = tmp_path / f"damaged.{suffix}"
    if suffix == "pth":
        torch.save(load_file(deit), path)
        whole = path.read_bytes()
    else:
        whole = deit.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"not a checkpoint " * 99}[content]
    )
    with pytest.raises(ValueError, match="damaged"):
        converted("vix_nystrom_tiny", path)


@pytest.mark.parametrize(
    "content", [b"hello world", b"", [torch.zeros(2)], torch.zeros(2), {1: torch.zeros(2)}, {"model": [1]}], ids=str
)
@pytest.mark.parametrize("name", ["vix_nystrom_cifar", "ccn_cifar", "cvt_cifar", "levin_cifar", "pin_cifar"])
def test_a_file_of_something_else_is_refused(name, content, tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        converted(name, path)


@pytest.mark.parametrize("name", ["vix_nystrom_cifar", "cvt_cifar", "levin_cifar", "pin_cifar", "fnet2d_cifar"])
def test_values_that_are_no_tensors_are_refused(name, tmp_path):
    torch.save({"head.weight": "evil"}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="'head.weight'; expected a dictionary from text to tensors"):
        converted(name, tmp_path / "other.pth")


def test_a_folder_without_weights_is_refused(tmp_path):
    save_for_hf(timm.create_model("vix_softmax_cifar", depth=1), tmp_path, safe_serialization=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no readable checkpoint.*No suitable checkpoints found"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


# saved model, name that takes its weights, what the message says
OTHERS = [
    ("ccn_cifar", "vix_nystrom_cifar", "doesn't fit vix_nystrom_cifar"),
    ("vix_linformer_cifar", "vix_mixer_cifar", r"Unexpected: blocks\.\*\.attn"),
    ("vix_linformer_cifar", "vix_fnet_cifar", r"Unexpected: blocks\.\*\.attn"),
    ("vix_mixer_cifar", "vix_fnet_cifar", r"Unexpected: blocks\.\*\.attn"),
]


@pytest.mark.parametrize("saved, name, words", OTHERS)
def test_weights_of_another_architecture_are_refused(saved, name, words, tmp_path):
    save_file(timm.create_model(saved, depth=1).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=words):
        converted(name, tmp_path / "other.safetensors", depth=1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere.safetensors"):
        converted("vix_nystrom_tiny", tmp_path / "nowhere.safetensors")


@pytest.fixture(scope="module")
def batch(photographs, deit):
    """64 photographs as DeiT sees them, and their classes."""
    transform = create_transform(**resolve_model_data_config(timm.create_model("deit_tiny_patch16_224")))
    with tarfile.open(photographs) as tar:
        members = {member.name.removeprefix("./"): member for member in tar.getmembers()}
        table = next(name for name in members if name.endswith("labels.csv"))
        rows = list(csv.DictReader(io.TextIOWrapper(tar.extractfile(members[table]))))[:64]
        images, labels = [], []
        for row in rows:
            name = next(n for n in members if n.endswith(row["file"]))
            images.append(transform(Image.open(tar.extractfile(members[name])).convert("RGB")))
            labels.append(int(row["imagenet_class"]))
    return torch.stack(images), torch.tensor(labels)


@pytest.fixture(scope="module")
def softmax_logits(batch, deit):
    model = timm.create_model("deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(deit)})
    with torch.inference_mode():
        return model.eval()(batch[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("vix_linformer_tiny", {"num_proj_tokens": 196}),
        ("vix_nystrom_tiny", {"num_landmarks": 196}),
    ],
)
def test_converted_deit_at_the_exact_limit_gives_its_logits(name, options, batch, softmax_logits, deit):
    model = converted(name, deit, **options)
    with torch.inference_mode():
        logits = model(batch[0])
    assert (softmax_logits.argmax(1) == batch[1]).float().mean() > 0.75
    bound = rounding(torch.float32, condition(nn.Module.__call__, model, batch[0][:4]))
    assert distance(logits, softmax_logits) < bound < 1e-3
    assert torch.equal(logits.argmax(1), softmax_logits.argmax(1))


@pytest.mark.slow
def test_converted_deit_recognises_photographs_without_training(batch, softmax_logits, deit):
    """architecture.md: 49 landmarks keep about 67 of 85 %; 64 images leave 6 points of noise."""
    with torch.inference_mode():
        logits = converted("vix_nystrom_tiny", deit)(batch[0])
    assert (logits.argmax(1) == batch[1]).float().mean() > 0.5


def test_a_mapping_of_layers_leaves_out_the_keywords_of_the_names_own_mixer():
    model = timm.create_model("vix_nystrom_cifar", layers={0: "performer", 1: {"mixer": "linformer"}}, depth=3)
    kinds = [type(block.attn.core).__name__ for block in model.blocks if hasattr(block.attn, "core")]
    assert kinds[:2] == ["PerformerAttention", "LinformerAttention"]
    assert not any(block.attn.core.conv_residual for block in model.blocks[:2])  # of Nyström's row
    own = timm.create_model("vix_nystrom_cifar", depth=1).blocks[0].attn.core
    for entry in ("nystrom", {"window_size": 4}):
        model = timm.create_model("vix_nystrom_cifar", layers={0: "performer", 1: entry}, depth=3)
        core = model.blocks[1].attn.core
        assert (core.num_landmarks, core.conv_residual) == (own.num_landmarks, own.conv_residual)


FAMILIES = ["vix_nystrom_cifar", "ccn_cifar", "cvt_cifar", "levin_cifar", "levip_128s", "pin_cifar", "fnet2d_cifar"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifier_can_be_left_out_and_added(name, tmp_path):
    few = dict(depth=(1,)) if name == "levin_cifar" else {}
    patch = dict(embed_strides=(4, 2, 2)) if name == "cvt_cifar" else dict(patch_size=4)
    patch |= dict(stride=4) if name == "pin_cifar" else {}
    arguments = few | (dict(img_size=64, depth=(1, 1, 1)) if name == "levip_128s" else patch)
    whole = lively(timm.create_model(name, num_classes=7, **arguments).eval())
    save_for_hf(whole, tmp_path / "whole", safe_serialization=True)
    headless = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True, num_classes=0).eval()
    x = torch.randn(2, *whole.pretrained_cfg["input_size"][:1], *[arguments.get("img_size", 32)] * 2)
    assert torch.equal(headless.forward_features(x), whole.forward_features(x))
    save_for_hf(headless, tmp_path / "headless", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'headless'}", pretrained=True, num_classes=3).eval()
    assert torch.equal(again.forward_features(x), whole.forward_features(x)) and again(x).shape[1] == 3


def old_names(state):
    """A state dict as of the time when the weights of a mixer were those of its slot."""
    found = {name.replace(".core.", "."): value for name, value in state.items()}
    assert found.keys() != state.keys()
    return found


def test_weights_from_before_mixers_were_modules_load(tmp_path):
    arguments = small_arguments("linformer", conv_residual=True)
    model, other = small("linformer", conv_residual=True), small("linformer", conv_residual=True)
    old, x = old_names(model.state_dict()), image(model)
    assert {"blocks.0.attn.token_proj", "blocks.0.attn.conv.weight"} <= old.keys()
    for parameter in other.parameters():
        parameter.data.normal_()
    other.load_state_dict(dict(old))
    assert torch.equal(other(x), model(x))
    save_file(old, tmp_path / "old.safetensors")
    overlay = dict(file=str(tmp_path / "old.safetensors"), num_classes=5)
    named = timm.create_model("vix_softmax_cifar", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    assert torch.equal(named.eval()(x), model(x))


def test_a_conversion_saved_before_mixers_were_modules_loads(tmp_path):
    model, x = vit(), torch.randn(2, 3, 32, 32)
    timm_vix.convert(model, "linformer", layers="last-2", num_proj_tokens=4)
    lively(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    save_file(old_names(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    # weights on the grid are resampled before they are loaded
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(32, 40)).eval()
    x = torch.randn(2, 3, 32, 40)
    model.set_input_size((32, 40))
    assert distance(larger(x), model(x)) < rounding(torch.float32, condition(nn.Module.__call__, model, x))


def test_a_checkpoint_without_a_patch_embedding_is_refused(tmp_path):
    state = timm.create_model("vix_softmax_cifar", depth=1).state_dict()
    del state["patch_embed.proj.weight"]
    save_file(state, tmp_path / "weights.safetensors")
    for classes in (10, 7):
        with pytest.raises(ValueError, match=r"Missing: patch_embed\.proj\.weight"):
            converted("vix_softmax_cifar", tmp_path / "weights.safetensors", depth=1, num_classes=classes)


def test_the_norm_of_another_pooling_is_explained(deit):
    with pytest.raises(ValueError, match="With global_pool='avg', fc_norm=False keeps the checkpoint's norm"):
        converted("vix_nystrom_tiny", deit, global_pool="avg")
    converted("vix_nystrom_tiny", deit, global_pool="avg", fc_norm=False)


def test_a_saved_model_takes_another_mixer(tmp_path):
    keywords = dict(depth=2, patch_size=4, num_landmarks=9, conv_residual=False)
    saved = lively(timm.create_model("vix_nystrom_cifar", **keywords).eval())
    save_for_hf(saved, tmp_path, safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, mixer="performer", num_features=16).eval()
    cores = [type(host.core) for host in hosts_of(model).values()]
    assert cores == [MIXERS["performer"]] * 2 and model.blocks[0].attn.core.conv is None
    assert torch.equal(model.blocks[1].attn.qkv.weight, saved.blocks[1].attn.qkv.weight)
    with pytest.raises(ValueError, match="num_landmarks=4: mixer='performer' takes"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, mixer="performer", num_landmarks=4)


@pytest.mark.parametrize(
    "keywords", [dict(attn_layer="diff"), dict(attn_layer="diff", merge=4, mixer="softmax")], ids=str
)
def test_attention_that_no_mixer_can_replace_is_refused(keywords):
    with pytest.raises(ValueError, match="block 0, a Block with DiffAttention, has no softmax attention"):
        timm.create_model("vix_nystrom_cifar", patch_size=4, **keywords)


def test_weights_that_cannot_be_fetched_are_no_broken_file(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = "the weights of vix_nystrom_tiny can't be fetched or read: LocalEntryNotFoundError: "
    with pytest.raises(ValueError, match=told):
        timm.create_model("vix_nystrom_tiny", pretrained=True, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["levin_cifar", "fnet2d_cifar"])
def test_intermediate_maps_are_checkpointed(name):
    model = lively(timm.create_model(name, patch_size=4).train())
    blocks = list(model.stages if name == "levin_cifar" else model.blocks)
    calls = []
    blocks[0].register_forward_pre_hook(lambda *arguments: calls.append(1))
    x = torch.randn(4, 3, 32, 32)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        calls.clear()
        model.zero_grad()
        maps = model.forward_intermediates(x, intermediates_only=True)
        sum(one.square().sum() for one in maps).backward()
        assert len(calls) == 1 + enable
        found.append([p.grad.clone() for p in blocks[0].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


OTHER_GRIDS = [((32, 128), (64, 64)), ((64, 64), (32, 128)), ((32, 128), (64, 128)), ((48, 80), (64, 128))]
POSITIONS = [(name, *sizes) for name in ("hybrid_vin_tiny", "cct_7", "hybrid_vit_tiny") for sizes in OTHER_GRIDS]


@pytest.mark.parametrize("name, old, new", [*POSITIONS, ("t2t_vit_tiny", *OTHER_GRIDS[0])])
def test_positions_behind_a_stem_move_to_another_grid(name, old, new, tmp_path):
    """Also to one of as many tokens, or from one of a square number of them."""
    model = timm.create_model(name, img_size=old, depth=1, num_classes=5)
    if name == "hybrid_vit_tiny":
        timm_vix.convert(model, "performer")
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=new)
    model.set_input_size(img_size=new)
    assert torch.equal(again.pos_embed, model.pos_embed)


@pytest.mark.parametrize(
    "size, patch_size, new",
    [((32, 32), 8, (16, 64)), ((16, 64), 8, (32, 32)), ((16, 64), 4, (16, 16)), ((24, 40), 8, (32, 64))],
    ids=str,
)
def test_positions_of_a_linear_embedding_move_behind_a_stem(size, patch_size, new, tmp_path):
    """The grid of the checkpoint follows from the patches of its own embedding, of 8 pixels."""
    save_file(vit(img_size=size).state_dict(), tmp_path / "vit.safetensors")
    overlay = {"file": str(tmp_path / "vit.safetensors"), "num_classes": 5, "input_size": (3, *size)}
    arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    twin = vit(img_size=[side * 8 // patch_size for side in new], **arguments)
    model = vit("hybrid_vin_tiny", patch_size=patch_size, img_size=new, **arguments)
    assert torch.equal(model.pos_embed, twin.pos_embed)


@pytest.mark.parametrize("name", ["vix_nystrom_tiny", "hybrid_vin_tiny"])
@pytest.mark.parametrize(
    "prefix, options",
    [
        (0, {"class_token": False, "global_pool": "avg"}),
        (0, {"no_embed_class": True}),
        (5, {"reg_tokens": 4}),
    ],
    ids=str,
)
def test_positions_of_other_prefix_tokens_are_named(prefix, options, name, tmp_path):
    save_file(vit().state_dict(), tmp_path / "vit.safetensors")
    overlay = {"file": str(tmp_path / "vit.safetensors"), "num_classes": 5}
    told = (
        f"17 positions, which are no known patch grid beside {prefix} prefix tokens; expected class_token, reg_tokens"
    )
    with pytest.raises(ValueError, match=told):
        vit(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    # of the same layout they load, on any grid
    save_file(vit(**options).state_dict(), tmp_path / "vit.safetensors")
    vit(name, img_size=(24, 40), pretrained=True, pretrained_cfg_overlay=overlay, **options)
