"""Attention transfer: its losses against loops, and real runs on real photographs, stopped, resumed and shared."""

import argparse
import copy
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
import timm
import torch
from conftest import distance
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.utils.misc import natural_key

import timm_vix
from timm_vix import cli
from timm_vix._checks import InputError
from timm_vix.deploy.classifier import load_trained
from timm_vix.planning.plan import plan_layers
from timm_vix.train.checkpoint import Checkpoint
from timm_vix.train.finetune import finetune
from timm_vix.train.losses import BlockMatching, Distillation
from timm_vix.train.settings import add_settings
from timm_vix.train.transfer import join_processes, transfer
from timm_vix.train.transfer_results import mixers_in_words
from timm_vix.train.transfer_settings import TransferSettings, parse_layers

SOURCE = "vit_tiny_patch16_224"
SMALL = dict(img_size=48, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7)


def model(**kwargs):
    torch.manual_seed(0)
    built = timm.create_model(SOURCE, **{**SMALL, **kwargs}).eval()
    for parameter in built.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return built


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(model().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def unlabelled(photographs, tmp_path_factory):
    """Sixty photographs, some in a folder of their own, one that can't be read, one text."""
    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "more" / "deep").mkdir(parents=True)
    with tarfile.open(photographs) as archive:
        names = [name for name in archive.getnames() if name.endswith(".jpg")][:60]
        for index, name in enumerate(names):
            with Image.open(io.BytesIO(archive.extractfile(name).read())) as image:
                image.resize((64, 64)).save(folder / ("more/deep" if index % 3 else ".") / f"{index}.jpg")
    (folder / "torn.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def arguments(file, unlabelled, out, **changes):
    settings = dict(
        source=SOURCE,
        data_dir=str(unlabelled),
        mixer="linformer",
        mixer_kwargs=dict(num_proj_tokens=4),
        source_kwargs={key: value for key, value in SMALL.items() if key != "img_size"},
        img_size=48,
        weights=str(file),
        block_steps=6,
        distill_steps=4,
        batch_size=8,
        checkpoint_every=2,
        amp="off",
        device="cpu",
        out=str(out),
    )
    return {**settings, **changes}


def test_block_errors_are_those_of_a_loop_over_blocks():
    teacher, student = model().double(), model().double()
    timm_vix.convert(student, layers={0: "linformer", 2: "nystrom"}, num_proj_tokens=4, num_landmarks=4)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    errors = BlockMatching(teacher, student, [0, 2])(x)
    tokens, expected = teacher._pos_embed(teacher.patch_embed(x)), []
    for index, block in enumerate(teacher.blocks):
        after = block(tokens)
        if index != 1:
            expected.append(((student.blocks[index](tokens) - after) ** 2).sum() / ((after - tokens) ** 2).sum())
        tokens = after
    assert distance(errors, torch.stack(expected)) < 1e-6
    assert not any(block._forward_hooks for block in teacher.blocks)
    # no layer hears of another's error
    errors[0].backward()
    assert student.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert not student.blocks[2].attn.qkv.weight.grad.any()


def test_an_error_goes_through_the_rest_of_the_original_and_without_its_mean():
    teacher, student = model().double(), model().double()
    timm_vix.convert(student, layers={0: "linformer", 2: "nystrom"}, num_proj_tokens=4, num_landmarks=4)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    plain = BlockMatching(teacher, student, [0, 2])(x)
    start = teacher._pos_embed(teacher.patch_embed(x))
    blocks = teacher.blocks
    inputs = [start, blocks[0](start), blocks[1](blocks[0](start))]
    end = blocks[2](inputs[2])
    for step, layer in enumerate([0, 2, 0]):
        *own, behind = BlockMatching(teacher, student, [0, 2], mean_free=0.5, pass_through=3.0)(x, step)
        y = student.blocks[layer](inputs[layer])
        for block in blocks[layer + 1 :]:
            y = block(y)
        error = y - end
        centred = error - error.sum(1, keepdim=True) / error.shape[1]
        expected = 3 * ((error**2).sum() + 0.5 * (centred**2).sum()) / (end**2).sum()
        assert distance(behind, expected) < 1e-6
        # the gradient reaches the block of this step, and none of the original's
        (gradient,) = torch.autograd.grad(behind, student.blocks[layer].attn.qkv.weight)
        assert gradient.abs().sum() > 0
        for index, (value, before) in enumerate(zip(own, plain)):
            error = student.blocks[2 * index](inputs[2 * index]) - (inputs[1], end)[index]
            centred = error - error.sum(1, keepdim=True) / error.shape[1]
            assert distance(value / before, 1 + 0.5 * (centred**2).sum() / (error**2).sum()) < 1e-6
    wanted, mine = teacher.forward_features(x), student.forward_features(x)
    error = mine - wanted
    centred = error - error.sum(1, keepdim=True) / error.shape[1]
    feature = Distillation(teacher, student, mean_free=2.0)(x)[0]
    assert distance(feature, ((error**2).sum() + 2 * (centred**2).sum()) / (wanted**2).sum()) < 1e-6


def test_a_block_that_changes_nothing_has_no_error_and_no_gradient():
    """Zero weights at the end of attention and MLP, as some initialisations leave them."""
    teacher = model()
    for layer in (teacher.blocks[1].attn.proj, teacher.blocks[1].mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    student = copy.deepcopy(teacher)
    timm_vix.convert(student, "linformer", num_proj_tokens=4)
    errors = BlockMatching(teacher, student, [0, 1, 2])(torch.randn(2, 3, 48, 48))
    assert errors[1] == 0 and errors[0] > 1e-4 and errors[2] > 1e-4
    errors.mean().backward()
    assert not student.blocks[1].attn.proj.weight.grad.any()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters() if parameter.grad is not None)
    # what is no rounding error counts
    torch.nn.init.constant_(student.blocks[1].attn.proj.bias, 0.1)
    assert BlockMatching(teacher, student, [0, 1, 2])(torch.randn(2, 3, 48, 48))[1] > 1


def test_distillation_is_nothing_for_equals_and_a_divergence_for_others():
    teacher, student = model(), model()
    x = torch.randn(3, 3, 48, 48)
    assert Distillation(teacher, student)(x).abs().max() < 1e-6
    timm_vix.convert(student, "linformer", num_proj_tokens=4)
    feature, divergence = Distillation(teacher, student)(x)
    p, q = teacher(x).softmax(-1), student(x).softmax(-1)
    assert distance(divergence, (p * (p / q).log()).sum(1).mean()) < 1e-4
    wanted = teacher.forward_features(x)
    assert distance(feature, ((student.forward_features(x) - wanted) ** 2).sum() / (wanted**2).sum()) < 1e-5


def held_out_images(teacher, unlabelled):
    """Every twentieth image that can be read, as the teacher takes it."""
    kept_apart = sorted((str(p) for p in unlabelled.rglob("*.jpg")), key=timm.utils.misc.natural_key)[::20]
    config = timm.data.resolve_input_data_config(teacher, dict(img_size=48))
    pixels = timm.data.create_transform(**config)
    return torch.stack([pixels(Image.open(p).convert("RGB")) for p in kept_apart if "torn" not in p])


def test_a_run(weights, unlabelled, tmp_path, capsys):
    settings = arguments(weights, unlabelled, tmp_path / "run", block_steps=60, distill_steps=20)
    settings.update(block_lr=3e-3, layers="last-2")
    student, report = transfer(**settings)
    assert "skipped 1 of" in (printed := capsys.readouterr().out) and "torn.jpg" in printed
    assert [row.layer for row in report.rows if row.changed] == [1, 2]

    rows = losses_of(tmp_path / "run")
    blocks = torch.tensor([values for stage, values in rows if stage == 1])
    assert blocks.shape == (60, 2) and sum(stage == 2 for stage, _ in rows) == 20
    assert (blocks[-10:].mean(0) < 0.9 * blocks[:5].mean(0)).all(), "each layer comes closer"

    # attention of the replaced layers is all that has changed
    before, after = load_file(weights), student.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith(("blocks.1.attn.", "blocks.2.attn.")) for key in changed)
    assert after.keys() - before.keys() == {f"blocks.{i}.attn.core.token_proj" for i in (1, 2)}

    loaded = timm.create_model(f"local-dir:{tmp_path / 'run' / 'hub'}", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded(x), student(x))
    assert all(parameter.requires_grad for parameter in student.parameters())

    with open(tmp_path / "run" / "result.csv") as file:
        (row,) = csv.DictReader(file)
    teacher = model()
    x = held_out_images(teacher, unlabelled)
    same = (teacher(x).argmax(1) == student(x).argmax(1)).float().mean()
    assert float(row["agreement"]) == pytest.approx(100 * float(same), abs=0.01)
    with Image.open(tmp_path / "run" / "layers.png") as figure:
        assert figure.width > 800 and len(figure.convert("RGB").getcolors(1 << 20)) > 50


def test_learned_features_start_from_the_teachers_tokens_and_move_faster(weights, unlabelled, tmp_path):
    options = dict(num_features=8, learned_features=True)
    settings = arguments(weights, unlabelled, tmp_path / "start", mixer="performer", mixer_kwargs=options)
    start, _ = transfer(**{**settings, "block_steps": 0, "distill_steps": 0})
    random = model()
    timm_vix.convert(random, "performer", **options)
    for drawn, placed in zip(random.blocks, start.blocks):
        assert not torch.equal(drawn.attn.core.features, placed.attn.core.features)
        core = placed.attn.core
        assert distance(core.feature_bias, -0.5 * core.features.square().sum(2).unsqueeze(1)) < 1e-5
    steps = dict(block_steps=1, distill_steps=0, block_lr=1e-3)
    moved, _ = transfer(**{**settings, **steps, "out": str(tmp_path / "moved")})
    # a step of AdamW is as long as its learning rate; a warm-up starts at a hundredth of block_lr
    for name, factor in (("core.features", 30), ("core.feature_bias", 4), ("proj.weight", 1)):
        before, after = (m.blocks[0].attn.get_parameter(name).detach() for m in (start, moved))
        assert (after - before).abs().median() == pytest.approx(1e-3 * factor, rel=0.01), name


# a transfer that is killed before a step
PROGRAM = """
import os, signal
from timm_vix.train.loop import Loop
from timm_vix.train.transfer import transfer

update = Loop.update

def update_or_die(loop, *arguments):
    position = loop.checkpoint.position
    if (position["stage"], position["step"]) == {at!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    update(loop, *arguments)

Loop.update = update_or_die
transfer(**{settings!r})
"""


def test_killed_in_either_stage_it_resumes_to_the_same_weights(weights, unlabelled, tmp_path):
    steps = dict(block_steps=6, distill_steps=6, threads=1, checkpoint_every=2)
    whole, _ = transfer(**arguments(weights, unlabelled, tmp_path / "whole", **steps))
    out = tmp_path / "killed"
    settings = arguments(weights, unlabelled, out, **steps)
    for stage in (1, 2):  # in the fourth step, of which the checkpoint has two
        program = PROGRAM.format(at=(stage, 3), settings=settings)
        process = subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL, check=False)
        assert process.returncode == -signal.SIGKILL
        position = torch.load(out / "checkpoint.pt", weights_only=True)["position"]
        assert (position["stage"], position["step"]) == (stage, 2)
        settings["resume"] = True
    resumed, _ = transfer(**settings)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key


def test_it_resumes_with_images_that_moved(weights, unlabelled, tmp_path):
    """Images lie in the folder itself and in folders of it; an earlier version counted the name of the first, too."""
    run = arguments(weights, unlabelled, tmp_path / "run", block_steps=1, distill_steps=1)
    whole, _ = transfer(**run)
    moved = shutil.copytree(unlabelled, tmp_path / "moved")
    checkpoint = tmp_path / "run" / "checkpoint.pt"

    def resumes(folder):
        again, _ = transfer(**{**run, "data_dir": str(folder)}, resume=True)
        assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in again.state_dict().items())

    resumes(moved)
    saved = torch.load(checkpoint, weights_only=True)
    names = sorted((str(path) for path in unlabelled.rglob("*.jpg")), key=natural_key)
    names = ["/".join(Path(name).parts[-2:]) for index, name in enumerate(names) if index % 20]
    saved["settings"]["images"] = f"{len(names)} images, names {zlib.crc32(repr(names).encode()):08x}"
    torch.save(saved, checkpoint)
    with pytest.raises(InputError, match="settings differ.*images="):
        resumes(moved)
    resumes(unlabelled)
    resumes(moved)
    (moved / "0.jpg").rename(moved / "other.jpg")
    with pytest.raises(InputError, match="settings differ.*images="):
        resumes(moved)


def test_a_held_out_image_that_cannot_be_read_is_named(weights, unlabelled, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, path in enumerate(sorted(unlabelled.glob("*.jpg"))[:12]):
        shutil.copy(path, folder / f"{index + 1:02}.jpg")
    (folder / "00.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"every twentieth image is held out.* none of these 1 can be read, .*00\.jpg"):
        transfer(**arguments(weights, folder, tmp_path / "out"))


def test_a_mixer_that_is_exact_leaves_the_model_as_it_was(weights, unlabelled, tmp_path):
    """49 landmarks are more than the 36 patches: nothing to fit, and no error for the figure's logarithm."""
    settings = arguments(weights, unlabelled, tmp_path / "exact", mixer="nystrom", mixer_kwargs={})
    student, _ = transfer(**settings)
    teacher = timm.create_model(SOURCE, **SMALL)
    teacher.load_state_dict(load_file(weights))
    x = torch.randn(2, 3, 48, 48)
    assert distance(student.eval()(x), teacher.eval()(x)) < 0.05
    assert all(error < 1e-3 for _, values in losses_of(tmp_path / "exact") for error in values)
    assert (tmp_path / "exact" / "layers.png").stat().st_size > 0
    transfer(**settings | dict(mixer_kwargs=dict(num_landmarks=4), out=str(tmp_path / "fewer")))
    assert max(error for _, values in losses_of(tmp_path / "fewer") for error in values) > 1e-3


def losses_of(folder):
    with open(folder / "steps.csv") as file:
        return [(int(row["stage"]), [float(x) for x in row["losses"][1:-1].split(",")]) for row in csv.DictReader(file)]


def test_with_scaled_logits_the_original_is_scaled_too(weights, unlabelled, tmp_path):
    """With as many landmarks as patches Nyström is softmax: nothing differs if both are scaled."""
    exact = dict(mixer="nystrom", mixer_kwargs=dict(num_landmarks=49, scale_logits=4), layers=[0, 1])
    student, _ = transfer(**arguments(weights, unlabelled, tmp_path / "scaled", **exact))
    assert all(error < 1e-3 for _, values in losses_of(tmp_path / "scaled") for error in values)
    teacher = timm.create_model(SOURCE, **SMALL).eval()
    teacher.load_state_dict(load_file(weights))
    x = torch.randn(2, 3, 48, 48)
    unscaled = teacher(x)
    timm_vix.convert(teacher, scale_logits=4)
    assert distance(student(x), teacher(x)) < 0.05 < distance(unscaled, teacher(x))


def test_a_conversion_that_only_scales_has_nothing_to_learn(weights, unlabelled, tmp_path):
    settings = arguments(weights, unlabelled, tmp_path / "run", mixer="softmax", mixer_kwargs=dict(scale_logits=4))
    with pytest.raises(ValueError, match="mixer='softmax' only scales logits, .* nothing to transfer"):
        transfer(**settings)
    assert not (tmp_path / "run").exists()


def test_the_first_stage_trains_the_layers_with_other_attention_only(weights, unlabelled, tmp_path):
    """Where logits are scaled, softmax attention has slots as well, which compute what the original computes."""
    kwargs = dict(mixer="axial", layers=[1], mixer_kwargs=dict(scale_logits=4), pass_through=1.0, block_steps=3)
    transfer(**arguments(weights, unlabelled, tmp_path / "run", **kwargs))
    first = [values for stage, values in losses_of(tmp_path / "run") if stage == 1]
    assert len(first) == 3 and all(len(values) == 2 and min(values) > 0 for values in first)


def test_a_conversion_that_only_merges_has_no_first_stage(weights, unlabelled, tmp_path, capsys):
    settings = arguments(weights, unlabelled, tmp_path / "merged", mixer="softmax", mixer_kwargs=dict(merge=4))
    transfer(**settings)
    assert "stage 1 is left out" in capsys.readouterr().out
    assert [stage for stage, _ in losses_of(tmp_path / "merged")] == [2] * 4
    assert losses_of(tmp_path / "merged")[0][1][0] > 0


def test_a_run_that_cannot_be_replaced_stays(weights, unlabelled, tmp_path):
    """A threshold merges another number of tokens in each image, which a batch can't hold."""
    settings = arguments(weights, unlabelled, tmp_path / "run", block_steps=1, distill_steps=1)
    transfer(**settings)
    left = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert tmp_path / "run/hub/model.safetensors" in left
    changes = dict(mixer=None, mixer_kwargs=dict(merge={"threshold": 0.9}), overwrite=True)
    with pytest.raises(InputError, match="the converted model fails on .*threshold.*expected a batch of 1, got 2"):
        transfer(**{**settings, **changes})
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == left


def test_without_a_classifier_tokens_are_compared(weights, unlabelled, tmp_path, capsys):
    state = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("head")}
    save_file(state, tmp_path / "headless.safetensors")
    settings = arguments(tmp_path / "headless.safetensors", unlabelled, tmp_path / "run")
    settings["source_kwargs"] |= dict(num_classes=0)
    converted, _ = transfer(**settings)
    (row,) = csv.DictReader((tmp_path / "run" / "result.csv").read_text().splitlines())
    original = model()
    original.reset_classifier(0)
    pixels = held_out_images(original, unlabelled)
    with torch.no_grad():
        wanted, mine = original.forward_features(pixels), converted.forward_features(pixels)
    expected = float(torch.cosine_similarity(wanted, mine, dim=2).mean())
    assert float(row["cosine"]) == pytest.approx(expected, abs=1e-4) and expected < 0.9999
    assert float(row["feature_distance"]) == pytest.approx(float((mine - wanted).norm() / wanted.norm()), abs=1e-4)
    assert row["agreement"] == ""
    sentence = f"its output tokens have a mean cosine of {row['cosine']} to those of the original"
    card = (tmp_path / "run" / "hub" / "README.md").read_text()
    assert sentence in card and sentence in capsys.readouterr().out
    assert "predicts" not in card and "image-feature-extraction" in card and "agreement: None" not in card


@pytest.mark.slow
def test_two_processes_do_what_one_does(weights, unlabelled, tmp_path):
    few = dict(mixer="nystrom", mixer_kwargs=dict(num_landmarks=4))
    one, _ = transfer(**arguments(weights, unlabelled, tmp_path / "one", **few))
    settings = arguments(weights, unlabelled, tmp_path / "two", **few)
    program = tmp_path / "program.py"
    program.write_text(f"from timm_vix.train.transfer import transfer; transfer(**{settings!r})")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    environment = {**os.environ, "PYTHONPATH": str(Path(timm_vix.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_file(tmp_path / "two" / "hub" / "model.safetensors")
    start, _ = transfer(**arguments(weights, unlabelled, tmp_path / "start", **few, block_steps=0, distill_steps=0))
    changes = {key: tensor - start.state_dict()[key] for key, tensor in one.state_dict().items()}
    changed = {key for key, change in changes.items() if change.any()}
    assert changed == {key for key in changes if ".attn." in key}
    for key in changed:
        # AdamW makes a step of any gradient; that of a bias of keys is rounding, since softmax doesn't see it
        bound = 0.02 if key.endswith("qkv.bias") else 1e-3
        assert distance(two[key] - start.state_dict()[key], changes[key]) < bound, key


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(source="vit_tiny_patch16_22"), ["vit_tiny_patch16_22", "near names"]),
        (dict(source="resnet18", source_kwargs={}, weights=None, pretrained=False), ["random weights", "weights=FILE"]),
        (dict(weights="nowhere.safetensors"), ["nowhere.safetensors"]),
        (dict(mixer="windows"), ["'windows'", "nystrom"]),
        (dict(mixer="softmax", mixer_kwargs={}), ["nothing to transfer"]),
        (dict(mixer="fnet", mixer_kwargs={}), ["no parameters to fit"]),
        (dict(layers="last-9"), ["last-9", "1 to 3"]),
        (dict(layers=[]), ["names no layer"]),
        (dict(mixer_kwargs=dict(num_landmarks=3)), ["linformer", "num_landmarks"]),
        (dict(data_dir="nowhere"), ["nowhere does not exist"]),
        (dict(data_dir=3), ["data_dir=3", "a folder"]),
        (dict(mixer_kwargs=dict(layers="last-1")), ["mixer_kwargs: layers", "a setting itself"]),
        (dict(batch_size=0), ["batch_size=0"]),
        (dict(pass_through=float("inf")), ["pass_through=inf", "finite"]),
        (dict(batch_size=100), ["batch_size=100", "at most 57, the number of images to learn from"]),
        (dict(block_steps=-1), ["block_steps=-1"]),
        (dict(block_lr=1e30), ["loss became", "lower block_lr=1e+30"]),
        (dict(amp="half"), ["amp=half"]),
        (dict(device="tpu"), ["device='tpu'"]),
        (dict(resume=True), ["no checkpoint.pt"]),
        (
            dict(source_kwargs=dict(patch_size=8, embed_dim=64, depth=3, num_heads=2, num_classes=7)),
            ["cannot be built"],
        ),
    ],
    ids=str,
)
def test_wrong_input_is_one_clear_line(weights, unlabelled, changes, words, tmp_path):
    with pytest.raises(ValueError) as error:
        transfer(**arguments(weights, unlabelled, tmp_path / "run", **changes))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("channels", [2, 4, 12])
def test_channels_that_image_files_lack_are_refused(channels, unlabelled, tmp_path):
    file = tmp_path / "multispectral.safetensors"
    save_file(model(in_chans=channels).state_dict(), file)
    settings = arguments(file, unlabelled, tmp_path / "run")
    settings["source_kwargs"] |= dict(in_chans=channels)
    planned = {key: settings[key] for key in ("source", "data_dir", "source_kwargs", "img_size", "weights", "device")}
    for call in (
        lambda: transfer(**settings),
        lambda: plan_layers(**planned, mixer=["linformer"], images=4, out=str(tmp_path / "plan.json")),
    ):
        with pytest.raises(ValueError, match=rf"in_chans={channels}: allowed is 1 \(grey\) or 3 \(RGB\)"):
            call()
    assert not (tmp_path / "run").exists()


def test_an_interrupted_transfer_is_saved_and_continues_exactly(weights, unlabelled, tmp_path, monkeypatch):
    steps = dict(threads=1, block_steps=40)
    whole, _ = transfer(**arguments(weights, unlabelled, tmp_path / "whole", **steps))
    settings = arguments(weights, unlabelled, tmp_path / "run", **steps, checkpoint_every=1)

    save, pressed = Checkpoint.save, []

    def save_and_press(checkpoint):
        """Ctrl-C after the second step of the blocks."""
        save(checkpoint)
        if not pressed and (checkpoint.position["stage"], checkpoint.position["step"]) == (1, 2):
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_press)
        told = r"after 2 of 40 steps; saved .*checkpoint.pt; resume continues"
        with pytest.raises(KeyboardInterrupt, match=told):
            transfer(**settings)
    assert not (tmp_path / "run" / "result.csv").exists()
    resumed, _ = transfer(**settings, resume=True)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_the_whole_network_with_its_learning_rates_continues_exactly(weights, unlabelled, tmp_path, monkeypatch):
    """Groups of parameters depend on the stage, the layer and the mixer; it stops in the second stage."""
    few = dict(
        mixer="performer",
        mixer_kwargs=dict(num_features=8, learned_features=True),
        distill_part="all",
        layer_decay=0.5,
        pass_through=1.0,
        block_steps=2,
        distill_steps=4,
    )
    whole, _ = transfer(**arguments(weights, unlabelled, tmp_path / "whole", **few))
    losses_of_stage_2 = Distillation.forward
    calls = []

    def stop(self, *inputs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return losses_of_stage_2(self, *inputs)

    monkeypatch.setattr(Distillation, "forward", stop)
    cut = arguments(weights, unlabelled, tmp_path / "cut", **few)
    with pytest.raises(KeyboardInterrupt, match="resume"):
        transfer(**cut)
    resumed, _ = transfer(**cut, resume=True)
    assert len(calls) == 4
    for (name, mine), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_batch_smaller_than_the_processes_is_refused(weights, unlabelled, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="batch_size=2: allowed is at least 1 for each of the 4 processes"):
        transfer(**arguments(weights, unlabelled, tmp_path / "run", batch_size=2))
    assert not (tmp_path / "run").exists()


def test_resume_notices_another_teacher(unlabelled, tmp_path):
    """Other weights of the same name, and a folder whose configuration pools other tokens of the same weights."""
    teacher, folder = model(global_pool="avg"), tmp_path / "teacher"

    def settings(**changes):
        found = arguments("", unlabelled, tmp_path / "run", source=f"local-dir:{folder}", source_kwargs={}, **changes)
        return {**found, "weights": None, "pretrained": True}

    timm.models.save_for_hf(teacher, folder, safe_serialization=True)
    transfer(**settings())
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    config = (folder / "config.json").read_text()
    assert '"global_pool": "avg"' in config
    (folder / "config.json").write_text(config.replace('"global_pool": "avg"', '"global_pool": "max"'))
    with pytest.raises(ValueError, match="settings differ.*'global_pool': 'avg'.* before.*'global_pool': 'max'.* now"):
        transfer(**settings(resume=True))
    teacher.head.bias.data += 1
    timm.models.save_for_hf(teacher, folder, safe_serialization=True)
    with pytest.raises(ValueError, match="settings differ.*teacher="):
        transfer(**settings(resume=True))
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == kept


def test_the_card_has_the_hubs_metadata(weights, unlabelled, tmp_path):
    transfer(**arguments(weights, unlabelled, tmp_path / "run", block_steps=1, distill_steps=0))
    card = ModelCard.load(tmp_path / "run" / "hub" / "README.md")
    assert card.data.to_dict() == dict(
        library_name="timm",
        pipeline_tag="image-classification",
        license="other",
        tags=["image-classification", "timm", "timm_vix"],
    )
    assert f"# {SOURCE} with linformer attention" in card.text


def test_folders_without_pictures_and_of_another_run(weights, unlabelled, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        transfer(**arguments(weights, tmp_path / "empty", tmp_path / "run"))
    transfer(**arguments(weights, unlabelled, tmp_path / "run"))
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="already holds .*; give resume to continue"):
        transfer(**arguments(weights, unlabelled, tmp_path / "run"))
    for moved in dict(threads=2), dict(data_dir=[unlabelled]):  # a path in a list is a folder
        transfer(**{**arguments(weights, unlabelled, tmp_path / "run", resume=True), **moved})
    with pytest.raises(ValueError, match="settings differ.*block_lr"):
        transfer(**arguments(weights, unlabelled, tmp_path / "run", resume=True, block_lr=0.5))
    again, before = (
        torch.load(io.BytesIO(data), weights_only=True)["model"]
        for data in ((tmp_path / "run" / "checkpoint.pt").read_bytes(), kept)
    )
    assert all(torch.equal(again[name], before[name]) for name in before)
    run = dict(model="vit_tiny_patch16_224", model_kwargs=dict(patch_size=8, embed_dim=32, depth=1, num_heads=2))
    finetune(**run, epochs=1, batch_size=512, lr=1e-3, img_size=8, out=str(tmp_path / "finetuned"))
    with pytest.raises(ValueError, match="settings differ"):
        transfer(**arguments(weights, unlabelled, tmp_path / "finetuned", resume=True))


def test_a_conversion_that_diverges_in_the_last_step_is_no_result(weights, unlabelled, tmp_path):
    changes = dict(block_steps=1, distill_steps=0, block_lr=1e30)
    with pytest.raises(ValueError, match=r"converted model gives tokens that aren't finite; lower block_lr=1e\+30"):
        transfer(**arguments(weights, unlabelled, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "hub").exists()


def test_layers_of_the_command_line():
    assert parse_layers("last-6") == "last-6" and parse_layers("plan.json") == "plan.json"
    assert parse_layers("0,3,5") == [0, 3, 5] and parse_layers("4") == [4]


def test_layers_of_a_plan(weights, unlabelled, tmp_path):
    """The file's layers are what is converted, and a run doesn't continue with another plan of the same name."""
    plan = tmp_path / "plan.json"

    def write(layer, depth=3):
        layers = {layer: {"mixer": "linformer", "num_proj_tokens": 4}}
        content = dict(format="timm_vix plan 1", architecture=SOURCE, depth=depth, layers=layers)
        plan.write_text(json.dumps(content))
        return arguments(weights, unlabelled, tmp_path / "run", layers=str(plan), mixer=None, mixer_kwargs={})

    _, report = transfer(**write("1"))
    assert [(row.layer, row.after) for row in report.rows if row.changed] == [(1, "LinformerAttention")]
    with pytest.raises(ValueError, match="settings differ.*layers"):
        transfer(**write("2"), resume=True)
    with pytest.raises(ValueError, match="plan.json is a plan for vit_tiny_patch16_224 with 12 layers; this model"):
        transfer(**write("1", depth=12), overwrite=True)
    with pytest.raises(ValueError, match="mixer='performer': a plan names the mixer of each layer; allowed is None"):
        transfer(**write("1") | dict(mixer="performer"), overwrite=True)
    plan.unlink()
    settings = arguments(weights, unlabelled, tmp_path / "run", layers=str(plan), mixer=None, mixer_kwargs={})
    with pytest.raises(ValueError, match="plan.json cannot be read as a plan"):
        transfer(**settings, overwrite=True)


def test_a_plan_that_merges_and_scales_is_transferred_as_a_whole(weights, unlabelled, tmp_path):
    content = dict(format="timm_vix plan 2", architecture=SOURCE, depth=3, merge=[0, 6, 6], scale_logits=20)
    content["layers"] = {"0": {"mixer": "linformer", "num_proj_tokens": 4}}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    given = arguments(weights, unlabelled, tmp_path / "run", layers=str(tmp_path / "plan.json"))
    del given["mixer"], given["mixer_kwargs"]
    student, report = transfer(**given)
    assert [(row.after, row.merged) for row in report.rows] == [
        *(("LinformerAttention", 0), ("SoftmaxAttention", 6), ("SoftmaxAttention", 6))
    ]
    assert report.trained_tokens == 20
    images = torch.randn(2, 3, 48, 48)
    again = timm.create_model(f"local-dir:{tmp_path / 'run' / 'hub'}", pretrained=True).eval()
    by_hand = model()
    timm_vix.convert(by_hand, layers={0: content["layers"]["0"]}, merge=[0, 6, 6], scale_logits=20)
    by_hand.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images), student(images)) and torch.equal(by_hand(images), student(images))


def test_several_mixers_are_all_told():
    model = timm.create_model(SOURCE, depth=4)
    layers = {0: {"mixer": "linformer", "num_proj_tokens": 4}, 1: "performer", 2: {"mixer": "linformer"}}
    mixer, keywords = mixers_in_words(timm_vix.convert(model, layers=layers, num_features=8))
    assert mixer == "linformer, performer"
    assert keywords.split("; ")[0] == "num_proj_tokens=[2, 2] sharing=kv window_size=0"
    assert "num_features=8 feature_seed=0 redraw_interval=0 learned_features=False" in keywords
    assert "merge" not in keywords and "scale_logits" not in keywords
    merged = timm_vix.convert(timm.create_model(SOURCE, **SMALL), "performer", merge=2, scale_logits=5)
    assert mixers_in_words(merged)[1].endswith("learned_features=False; merge=2,2,2; scale_logits=5")


def test_it_goes_on_at_another_size_and_trains_the_whole_network(weights, unlabelled, tmp_path):
    """At 48 px from one folder, then at 64 px from two, from the weights of the first transfer."""
    few = dict(block_steps=2, distill_steps=2, pass_through=1.0, mean_free=1.0)
    first, _ = transfer(**arguments(weights, unlabelled, tmp_path / "first", **few))
    start = first.state_dict()
    nothing = dict(block_steps=0, distill_steps=0, start=str(tmp_path / "first"))
    grown, _ = transfer(**arguments(weights, unlabelled, tmp_path / "grown", **nothing, img_size=64))
    first.set_input_size((64, 64))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(grown(x), first(x))
    folders = [str(unlabelled / "more"), str(unlabelled)]
    settings = arguments(weights, unlabelled, tmp_path / "whole", block_steps=0, distill_steps=2, distill_part="all")
    settings.update(data_dir=folders, layer_decay=0.5, distill_lr=1e-2, start=str(tmp_path / "first"))
    whole, _ = transfer(**settings)
    state = whole.state_dict()
    moved = {name: (state[name] - start[name]).abs().max() for name in start if state[name].is_floating_point()}
    assert not [name for name, change in moved.items() if change == 0 and "conv" not in name]
    # Adam moves each by its learning rate, which halves from layer to layer
    top, bottom = (moved[f"blocks.{layer}.mlp.fc1.weight"] for layer in (2, 0))
    assert 3 < top / bottom < 5
    row = next(csv.DictReader((tmp_path / "whole" / "result.csv").read_text().splitlines()))
    assert int(row["images"]) == 57  # of 61, those of the inner folder once; every twentieth is held out
    settings.update(out=str(tmp_path / "other"), mixer="nystrom", mixer_kwargs={})
    with pytest.raises(ValueError, match="expected the folder of a transfer with the same source and mixers"):
        transfer(**settings)
    # neither has weights by which it could be told from the other
    axial = dict(settings, mixer="axial", block_steps=0, distill_steps=0, layer_decay=1.0, distill_part="attention")
    transfer(**{**axial, "start": None, "out": str(tmp_path / "axial")})
    with pytest.raises(ValueError, match=r"blocks\.0\.attn has axial attention there and nystrom attention here"):
        transfer(**{**settings, "start": str(tmp_path / "axial")})
    with pytest.raises(ValueError, match="start=.*nowhere"):
        transfer(**{**settings, "start": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    "command, option", [("transfer", "--mixer-kwargs"), ("transfer", "--source-kwargs"), ("plan", "--source-kwargs")]
)
def test_a_keyword_without_a_value_is_refused(command, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timm-vix", command, "--source", SOURCE, "--data-dir", "x", option, "depth"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and f"{option} depth: expected key=value" in capsys.readouterr().err


def test_keywords_of_one_option_given_twice_are_all_taken():
    parser = argparse.ArgumentParser()
    add_settings(parser, TransferSettings)
    text = "--source vit_tiny_patch16_224 --data-dir x --mixer-kwargs num_proj_tokens=4 --mixer-kwargs merge=8"
    given = parser.parse_args([*text.split(), "--source-kwargs", "depth=3", "--source-kwargs", "num_heads=2"])
    assert given.mixer_kwargs == dict(num_proj_tokens=4, merge=8)
    assert given.source_kwargs == dict(depth=3, num_heads=2)


@pytest.mark.parametrize("name", ["cut.safetensors", "text.pth", "text.safetensors", "pickled.pth"])
def test_files_that_hold_no_weights_are_named(name, weights, unlabelled, tmp_path):
    """Before anything is built: what timm raises of such a file doesn't name it."""
    path = tmp_path / name
    if name.startswith("cut"):
        path.write_bytes(weights.read_bytes()[:100])
    elif name.startswith("text"):
        path.write_text("it is text")
    else:
        torch.save({"model": argparse.Namespace()}, path)
    for call in (
        lambda: transfer(**arguments(path, unlabelled, tmp_path / "run")),
        lambda: finetune(SOURCE, checkpoint=str(path), out=str(tmp_path / "run")),
        lambda: plan_layers(SOURCE, str(unlabelled), weights=str(path), out=str(tmp_path / "plan.json")),
        lambda: load_trained(SOURCE, weights=str(path)),
    ):
        with pytest.raises(ValueError, match=f"{name} is no readable file of weights: ") as error:
            call()
        assert "\n" not in str(error.value)
    assert [one.name for one in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("given", ["cuda", "cuda:0"])
def test_each_process_has_its_own_gpu_and_it_is_no_setting(given, weights, unlabelled, tmp_path, monkeypatch):
    """Or no process but the first could continue the run."""
    run = TransferSettings(**arguments(weights, unlabelled, tmp_path / "run", device=given))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("timm_vix.train.transfer.find_device", lambda name: name)
    joined = dict(device="cuda:1", global_rank=1)
    monkeypatch.setattr("timm_vix.train.transfer.init_distributed_device_so", lambda device: joined)
    assert join_processes(run) == 1 and run.device == "cuda:1"
    assert "device" not in run.recorded()


def test_without_a_classifier_all_that_trains_has_a_gradient():
    """Of several processes each waits for the gradients of the others."""
    teacher = model(num_classes=0, global_pool="avg", class_token=False).eval()
    student = copy.deepcopy(teacher)
    Distillation(teacher, student)(torch.randn(2, 3, 48, 48)).sum().backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []


def test_what_a_transfer_starts_from_is_not_replaced_by_it(weights, unlabelled, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(weights, out / "weights.safetensors")
    for start in (dict(start=str(out)), dict(weights=str(out / "weights.safetensors"))):
        with pytest.raises(InputError, match="lies in out=.*give another out"):
            transfer(**arguments(weights, unlabelled, out, overwrite=True, **start))
    assert (out / "weights.safetensors").read_bytes() == Path(weights).read_bytes()


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(source_kwargs=dict(norm_layer=torch.nn.LayerNorm)), "source_kwargs: norm_layer=.*expected numbers, text"),
        (dict(pretrained=True), "weights and pretrained were both given; allowed is one of them"),
    ],
)
def test_what_no_run_could_finish_with_is_refused(wrong, words, weights, unlabelled, tmp_path):
    with pytest.raises(InputError, match=words):
        transfer(**arguments(weights, unlabelled, tmp_path / "run", **wrong))
    assert not (tmp_path / "run").exists()
