"""Freezing all but a part, and what is kept of a task: exact figures, exact return, one line for another model."""

import copy
import os

import pytest
import timm
import torch
from conftest import image, small
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timm_vix


def vit(num_classes: int = 5, **kwargs) -> torch.nn.Module:
    """timm's own ViT of three narrow blocks, the same weights in every call."""
    torch.manual_seed(0)
    arguments = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    model = timm.create_model("deit_tiny_patch16_224", **{**arguments, **kwargs}).eval()
    if num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model


def train(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Two real steps of AdamW on random images."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        images = torch.randn(4, 3, 32, 32, generator=generator)
        loss = torch.nn.functional.cross_entropy(model(images), torch.arange(4) % model.num_classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def answer(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(9)))


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_attention_trains_with_the_classifier_and_nothing_else() -> None:
    model = vit()
    report = timm_vix.freeze_except(model, "attention")
    assert trainable(model) == {n for n, _ in model.named_parameters() if ".attn." in n or n.startswith("head.")}
    assert report.trainable == 3 * (32 * 96 + 96 + 32 * 32 + 32) + 32 * 5 + 5
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
    assert trainable(model) == {f"blocks.{i}.attn.{name}" for i in (1, 2) for name in names}


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


def test_two_tasks_share_one_backbone(tmp_path) -> None:
    expected = {}
    for seed, classes in ((1, 7), (2, 3)):
        model = vit(classes)
        timm_vix.freeze_except(model, "attention")
        expected[classes] = answer(train(model, seed))
        timm_vix.save_delta(model, tmp_path / f"{classes}.safetensors")
    shared = vit()
    frozen = {n: p.clone() for n, p in shared.named_parameters() if ".attn." not in n and "head" not in n}
    for classes in (7, 3, 7):
        timm_vix.load_delta(shared, tmp_path / f"{classes}.safetensors")
        assert shared.num_classes == classes
        assert torch.equal(answer(shared), expected[classes])
    assert all(torch.equal(shared.get_parameter(name), tensor) for name, tensor in frozen.items())
    assert not torch.equal(expected[7][:, :3], expected[3])


def test_a_converted_model_keeps_its_task(tmp_path) -> None:
    model = vit()
    timm_vix.convert(model, "linformer", layers="last-2", num_proj_tokens=4)
    timm_vix.freeze_except(model, "mixer")
    timm_vix.save_delta(train(model, 1), tmp_path / "delta.safetensors")
    assert set(load_file(tmp_path / "delta.safetensors")) == {f"blocks.{i}.attn.core.token_proj" for i in (1, 2)}
    other = vit()
    timm_vix.convert(other, "linformer", layers="last-2", num_proj_tokens=4)
    timm_vix.load_delta(other, tmp_path / "delta.safetensors")
    assert torch.equal(answer(other), answer(model))


def test_buffers_that_training_changes_travel(tmp_path) -> None:
    def stem() -> torch.nn.Module:
        torch.manual_seed(0)
        return small("performer", stem="conv", redraw_interval=1)

    model = stem().train()
    timm_vix.freeze_except(model, "attention")
    model(image(model, 4)).sum().backward()
    timm_vix.save_delta(model, tmp_path / "delta.safetensors")
    other = stem()
    images = image(model)
    with torch.no_grad():
        assert not torch.equal(other(images), model.eval()(images))
        timm_vix.load_delta(other, tmp_path / "delta.safetensors")
        assert torch.equal(other(images), model(images))


def test_freezing_again_is_freezing_anew() -> None:
    model = vit()
    timm_vix.freeze_except(model, "head")
    timm_vix.freeze_except(model, "attention")
    again = vit()
    timm_vix.freeze_except(again, "attention")
    assert trainable(model) == trainable(again)


def test_both_classifiers_of_a_distilled_model_train(tmp_path) -> None:
    def distilled() -> torch.nn.Module:
        torch.manual_seed(0)
        arguments = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=4)
        return timm.create_model("deit_tiny_distilled_patch16_224", **arguments)

    model = distilled()
    model.reset_classifier(6)
    timm_vix.freeze_except(model, "head")
    assert trainable(model) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    timm_vix.save_delta(model, tmp_path / "delta.safetensors")
    other = distilled()
    timm_vix.load_delta(other, tmp_path / "delta.safetensors")
    assert torch.equal(answer(other), answer(model))


@pytest.mark.parametrize(
    "build, part, words",
    [
        (vit, "attn", "part='attn': expected one of 'attention', 'mlp', 'mixer', 'head'"),
        (vit, "mixer", "has no mixer, so nothing was added"),
        (lambda: small("nystrom"), "mixer", "has NystromAttention, so nothing was added"),
        (lambda: vit(0), "head", "has no classifier"),
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


@pytest.mark.parametrize("name", ["cvn_cifar", "levin_cifar", "pin_cifar", "ccn_cifar", "vix_nystrom_cifar"])
@pytest.mark.parametrize("part, places", [("attention", ("attn", "attn_downsample")), ("mlp", ("mlp",))])
def test_parts_of_every_family(name: str, part: str, places: tuple[str, ...]) -> None:
    model = timm.create_model(name, device="meta")
    timm_vix.freeze_except(model, part)
    parameters = {key for key, _ in model.named_parameters()}
    wanted = {key for key in parameters if set(places) & set(key.split("."))}
    assert wanted and trainable(model) == wanted | {key for key in parameters if key.startswith("head")}


@pytest.mark.parametrize("name", ["levin_128s", "levin_cifar", "cvn_cifar"])
def test_other_hosts_take_a_delta_of_their_own_function_only(name: str, tmp_path) -> None:
    def build(num_classes: int, **kwargs) -> torch.nn.Module:
        torch.manual_seed(0)
        size = dict(img_size=32) if name.endswith("cifar") else {}
        model = timm.create_model(name, num_classes=5, **{"num_landmarks": 9, **size, **kwargs}).eval()
        if num_classes != 5:
            model.reset_classifier(num_classes)
        return model

    model = build(3)
    timm_vix.freeze_except(model, "attention")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    path = tmp_path / "delta.safetensors"
    timm_vix.save_delta(model, path)
    shared, images = build(5), torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    timm_vix.load_delta(shared, path)
    assert shared.num_classes == 3 and torch.equal(shared(images), model(images))
    for other in (dict(num_landmarks=4), dict(pinv_iterations=3)):
        with pytest.raises(ValueError, match="its mixers are"):
            timm_vix.load_delta(build(3, **other), path)


def test_a_convolution_of_another_host_is_its_mixers() -> None:
    model = timm.create_model("cvn_cifar", device="meta")
    timm_vix.freeze_except(model, "mixer")
    assert trainable(model) == {n for n, _ in model.named_parameters() if n.endswith("attn.core.conv.weight")} != set()


def test_what_is_no_delta_of_this_model_is_refused(tmp_path) -> None:
    def other_weights() -> torch.nn.Module:
        model = vit()
        with torch.no_grad():
            model.blocks[1].mlp.fc1.weight[0, 0] += 1e-6
        return model

    def converted() -> torch.nn.Module:
        model = vit()
        timm_vix.convert(model, "nystrom", num_landmarks=4)
        return model

    model = vit()
    timm_vix.freeze_except(model, "attention")
    path = tmp_path / "delta.safetensors"
    timm_vix.save_delta(model, path)
    refused = {
        "frozen weights of its deit_tiny_patch16_224 differ": other_weights(),
        "its mixers are": converted(),
        "of deit_tiny_patch16_224; this one is vix_nystrom_cifar": timm.create_model("vix_nystrom_cifar", depth=1),
        "differ from those": vit(depth=2),
    }
    for words, other in refused.items():
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=words) as error:
            timm_vix.load_delta(other, path)
        assert str(path) in str(error.value) and "another model" in str(error.value)
        torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)


def test_other_files_are_refused(tmp_path) -> None:
    model = vit()
    timm_vix.freeze_except(model, "attention")
    timm_vix.save_delta(model, tmp_path / "whole.safetensors")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    (tmp_path / "empty.safetensors").touch()
    torch.save(model.state_dict(), tmp_path / "pickle.safetensors")
    words = {"weights": "is no delta", **dict.fromkeys(("cut", "empty", "pickle", "absent"), "cannot be read")}
    for name, word in words.items():
        with pytest.raises(ValueError, match=f"{name}.safetensors.* {word}") as error:
            timm_vix.load_delta(model, tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)


def test_a_delta_that_was_tampered_with_is_refused(tmp_path) -> None:
    model = vit()
    timm_vix.freeze_except(model, "attention")
    path = tmp_path / "delta.safetensors"
    timm_vix.save_delta(model, path)
    with safe_open(path, "pt") as file:
        told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weight, qkv = "head.weight", "blocks.0.attn.qkv.weight"
    for name, tensor in (
        (weight, torch.tensor(1.0)),
        (weight, tensors[weight][:0]),
        (qkv, tensors[qkv].to(torch.int32)),
    ):
        save_file({**tensors, name: tensor}, path, told)
        with pytest.raises(ValueError, match="of another shape, or not here"):
            timm_vix.load_delta(model, path)


def test_a_delta_needs_a_backbone(tmp_path) -> None:
    with pytest.raises(ValueError, match="has no frozen parameters.*call freeze_except"):
        timm_vix.save_delta(vit(), tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="has only frozen parameters"):
        timm_vix.save_delta(vit().requires_grad_(False), tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())
