"""What trains after freezing all but a part: which parameters, how many, and the memory that it takes."""

import os

import pytest
import timm
import torch
from conftest import small, vit

import timm_vix


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_attention_trains_with_the_classifier_and_nothing_else() -> None:
    model = vit()
    report = timm_vix.freeze_except(model, "attention")
    assert trainable(model) == {n for n, _ in model.named_parameters() if ".attn." in n or n.startswith("head.")}
    assert report.trainable == 4 * (32 * 96 + 96 + 32 * 32 + 32) + 32 * 5 + 5
    assert report.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "eva02_tiny_patch14_224", "vix_mixer_tiny", "levit_128s"])
def test_mlp_trains_the_feed_forward_networks_with_the_classifier(name: str) -> None:
    model = timm.create_model(name, num_classes=5)
    timm_vix.freeze_except(model, "mlp")
    assert trainable(model) == {n for n, _ in model.named_parameters() if ".mlp." in n or n.startswith("head")}


@pytest.mark.parametrize(
    "mixer, options, names",
    [
        ("linformer", {}, {"token_proj"}),
        ("nystrom", {"conv_residual": True}, {"conv.weight"}),
        ("performer", {"learned_features": True}, {"features", "feature_bias"}),
        ("linformer", {"sharing": "none"}, {"token_proj"}),
    ],
)
def test_mixer_trains_what_a_mixer_adds(mixer: str, options: dict, names: set[str]) -> None:
    model = vit()
    timm_vix.convert(model, mixer, layers=[1, 2], **({"num_landmarks": 4} if mixer == "nystrom" else {}), **options)
    before = {n for n, _ in vit().named_parameters()}
    timm_vix.freeze_except(model, "mixer")
    assert trainable(model) == {n for n, _ in model.named_parameters()} - before
    places = {n.replace(".core.", ".") for n in trainable(model)}
    assert places == {f"blocks.{i}.attn.{name}" for i in (1, 2) for name in names}


def test_all_of_a_mixer_without_queries_is_its_own() -> None:
    model = small("mixer")
    timm_vix.freeze_except(model, "mixer")
    assert trainable(model) == {n for n, _ in model.named_parameters() if ".attn." in n}


@pytest.mark.parametrize("part", ["attention", "head"])
def test_memory_of_the_optimizer_and_of_the_delta_are_what_they_are(part: str, tmp_path) -> None:
    model = vit()
    report = timm_vix.freeze_except(model, part)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert report.optimizer_bytes == sum(m.numel() * m.element_size() for m in moments)
    timm_vix.save_delta(model, tmp_path / "delta.safetensors")
    header = os.path.getsize(tmp_path / "delta.safetensors") - report.delta_bytes
    assert 0 < header < 4000
    assert f"{report.trainable / 1e6:.2f} of {report.total / 1e6:.2f} M" in str(report)


def test_freezing_again_is_freezing_anew() -> None:
    model = vit()
    timm_vix.freeze_except(model, "head")
    timm_vix.freeze_except(model, "attention")
    again = vit()
    timm_vix.freeze_except(again, "attention")
    assert trainable(model) == trainable(again)


@pytest.mark.parametrize(
    "build, part, words",
    [
        (vit, "attn", "part='attn': expected one of 'attention', 'mlp', 'mixer', 'head'"),
        (vit, "mixer", "has no mixer, so nothing was added"),
        (lambda: small("nystrom"), "mixer", "has NystromAttention, so nothing was added"),
        (lambda: vit(num_classes=0), "head", "has no classifier"),
        (lambda: timm.create_model("test_resnet"), "attention", "ResNet has no attention"),
        (lambda: timm.create_model("test_resnet"), "mlp", "ResNet has no feed-forward network.*allowed here: 'head'"),
        (lambda: timm.create_model("vix_fnet_cifar", depth=1), "attention", "allowed here: 'mlp', 'head'"),
    ],
)
def test_a_part_that_is_not_there(build, part: str, words: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=words):
        timm_vix.freeze_except(model, part)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_wrapped_model_is_frozen_like_itself() -> None:
    expected = vit()
    timm_vix.freeze_except(expected, "attention")
    for wrap in (torch.compile, torch.nn.DataParallel):
        model = vit()
        report = timm_vix.freeze_except(wrap(model), "attention")
        assert trainable(model) == trainable(expected)
        assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["cvn_cifar", "levin_cifar", "pin_cifar", "ccn_cifar", "vix_nystrom_cifar"])
@pytest.mark.parametrize("part, places", [("attention", ("attn", "attn_downsample")), ("mlp", ("mlp",))])
def test_parts_of_every_family(name: str, part: str, places: tuple[str, ...]) -> None:
    model = timm.create_model(name, device="meta")
    timm_vix.freeze_except(model, part)
    parameters = {key for key, _ in model.named_parameters()}
    wanted = {key for key in parameters if set(places) & set(key.split("."))}
    assert wanted and trainable(model) == wanted | {key for key in parameters if key.startswith("head")}


def test_a_convolution_of_another_host_is_its_mixers() -> None:
    model = timm.create_model("cvn_cifar", device="meta")
    timm_vix.freeze_except(model, "mixer")
    assert trainable(model) == {n for n, _ in model.named_parameters() if n.endswith("attn.core.conv.weight")} != set()
