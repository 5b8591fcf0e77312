"""Fine-tuning: exact continuation, files that survive, honest export, and one clear line for wrong input."""

import argparse
import csv
import errno
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import exit_code, lively, load_example
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.transforms import v2

import timm_vix
from timm_vix._checks import InputError
from timm_vix.data.folders import find_images, hold_out
from timm_vix.data.images import Images, transforms
from timm_vix.train.build import build_model
from timm_vix.train.checkpoint import write_history
from timm_vix.train.finetune import evaluate, finetune, seed_step
from timm_vix.train.finetune_settings import FinetuneSettings
from timm_vix.train.settings import add_settings, given_settings

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "finetune.py"
load_digits = pytest.importorskip("sklearn.datasets", reason="the images are scikit-learn's digits").load_digits

MODEL_KWARGS = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2)
TINY = dict(model="vit_tiny_patch16_224", model_kwargs=MODEL_KWARGS, img_size=32, batch_size=4, threads=1, amp="off")
# everything that draws random numbers is on, and more is drawn in every step than in the one before a stop
EXACT = dict(TINY, epochs=2, lr=1e-3, mixup=0.2, drop_path=0.2, augment="rand", device="cpu")
CLOCK = {"seconds", "train_seconds", "images_per_second"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Folder of real images: four digits, 40 PNG files each."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for label in range(4):
        (folder / f"digit{label}").mkdir()
        for i, image in enumerate(data.images[data.target == label][:40]):
            pixels = Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32))
            pixels.save(folder / f"digit{label}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A run that nobody stopped: its folder, model and history."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, *finetune(data_dir=str(digits), out=str(out), **EXACT)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs the example in this process; returns exit code and stderr."""
    example = load_example("finetune")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        capsys.readouterr()
        return exit_code(example.main), capsys.readouterr().err

    return run


def command(data_dir, out, **settings):
    """The settings as arguments of the script."""
    arguments = ["--data-dir", str(data_dir), "--out", str(out)]
    for name, value in settings.items():
        values = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
        arguments += ["--" + name.replace("_", "-"), *values]
    return arguments


def assert_same_run(out, finished):
    reference, _, history = finished
    mine, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (out, reference))
    for row, expected in zip(mine["position"]["history"], history, strict=True):
        assert {k: v for k, v in row.items() if k not in CLOCK} == {k: v for k, v in expected.items() if k not in CLOCK}
    torch.testing.assert_close(mine["model"], theirs["model"], rtol=0, atol=0)
    torch.testing.assert_close(mine["optimizer"]["state"], theirs["optimizer"]["state"], rtol=0, atol=0)
    rows = read_history(out)
    assert [float(row["train_loss"]) for row in rows] == [row["train_loss"] for row in history]


def read_history(out):
    return list(csv.DictReader((out / "history.csv").read_text().splitlines()))


def position(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["position"]


# a run that is killed in the fourth step of the second epoch
PROGRAM = """
import os, signal
import timm_vix.train.finetune as module

seed_step = module.seed_step

def seed_or_die(run, epoch, step):
    if (epoch, step) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    seed_step(run, epoch, step)

module.seed_step = seed_or_die
module.finetune(**{settings!r})
"""


def test_killed_run_continues_exactly(digits, finished, tmp_path):
    out = tmp_path / "out"
    program = PROGRAM.format(settings=dict(EXACT, data_dir=str(digits), out=str(out), checkpoint_every=2))
    killed = subprocess.run([sys.executable, "-c", program], env=dict(os.environ, PYTHONPATH=str(ROOT)), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (position(out)["epoch"], position(out)["step"]) == (1, 2)
    # another process, other workers, another place of the same images
    shutil.copytree(digits, tmp_path / "moved")
    finetune(data_dir=str(tmp_path / "moved"), out=str(out), resume=True, workers=2, **EXACT)
    assert_same_run(out, finished)


def test_interrupted_run_is_saved_and_continues_exactly(digits, finished, tmp_path, script, monkeypatch):
    out = tmp_path / "out"

    def seed_and_press(run, epoch, step):
        """Ctrl-C in the third step of the second epoch."""
        seed_step(run, epoch, step)
        if (epoch, step) == (1, 2):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("timm_vix.train.finetune.seed_step", seed_and_press)
        code, stderr = script(*command(digits, out, **EXACT))
    assert code == 130
    assert "interrupted in epoch 2" in stderr and f"saved {out}/checkpoint.pt" in stderr and "resume" in stderr
    assert stderr.count("\n") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert position(out)["epoch"] == 1
    finetune(data_dir=str(digits), out=str(out), resume=True, **EXACT)
    assert_same_run(out, finished)


def test_ctrl_c_promises_a_continuation_only_from_a_checkpoint(digits, tmp_path, monkeypatch, script):
    out = tmp_path / "out"
    words = command(digits, out, **EXACT)

    def press(*_):
        raise KeyboardInterrupt

    def stopped_in(step, *more):
        with monkeypatch.context() as patch:
            patch.setattr(f"timm_vix.train.finetune.{step}", press)
            code, stderr = script(*words, *more)
        assert code == 130
        return stderr

    too_early = "interrupted before the first checkpoint\n"
    assert stopped_in("find_images") == too_early and not out.exists()
    assert stopped_in("seed_step") == "interrupted; the same command with --resume continues\n"
    assert stopped_in("find_images", "--resume") == "interrupted; the same command with --resume continues\n"
    assert stopped_in("find_images", "--overwrite") == too_early  # the checkpoint is that of the former run
    told = stopped_in("seed_step", "--overwrite")
    assert told == "interrupted; the same command with --resume instead of --overwrite continues\n"
    assert position(out)["epoch"] == 0
    assert script(*words, "--resume")[0] == 0


def test_weights_threads_and_device_may_change_in_between(digits, tmp_path, monkeypatch, script):
    weights, out = tmp_path / "start.safetensors", tmp_path / "out"
    torch.manual_seed(5)
    save_file(
        timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, **MODEL_KWARGS).state_dict(), weights
    )
    whole, _ = finetune(data_dir=str(digits), out=str(tmp_path / "whole"), checkpoint=str(weights), **EXACT)

    def crash(*_):
        if position(out)["epoch"]:
            raise RuntimeError
        return 50.0, 100.0

    with monkeypatch.context() as patch:
        patch.setattr("timm_vix.train.finetune.evaluate", crash)
        with pytest.raises(RuntimeError):
            finetune(data_dir=str(digits), out=str(out), checkpoint=str(weights), checkpoint_every=20, **EXACT)
    assert (position(out)["epoch"], position(out)["step"]) == (1, 20)
    other = shutil.copy(weights, tmp_path / "other.safetensors")
    for change, words in (
        (["--checkpoint", other], "checkpoint=start.safetensors before, other.safetensors now"),
        ([], "checkpoint=start.safetensors before, None now"),
    ):
        assert_one_clear_line(script(*command(digits, out, **EXACT), "--resume", *change), ["settings differ", words])
    moved = tmp_path / "moved" / "start.safetensors"
    moved.parent.mkdir()
    weights.rename(moved)
    # as earlier versions left it, and from a device that is not here
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    saved["settings"].update(threads=1, device="cuda:7")
    del saved["settings"]["content"], saved["settings"]["construction"], saved["settings"]["checkpoint"]
    del saved["damaged"]
    saved["position"].update(weights=None, damaged=[[], []])
    shutil.copytree(out, tmp_path / "earlier")
    torch.save(saved, tmp_path / "earlier" / "checkpoint.pt")
    # two threads add in another order
    for folder, threads, tolerance in ((tmp_path / "earlier", 1, 0), (out, 2, 1e-4)):
        settings = dict(EXACT, checkpoint=str(moved), threads=threads)
        model, _ = finetune(data_dir=str(digits), out=str(folder), resume=True, **settings)
        torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=tolerance)
        card = (folder / "hub" / "README.md").read_text()
        assert "trained from `start.safetensors`" in card
        assert "- device: cpu" in card and f"- threads: {threads}" in card


def test_resuming_a_finished_run_changes_nothing(digits, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "hub")
    finetune(data_dir=str(digits), out=str(out), resume=True, **EXACT)
    assert_same_run(out, finished)
    assert (out / "hub" / "model.safetensors").read_bytes() == (finished[0] / "hub" / "model.safetensors").read_bytes()


def test_failing_write_keeps_the_previous_checkpoint(digits, finished, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "out", os.fsync, []

    def full_disk(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="cannot write .*checkpoint.pt.*No space left on device.*previous one is intact"):
        finetune(data_dir=str(digits), out=str(out), checkpoint_every=3, **EXACT)
    monkeypatch.undo()
    assert position(out)["step"] == 9  # one at the start, then steps 3, 6, 9; the fifth failed
    assert not list(out.glob("*.partial"))
    finetune(data_dir=str(digits), out=str(out), resume=True, **EXACT)
    assert_same_run(out, finished)


def test_history_of_an_earlier_version_gets_the_new_columns(tmp_path) -> None:
    write_history(tmp_path / "history.csv", [dict(epoch=1, top1=50.0), dict(epoch=2, top1=60.0, train_seconds=3.0)])
    assert read_history(tmp_path) == [
        dict(epoch="1", top1="50.0", train_seconds=""),
        dict(epoch="2", top1="60.0", train_seconds="3.0"),
    ]


def test_only_the_rest_of_a_killed_first_checkpoint_is_overwritten_unasked(digits, tmp_path) -> None:
    settings = dict(data_dir=str(digits), out=str(tmp_path / "out"), **dict(TINY, epochs=1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pt.partial").write_bytes(b"half")
    finetune(**settings)
    (tmp_path / "out" / "checkpoint.pt").unlink()  # to save room
    with pytest.raises(InputError, match="already holds curve.png; give resume to continue that run, overwrite to"):
        finetune(**settings)
    assert (tmp_path / "out" / "hub" / "model.safetensors").is_file()


def test_full_disk(digits, tmp_path, script):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs of 400 kB")
    try:
        # the first checkpoint, without optimizer state, fits; the second, three times as large, does not
        code, stderr = script(*command(digits, disk / "out", **EXACT))
        assert code == 2 and stderr.count("\n") == 1
        assert stderr.startswith("error: cannot write") and "No space left on device" in stderr
        assert position(disk / "out") == dict(epoch=0, step=0, loss=0.0, seconds=0.0, history=[], weighted=False)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_hub_folder_reloads_with_identical_logits(finished):
    out, model, _ = finished
    again = timm.create_model(f"local-dir:{out}/hub", pretrained=True).eval()
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(pixels), model(pixels))
    assert again.pretrained_cfg["label_names"] == ["digit0", "digit1", "digit2", "digit3"]
    config = resolve_model_data_config(again)
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 1.0)
    assert list(config["mean"]) == list(config["std"]) == [0.5, 0.5, 0.5]


def test_accuracy_is_what_timm_measures(digits, tmp_path):
    out = tmp_path / "out"
    settings = dict(model="test_vit", img_size=32, epochs=4, batch_size=4, lr=2e-3, augment="none", threads=1)
    settings |= dict(device="cpu", amp="off")  # as what it is compared with
    _, history = finetune(data_dir=str(digits), out=str(out), **settings)
    assert history[-1]["top1"] > 50  # of four classes: it has learnt
    model = timm.create_model(f"local-dir:{out}/hub", pretrained=True).eval()
    _, val, classes = find_images(str(digits))
    assert list(ImageDataset(str(digits)).reader.class_to_idx) == classes
    transform, held_out = create_transform(**resolve_model_data_config(model)), []
    for path, _ in val:
        with Image.open(path) as image:
            held_out.append(transform(image.convert("RGB")))
    with torch.inference_mode():
        predicted = model(torch.stack(held_out)).argmax(1)
    correct = sum(int(p) == label for p, (_, label) in zip(predicted, val, strict=True))
    assert history[-1]["top1"] == 100 * correct / len(val)
    assert history[-1]["top5"] == 100


@pytest.mark.parametrize("classes", [3, 7])
def test_as_many_right_answers_are_the_same_accuracy_whatever_batch_they_are_in(classes):
    """Eleven images in batches of three, of which four are right and three more among the first five."""
    settings = SimpleNamespace(batch_size=3, workers=0, device="cpu")
    labels, ranks = torch.arange(11) % classes, torch.tensor([0] * 4 + [2] * 3 + [6] * 4).clamp(max=classes - 1)
    logits = -(torch.arange(classes) - labels[:, None] + ranks[:, None]).remainder(classes).float()
    assert torch.equal(logits.argsort(1, descending=True).argsort(1).gather(1, labels[:, None])[:, 0], ranks)
    for order in (torch.arange(11), torch.arange(11).flip(0), torch.arange(11) * 4 % 11):
        images = SimpleNamespace(batches=order.split, loader=lambda keys, _: ((logits[k], labels[k]) for k in keys))
        found = evaluate(torch.nn.Identity(), images, settings, torch.float32, lambda pixels: pixels, lambda: None)
        assert found == (400 / 11, 700 / 11 if classes == 7 else 100.0)


@pytest.fixture(scope="module")
def small_set(digits, tmp_path_factory):
    """A folder of 36 images of three classes to learn from, most of the first one, and one of each to validate on."""
    folder = tmp_path_factory.mktemp("small_set")
    for label, number in enumerate((20, 10, 6)):
        for split, numbers in (("train", range(number)), ("val", range(number, number + 1))):
            (folder / split / f"digit{label}").mkdir(parents=True)
            for i in numbers:
                shutil.copy(digits / f"digit{label}" / f"{i}.png", folder / split / f"digit{label}")
    return folder


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    """Weights of a model whose answers are far from even, whatever its head."""
    path = tmp_path_factory.mktemp("decided") / "weights.safetensors"
    torch.manual_seed(3)
    state = lively(timm.create_model("vit_tiny_patch16_224", img_size=32, **MODEL_KWARGS)).state_dict()
    save_file({**state, "norm.weight": 30 * state["norm.weight"]}, path)
    return str(path)


# all images in one step
ONE_STEP = dict(TINY, batch_size=36, epochs=1, augment="none", device="cpu")


@pytest.mark.parametrize("smoothing, mixup", [(0.0, 0.0), (0.3, 0.0), (0.3, 0.2)])
def test_the_loss_is_cross_entropy_with_labels_spread_over_all_classes(
    small_set, decided, tmp_path, monkeypatch, smoothing, mixup
):
    """With mixup too, here of each image with nothing of another."""
    monkeypatch.setattr(np.random, "beta", lambda a, b: 1.0)  # the share of the image itself
    settings = dict(ONE_STEP, checkpoint=decided, lr=1e-12, label_smoothing=smoothing, mixup=mixup)
    _, (row,) = finetune(data_dir=str(small_set), out=str(tmp_path / "out"), **settings)
    model = timm.create_model(f"local-dir:{tmp_path}/out/hub", pretrained=True).eval()
    transform, pixels, labels = create_transform(**resolve_model_data_config(model)), [], []
    for path in (small_set / "train").rglob("*.png"):
        with Image.open(path) as image:
            pixels.append(transform(image.convert("RGB")))
        labels.append(int(path.parent.name.removeprefix("digit")))
    with torch.inference_mode():
        log_p = model(torch.stack(pixels)).double().log_softmax(1)
    label, even = -log_p[range(36), labels].mean().item(), -log_p.mean().item()
    assert abs(label - even) > 0.5, "else any share gives the same"
    assert row["train_loss"] == pytest.approx((1 - smoothing) * label + smoothing * even, rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_the_learning_rate_of_each_step(small_set, tmp_path, schedule, warmup):
    """It rises in a line from a hundredth, and then stays or follows half a cosine over all steps, without restart."""
    used = []

    def note(optimizer, arguments, keywords):
        used.append({group["lr"] for group in optimizer.param_groups})
        # not of biases and norms
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.07}

    steps = register_optimizer_step_pre_hook(note)
    try:
        settings = dict(TINY, batch_size=6, epochs=4, lr=2e-3, schedule=schedule, warmup=warmup, weight_decay=0.07)
        finetune(data_dir=str(small_set), out=str(tmp_path / "out"), **settings)
    finally:
        steps.remove()
    total, rising = 24, 7 if warmup else 0
    rise = [0.01 + 0.99 * t / rising for t in range(rising)]
    cosine = [(1 + math.cos(math.pi * t / total)) / 2 for t in range(rising, total)]
    expected = rise + (cosine if schedule == "cosine" else [1.0] * len(cosine))
    assert [len(rates) for rates in used] == [1] * total
    assert [max(rates) / 2e-3 for rates in used] == pytest.approx(expected, rel=1e-9)


def test_depth_that_is_dropped_and_half_precision(small_set, decided, tmp_path):
    """Both as timm and torch do them."""
    dropped = dict(TINY, model="vix_softmax_cifar", model_kwargs=dict(depth=3), epochs=1, drop_path=0.2, img_size=8)
    net, _ = finetune(data_dir=str(small_set), out=str(tmp_path / "dropped"), **dropped)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    settings = dict(ONE_STEP, checkpoint=decided, lr=1e-12, label_smoothing=0.0, amp="bfloat16")
    _, (row,) = finetune(data_dir=str(small_set), out=str(tmp_path / "half"), **settings)
    assert row["dtype"] == "bfloat16"
    model = timm.create_model(f"local-dir:{tmp_path}/half/hub", pretrained=True).eval()
    transform, losses = create_transform(**resolve_model_data_config(model)), []
    for path in (small_set / "train").rglob("*.png"):
        with Image.open(path) as image, torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            logits = model(transform(image.convert("RGB"))[None])
        losses.append(-logits.float().log_softmax(1)[0, int(path.parent.name.removeprefix("digit"))].item())
    assert row["train_loss"] == pytest.approx(np.mean(losses), rel=0.01)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_each_layer_moves_by_the_decay_less_than_the_one_above(small_set, tmp_path, decay):
    """A first step of Adam moves a parameter by its learning rate, whatever the gradient."""
    settings = dict(ONE_STEP, model_kwargs=dict(MODEL_KWARGS, depth=4), weight_decay=0.0, layer_decay=decay)
    before, after = (
        finetune(data_dir=str(small_set), out=str(tmp_path / str(lr)), **settings, lr=lr)[0].double().state_dict()
        for lr in (1e-30, 1e-4)
    )
    layers = ["patch_embed.proj.weight", *(f"blocks.{i}.mlp.fc1.weight" for i in range(4)), "head.weight"]
    moved = [(after[name] - before[name]).abs().max().item() for name in layers]
    assert moved == pytest.approx([1e-4 * (decay or 1) ** below for below in (5, 4, 3, 2, 1, 0)], rel=0.01)


def test_results_files(finished):
    out, _, history = finished
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "history.csv", "curve.png", "hub"}
    with Image.open(out / "curve.png") as curve:
        assert curve.size == (1200, 480)
    card = ModelCard.load(out / "hub" / "README.md")
    assert card.data.to_dict() == dict(
        library_name="timm",
        pipeline_tag="image-classification",
        license="other",
        tags=["image-classification", "timm"],
    )
    body = card.text
    assert f"| top-1 | {history[-1]['top1']:.2f} |" in body
    assert "- seed: 0" in body and "4 classes, 128 images; validation: 32" in body
    assert history[-1]["lr"] < history[0]["lr"] <= EXACT["lr"]


@pytest.mark.parametrize("augment", ["none", "light", "rand"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_is_a_function_of_seed_epoch_and_index(digits, augment, channels):
    train, _, classes = find_images(str(digits))
    config = dict(input_size=(channels, 32, 32), interpolation="bicubic", mean=(0.5,) * channels, crop_pct=1.0)
    resize, augmented, _ = transforms(dict(config, crop_mode="center"), augment, 0.5)
    images, other = (Images(train[:16], classes, channels, resize, augmented, seed) for seed in (0, 1))

    def epoch(images, number):
        return torch.stack([images[number, i][0] for i in range(16)])

    first = epoch(images, 0)
    assert first.shape == (16, channels, 32, 32) and first.dtype == torch.uint8
    torch.rand(7)
    assert torch.equal(first, epoch(images, 0))
    assert torch.equal(images[0, 5][0], first[5])
    assert torch.equal(first, epoch(images, 1)) == (augment == "none")
    assert torch.equal(first, epoch(other, 0)) == (augment == "none")
    assert images.batches(4, 0) != images.batches(4, 1)
    assert sorted(key for batch in images.batches(4, 1) for key in batch) == [(1, i) for i in range(16)]


def drawn(pixels, augment, flip, times=200):
    """One square grey image as that many epochs show it, (times, H, W)."""
    config = dict(input_size=(1, *pixels.shape), interpolation="bicubic", mean=(0.5,), crop_pct=1.0)
    resize, augmented, _ = transforms(dict(config, crop_mode="center"), augment, flip)
    images = Images([(pixels, 0)], ["a"], 1, resize, augmented, seed=0)
    return torch.stack([images[epoch, 0][0][0] for epoch in range(times)])


# small images are shifted, and larger ones zoomed: either way some of both halves stays
@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("flip, low, high", [(0.0, 0, 0), (0.5, 0.35, 0.65), (1.0, 1, 1)])
def test_images_are_mirrored_with_the_probability_that_was_asked_for(size, flip, low, high):
    pixels = np.full((size, size), 40, np.uint8)
    pixels[:, : size // 2] = 200
    shown = drawn(pixels, "light", flip).float()
    left, right = shown[:, :, : size // 2].mean((1, 2)), shown[:, :, size // 2 :].mean((1, 2))
    assert ((left - right).abs() > 5).all()
    assert low <= (right > left).double().mean() <= high
    assert len(shown.unique(dim=0)) > 20, "shifted or zoomed as well"


def test_rand_changes_grey_values_light_only_places_and_none_nothing():
    pixels = np.full((32, 32), 40, np.uint8)
    pixels[:, :16] = 200
    assert (drawn(pixels, "none", 1.0) == torch.from_numpy(pixels)).all()
    others = {}
    for augment in ("light", "rand"):
        known = torch.isin(drawn(pixels, augment, 0.0), torch.tensor([0, 40, 200]))  # 0 is beyond the border
        others[augment] = (~known).flatten(1).any(1).double().mean()
    assert others["light"] == 0 and others["rand"] > 0.5


def test_hold_out_is_a_fifth_of_every_class_and_fixed(digits):
    train, val, _ = find_images(str(digits))
    assert [sum(label == i for _, label in val) for i in range(4)] == [8] * 4
    assert not {path for path, _ in train} & {path for path, _ in val}
    assert find_images(str(digits))[1] == val


@pytest.mark.parametrize("share", [0.2, 0.8, 0.95])
def test_every_class_keeps_an_image_to_learn_from(share):
    items = [(Path(f"{label}{i}.png"), label) for label, number in enumerate((1, 2, 4, 20)) for i in range(number)]
    train, val = hold_out(items, share)
    assert {label for _, label in train} == {0, 1, 2, 3} and {label for _, label in val} == {1, 2, 3}
    assert sorted(map(str, train + val)) == sorted(map(str, items))


def test_a_photograph_that_says_how_it_was_held_is_turned(tmp_path):
    """As the page that serves the model turns it."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8, 0] = 255  # red on the left: below, after a quarter turn anticlockwise
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    plain = v2.Compose([v2.PILToTensor()])
    images = Images([(tmp_path / "a.png", 0)], ["a"], 3, lambda image: image, plain, seed=0)
    found = images[None, 0][0]
    assert found.shape == (3, 16, 8) and (found[0, 8:] == 255).all() and not found[0, :8].any()


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test", "elsewhere"])
def test_validation_folder(digits, tmp_path, name):
    shutil.copytree(digits, tmp_path / "data" / "train")
    if name == "valid":  # images to test on are there as well
        shutil.copytree(digits, tmp_path / "data" / "test")
    for label in (1, 3):
        (tmp_path / "data" / name / f"digit{label}").mkdir(parents=True)
        shutil.copy(digits / f"digit{label}" / "0.png", tmp_path / "data" / name / f"digit{label}")
    val_dir = str(tmp_path / "data" / name) if name == "elsewhere" else None
    train, val, _ = find_images(str(tmp_path / "data"), val_dir)
    assert len(train) == 160 and [label for _, label in val] == [1, 3]


def test_unreadable_images_are_skipped_counted_and_named(digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "data")
    (tmp_path / "data" / "digit1" / "text.jpg").write_text("no image at all")
    whole = (digits / "digit2" / "0.png").read_bytes()
    (tmp_path / "data" / "digit2" / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "digit2" / "empty.png").touch()
    _, history = finetune(data_dir=str(tmp_path / "data"), out=str(tmp_path / "out"), **dict(TINY, epochs=1))
    printed = capsys.readouterr().out
    skipped = [line for line in printed.splitlines() if line.startswith("skipped")]
    assert sum(int(line.split()[1]) for line in skipped) == 3
    assert all(name in printed for name in ("digit1/text.jpg", "digit2/half.png", "digit2/empty.png"))
    assert len(history) == 1


def images_of(folder, lazy, augment="light"):
    items, _, classes = find_images(str(folder), held_out=0.01)
    config = dict(input_size=(3, 32, 32), interpolation="bicubic", mean=(0.5,) * 3, crop_pct=1.0, crop_mode="center")
    resize, augmented, _ = transforms(config, augment, 0.5)
    return Images(items, classes, 3, resize, augmented, 0, lazy=lazy)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_decoded_when_a_batch_needs_them(digits, workers):
    at_once, lazy = images_of(digits, lazy=False), images_of(digits, lazy=True)
    assert len(at_once.cache) == len(lazy) == len(at_once) > 150
    assert sorted(lazy.items[i][1] for i in lazy.cache) == [0, 1, 2, 3], "one image of each class was tried"
    keys = lazy.batches(8, epoch=3)
    for number, (pixels, labels) in enumerate(lazy.loader(keys, workers)):
        assert torch.equal(pixels, torch.stack([at_once[key][0] for key in keys[number]]))
        assert labels.tolist() == [at_once[key][1] for key in keys[number]]
        if number == 2 and not workers:
            assert {i for batch in keys[:3] for _, i in batch} <= lazy.cache.keys() and len(lazy.cache) <= 24 + 4
    # decoded by a worker or not, all are in memory now
    assert {i for batch in keys for _, i in batch} <= lazy.cache.keys()
    assert all(np.array_equal(pixels, at_once.cache[i]) for i, pixels in lazy.cache.items())


@pytest.mark.parametrize("lazy", [False, True], ids=["at_once", "lazy"])
def test_images_beyond_the_limit_of_memory_are_decoded_again(digits, tmp_path, monkeypatch, lazy):
    """Two epochs are those without a limit; a damaged image is among those that came first."""
    shutil.copytree(digits, tmp_path / "data")
    damaged = find_images(str(tmp_path / "data"), held_out=0.01)[0][2][0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    free = images_of(tmp_path / "data", lazy)
    monkeypatch.setattr("timm_vix.data.images.CACHE_BYTES", 5 * 32 * 32 * 3 + 100)
    limited = images_of(tmp_path / "data", lazy)
    for epoch in range(2):
        keys = free.batches(8, epoch)
        for mine, theirs in zip(limited.loader(keys), free.loader(keys), strict=True):
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
            assert len(limited.cache) <= 5
    assert len(limited.cache) == 5
    for i, pixels in limited.cache.items():
        with Image.open(limited.items[i][0]) as expected:
            assert np.array_equal(pixels, np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_replaced_in_training_and_left_out_of_validation(digits, tmp_path, workers, capsys):
    shutil.copytree(digits, tmp_path / "data")
    files = [path for path, _ in find_images(str(tmp_path / "data"), held_out=0.01)[0]]
    damaged = (50, 51, len(files) - 1)  # after the last one comes the first
    for i in damaged:
        files[i].write_bytes(files[i].read_bytes()[:100])
    images = images_of(tmp_path / "data", lazy=True, augment="none")
    readable = [i for i in range(len(files)) if i not in damaged]
    (keys,) = images.batches(len(images), epoch=0)
    ((pixels, labels),) = images.loader([keys], workers)
    printed = capsys.readouterr().out
    assert f"skipped 3 of {len(files)} images" in printed and all(str(files[i]) in printed for i in damaged)
    for (_, i), image, label in zip(keys, pixels, labels, strict=True):
        shown = {50: 52, 51: 52, len(files) - 1: 0}.get(i, i)
        with Image.open(images.items[shown][0]) as expected:
            assert np.array_equal(image.permute(1, 2, 0), np.asarray(expected.convert("RGB")))
        assert label == images.items[shown][1]
    validated = torch.cat([labels for _, labels in images.loader(images.batches(8), workers)])
    assert validated.tolist() == [images.items[i][1] for i in readable]
    assert images.readable == len(readable)
    assert capsys.readouterr().out == "", "printed once"


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_other_models_grey_images_and_reload(digits, tmp_path, model):
    out = tmp_path / "out"
    settings = dict(model=model, img_size=32, in_chans=1, batch_size=32, epochs=1, threads=1, device="cpu")
    net, _ = finetune(data_dir=str(digits), out=str(out), **settings)
    again = timm.create_model(f"local-dir:{out}/hub", pretrained=True).eval()
    pixels = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(pixels), net(pixels))
    assert resolve_model_data_config(again)["input_size"] == (1, 32, 32)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_initial_weights_come_from_the_checkpoint(digits, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    weights = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **MODEL_KWARGS).state_dict()
    save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)
    out = tmp_path / "out"
    finetune(data_dir=str(digits), checkpoint=str(file), out=str(out), epochs=1, lr=1e-9, **TINY)
    trained = load_file(out / "hub" / "model.safetensors")
    assert trained["head.weight"].shape == (4, 32)
    for key in weights.keys() - {"head.weight", "head.bias"}:
        torch.testing.assert_close(trained[key], weights[key], rtol=0, atol=1e-6)
    assert f"trained from `{file.name}`" in (out / "hub" / "README.md").read_text()


def test_a_checkpoint_replaces_the_weights_of_a_converted_folder(digits, tmp_path):
    """With those of its mixers, which the model that it was converted from lacks."""

    def converted(number):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **MODEL_KWARGS)
        timm_vix.convert(model, "linformer", num_proj_tokens=4)
        for _ in range(number):
            lively(model)
        return model

    save_for_hf(converted(1), tmp_path / "hub", safe_serialization=True)
    weights = converted(2).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    given = dict(model=f"local-dir:{tmp_path / 'hub'}", checkpoint=str(tmp_path / "weights.safetensors"))
    run = FinetuneSettings(data_dir=str(digits), out=str(tmp_path / "out"), img_size=32, **given)
    model, _ = build_model(SimpleNamespace(**vars(run) | dict(drop_path=0, device="cpu")), torch.float32, 4)
    found = model.state_dict()
    assert found["head.weight"].shape == (4, 32) and "blocks.0.attn.core.token_proj" in weights
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights.keys() - {"head.weight", "head.bias"})


@pytest.mark.parametrize("given", [{}, dict(pretrained=True)], ids=str)
def test_a_folder_brings_its_weights(given, digits, tmp_path):
    """With or without pretrained; of another number of classes, all but its head, and images as they were prepared."""
    saved = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **MODEL_KWARGS)
    saved.pretrained_cfg.update(mean=(0.2, 0.3, 0.4))
    save_for_hf(saved, tmp_path / "hub", safe_serialization=True)
    start = dict(model=f"local-dir:{tmp_path / 'hub'}", model_kwargs=None, **given)
    settings = {**TINY, **start, **dict(data_dir=str(digits), out=str(tmp_path / "out"), epochs=1, lr=1e-9)}
    whole, _ = finetune(**settings)
    config = json.loads((tmp_path / "out" / "hub" / "config.json").read_text())["pretrained_cfg"]
    assert config["mean"] == [0.2, 0.3, 0.4] and whole.head.weight.shape == (4, 32)
    for key, tensor in saved.state_dict().items():
        if not key.startswith("head."):
            torch.testing.assert_close(whole.state_dict()[key], tensor, rtol=0, atol=1e-6)
    again, _ = finetune(**settings, resume=True)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert "trained from a local folder" in (tmp_path / "out" / "hub" / "README.md").read_text()


def test_a_folder_that_an_earlier_version_started_from_random_weights_is_continued(digits, tmp_path):
    saved = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, **MODEL_KWARGS)
    saved.pretrained_cfg.update(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)  # as a run from random weights leaves it
    save_for_hf(saved, tmp_path / "hub", safe_serialization=True)
    out, start = tmp_path / "out", dict(model=f"local-dir:{tmp_path / 'hub'}", model_kwargs=None)
    settings = {**TINY, **start, **dict(data_dir=str(digits), out=str(out), epochs=1)}
    whole, _ = finetune(**settings)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    del state["position"]["weighted"]
    torch.save(state, out / "checkpoint.pt")
    again, _ = finetune(**settings, resume=True)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert "trained from random weights" in (out / "hub" / "README.md").read_text()


def test_overwrite_replaces_only_the_run(digits, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "notes.txt").write_text("mine")
    _, history = finetune(data_dir=str(digits), out=str(out), overwrite=True, epochs=1, seed=1, **TINY)
    assert (out / "notes.txt").read_text() == "mine"
    assert len(read_history(out)) == len(history) == 1


def folder(tmp_path, *files):
    for name in files:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            Image.new("RGB", (32, 32), "red").save(tmp_path / "data" / name)
        elif name.endswith(".jpg"):
            (tmp_path / "data" / name).write_text("no image")
        else:
            (tmp_path / "data" / name).mkdir(exist_ok=True)
    return tmp_path / "data"


# name -> (arguments, words of the message); DATA is a good folder
WRONG_SETTINGS = {
    "unknown model": (
        ["--model", "vit_tiny_patch16_225"],
        ["vit_tiny_patch16_225", "near names", "vit_tiny_patch16_224"],
    ),
    "unknown tag": (["--model", "vit_tiny_patch16_224.nonsense"], ["vit_tiny_patch16_224.nonsense", "tag"]),
    "no model": (["--model", ""], ["model is missing"]),
    "unknown keyword": (["--model-kwargs", "patch_sise=8"], ["vit_tiny_patch16_224", "patch_sise"]),
    "no key=value": (["--model-kwargs", "patch_size"], ["patch_size", "key=value"]),
    "epochs 0": (["--epochs", "0"], ["epochs=0", "above 0"]),
    "epochs text": (["--epochs", "many"], ["--epochs", "many"]),
    "batch size": (["--batch-size", "-4"], ["batch_size=-4", "above 0"]),
    "odd mixup": (["--batch-size", "3", "--mixup", "0.2"], ["batch_size=3", "even"]),
    "lr 0": (["--lr", "0"], ["lr=0", "above 0"]),
    "lr nan": (["--lr", "nan"], ["lr=nan", "above 0"]),
    "lr huge": (["--lr", "1e30"], ["loss became nan", "lower lr=1e+30"]),
    "drop path": (["--drop-path", "1.5"], ["drop_path=1.5", "0 to below 1"]),
    "augment": (["--augment", "heavy"], ["augment=heavy", "none, light, rand"]),
    "amp": (["--amp", "float16"], ["amp=float16", "auto, off, bfloat16"]),
    "device": (["--device", "cuda:77"], ["cuda:77", "not on this machine", "auto", "cpu"]),
    "channels": (["--in-chans", "2"], ["in_chans=2", "1 (grey) or 3 (RGB)"]),
    "image size": (["--img-size", "4"], ["vit_tiny_patch16_224"]),
    "no checkpoint file": (["--checkpoint", "/nowhere/w.pth"], ["/nowhere/w.pth", ".safetensors or .pth"]),
    "resume nothing": (["--resume"], ["resume", "no checkpoint.pt"]),
    "resume and overwrite": (["--resume", "--overwrite"], ["resume and overwrite", "one of them"]),
    "no name": (["--out", ""], ["out=", "isn't empty"]),
    "out under a file": (["--out", f"{__file__}/out"], [f"{__file__}/out", "cannot be written"]),
    "unknown argument": (["--epoch-count", "3"], ["--epoch-count"]),
}
WRONG_DATA = {
    "missing": ([], ["does not exist", "<class>/<image>"]),
    "empty": (["."], ["no images", "<class>/<image>"]),
    "no images": (["cat/", "dog/"], ["no images"]),
    "images only": (["a.png", "b.png"], ["no images in class folders"]),
    "empty class": (["cat/a.png", "dog/a.png", "emu/", "emu/b.webp"], ["without images: emu", ".jpeg, .jpg, .png"]),
    "one class": (["cat/a.png", "cat/b.png"], ["one class only", "'cat'"]),
    "single images": (["cat/a.png", "dog/a.png"], ["held out", "val_dir"]),
    "no train": (["val/cat/a.png", "val/dog/a.png"], ["val/ but no train/"]),
    "unreadable class": (["cat/a.png", "cat/b.png", "dog/a.jpg", "dog/b.jpg"], ["'dog'", "none of its", "can be read"]),
    "new class": (["train/cat/a.png", "train/dog/a.png", "val/emu/a.png"], ["none of the 2 known classes: emu"]),
}


def assert_one_clear_line(result, words):
    code, stderr = result
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    for word in words:
        assert word in stderr


@pytest.mark.parametrize("arguments, words", WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_wrong_settings(digits, tmp_path, script, arguments, words):
    good = command(digits, tmp_path / "out", **dict(TINY, epochs=1))
    assert_one_clear_line(script(*good, *arguments), words)


@pytest.mark.parametrize("files, words", WRONG_DATA.values(), ids=WRONG_DATA)
def test_wrong_data(tmp_path, script, files, words):
    data = folder(tmp_path, *files)
    assert_one_clear_line(
        script(*command(data, tmp_path / "out", **TINY)), [str(tmp_path), *words][words[0] == "held out" :]
    )
    assert not (tmp_path / "out").exists()


def test_data_dir_is_a_file(tmp_path, script):
    (tmp_path / "data").write_text("")
    assert_one_clear_line(script(*command(tmp_path / "data", tmp_path / "out", **TINY)), ["data is a file"])


def test_existing_run_is_not_touched(digits, finished, tmp_path, script):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    for arguments, words in (
        ([], ["already holds checkpoint.pt", "resume", "overwrite"]),
        (["--overwrite", "--lr", "-1"], ["lr=-1"]),
        (
            ["--overwrite", "--model", "vix_softmax_cifar", "--model-kwargs", "depth=2", "merge={'threshold':0.9}"],
            ["threshold", "expected a batch of 1, got 2"],
        ),
        (["--overwrite", "--checkpoint", str(out / "history.csv")], ["history.csv"]),
        (
            ["--resume", "--seed", "5", "--lr", "0.5"],
            ["settings differ", "seed=0 before, 5 now", "lr=0.001 before, 0.5 now"],
        ),
        (["--resume", "--model-kwargs", "patch_size=4"], ["settings differ", "model_kwargs="]),
    ):
        assert_one_clear_line(script(*command(digits, out, **EXACT), *arguments), words)
    assert_same_run(out, finished)
    assert_one_clear_line(script("--out", tmp_path / "new", "--val-dir", digits), ["val_dir=", "without data_dir"])
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:1000])
    assert_one_clear_line(script(*command(digits, out, **EXACT), "--resume"), ["checkpoint.pt cannot be read"])


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_resume_notices_a_damaged_best_epoch_before_it_trains(damage, digits, tmp_path, monkeypatch):
    settings = dict(EXACT, data_dir=str(digits), out=str(tmp_path / "out"), keep="best")
    finetune(**settings)
    best, kept = tmp_path / "out" / "best.pt", (tmp_path / "out" / "checkpoint.pt").read_bytes()
    best.write_bytes(best.read_bytes()[:1000]) if damage == "cut" else best.unlink()
    with pytest.raises(ValueError, match="best.pt cannot be read: ") as error:
        finetune(**settings, resume=True)
    assert "\n" not in str(error.value) and (tmp_path / "out" / "checkpoint.pt").read_bytes() == kept


def test_a_model_that_diverges_in_the_last_step_of_an_epoch_is_no_result(digits, tmp_path):
    """Its loss before that step was finite, and the largest of logits that are no numbers is always the first."""
    settings = dict(TINY, batch_size=160, epochs=1, lr=1e30, warmup=0.0, device="cpu")
    with pytest.raises(ValueError, match=r"logits that aren't finite after training; lower lr=1e\+30 or set amp=off"):
        finetune(data_dir=str(digits), out=str(tmp_path / "out"), **settings)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint.pt"}
    assert position(tmp_path / "out")["step"] == 0


def test_a_folder_given_as_a_dot_has_its_name_in_the_card(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(digits)
    finetune(data_dir=".", out=str(tmp_path / "out"), **dict(TINY, epochs=1, lr=1e-3, device="cpu"))
    assert f"on `{digits.name}` (4 classes" in (tmp_path / "out" / "hub" / "README.md").read_text()


def test_resume_notices_other_images(digits, finished, tmp_path, script):
    shutil.copytree(digits, tmp_path / "data")
    (tmp_path / "data" / "digit0" / "0.png").rename(tmp_path / "data" / "digit0" / "other.png")
    shutil.copytree(finished[0], tmp_path / "out")
    result = script(*command(tmp_path / "data", tmp_path / "out", **EXACT), "--resume")
    assert_one_clear_line(result, ["settings differ", "images="])


def test_resume_notices_other_pixels_of_the_same_size(digits, tmp_path, script):
    """Without compression neither name nor size tells; a copy elsewhere, with new times, is the same."""

    def store(image, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, compress_level=0)

    for file in digits.rglob("*.png"):
        with Image.open(file) as image:
            store(image, tmp_path / "data" / file.parent.name / file.name)
    settings = dict(TINY, epochs=1)
    whole, _ = finetune(data_dir=str(tmp_path / "data"), out=str(tmp_path / "out"), **settings)
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    again, _ = finetune(data_dir=str(tmp_path / "copy"), out=str(tmp_path / "out"), resume=True, **settings)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    changed = tmp_path / "copy" / "digit2" / "7.png"
    size = changed.stat().st_size
    with Image.open(changed) as image:
        pixels = np.array(image)
    pixels[3, 4] ^= 1
    store(Image.fromarray(pixels), changed)
    assert changed.stat().st_size == size
    result = script(*command(tmp_path / "copy", tmp_path / "out", **settings), "--resume")
    assert_one_clear_line(result, ["settings differ", "content="])


def test_resume_notices_another_model_of_the_same_name(digits, tmp_path, script):
    """A folder whose configuration pools other tokens of the same weights."""
    saved = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, global_pool="avg", **MODEL_KWARGS)
    timm.models.save_for_hf(saved, tmp_path / "model", safe_serialization=True)
    settings = dict(TINY, epochs=1, model=f"local-dir:{tmp_path / 'model'}", model_kwargs={"drop_rate": 0.0})
    finetune(data_dir=str(digits), out=str(tmp_path / "out"), pretrained=True, **settings)
    arguments = [*command(digits, tmp_path / "out", **settings), "--pretrained", "--resume"]
    assert script(*arguments)[0] == 0
    config = (tmp_path / "model" / "config.json").read_text()
    assert '"global_pool": "avg"' in config
    card = (tmp_path / "out" / "hub" / "README.md").read_text()
    assert "# vit_tiny_patch16_224\n" in card and "trained from a local folder on" in card
    assert str(tmp_path) not in card and "timm_vix" not in card
    (tmp_path / "model" / "config.json").write_text(config.replace('"global_pool": "avg"', '"global_pool": "max"'))
    words = ["settings differ", "'global_pool': 'avg'}} before", "'global_pool': 'max'}} now"]
    assert_one_clear_line(script(*arguments), words)


def test_the_card_of_a_converted_model_imports_this_package(digits, tmp_path):
    source = dict(source="vit_tiny_patch16_224", mixer="linformer", num_proj_tokens=4, img_size=32)
    settings = dict(TINY, epochs=np.int64(1), lr=np.float32(1e-3), model="vix_from_timm")
    settings["model_kwargs"] = {**source, **MODEL_KWARGS}
    finetune(data_dir=str(digits), out=str(tmp_path / "out"), **settings)
    card = (tmp_path / "out" / "hub" / "README.md").read_text()
    assert "import timm, timm_vix" in card and "- timm_vix\n" in card and "trained from random weights" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert f"local-dir:{tmp_path}" not in code


def test_images_of_more_than_64_px_keep_a_margin_without_weights(digits, tmp_path):
    """Two models that are compared see the same part of an image, whether one has weights to start from or not."""
    settings = dict(TINY, epochs=1, img_size=80, batch_size=8)
    finetune(data_dir=str(digits), out=str(tmp_path / "out"), **settings)
    config = json.loads((tmp_path / "out" / "hub" / "config.json").read_text())["pretrained_cfg"]
    assert config["input_size"][1:] == [80, 80]
    assert config["crop_pct"] == timm.get_pretrained_cfg(TINY["model"]).crop_pct < 1


class Pickled:
    def __reduce__(self):
        return os.mkdir, (str(Path(__file__).with_name("was_unpickled")),)


def damaged_checkpoints(folder):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, **MODEL_KWARGS)
    save_file(model.state_dict(), folder / "good.safetensors")
    torch.save(model.state_dict(), folder / "good.pth")
    for name in ("good.safetensors", "good.pth"):
        data = (folder / name).read_bytes()
        (folder / name.replace("good", "truncated")).write_bytes(data[: len(data) // 2])
        (folder / name.replace("good", "text")).write_text("no weights")
        (folder / name.replace("good", "empty")).touch()
    torch.save({"state_dict": model.state_dict(), "more": Pickled()}, folder / "pickle.pth")
    other = dict(MODEL_KWARGS, embed_dim=48)
    wide = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, **other)
    deep = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=9, **dict(MODEL_KWARGS, depth=4))
    save_file(wide.state_dict(), folder / "wide.safetensors")
    save_file(deep.state_dict(), folder / "deep.safetensors")
    save_file(timm.create_model("test_resnet").state_dict(), folder / "resnet.safetensors")


def test_wrong_checkpoints(digits, tmp_path, script):
    damaged_checkpoints(tmp_path)
    files = sorted(set(tmp_path.glob("*.*")) - set(tmp_path.glob("good.*")))
    assert len(files) == 10
    for file in files:
        result = script(*command(digits, tmp_path / "out", **TINY), "--checkpoint", file)
        assert_one_clear_line(result, [f"checkpoint={file}"])
    assert not Path(__file__).with_name("was_unpickled").exists()
    assert not (tmp_path / "out").exists()


def test_fewer_tensors_than_the_model_are_named(tmp_path, capsys):
    shallow = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=9, **dict(MODEL_KWARGS, depth=1))
    save_file(shallow.state_dict(), tmp_path / "shallow.safetensors")
    run = SimpleNamespace(
        **TINY, checkpoint=str(tmp_path / "shallow.safetensors"), pretrained=False, resume=False, in_chans=None
    )
    build_model(SimpleNamespace(**vars(run) | dict(drop_path=0, device="cpu")), torch.float32, 4)
    assert "new in vit_tiny_patch16_224: blocks.1." in capsys.readouterr().out


def test_a_part_trains_and_is_kept_apart(digits, tmp_path, script, capsys):
    out = tmp_path / "out"
    settings = dict(TINY, epochs=1, lr=1e-3, train_only="attention")
    net, _ = finetune(data_dir=str(digits), out=str(out), **settings)
    assert "training attention only: 0.0" in capsys.readouterr().out
    start = tmp_path / "start"
    fresh, _ = finetune(data_dir=str(digits), out=str(start), **settings | dict(lr=1e-30, weight_decay=0.0))
    assert not torch.equal(net.blocks[0].attn.qkv.weight, fresh.blocks[0].attn.qkv.weight)
    assert torch.equal(net.blocks[0].mlp.fc1.weight, fresh.blocks[0].mlp.fc1.weight)
    timm_vix.load_delta(fresh, out / "delta.safetensors")
    torch.testing.assert_close(fresh.state_dict(), net.state_dict(), rtol=0, atol=0)
    result = script(*command(digits, tmp_path / "wrong", **TINY), "--train-only", "norm")
    assert_one_clear_line(result, ["train_only=norm", "attention, mlp, mixer, head"])


def test_the_best_epoch_is_in_the_delta_too(digits, tmp_path, monkeypatch):
    falling = iter([(accuracy, 100.0) for accuracy in (60.0, 70.0, 50.0, 40.0, 50.0, 50.0, 50.0)])
    monkeypatch.setattr("timm_vix.train.finetune.evaluate", lambda *arguments: next(falling))
    settings = dict(TINY, model="test_vit", model_kwargs={}, train_only="attention", schedule="constant", warmup=0.0)
    once = dict(settings, epochs=4, lr=1e-2, keep="best")
    best, history = finetune(data_dir=str(digits), out=str(tmp_path / "best"), **once)
    epoch = max(history, key=lambda row: row["top1"])["epoch"]
    last = torch.load(tmp_path / "best" / "checkpoint.pt", weights_only=True)["model"]
    assert epoch == 2 and not torch.equal(last["blocks.0.attn.qkv.weight"], best.blocks[0].attn.qkv.weight)
    hub = load_file(tmp_path / "best" / "hub" / "model.safetensors")
    other, _ = finetune(data_dir=str(digits), out=str(tmp_path / "other"), **settings | dict(epochs=1, lr=1e-30))
    timm_vix.load_delta(other, tmp_path / "best" / "delta.safetensors")
    torch.testing.assert_close(other.state_dict(), hub, rtol=0, atol=0)
    # at a constant learning rate two epochs alone end where the best of four was
    two = settings | dict(epochs=2, lr=1e-2)
    ends, _ = finetune(data_dir=str(digits), out=str(tmp_path / "two"), **two)
    torch.testing.assert_close(ends.state_dict(), hub, rtol=0, atol=0)


def test_signature_documentation_and_command_line_are_those_of_the_settings():
    names = [own.name for own in fields(FinetuneSettings)]
    assert list(inspect.signature(finetune).parameters) == names
    assert inspect.signature(finetune).parameters["weight_decay"].default == 0.05
    for name in names:
        assert f"\n        {name}: " in finetune.__doc__
    assert "share of all steps in which the learning rate rises (0 to below 1); default: 0.1." in finetune.__doc__
    assert max(map(len, finetune.__doc__.splitlines())) <= 120
    parser = argparse.ArgumentParser()
    add_settings(parser, FinetuneSettings)
    assert "RandAugment as well (none, light, rand); default: light" in " ".join(parser.format_help().split())
    text = "--model test_vit --model-kwargs depth=3 pool=avg --lr 3e-3 --epochs 2 --pretrained --keep best"
    given = given_settings(parser.parse_args(text.split()), FinetuneSettings)
    assert given == dict(
        model="test_vit", model_kwargs=dict(depth=3, pool="avg"), lr=3e-3, epochs=2, pretrained=True, keep="best"
    )
    assert given_settings(parser.parse_args([]), FinetuneSettings) == {}
    twice = "--model-kwargs depth=3 pool=avg --lr 3e-3 --model-kwargs num_heads=2 depth=4"  # the last value counts
    given = given_settings(parser.parse_args(twice.split()), FinetuneSettings)
    assert given == dict(model_kwargs=dict(depth=4, pool="avg", num_heads=2), lr=3e-3)
    assert given_settings(parser.parse_args([]), FinetuneSettings) == {}
    for option in ("--checkpoint", "--weights"):  # as other commands call it
        assert given_settings(parser.parse_args([option, "vit.pth"]), FinetuneSettings) == dict(checkpoint="vit.pth")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(lr="high"), "lr='high': allowed is a number"),
        (dict(epochs=2.5), "epochs=2.5: allowed is an integer"),
        (dict(epochs=True), "epochs=True: allowed is an integer"),
        (dict(pretrained="no"), "pretrained='no': allowed is True or False"),
        (dict(model_kwargs="depth=3"), "model_kwargs='depth=3': allowed is a mapping of keywords or None"),
        (dict(out=None), "out=None: allowed is text"),
        (dict(seed=-1), "seed=-1: allowed is 0 or more"),
        (dict(drop_path=1), "drop_path=1: allowed is 0 to below 1"),
    ],
    ids=str,
)
def test_a_setting_of_another_type_is_named(digits, wrong, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        finetune(**{**TINY, "data_dir": digits, **wrong})


@pytest.mark.slow
def test_digits_reach_95_percent(tmp_path):
    _, history = finetune(out=str(tmp_path / "out"), threads=1)
    assert history[-1]["top1"] > 95


@pytest.mark.parametrize(
    "start",
    [
        dict(checkpoint="{out}/hub/model.safetensors"),
        dict(model="local-dir:{out}/hub", model_kwargs=None, pretrained=True),
    ],
)
def test_what_a_run_starts_from_is_not_replaced_by_it(start, digits, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    before = (out / "hub" / "model.safetensors").read_bytes()
    start = {name: value.format(out=out) if isinstance(value, str) else value for name, value in start.items()}
    with pytest.raises(InputError, match="lies in out=.*give another out"):
        finetune(data_dir=str(digits), out=str(out), overwrite=True, **{**TINY, **start})
    assert (out / "hub" / "model.safetensors").read_bytes() == before and (out / "checkpoint.pt").is_file()


def test_keywords_that_no_file_can_hold_are_refused(digits, tmp_path):
    wrong = dict(TINY, model_kwargs=dict(MODEL_KWARGS, norm_layer=torch.nn.LayerNorm))
    with pytest.raises(InputError, match="model_kwargs: norm_layer=.*expected numbers, text, lists or mappings"):
        finetune(data_dir=str(digits), out=str(tmp_path / "out"), **wrong)
    assert not (tmp_path / "out").exists()


def test_a_batch_norm_after_pooling_refuses_single_images_before_a_run_is_replaced(digits, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    single = dict(TINY, model="levin_cifar", model_kwargs={}, batch_size=1, overwrite=True)
    with pytest.raises(InputError, match="batch_size=1: model=levin_cifar in training fails"):
        finetune(data_dir=str(digits), out=str(out), **single)
    assert position(out) == position(finished[0])


def test_killed_before_the_best_epoch_is_written_it_is_written_later(digits, tmp_path, monkeypatch):
    """The checkpoint comes first, so no weights are the best ones that the history doesn't have."""
    out, written = tmp_path / "out", []
    write = timm_vix.train.finetune_results.write_tensors

    def write_or_stop(path, tensors):
        written.append(path.name)
        if len(written) == 1:
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr("timm_vix.train.finetune_results.write_tensors", write_or_stop)
    settings = dict(TINY, epochs=1, keep="best", data_dir=str(digits), out=str(out), device="cpu")
    with pytest.raises(KeyboardInterrupt):
        finetune(**settings)
    assert not (out / "best.pt").exists() and len(position(out)["history"]) == 1
    model, _ = finetune(**settings, resume=True)
    assert written == ["best.pt"] * 2
    saved = torch.load(out / "best.pt", weights_only=True)
    torch.testing.assert_close(saved, model.state_dict(), rtol=0, atol=0)


def test_a_file_of_weights_beside_pretrained_is_refused(digits, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=32, **MODEL_KWARGS).state_dict(), weights)
    given = dict(TINY, checkpoint=str(weights), pretrained=True)
    with pytest.raises(InputError, match="checkpoint and pretrained were both given; allowed is one of them"):
        finetune(data_dir=str(digits), out=str(tmp_path / "out"), **given)


def test_a_run_is_continued_without_the_file_of_its_initial_weights(digits, tmp_path):
    weights, out = tmp_path / "weights.safetensors", tmp_path / "out"
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=32, **MODEL_KWARGS).state_dict(), weights)
    given = dict(TINY, data_dir=str(digits), out=str(out), checkpoint=str(weights), epochs=1, device="cpu")
    whole, _ = finetune(**given)
    weights.unlink()
    again, _ = finetune(**given, resume=True)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert "trained from `weights.safetensors`" in (out / "hub" / "README.md").read_text()
    for other, words in ((None, "None now"), (str(tmp_path / "other.pth"), "other.pth now")):
        with pytest.raises(InputError, match=f"settings differ.*checkpoint=weights.safetensors before, {words}"):
            finetune(**{**given, "checkpoint": other}, resume=True)
    with pytest.raises(InputError, match="weights.safetensors is no file"):
        finetune(**given, overwrite=True)


def test_a_default_of_zero_is_documented():
    assert "workers: processes that load images (0 or more); default: 0." in " ".join(finetune.__doc__.split())


def test_the_card_has_both_sides_of_images_that_are_not_square(digits, tmp_path):
    sides = dict(TINY, img_size=None, model_kwargs=dict(MODEL_KWARGS, img_size=[32, 64]), epochs=1, device="cpu")
    finetune(data_dir=str(digits), out=str(tmp_path / "out"), **sides)
    assert "32x64 px" in (tmp_path / "out" / "hub" / "README.md").read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_gone_are_not_damaged(workers, digits, tmp_path, monkeypatch, script):
    shutil.copytree(digits, tmp_path / "data")

    def taken_away(run, epoch, step):
        if step == 1:
            (tmp_path / "data").rename(tmp_path / "elsewhere")
        seed_step(run, epoch, step)

    monkeypatch.setattr("timm_vix.train.finetune.seed_step", taken_away)
    arguments = command(tmp_path / "data", tmp_path / "out", **TINY, epochs=1, checkpoint_every=1, device="cpu")
    arguments += ["--workers", str(workers)]
    code, errors = script(*arguments)
    assert code == 2 and re.search(r"^error: \S+\.png can't be read: its folder is no longer there$", errors, re.M)
    assert len(errors.splitlines()) == 1
    (tmp_path / "elsewhere").rename(tmp_path / "data")
    monkeypatch.setattr("timm_vix.train.finetune.seed_step", seed_step)
    assert script(*arguments, "--resume")[0] == 0
    assert len(read_history(tmp_path / "out")) == 1


def test_a_continued_run_counts_the_same_images(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    for number in range(5):
        (tmp_path / "data" / "digit1" / f"damaged{number}.png").write_text("no image")
    settings = dict(TINY, epochs=1, device="cpu", data_dir=str(tmp_path / "data"), out=str(tmp_path / "out"))
    finetune(**settings)
    card = (tmp_path / "out" / "hub" / "README.md").read_text()
    counted = [int(number) for number in re.search(r"(\d+) images; validation: (\d+)", card).groups()]
    assert sum(counted) == 160
    finetune(**settings, resume=True)
    assert (tmp_path / "out" / "hub" / "README.md").read_text() == card


def test_names_that_are_no_text_and_formulas(digits, tmp_path, capsys):
    try:
        shutil.copytree(digits, folder := tmp_path / os.fsdecode(b"caf\xe9 $_$"))
        (folder / "digit1" / os.fsdecode(b"\xe9.png")).write_text("no image")
    except OSError as error:
        pytest.skip(f"this file system has text alone for names: {error}")
    finetune(**TINY, epochs=1, device="cpu", data_dir=str(folder), out=str(tmp_path / "first"))
    assert "\\udce9.png" in capsys.readouterr().out
    assert "caf\\udce9 $_$" in (tmp_path / "first" / "hub" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "first").rename(place := tmp_path / "a$_$b")
    settings = dict(TINY, model=f"local-dir:{place}/hub", model_kwargs={}, pretrained=True, epochs=1, device="cpu")
    finetune(**settings, data_dir=str(digits), out=str(tmp_path / "second"))
    assert (tmp_path / "second" / "curve.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(num_classes=7), "model_kwargs: num_classes=7 is given by the images"),
        (dict(drop_path_rate=0.5), "drop_path=0.2 and model_kwargs: drop_path_rate=0.5 were both given"),
    ],
    ids=str,
)
def test_what_is_given_twice_is_refused(given, words, digits, tmp_path):
    settings = dict(EXACT, model_kwargs=MODEL_KWARGS | given)
    with pytest.raises(InputError) as error:
        finetune(data_dir=str(digits), out=str(tmp_path / "out"), **settings)
    assert words in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda state: [state], "holds a list; expected a checkpoint"),
        (lambda state: state | dict(settings=None), "has no settings"),
        (lambda state: state | dict(model={}), "is not of this training"),
        (lambda state: state | dict(optimizer={}), "is not of this training"),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line(damage, words, digits, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    path = tmp_path / "out" / "checkpoint.pt"
    torch.save(damage(torch.load(path, weights_only=True)), path)
    with pytest.raises(InputError) as error:
        finetune(data_dir=str(digits), out=str(tmp_path / "out"), **EXACT, resume=True)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow  # inductor compiles the training and the validation
def test_compiled_training_follows_the_other(digits, tmp_path):
    """The same losses, accuracies and weights as in eager mode, from code that was compiled."""
    settings = dict(EXACT, data_dir=str(digits), drop_path=0.0, lr=1e-4)
    eager, expected = finetune(out=str(tmp_path / "eager"), **settings)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled, history = finetune(out=str(tmp_path / "compiled"), compile=True, **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= graphs + 2  # in training and in eval mode
    for row, other in zip(history, expected, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert row["top1"] == pytest.approx(other["top1"], abs=100 / 32)  # one of the images at most
    # AdamW turns a tiny gradient into a whole step, so single weights may differ by some steps
    for name, weight in compiled.state_dict().items():
        assert (weight - eager.state_dict()[name]).norm() <= 1e-2 * eager.state_dict()[name].norm() + 1e-4
    hub = timm.create_model(f"local-dir:{tmp_path / 'compiled' / 'hub'}", pretrained=True).eval()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(hub(x), compiled(x))


@pytest.mark.slow  # torch.compile is imported, and works up to its end
def test_a_missing_compiler_is_one_line(tmp_path):
    environment = dict(os.environ, PATH=str(tmp_path), CXX="", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    arguments = ["--compile", "--threads", "1", "--out", str(tmp_path / "out"), "--model-kwargs", "depth=1"]
    command = [sys.executable, str(SCRIPT), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 2 and last.startswith("error: compile: ") and last.endswith("; train without it")
    assert "No working C++ compiler found" in last and "Traceback" not in run.stderr
