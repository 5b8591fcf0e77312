"""timm's ``NaFlexVit`` with mixers that honour its padding: a padded batch against each image alone."""

import copy
import json

import pytest
import timm
import torch
from conftest import distance, lively, rounding, since
from timm.models import save_for_hf
from torch import nn

import timm_vix
from timm_vix._checks import InputError
from timm_vix.conversion.plan_file import FORMATS
from timm_vix.mixers import MIXERS

# some with fewer patches than there are landmarks
GRIDS = [(4, 5), (2, 3), (8, 3), (1, 1)]
COUNTS = {"nystrom": {"num_landmarks": 7}, "linformer": {"num_proj_tokens": 7}}
TAKEN = {name: (name, COUNTS.get(name, {})) for name, mixer in MIXERS.items() if mixer.takes_sequences}
TAKEN |= {
    "performer-learned": ("performer", {"learned_features": True}),
    "linformer-headwise": ("linformer", {"num_proj_tokens": 4, "sharing": "headwise"}),
    "linformer-none": ("linformer", {"num_proj_tokens": 4, "sharing": "none"}),
}
HOSTS = {
    "registers": dict(reg_tokens=2),
    "class": dict(class_token=True, global_pool="token", fc_norm=False),
    "bare": dict(reg_tokens=0, qk_norm=True),
    "axial": dict(rope_type="axial", reg_tokens=1, pos_embed="none"),
    "mixed": dict(rope_type="mixed", reg_tokens=1, pos_embed="factorized"),
}


def naflex(dtype: torch.dtype = torch.float64, **kwargs) -> nn.Module:
    arguments = dict(embed_dim=32, depth=2, num_heads=2, num_classes=5, patch_size=2, pos_embed_grid_size=(4, 4))
    arguments |= dict(init_values=None, reg_tokens=2)
    return lively(timm.create_model("naflexvit_base_patch16_gap", **arguments | kwargs).eval()).to(dtype)


def converted(name: str, dtype: torch.dtype = torch.float64, **kwargs) -> nn.Module:
    model = naflex(dtype, **kwargs)
    mixer, keywords = TAKEN[name]
    timm_vix.convert(model, mixer, **keywords)
    return lively(model)


def batch_of(images: list[torch.Tensor], length: int | None = None) -> dict[str, torch.Tensor]:
    """What timm's collator makes of images (H, W, 12) in patches: padded to the longest, or to ``length``."""
    counts = [image.shape[0] * image.shape[1] for image in images]
    length = length or max(counts)
    rows = zip(images, counts)
    patches = torch.stack([nn.functional.pad(i.flatten(0, 1), (0, 0, 0, length - n)) for i, n in rows])
    coordinates = torch.zeros(len(images), length, 2, dtype=torch.int64)
    for row, image, count in zip(coordinates, images, counts):
        row[:count] = torch.cartesian_prod(*map(torch.arange, image.shape[:2]))
    valid = torch.arange(length) < torch.tensor(counts).unsqueeze(1)
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


def images_of(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(height, width, 12, dtype=dtype, requires_grad=True) for height, width in GRIDS]


def gradients_of(model: nn.Module, outputs: torch.Tensor, images: list[torch.Tensor]) -> torch.Tensor:
    """With respect to the images and parameters, in a row; without those of positions, which timm takes in float32."""
    wanted = [p for name, p in model.named_parameters() if "pos_embed" not in name]
    found = torch.autograd.grad(outputs.square().sum(), [*images, *wanted], allow_unused=True)
    return torch.cat([t.flatten() for t in found if t is not None])


def compare(model: nn.Module, dtype: torch.dtype, bound: float) -> None:
    """Outputs and gradients of a padded batch are those of the images one by one."""
    images = images_of(dtype)
    together = model(batch_of(images, 30))
    alone = torch.cat([model(batch_of([image])) for image in images])
    assert distance(together, alone) < bound
    assert distance(gradients_of(model, together, images), gradients_of(model, alone, images)) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", TAKEN)
def test_padding_changes_nothing(name, dtype):
    compare(converted(name, dtype), dtype, rounding(dtype))


@pytest.mark.parametrize("name", ["performer", "nystrom", "linformer"])
@pytest.mark.parametrize("host", ["class", "bare", "axial", "mixed"])
def test_padding_changes_nothing_in_other_hosts(host, name):
    # timm makes mixed rotary positions in float32, and landmarks have the mean of theirs at length 1
    bound = rounding(torch.float32 if host == "mixed" else torch.float64)
    compare(converted(name, **HOSTS[host]), torch.float64, bound)


@pytest.mark.parametrize("name", TAKEN)
def test_an_image_is_the_sequence_of_its_patches(name):
    model = converted(name)
    image = torch.randn(8, 3, 12, dtype=torch.float64)
    pixels = image.reshape(8, 3, 2, 2, 3).permute(4, 0, 2, 1, 3).reshape(1, 3, 16, 6)
    assert distance(model(pixels), model(batch_of([image], 30))) < rounding(torch.float64)


def test_landmarks_are_means_of_pieces_of_the_sequence():
    """As many landmarks as patches give softmax attention; Linformer's single one is a mean of its 16 pieces."""
    x, valid = torch.randn(4, 30, 32, dtype=torch.float64), batch_of(images_of(), 30)["patch_valid"]
    mask = valid[:, None, None, :]
    softmax = naflex(reg_tokens=0, depth=1)
    nystrom, linformer = copy.deepcopy(softmax), copy.deepcopy(softmax)
    attn = softmax.blocks[0].attn
    timm_vix.convert(nystrom, "nystrom", num_landmarks=24)
    assert distance(nystrom.blocks[0].attn(x, mask)[valid], attn(x, mask)[valid]) < rounding(torch.float64)
    timm_vix.convert(linformer, "linformer", num_proj_tokens=1)
    means = [nn.functional.adaptive_avg_pool1d(row[read].T, 16).mean(1) for row, read in zip(x, valid)]
    values = attn.proj(nn.functional.linear(torch.stack(means), attn.qkv.weight[64:], attn.qkv.bias[64:]))
    expected = values.unsqueeze(1).expand(-1, 30, -1)[valid]
    assert distance(linformer.blocks[0].attn(x, mask)[valid], expected) < rounding(torch.float64)


@pytest.mark.parametrize("mixer", [name for name, mixer_class in MIXERS.items() if not mixer_class.takes_sequences])
def test_mixers_of_a_grid_are_refused(mixer):
    model = naflex(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError) as error:
        timm_vix.convert(model, mixer)
    allowed = ", ".join(name for name, mixer_class in MIXERS.items() if mixer_class.takes_sequences)
    assert "NaFlexVit" in str(error.value) and f"mixer={mixer!r}" in str(error.value) and allowed in str(error.value)
    assert before.keys() == model.state_dict().keys() and not model.use_key_only_attn_mask


@pytest.mark.parametrize(
    "mixer, keywords, words",
    [
        ("nystrom", {"window_size": 2}, "window_size=2"),
        ("nystrom", {"conv_residual": True}, "conv_residual=True"),
        ("performer", {"locality": 0.1}, "locality=0.1"),
        ("softmax", {"merge_keys": 0.5}, "merge_keys=0.5"),
        ("softmax", {"merge": 2}, "merge=2.*allowed is None"),
        ("softmax", {"scale_logits": "log"}, "scale_logits='log'.*allowed is None"),
        ("nystrom", {"layers": {0: {"mixer": "softmax", "conv_residual": True}}}, "conv_residual=True"),
    ],
)
def test_what_needs_the_grid_or_reads_padding_is_refused(mixer, keywords, words):
    with pytest.raises(InputError, match=words):
        timm_vix.convert(naflex(), mixer, **keywords)


def test_dropped_patches():
    """Landmarks would be means of a random order; Performer needs none."""
    with pytest.raises(InputError, match="patch_drop_rate=0.5"):
        timm_vix.convert(naflex(patch_drop_rate=0.5), "nystrom")
    model = naflex(patch_drop_rate=0.5)
    timm_vix.convert(model, "performer")
    images = images_of()
    model.train()(batch_of(images)).sum().backward()
    assert all(image.grad.isfinite().all() for image in images)


def test_random_features_are_drawn_anew():
    model = naflex()
    timm_vix.convert(model, "performer", redraw_interval=2)
    features = model.blocks[1].attn.core.features.clone()
    model.train()(batch_of(images_of()))
    assert torch.equal(model.blocks[1].attn.core.features, features)
    model(batch_of(images_of()))
    assert distance(model.blocks[1].attn.core.features, features) > 0.1


def test_plans_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": FORMATS[0], "layers": {"0": {"mixer": "performer"}}}))
    with pytest.raises(InputError, match=r"NaFlexVit .*no patch grid.*timm_vix.convert, without a plan"):
        timm_vix.convert(naflex(), layers=str(path))


@pytest.mark.parametrize("own", [False, True])
def test_revert_gives_masks_and_attention_back(own):
    model = naflex(use_key_only_attn_mask=own)
    batch = batch_of(images_of())
    expected = model(batch)
    timm_vix.convert(model, "nystrom", num_landmarks=2)
    assert model.use_key_only_attn_mask and distance(model(batch), expected) > 1e-3
    timm_vix.convert(model, "performer", layers=[1])
    timm_vix.revert(model)
    assert model.use_key_only_attn_mask == own and torch.equal(model(batch), expected)


@pytest.mark.parametrize("name", ["performer-learned", "nystrom", "linformer-none"])
def test_save_and_reload(name, tmp_path):
    model = converted(name, torch.float32)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    batch = batch_of(images_of(torch.float32))
    assert torch.equal(again(batch), model(batch))
    timm_vix.revert(again), timm_vix.revert(model)
    assert torch.equal(again(batch), model(batch))


@pytest.mark.slow
@since("2.9", "exports no batch of any size")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_and_exported_where_timm_is():
    """timm's own NaFlexVit exports for images alone, and doesn't script."""
    model = converted("nystrom", torch.float32, depth=1)
    batch = batch_of(images_of(torch.float32))
    compiled = torch.compile(model, backend="eager")
    assert distance(compiled(batch), model(batch)) < rounding(torch.float32)
    pixels = torch.randn(2, 3, 16, 6)
    program = torch.export.export(model, (pixels,))
    assert distance(program.module()(pixels), model(pixels)) < rounding(torch.float32)


@pytest.mark.parametrize("name", [name for name in TAKEN if MIXERS[name.split("-")[0]].mixes_tokens])
def test_masks_that_the_caller_gives(name):
    """A mask of keys that the caller gives acts like padding, and hides what it says; one of pairs is for softmax."""
    model, batch = converted(name), batch_of(images_of(), 30)
    expected = model(batch)
    keys = torch.cat([torch.ones(4, 2, dtype=torch.bool), batch["patch_valid"]], dim=1)[:, None, None, :]
    assert torch.equal(model({**batch, "attn_mask": keys}), expected)
    hidden, patches = keys.clone(), batch["patches"].clone().requires_grad_()
    hidden[0, ..., 2 + 5] = False
    tokens = model.forward_features(**{**batch, "patches": patches, "attn_mask": hidden})["patches"]
    seen = [token for token in range(32) if token != 2 + 5]
    (gradient,) = torch.autograd.grad(tokens[0, seen].square().sum(), patches)
    assert gradient[0, 5].abs().max() == 0 < gradient[0, 4].abs().max()
    pairs = {**batch, "attn_mask": keys.expand(4, 1, 32, 32)}
    if name == "softmax":
        assert distance(model(pairs), expected) < rounding(torch.float64)
        return
    with pytest.raises(InputError, match=r"attn_mask of shape \[4, 1, 32, 32\].*B=4 or 1 and N=32"):
        model(pairs)
