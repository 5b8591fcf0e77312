"""Batch norms for layer norms: fitted as least squares says, folded exactly, and refused where that can't be."""

import argparse
import copy
import csv
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from conftest import DEIT, PHOTOGRAPHS, distance, lively, load_example, small, vit
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import nn
from torch.nn.utils import parametrize

import timm_vix
from timm_vix._checks import InputError
from timm_vix.conversion.feedforward import structure_mlp
from timm_vix.conversion.folding import PrefixAffine
from timm_vix.conversion.handover import HandoverSchedule, finish_handover
from timm_vix.conversion.norms import TokenBatchNorm

EXAMPLE = Path(__file__).parents[1] / "examples" / "fold_norms.py"
SIZE = dict(img_size=(56, 40), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
HOSTS = {
    "class": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "init_values": 0.5, "qk_norm": True}),
    "no_prefix": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "mean_after_norm": ("vit_tiny_patch16_224", {"fc_norm": False, "global_pool": "avg"}),
    "no_bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "one_projection": ("vit_tiny_patch16_224", {"block_fn": ParallelScalingBlock}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "eva_biases": ("eva_giant_patch14_224", {}),
    "eva_unfused": ("eva02_tiny_patch14_224", {"qkv_fused": False}),
    "eva_swiglu": ("eva02_tiny_patch14_224", {"swiglu_mlp": True, "scale_mlp": True}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "vix_rope": ("vix_softmax_cifar", {"rope": "axial"}),
    "vix_nystrom": ("vix_nystrom_tiny", {"num_landmarks": 9}),
    "vix_parallel": ("vix_performer_tiny", {"block": "parallel"}),
}
# what a conversion adds; 2 landmarks are few enough that Nyström attention fuses with its projections
CONVERTED = {
    "nystrom": dict(mixer="nystrom", num_landmarks=2),
    "windows": dict(mixer="nystrom", num_landmarks=6, window_size=2, conv_residual=True),
    "linformer": dict(mixer="linformer", num_proj_tokens=4),
    "linformer_heads": dict(mixer="linformer", num_proj_tokens=4, sharing="none"),
    "performer": dict(mixer="performer"),
    "merging": dict(mixer="softmax", merge=5),
}


def host(kind="class", **kwargs):
    """A small model in eval mode and float64, of 7x5 patches, 2 layers and 2 heads, with lively weights."""
    name, own = HOSTS[kind]
    torch.manual_seed(0)
    return lively(timm.create_model(name, **{**SIZE, **own, **kwargs}).eval()).double()


def images(batch=3):
    return torch.randn(batch, 3, 56, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def trained(model):
    """Give batch norms other constants than those of the fit, as training does."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, TokenBatchNorm):
            module.alpha.data.fill_(0.3)
            for norm in (norm for norm in module.children() if isinstance(norm, nn.BatchNorm1d)):
                norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
                norm.running_var.copy_(0.1 + torch.rand(norm.running_var.shape, generator=generator))
                norm.weight.data.add_(0.1 * torch.randn(norm.weight.shape, generator=generator))
    return model


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)


@torch.no_grad()
@pytest.mark.parametrize("kind", HOSTS)
def test_folding_is_exact(kind):
    model, x = host(kind), images()
    before = model(x)
    timm_vix.replace_norms(model, images(4))
    assert 0 < distance(model(x), before) < 0.5
    trained(model)
    reference = copy.deepcopy(model)
    timm_vix.fold_norms(model)
    assert distance(reference(x), before) > 0.05
    assert distance(model(x), reference(x)) < 1e-10
    assert not any(isinstance(module, TokenBatchNorm) for module in model.modules())
    assert model.num_prefix_tokens > 0 or not any(isinstance(module, PrefixAffine) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "eva_biases", "no_bias"])
@pytest.mark.parametrize("mixer", CONVERTED)
def test_converted_models_fold(kind, mixer):
    model, x = host(kind), images()
    timm_vix.convert(model, **CONVERTED[mixer])
    timm_vix.replace_norms(model, images(4))
    reference = copy.deepcopy(trained(model))
    timm_vix.fold_norms(model)
    # Linformer's initial means are rounded to float32
    assert distance(model(x), reference(x)) < (1e-6 if mixer == "linformer" else 1e-10)
    if mixer != "merging":  # the attention that comes back has the folded weights
        timm_vix.revert(model)
        timm_vix.revert(reference)
        assert distance(model(x), reference(x)) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("by_name", [False, True])
def test_norms_of_a_saved_model_whose_attention_was_not_saved(by_name, tmp_path):
    """Token mixing has no queries and keys: what it replaced can't come back, and need not for other norms."""
    if by_name:
        options = dict(source="vit_tiny_patch16_224", mixer="fnet", layers="last-1", **SIZE)
        model = lively(timm.create_model("vix_from_timm", **options).eval())
    else:
        model = host().float()
        timm_vix.convert(model, "fnet", layers=[1])
    save_for_hf(model, tmp_path / "first", safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True).eval()
    x, before = images().float(), copy.deepcopy(model)
    timm_vix.replace_norms(model, images(4).float())
    trained(model)
    assert distance(model(x), before(x)) > 0.01
    save_for_hf(model, tmp_path / "second", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True).eval()
    kinds = [type(block.attn).__name__ for block in again.blocks]
    assert kinds == ["Attention", type(model.blocks[1].attn).__name__] and kinds[1] != "Attention"
    assert torch.equal(again(x), model(x))


@torch.no_grad()
def test_gates_that_read_a_norm_are_refused():
    model = host()
    timm_vix.convert(model, "atrous", window_size=2)
    timm_vix.replace_norms(model, images(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"blocks\.0\.norm1 can't be folded: the gates of AtrousAttention read it"):
        timm_vix.fold_norms(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model = host()
    timm_vix.convert(model, "atrous", window_size=2, dilations=1)
    timm_vix.replace_norms(model, images(4))
    expected = trained(model)(x := images())
    timm_vix.fold_norms(model)
    assert distance(model(x), expected) < 1e-10


@torch.no_grad()
def test_several_sizes():
    model = host(dynamic_img_size=True)
    timm_vix.convert(model, "nystrom", num_landmarks=4)
    timm_vix.replace_norms(model, images())
    reference = copy.deepcopy(trained(model))
    timm_vix.fold_norms(model)
    x = torch.randn(2, 3, 40, 72, dtype=torch.float64)
    assert distance(model(x), reference(x)) < 1e-10


@torch.no_grad()
def test_fit_is_least_squares():
    model, calibration = host("registers"), images(6)
    reference = copy.deepcopy(model)
    residuals = timm_vix.replace_norms(model, calibration)
    assert residuals.keys() == {f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)} | {"norm"}
    seen = []
    model.blocks[1].norm2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(calibration)  # so x is what comes after the fitted norms before
    (x,) = seen
    y, fitted = reference.blocks[1].norm2(x), model.blocks[1].norm2(x)
    rest = total = 0.0
    for rows in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, None)):
        for channel in (0, 17):
            u, v = x[:, rows, channel].flatten(), y[:, rows, channel].flatten()
            design = torch.stack([u, torch.ones_like(u)], 1)
            expected = design @ torch.linalg.lstsq(design, v[:, None]).solution
            assert distance(fitted[:, rows, channel].flatten(), expected[:, 0]) < 1e-3
        rest += float((y[:, rows] - fitted[:, rows]).square().sum())
        total += float((y[:, rows] - y[:, rows].mean((0, 1))).square().sum())
    assert residuals["blocks.1.norm2"] == pytest.approx(rest / total, rel=1e-4)


def test_a_constant_channel_takes_the_layer_norms_slope():
    norm = nn.LayerNorm(4).double()
    norm.weight.data.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.randn(8, 5, 4, dtype=torch.float64)
    x[:, 0] = torch.tensor([1.0, 3.0, -1.0, 1.0])  # the class token: mean 1, variance 2
    new = TokenBatchNorm(4, 1, dtype=torch.float64).eval()
    new.fit(norm, x, norm(x).detach())
    assert distance(new(x)[:, 0], norm(x)[:, 0]) < 1e-9
    assert distance(new.affine()[0][0], norm.weight / (2 + norm.eps) ** 0.5) < 1e-9


def test_training_normalises_each_kind_by_itself():
    torch.manual_seed(0)
    module = TokenBatchNorm(3, 2, dtype=torch.float64).train()
    module.alpha.data.fill_(0.5)
    x = 2 + 3 * torch.randn(6, 7, 3, dtype=torch.float64)
    y = module(x) - 0.5 * x
    for part in (x[:, 0], x[:, 1], x[:, 2:].flatten(0, 1)):
        assert part.mean(0).abs().min() > 0.5
    for part, given in ((y[:, 0], x[:, 0]), (y[:, 1], x[:, 1]), (y[:, 2:].flatten(0, 1), x[:, 2:].flatten(0, 1))):
        expected = (given - given.mean(0)) / (given.var(0, correction=0) + 1e-5).sqrt()
        assert distance(part, expected) < 1e-10
    assert distance(module.prefix.running_mean, 0.1 * x[:, :2].mean(0).flatten()) < 1e-10


def test_hand_over_and_training():
    model, x = host().train(), images(4)
    before = model.eval()(x)
    schedule = HandoverSchedule(2)
    timm_vix.replace_norms(model, images(), schedule)
    assert distance(model(x), before) < 1e-10
    state = state_of(model)
    with pytest.raises(InputError) as error:
        timm_vix.fold_norms(model)
    assert "blocks.0.norm1" in str(error.value) and "step 0 of 2" in str(error.value)
    assert unchanged(model, state)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        model(x).square().mean().backward()
        assert all(parameter.grad is not None for name, parameter in model.named_parameters() if ".new." in name)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    finish_handover(model.eval())
    after = model(x)
    timm_vix.fold_norms(model)
    assert distance(model(x), after) < 1e-10


@torch.no_grad()
def test_tiny_scales_divide_no_prefix_token():
    model, x = host(), images()
    timm_vix.replace_norms(model, images())
    norm = model.blocks[0].norm1
    norm.patch.weight.data[:3] = torch.tensor([0.0, 1e-9, -1e-14], dtype=torch.float64)
    reference = copy.deepcopy(model)
    timm_vix.fold_norms(model)
    assert distance(model(x), reference(x)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, conversion, folded",
    [
        ("registers", None, "batch"),
        ("dinov2", None, "folded_blocks"),
        ("eva_biases", None, "folded"),
        ("no_bias", CONVERTED["nystrom"], "folded"),
        ("vix_nystrom", None, "folded"),
        ("eva_unfused", CONVERTED["performer"], "batch"),
        ("eva_unfused", CONVERTED["nystrom"], "folded"),
        ("vix_parallel", None, "folded_blocks"),
    ],
)
def test_saved_models_come_back(kind, conversion, folded, tmp_path):
    model, x = host(kind).float(), images().float()
    if conversion:
        timm_vix.convert(model, **conversion)
    timm_vix.replace_norms(model, images())
    trained(model)
    if folded != "batch":
        timm_vix.fold_norms(model, last=folded == "folded")
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    assert loaded.state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_converting_after_folding(tmp_path):
    model, x = host().float(), images().float()
    timm_vix.replace_norms(model, images())
    timm_vix.fold_norms(model)
    plain = model(x)
    timm_vix.convert(model, "performer", layers="last-1")
    expected = model(x)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), expected)
    timm_vix.revert(model)
    assert torch.equal(model(x), plain)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), plain)


def test_norms_of_a_model_without_a_name_leave_its_mixers_weight_decay():
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    timm_vix.convert(model, "performer", learned_features=True)
    spared = model.no_weight_decay()
    timm_vix.replace_norms(model, torch.randn(4, 3, 32, 32))
    assert model.no_weight_decay() == spared and any(name.endswith("core.features") for name in spared)


@torch.no_grad()
def test_a_gate_can_be_put_in_after_folding_and_comes_back(tmp_path):
    model, x = host().float(), images().float()
    timm_vix.replace_norms(model, images())
    timm_vix.fold_norms(model)
    timm_vix.convert(model, "atrous", layers=[0], window_size=2)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


@torch.no_grad()
def test_a_saved_model_with_folded_norms_alone_is_converted_as_asked(tmp_path):
    model, x = host().float(), images().float()
    timm_vix.replace_norms(model, images())
    timm_vix.fold_norms(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    place = f"local-dir:{tmp_path}"
    assert torch.equal(timm.create_model(place, pretrained=True).eval()(x), model(x))
    merged = timm.create_model(place, pretrained=True, merge=3).eval()
    timm_vix.convert(model, merge=3)
    assert torch.equal(merged(x), model(x))
    with pytest.raises(ValueError, match="mixer='nystrom'.*no layer of the saved model is converted"):
        timm.create_model(place, pretrained=True, mixer="nystrom")


@torch.no_grad()
def test_a_saved_classifier_that_holds_the_last_norm_can_not_be_exchanged(tmp_path):
    model, x = host("class").float(), images().float()
    timm_vix.replace_norms(model, images().float())
    timm_vix.fold_norms(trained(model))
    save_for_hf(model, tmp_path, safe_serialization=True)
    same = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=model.num_classes).eval()
    assert distance(same(x), model(x)) < 1e-5
    for number in (0, model.num_classes + 1):
        with pytest.raises(ValueError, match=f"num_classes={number}: the last norm .* fold_norms.model, last=False"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=number)


@torch.no_grad()
def test_features_stay_without_the_last_norm():
    model, x = host("dinov2", num_classes=0), images()
    timm_vix.replace_norms(model, images())
    reference = copy.deepcopy(trained(model))
    timm_vix.fold_norms(model, last=False)
    assert isinstance(model.norm, TokenBatchNorm)
    assert distance(model.forward_features(x), reference.forward_features(x)) < 1e-10


class Scaled(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 2 * weight


class Adapter(nn.Module):
    """A low-rank adapter, as fine-tuning libraries put it around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def with_adapter(model):
    model.blocks[1].mlp.fc1 = Adapter(model.blocks[1].mlp.fc1)


def with_shared_weights(model):
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def with_pool(model):
    model.global_pool = "avgmax"


def with_trained_projection(model):
    timm_vix.convert(model, "linformer", num_proj_tokens=4)
    model.blocks[0].attn.core.token_proj.data.mul_(1.1)


REFUSED = {
    "adapter": (with_adapter, ["blocks.1.norm2", "blocks.1.mlp.fc1", "Adapter", "nn.Linear"]),
    "parametrised": (
        lambda model: parametrize.register_parametrization(model.blocks[0].attn.qkv, "weight", Scaled()),
        ["blocks.0.norm1", "blocks.0.attn.qkv"],
    ),
    "hook": (
        lambda model: model.blocks[1].attn.register_forward_pre_hook(lambda module, args: None),
        ["blocks.1.norm1", "Attention", "hooks"],
    ),
    "shared": (with_shared_weights, ["blocks.0.norm2", "used elsewhere"]),
    "shared_layer": (
        lambda model: setattr(model.blocks[1].mlp, "fc1", model.blocks[0].mlp.fc1),
        ["blocks.0.norm2", "used elsewhere"],
    ),
    "convolution": (lambda model: setattr(model.blocks[0].mlp, "fc1", nn.Conv1d(32, 8, 1)), ["Conv1d", "nn.Linear"]),
    "other_mlp": (lambda model: setattr(model.blocks[0], "mlp", nn.Softmax(-1)), ["blocks.0.norm2", "Softmax", "Mlp"]),
    "fnet": (lambda model: timm_vix.convert(model, "fnet"), ["blocks.0.norm1", "FourierMixing", "queries"]),
    "token_mlp": (lambda model: timm_vix.convert(model, "mixer"), ["blocks.0.norm1", "TokenMlp"]),
    "trained_projection": (with_trained_projection, ["blocks.0.norm1", "LinformerAttention", "sum to one"]),
    "features": (lambda model: model.reset_classifier(0), ["norm", "features", "last=False"]),
    "pooling": (with_pool, ["norm", "'avgmax'", "last=False"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded(case):
    change, words = REFUSED[case]
    model = host()
    timm_vix.replace_norms(model, images())
    change(model)
    state = state_of(model)
    with pytest.raises(InputError) as error:
        timm_vix.fold_norms(model)
    for word in words:
        assert word in str(error.value)
    assert unchanged(model, state)


@pytest.mark.parametrize(
    "build, given, words",
    [
        (lambda: timm.create_model("test_resnet"), None, ["ResNet", "VisionTransformer or Eva"]),
        (lambda: host(block_fn=ResPostBlock), None, ["blocks.0", "ResPostBlock", "EvaBlock"]),
        (lambda: host(norm_layer="rmsnorm"), None, ["no layer norms"]),
        (host, images(0), ["images=(0, 3, 56, 40)", "at least one image"]),
        (host, [images(1)], ["images=list", "tensor"]),
        (host, torch.full((1, 3, 56, 40), float("nan")), ["images", "finite"]),
    ],
    ids=["resnet", "post_norm", "rms", "no_images", "list", "nan"],
)
def test_what_cannot_be_replaced(build, given, words):
    model = build()
    state = state_of(model)
    with pytest.raises(InputError) as error:
        timm_vix.replace_norms(model, images() if given is None else given)
    for word in words:
        assert word in str(error.value)
    assert unchanged(model, state)


def test_wrong_order():
    model = host()
    with pytest.raises(InputError, match="replace_norms"):
        timm_vix.fold_norms(model)
    model.norm.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(InputError, match="norm has hooks"):
        timm_vix.replace_norms(model, images())
    with pytest.raises(InputError, match="norms='folded'"):
        timm.create_model("vix_from_timm", mixer="performer", norms="folded")
    with pytest.raises(InputError, match="norms='rms'"):
        timm.create_model("vix_from_timm", mixer="performer", norms="rms")


@torch.no_grad()
def test_scripted():
    model = small("softmax", reg_tokens=1)
    x = torch.randn(2, 3, 14, 10)
    timm_vix.replace_norms(model, x)
    expected = model(x)
    assert torch.allclose(torch.jit.script(model)(x), expected, atol=1e-5)
    timm_vix.fold_norms(model)
    assert torch.allclose(torch.jit.script(model)(x), expected, atol=1e-4)


@pytest.mark.skipif(not DEIT.exists(), reason=f"needs {DEIT}")
@torch.no_grad()
def test_trained_weights_survive():
    overlay = dict(file=str(DEIT), source=None)
    model = timm.create_model("deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 224, 224)
    residuals = timm_vix.replace_norms(model, x)
    assert max(residuals.values()) < 0.5
    expected = model(x)
    timm_vix.fold_norms(model)
    assert distance(model(x), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(
    not (DEIT.exists() and PHOTOGRAPHS.exists()), reason="needs DeiT-Tiny's weights and the photographs"
)
def test_the_example_measures_what_is_folded(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    with tarfile.open(PHOTOGRAPHS) as tar:
        tar.extractall(tmp_path, filter="data")
    (photographs,) = tmp_path.glob("**/labels.csv")
    command = [sys.executable, EXAMPLE, "--images", photographs.parent, "--weights", DEIT, "--steps", "0", "2"]
    command += ["--data-dir", photographs.parent / "images", "--count", "20", "--rounds", "1", "--batch-size", "2"]
    command += ["--runs", tmp_path / "runs", "--out", tmp_path / "rows.csv"]
    for more in ([], [], ["--fade"]):  # the second time nothing is left to do
        environment = dict(os.environ, PYTHONPATH=str(EXAMPLE.parents[1]))
        subprocess.run([*command, *more], env=environment, check=True)
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [(row["norms"], row["steps"], row["format"], row["dtype"]) for row in rows] == [
        (norms, steps, *form)
        for norms, steps in (("layer", "0"), ("folded", "0"), ("folded", "2"), ("faded, folded", "2"))
        for form in (("eager", "float32"), ("onnx", "float32"), ("onnx", "int8"))
    ]
    assert float(rows[0]["agreement"]) == float(rows[1]["agreement"]) == 100.0
    assert rows[3]["top1"] == rows[4]["top1"] and 0 < float(rows[3]["agreement"]) < 100


def test_the_example_refuses_a_batch_of_more_images_than_there_are(digits, tmp_path):
    save_file(vit().state_dict(), weights := tmp_path / "weights.safetensors")
    run = dict(data_dir=digits, batch_size=61, lr=1e-4, fade=False, weights=weights, runs=tmp_path)
    config = resolve_model_data_config(vit())
    with pytest.raises(InputError, match="batch_size=61: allowed is at most 60, the number of images to learn from"):
        load_example("fold_norms").train(vit(), vit(), HandoverSchedule(1), config, argparse.Namespace(**run))


def test_what_replaces_frozen_layers_is_frozen():
    model, images = vit(depth=2), torch.randn(8, 3, 32, 32)
    timm_vix.freeze_except(model, "head")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias"}
    changes = (
        lambda: timm_vix.replace_norms(model, images),
        lambda: timm_vix.fold_norms(model, last=False),
        lambda: structure_mlp(model, images=images),
    )
    for change in changes:
        change()
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_a_model_saved_during_a_hand_over_says_so(tmp_path):
    model = vit(depth=2)
    timm_vix.replace_norms(model, torch.randn(8, 3, 32, 32), HandoverSchedule(2))
    save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="saved during a hand-over from layer norms .blocks.0.norm1.old") as error:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "save after finish" in str(error.value)
