"""What is kept of a task: the exact return, equal models whatever they are wrapped in, one line for another model."""

import copy
import hashlib
import json

import pytest
import timm
import torch
from conftest import image, small
from conftest import vit as small_vit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_freeze import trainable
from timm.models import save_for_hf
from timm.utils import unwrap_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import timm_vix
from timm_vix.conversion.identity import fingerprint


def vit(num_classes: int = 5, **kwargs) -> torch.nn.Module:
    """timm's own ViT of three narrow blocks, the same backbone weights in every call."""
    torch.manual_seed(0)
    model = small_vit("deit_tiny_patch16_224", **{"depth": 3, **kwargs})
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


def test_two_tasks_share_one_backbone(tmp_path) -> None:
    expected = {}
    for seed, classes in ((1, 7), (2, 3)):
        model = vit(num_classes=classes)
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


def test_as_many_landmarks_as_patches_are_counted_at_the_present_size(tmp_path) -> None:
    def build(img_size: int, num_landmarks: int) -> torch.nn.Module:
        model = vit()
        timm_vix.convert(model, "nystrom", num_landmarks=num_landmarks)  # at 4x4 patches
        model.set_input_size(img_size)
        return model

    model = build(64, 30)
    timm_vix.freeze_except(model, "attention")
    timm_vix.save_delta(model, tmp_path / "delta.safetensors")
    timm_vix.load_delta(build(64, 30), tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="num_landmarks=30"):
        timm_vix.load_delta(build(64, 20), tmp_path / "delta.safetensors")
    at_once = vit()
    at_once.set_input_size(64)
    timm_vix.convert(at_once, "nystrom", num_landmarks=30)
    timm_vix.load_delta(at_once, tmp_path / "delta.safetensors")


def test_landmarks_of_a_model_of_any_size_count_as_they_are(tmp_path) -> None:
    def build(num_landmarks: int) -> torch.nn.Module:
        model = vit(dynamic_img_size=True)
        timm_vix.convert(model, "nystrom", num_landmarks=num_landmarks)  # at 4x4 patches, and later at any
        return model

    model = build(30)
    timm_vix.freeze_except(model, "head")
    timm_vix.save_delta(model, tmp_path / "delta.safetensors")
    timm_vix.load_delta(build(30), tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="num_landmarks=30"):
        timm_vix.load_delta(build(20), tmp_path / "delta.safetensors")


def test_a_converted_model_keeps_its_task(tmp_path) -> None:
    model = vit()
    timm_vix.convert(model, "linformer", layers="last-2", num_proj_tokens=4)
    timm_vix.freeze_except(model, "mixer")
    timm_vix.save_delta(train(model, 1), tmp_path / "delta.safetensors")
    names = set(load_file(tmp_path / "delta.safetensors"))
    assert names == {f"blocks.{i}.attn.core.token_proj" for i in (1, 2)}
    other = vit()
    timm_vix.convert(other, "linformer", layers="last-2", num_proj_tokens=4)
    assert not torch.equal(answer(other), answer(model))
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
        ((keyword, value),) = other.items()
        with pytest.raises(ValueError, match=f" in the file and nystrom.{keyword}={value}. here"):
            timm_vix.load_delta(build(3, **other), path)


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
        "blocks.0.attn is timm's attention in the file and nystrom here": converted(),
        "from deit_tiny_patch16_224; this model is vix_nystrom_cifar": timm.create_model("vix_nystrom_cifar", depth=1),
        "differ from those": vit(depth=2),
    }
    for words, other in refused.items():
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=words) as error:
            timm_vix.load_delta(other, path)
        assert str(path) in str(error.value) and "does not fit this model" in str(error.value)
        torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)


def test_a_classifier_of_another_width_is_refused(tmp_path) -> None:
    """Also by a model that has no classifier to compare it with."""
    model = vit(num_classes=7)
    timm_vix.freeze_except(model, "head")
    path = tmp_path / "delta.safetensors"
    timm_vix.save_delta(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    wrong = {
        "head.weight": [torch.zeros(7, 99), torch.zeros(7), torch.zeros(7, 32, 1), torch.zeros(7, 32, dtype=torch.int)],
        "head.bias": [torch.zeros(7, 1), torch.zeros(())],
    }
    for name, others in wrong.items():
        for tensor in others:
            save_file(tensors | {name: tensor}, path, metadata)
            other = vit(num_classes=0)
            with pytest.raises(ValueError, match=f"{name}.* have another shape"):
                timm_vix.load_delta(other, path)
            assert other.num_classes == 0 and isinstance(other.head, torch.nn.Identity)
    save_file(tensors, path, metadata)
    timm_vix.load_delta(other, path)
    assert torch.equal(other.head.weight, model.head.weight) and torch.equal(other.head.bias, model.head.bias)


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
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weight, qkv = "head.weight", "blocks.0.attn.qkv.weight"
    for name, tensor in (
        (weight, torch.tensor(1.0)),
        (weight, tensors[weight][:0]),
        (qkv, tensors[qkv].to(torch.int32)),
    ):
        save_file({**tensors, name: tensor}, path, metadata)
        with pytest.raises(ValueError, match="another shape, or do not exist here"):
            timm_vix.load_delta(model, path)
    for change in (
        {"mechanisms": "{"},
        {"mechanisms": '["nystrom"]'},
        {"mechanisms": '{"blocks.0.attn": "nystrom"}'},
        {"backbone": "{}"},
        {"backbone": '{"int4": "00"}'},
        {"backbone": "null"},
        {"backbone": '["float32"]'},
        {"mechanisms": "[" * 100_000},
        {"format": "timm_vix delta 1"},
    ):
        save_file(tensors, path, metadata | change)
        with pytest.raises(ValueError, match="delta.safetensors is a damaged delta: ") as error:
            timm_vix.load_delta(model, path)
        assert "\n" not in str(error.value)


def test_a_file_from_before_a_keyword_has_what_it_had(tmp_path) -> None:
    def build(**options) -> torch.nn.Module:
        model = vit()
        timm_vix.convert(model, "axial", **options)
        return model

    path = tmp_path / "delta.safetensors"
    expected = task(path, build)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    mechanisms = json.loads(metadata["mechanisms"])
    for _, config in mechanisms.values():
        assert (config.pop("conv_residual"), config.pop("locality")) == (False, 0.0)
    save_file(load_file(path), path, metadata | {"mechanisms": json.dumps(mechanisms)})
    model = build()
    timm_vix.load_delta(model, path)
    assert torch.equal(answer(model), expected)
    with pytest.raises(ValueError, match=r"axial\(locality=0.0\) in the file and axial\(locality=0.05\) here"):
        timm_vix.load_delta(build(locality=0.05), path)


def test_a_delta_needs_a_backbone(tmp_path) -> None:
    with pytest.raises(ValueError, match="has no frozen parameters.*call freeze_except"):
        timm_vix.save_delta(vit(), tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="has only frozen parameters"):
        timm_vix.save_delta(vit().requires_grad_(False), tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())


def task(path, build, part: str = "attention", seed: int = 3) -> torch.Tensor:
    """Fine-tune a model, save what changed, and return its answer."""
    model = build()
    timm_vix.freeze_except(model, part)
    train(model, seed)
    timm_vix.save_delta(model, path)
    return answer(model)


@pytest.mark.parametrize(
    "mixer, first, second",
    [
        ("nystrom", {}, dict(ridge=0.01, pinv_iterations=8, conv_residual=False, window_size=0)),
        ("nystrom", dict(num_landmarks=16), {}),
        ("nystrom", dict(ridge=1), dict(ridge=1.0)),
        ("linformer", dict(num_proj_tokens=4), dict(num_proj_tokens=(2, 2), sharing="kv", window_size=0)),
        ("linformer", dict(num_proj_tokens=[2, 2]), dict(num_proj_tokens=(2, 2))),
        ("performer", {}, dict(num_features=64, feature_seed=0, redraw_interval=0, learned_features=False)),
        ("atrous", {}, dict(dilations=(1, 2, 4), window_size=8)),
        ("atrous", dict(dilations="1,2"), dict(dilations=[1, 2])),
        ("atrous", dict(dilations=2), dict(dilations="(2,)")),
    ],
)
def test_keywords_written_otherwise_are_the_same_model(mixer: str, first: dict, second: dict, tmp_path) -> None:
    def build(options: dict) -> torch.nn.Module:
        model = vit()
        timm_vix.convert(model, mixer, **options)
        return model

    for given, other in ((first, second), (second, first)):
        expected = task(tmp_path / "delta.safetensors", lambda options=given: build(options))
        model = build(other)
        assert not torch.equal(answer(model), expected)
        timm_vix.load_delta(model, tmp_path / "delta.safetensors")
        assert torch.equal(answer(model), expected)


def test_a_token_mlp_of_the_default_width_is_the_same_model(tmp_path) -> None:
    def build(**options) -> torch.nn.Module:
        torch.manual_seed(0)
        return small("mixer", img_size=32, patch_size=8, **options)

    expected = task(tmp_path / "delta.safetensors", build)
    model = build(tokens_mlp_ratio=0.5)
    assert not torch.equal(answer(model), expected)
    timm_vix.load_delta(model, tmp_path / "delta.safetensors")
    assert torch.equal(answer(model), expected)


def compiled_blocks(model: torch.nn.Module) -> torch.nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    return model


def checkpointed_blocks(model: torch.nn.Module) -> torch.nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda model: torch.compile(model, backend="eager"), id="compile"),
        pytest.param(torch.nn.DataParallel, id="data parallel"),
        pytest.param(lambda model: torch.nn.DataParallel(torch.compile(model, backend="eager")), id="both"),
        compiled_blocks,
        checkpointed_blocks,
    ],
)
def test_a_wrapped_model_is_the_same_model(wrap, tmp_path) -> None:
    def build() -> torch.nn.Module:
        model = vit()
        timm_vix.convert(model, "linformer", layers=[0, 2], num_proj_tokens=4)
        return model

    def build_wrapped() -> torch.nn.Module:
        return wrap(build())

    bare, wrapped = tmp_path / "bare.safetensors", tmp_path / "wrapped.safetensors"
    expected = {bare: task(bare, build, seed=1)}
    model = build_wrapped()
    timm_vix.freeze_except(model, "attention")
    timm_vix.save_delta(train_unwrapped(model, 2), wrapped)
    expected[wrapped] = answer(model)
    assert not torch.equal(expected[bare], expected[wrapped])
    assert set(load_file(wrapped)) == set(load_file(bare))
    for path in (bare, wrapped):
        for other in (build(), build_wrapped()):
            timm_vix.load_delta(other, path)
            torch.testing.assert_close(answer(other), expected[path], rtol=0, atol=1e-5)


def train_unwrapped(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    train(unwrap_model(model), seed)
    return model


def test_a_backbone_in_another_dtype_is_compared_in_the_coarser_one(tmp_path) -> None:
    def changed(dtype: torch.dtype, change: float) -> torch.nn.Module:
        model = vit()
        with torch.no_grad():
            model.blocks[1].mlp.fc1.weight[0, 0] *= 1 + change
        return model.to(dtype)

    path = tmp_path / "delta.safetensors"
    task(path, vit)
    tuned = load_file(path)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = vit().to(dtype)
        timm_vix.load_delta(model, path)
        assert all(torch.equal(model.state_dict()[name], tensor.to(dtype)) for name, tensor in tuned.items())
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        with pytest.raises(ValueError, match="the frozen weights of its deit_tiny_patch16_224 differ"):
            timm_vix.load_delta(changed(dtype, 0.01), path)
    # the same in bfloat16, and another model in float32
    with pytest.raises(ValueError, match="the frozen weights"):
        timm_vix.load_delta(changed(torch.float32, 1e-6), path)

    half = vit().to(torch.bfloat16)
    timm_vix.freeze_except(half, "head")
    timm_vix.save_delta(half, path)
    for model in (vit(), vit().to(torch.bfloat16).float(), vit().to(torch.bfloat16)):
        with torch.no_grad():
            model.head.weight.zero_()
        timm_vix.load_delta(model, path)
        assert torch.equal(model.head.weight.to(torch.bfloat16), half.head.weight)
    with pytest.raises(ValueError, match="the frozen weights"):
        timm_vix.load_delta(changed(torch.float32, 0.01), path)


def test_equal_weights_of_another_function_are_refused(tmp_path) -> None:
    def pooled(global_pool: str) -> torch.nn.Module:
        return vit(global_pool=global_pool, fc_norm=False)

    def rotary(rope: str) -> torch.nn.Module:
        torch.manual_seed(0)
        return small("linformer", rope, img_size=32, patch_size=8)

    path = tmp_path / "delta.safetensors"
    for build, mine, other in ((pooled, "token", "avg"), (rotary, "axial", "1d")):
        task(path, lambda build=build, mine=mine: build(mine))
        timm_vix.load_delta(build(mine), path)
        with pytest.raises(ValueError, match=f"{mine}.*{other}"):
            timm_vix.load_delta(build(other), path)


def test_a_model_reloaded_from_its_folder_or_named_with_a_tag_is_the_same_model(tmp_path) -> None:
    def build() -> torch.nn.Module:
        model = vit()
        timm_vix.convert(model, "nystrom", num_landmarks=4)
        return model

    save_for_hf(build(), tmp_path / "folder", safe_serialization=True)
    expected = task(tmp_path / "delta.safetensors", build)
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    arguments = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5, num_landmarks=4)
    tagged = timm.create_model("vix_from_timm", source="deit_tiny_patch16_224.fb_in1k", mixer="nystrom", **arguments)
    tagged.load_state_dict(build().state_dict())
    for model in (reloaded, tagged):
        timm_vix.load_delta(model, tmp_path / "delta.safetensors")
        assert torch.equal(answer(model), expected)


def as_format_1(path, architecture: str, mixers: dict, backbone: dict[str, torch.Tensor]) -> None:
    """Give a file the metadata that the first format had."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().numpy().tobytes())
    metadata = dict(
        format="timm_vix delta 1",
        architecture=architecture,
        mixers=json.dumps(mixers),
        backbone=digest.hexdigest()[:16],
    )
    save_file(load_file(path), path, metadata)


@pytest.mark.parametrize(
    "mixer, class_name, recorded, options",
    [
        ("nystrom", "NystromAttention", dict(num_landmarks=4), dict(num_landmarks=4)),
        ("nystrom", "NystromAttention", dict(num_landmarks=4), dict(num_landmarks=4, ridge=0.01)),
        ("nystrom", "NystromAttention", dict(ridge=0.01, num_landmarks=4), dict(num_landmarks=4)),
        ("linformer", "LinformerAttention", dict(num_proj_tokens=[2, 2]), dict(num_proj_tokens=4)),
        ("performer", "PerformerAttention", dict(num_features=None), {}),
        ("performer", "PerformerAttention", dict(num_features=64), {}),
        ("atrous", "AtrousAttention", dict(dilations="1,2"), dict(dilations=(1, 2))),
        ("atrous", "AtrousAttention", {}, {}),
        ("fnet", "FourierMixing", {}, {}),
    ],
)
def test_a_file_of_the_first_format_loads(mixer: str, class_name: str, recorded: dict, options: dict, tmp_path) -> None:
    def build() -> torch.nn.Module:
        model = vit()
        timm_vix.convert(model, mixer, layers=[1], **options)
        return model

    path = tmp_path / "delta.safetensors"
    expected = task(path, build, "head")
    # the names of that time: mixers were no sub-modules of their own
    parameters = {name.replace(".core.", "."): p for name, p in build().named_parameters()}
    backbone = {name: p for name, p in parameters.items() if not name.startswith("head.")}
    old = {"blocks.1.attn": [class_name, recorded]}
    as_format_1(path, "deit_tiny_patch16_224", old, backbone)
    model = build()
    timm_vix.load_delta(model, path)
    assert torch.equal(answer(model), expected)
    if mixer == "nystrom":
        other = vit()
        timm_vix.convert(other, mixer, layers=[1], num_landmarks=4, ridge=0.5)
        with pytest.raises(ValueError, match="nystrom.ridge=0.01. in the file and nystrom.ridge=0.5. here"):
            timm_vix.load_delta(other, path)
    with pytest.raises(ValueError, match=f"blocks.1.attn is {mixer} in the file and timm's attention here"):
        timm_vix.load_delta(vit(), path)
    backbone["blocks.0.mlp.fc1.bias"] = backbone["blocks.0.mlp.fc1.bias"] + 1
    as_format_1(path, "deit_tiny_patch16_224", old, backbone)
    with pytest.raises(ValueError, match="frozen weights of its deit_tiny_patch16_224 differ"):
        timm_vix.load_delta(model, path)


@pytest.mark.parametrize(
    "name, class_name, recorded",
    [
        (
            "levin_cifar",
            "ProjectedNystrom",
            dict(num_landmarks=9, pinv_iterations=8, ridge=0.01, conv_residual=False),
        ),
        ("cvp_cifar", "ProjectedPerformer", dict(num_features=64, feature_seed=0)),
    ],
)
def test_a_file_of_the_first_format_loads_into_a_convolutional_host(
    name: str, class_name: str, recorded: dict, tmp_path
) -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=5, **recorded).eval()

    path = tmp_path / "delta.safetensors"
    model = build()
    timm_vix.freeze_except(model, "head")
    timm_vix.save_delta(train(model, 3), path)
    backbone = {n: p for n, p in build().named_parameters() if not n.startswith("head")}
    cores = [path for path, _ in build().named_modules() if path.endswith(".core")]
    as_format_1(path, name, {core: [class_name, recorded] for core in cores}, backbone)
    other = build()
    assert not torch.equal(answer(other), answer(model))
    timm_vix.load_delta(other, path)
    assert torch.equal(answer(other), answer(model))
    wrong = {core: [class_name, {**recorded, next(iter(recorded)): 4}] for core in cores}
    as_format_1(path, name, wrong, backbone)
    with pytest.raises(ValueError, match=f"{next(iter(recorded))}=4. in the file"):
        timm_vix.load_delta(other, path)


def test_a_delta_from_before_keys_merged_loads(tmp_path) -> None:
    def build(**keywords: float) -> torch.nn.Module:
        torch.manual_seed(0)
        return small("softmax", "axial", img_size=32, patch_size=8, **keywords)

    path = tmp_path / "delta.safetensors"
    expected = task(path, build)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"mechanisms": metadata["mechanisms"].replace('"merge_keys": 1.0, ', "")})
    model = build()
    timm_vix.load_delta(model, path)
    assert torch.equal(answer(model), expected)
    with pytest.raises(ValueError, match=r"softmax\(merge_keys=1.0\) in the file and softmax\(merge_keys=0.5\) here"):
        timm_vix.load_delta(build(merge_keys=0.5), path)


def test_the_fingerprint_of_a_single_number_depends_on_it_alone() -> None:
    every_second = torch.arange(5, 7)[::2]  # of stride 2, and contiguous all the same
    assert fingerprint({"labels": every_second}) == fingerprint({"labels": torch.tensor([5])})
    assert fingerprint({"labels": every_second}) != fingerprint({"labels": torch.tensor([6])})
