"""Segmentation: scenes are checked, the score is a naive loop's, and a killed training ends with equal weights."""

import argparse
import importlib
import itertools
import math
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import DATA, DEIT, exit_code
from PIL import Image
from safetensors.torch import save_file

from timm_vix._checks import InputError
from timm_vix._records import read_records

pytest.importorskip("segmentation_models_pytorch", reason="it has the encoders and the head")
ROOT = Path(__file__).parents[1]
CAMVID = DATA / "camvid.tar"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def module():
    """The modules of the example by name."""
    return importlib.import_module


@pytest.fixture
def folder(tmp_path):
    """Four scenes of 60x44 pixels in either split: dark, of class 3, but for a bright rectangle of class 8."""
    random = np.random.default_rng(0)
    for split, number in itertools.product(("train", "val"), range(4)):
        for part in ("images", "masks"):
            (tmp_path / split / part).mkdir(parents=True, exist_ok=True)
        classes = np.full((44, 60), 3, np.uint8)
        top, left = random.integers(0, 20, 2)
        classes[top : top + 20, left : left + 30] = 8
        pixels = np.where(classes == 8, 230, 25).astype(np.uint8)[..., None].repeat(3, axis=2)
        classes[40:] = 11
        Image.fromarray(pixels).save(tmp_path / split / "images" / f"{number}.jpg", quality=95)
        Image.fromarray(classes).save(tmp_path / split / "masks" / f"{number}.png")
    return tmp_path


@pytest.fixture
def start(module, monkeypatch):
    """Arguments of the command line as the example reads them: a small training from random weights."""

    def parse(folder: Path, *more: object) -> argparse.Namespace:
        line = ["--data-dir", folder, "--model", "test_vit", "--patch-size", 16, "--img-size", 32, 64]
        line += ["--batch-size", 2, "--epochs", 2, "--lr", 1e-3, "--amp", "off", "--device", "cpu", "--threads", 1]
        line += ["--rounds", 1, "--runs", folder / "runs", "--out", folder / "rows.csv", *more]
        monkeypatch.setattr(sys, "argv", ["segment.py", *map(str, line)])
        run = module("segment").parse_arguments()
        run.dtype = torch.float32
        return run

    return parse


def test_scores_are_those_of_a_naive_loop(module) -> None:
    scenes = module("road_scenes")
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randint(0, 10, (2, 5, 7), generator=generator) for _ in range(3)]  # class 10 never occurs
    for truth, _ in pairs:
        truth[:, :2] = 11
    found = scenes.scores(sum(scenes.confusion(truth.byte(), prediction) for truth, prediction in pairs))
    pixels = [(int(t), int(p)) for truth, guess in pairs for t, p in zip(truth.flatten(), guess.flatten()) if t != 11]
    ratios = []
    for label in range(11):
        both = sum(t == p == label for t, p in pixels)
        either = sum(label in (t, p) for t, p in pixels)
        if either:
            ratios.append(both / either)
    assert len(ratios) == 10
    assert found["miou"] == pytest.approx(100 * sum(ratios) / len(ratios))
    assert found["pixel_accuracy"] == pytest.approx(100 * sum(t == p for t, p in pixels) / len(pixels))


def other_mask(folder: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(folder / "train" / "masks" / "2.png")


BAD = {
    "another size": (
        lambda f: other_mask(f, np.zeros((20, 30), np.uint8)),
        "2.png has 30x20 pixels, and its image 60x44",
    ),
    "class": (lambda f: other_mask(f, np.full((44, 60), 12, np.uint8)), "2.png holds class 12; allowed are 0 to 11"),
    "colours": (
        lambda f: other_mask(f, np.zeros((44, 60, 3), np.uint8)),
        "2.png has pixels of mode RGB; expected 8-bit",
    ),
    "no class": (
        lambda f: [Image.fromarray(np.full((44, 60), 11, np.uint8)).save(path) for path in (f / "val/masks").iterdir()],
        "val: no mask has a pixel of a class, 0 to 10",
    ),
    "no mask": (lambda f: (f / "train/masks/2.png").unlink(), "2.png does not exist; expected a mask for"),
    "damaged": (lambda f: (f / "train/images/2.jpg").write_bytes(b"no picture"), "2.jpg cannot be read"),
    "no image": (lambda f: [path.unlink() for path in (f / "val/images").iterdir()], "images holds no images"),
    "no folder": (lambda f: (f / "val").rename(f / "test"), "val/images does not exist; expected a folder of images"),
}


@pytest.mark.parametrize("spoil, words", BAD.values(), ids=BAD)
def test_bad_data_is_one_line(spoil, words, folder, start, module, capsys) -> None:
    start(folder)
    spoil(folder)
    assert exit_code(module("segment").main) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # a progress bar may come before
    assert error.startswith("error: ") and words in error
    assert not (folder / "runs").exists() and not (folder / "rows.csv").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--img-size", 32, 60], "img_size=32 60: expected multiples of patch_size=16"),
        (["--img-size", 48, 64], "head=dpt takes patches of 4, 8, 16 or 32 px and sizes that are multiples of 32"),
        (["--trained-blocks", 7], "trained_blocks=7: expected an integer from 0 to 6"),
        (["--weights", "none.safetensors"], "weights=none.safetensors is no file"),
        (["--model", "vit_tinny"], "is not registered in timm; near names: "),
        (["--patch-size", 0], "patch_size=0: expected an integer of at least 1"),
        (["--img-size", 0, 0], "img_size=0: expected an integer of at least 1"),
        (["--img-size", 32, -32], "img_size=-32: expected an integer of at least 1"),
        (["--epochs", 0], "epochs=0.0: expected a finite number of at least 0.01"),
    ],
)
def test_bad_arguments_are_one_line(options, words, folder, start, module, capsys) -> None:
    start(folder, *options)
    assert exit_code(module("segment").main) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error


WRONG_WEIGHTS = {
    "a delta": (
        lambda weights: {"blocks.5.attn.core.token_proj": torch.zeros(4, 8)},
        ["missing are cls_token", "unexpected are blocks.5.attn.core.token_proj"],
    ),
    "other names": (
        lambda weights: {f"encoder.{name}": value for name, value in weights.items()},
        ["missing are cls_token", "unexpected are encoder."],
    ),
    "a part": (
        lambda weights: {name: value for name, value in weights.items() if "blocks.5." not in name},
        ["missing are blocks.5."],
    ),
    "more": (
        lambda weights: weights | {"blocks.6.norm1.bias": torch.zeros(64)},
        ["unexpected are blocks.6.norm1.bias"],
    ),
}


@pytest.mark.parametrize("change, words", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_weights_of_something_else_are_one_line(change, words, folder, start, module, capsys) -> None:
    save_file(change(timm.create_model("test_vit").state_dict()), folder / "wrong.safetensors")
    start(folder, "--weights", folder / "wrong.safetensors")
    assert exit_code(module("segment").main) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: model=test_vit with weights=") and not [word for word in words if word not in error]
    assert not (folder / "runs").exists() and not (folder / "rows.csv").exists()


@pytest.mark.parametrize("head", ["dpt", "linear"])
def test_weights_of_any_classifier_are_those_of_the_backbone(head, folder, start, module) -> None:
    weights = timm.create_model("test_vit", num_classes=7, img_size=(32, 64)).state_dict()
    save_file(weights, folder / "right.safetensors")
    run = start(folder, "--weights", folder / "right.safetensors", "--head", head)
    found = module("segmenter").build(run, "softmax").encoder.model.state_dict()
    assert found.keys() == weights.keys() - {"head.weight", "head.bias"}
    assert all(torch.equal(value, weights[name]) for name, value in found.items())


def test_masks_are_augmented_as_their_images_and_batches_are_a_function_of_the_step(folder, module) -> None:
    road = module("road_scenes")
    scenes = road.Scenes(road.read_scenes(folder / "train"), (32, 64), batch_size=2, seed=1)
    batches = list(scenes.batches(0, 6))
    for pixels, classes in batches:
        assert pixels.shape == (2, 3, 32, 64) and classes.shape == (2, 32, 64)
        counted = classes != 11
        bright = pixels.float().mean(1) > 110
        assert float((bright == (classes == 8))[counted].float().mean()) > 0.95
    assert not torch.equal(batches[0][1], batches[2][1])  # another epoch, another augmentation
    for (pixels, classes), (again, classes_again) in zip(batches[3:], scenes.batches(3, None)):
        assert torch.equal(pixels, again) and torch.equal(classes, classes_again)


@pytest.mark.parametrize("head", ["dpt", "linear"])
def test_loss_is_that_of_the_pixels_with_a_class(head, folder, start, module) -> None:
    segmenter = module("segmenter")
    run = start(folder, "--head", head)
    objective = segmenter.Objective(segmenter.build(run, "axial").eval(), run)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 32, 64), dtype=torch.uint8, generator=generator)
    classes = torch.randint(0, 12, (2, 32, 64), generator=generator)
    classes[classes == 5] = 4
    logits = objective.logits(pixels).double()
    assert logits.shape == (2, 11, 32, 64)
    counted = classes != 11
    chances = logits.softmax(1).movedim(1, -1)[counted]  # (pixels, classes)
    truth = classes[counted]
    entropy = -chances[torch.arange(len(truth)), truth].log().mean()
    dice = []
    for label in range(11):
        wanted = (truth == label).double()
        overlap = 2 * (chances[:, label] * wanted).sum() / (chances[:, label].sum() + wanted.sum())
        dice.append(1 - overlap if label in truth else torch.zeros(()))
    found = objective.loss(pixels, classes.byte()).detach()
    assert float(found) == pytest.approx(float((entropy + sum(dice) / 11).detach()), rel=1e-4)


def test_rates_fall_from_the_head_to_the_first_block_and_over_the_training(folder, start, module) -> None:
    segmenter, segment = module("segmenter"), module("segment")
    run = start(folder, "--layer-decay", 0.5)
    net = segmenter.build(run, "nystrom")
    optimizer = segmenter.optimizer_of(net, run)
    scheduler = segment.warmup_and_cosine(optimizer, run.lr, segment.TICKS, segment.TICKS // 10)

    def rates(progress: float) -> dict[torch.Tensor, float]:
        scheduler.step_update(round(segment.TICKS * progress))
        return {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}

    found, blocks = rates(0.1), net.encoder.model.blocks
    assert {id(parameter) for parameter in found} == {id(parameter) for parameter in net.parameters()}
    assert found[net.segmentation_head.head[0].weight] == pytest.approx(run.lr * (1 + math.cos(0.1 * math.pi)) / 2)
    for before, after in itertools.pairwise(blocks):
        assert found[before.mlp.fc1.weight] == pytest.approx(0.5 * found[after.mlp.fc1.weight])
    head = net.segmentation_head.head[0].weight
    assert [rates(p)[head] / run.lr for p in (0.05, 0.5, 1.0)] == pytest.approx([0.505, 0.5, 0.0], abs=1e-9)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("blocks", [None, 1])
def test_a_killed_training_ends_with_the_same_weights(blocks, folder, start, module, tmp_path) -> None:
    segment, segmenter, road = (module(name) for name in ("segment", "segmenter", "road_scenes"))
    run = start(folder, "--head", "linear", "--checkpoint-every", 1)
    run.trained_blocks = blocks
    read = road.read_scenes(folder / "train")
    whole, cut = (segmenter.build(run, "linformer") for _ in range(2))
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    scenes = road.Scenes(read, run.img_size, run.batch_size, run.seed)
    assert segment.train(whole, scenes, {}, run, tmp_path / "whole")["step"] == 4

    class Ending(road.Scenes):
        def batches(self, first, last):
            yield from itertools.islice(super().batches(first, last), 2)
            raise Killed

    with pytest.raises(Killed):
        segment.train(cut, Ending(read, run.img_size, run.batch_size, run.seed), {}, run, tmp_path / "cut")
    again = segmenter.build(run, "linformer")
    segment.train(again, scenes, {}, run, tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    changed = {name for name, value in whole.state_dict().items() if not torch.equal(value, before[name])}
    frozen = {name for name in before if "patch_embed" in name or "blocks.4." in name}
    assert "encoder.model.blocks.5.mlp.fc1.weight" in changed and "head.1.weight" in changed
    assert bool(frozen & changed) == (blocks is None)


def test_rows_come_once_and_equal_time_ends_by_the_clock(folder, start, module, monkeypatch, capsys) -> None:
    segment = module("segment")
    monkeypatch.setattr(segment, "costs", module("segmenter").costs_here)  # without the start of a process
    start(folder, "--mixers", "softmax", "merged", "--seconds", 0.1)
    assert exit_code(segment.main) == 0
    rows, damaged = read_records(folder / "rows.csv", segment.COLUMNS, exact=True)
    assert damaged == 0 and [row["mixer"] for row in rows] == ["softmax", "merged"]
    for row in rows:
        assert row["train_s"] >= 0.1 and row["epochs"] >= 0.5 and row["budget"] == "0.1 s"
        assert 0 <= row["miou"] <= 100 and 0 <= row["pixel_accuracy"] <= 100
        assert row["tokens"] == 2 * 4 + 1 and row["step_ms"] > 0 and row["infer_ms"] > 0
    assert rows[0]["faster_training"] == rows[0]["faster_inference"] == 1.0
    for picture in folder.glob("runs/*/predictions.png"):
        with Image.open(picture) as image:
            assert image.size == (3 * 240, 2 * 176)
            right = np.asarray(image.convert("RGB"))[5, 245]  # the true class of a corner
        assert tuple(right) in {tuple(module("road_scenes").PALETTE[label]) for label in (3, 8)}
    capsys.readouterr()
    assert exit_code(segment.main) == 0
    assert capsys.readouterr().out.count("already in") == 2
    assert len(read_records(folder / "rows.csv", segment.COLUMNS)[0]) == 2


def test_a_row_is_kept_where_its_costs_cannot_be_measured(folder, start, module, monkeypatch, capsys) -> None:
    segment, costs = module("segment"), module("segmenter").costs

    def too_large(run: argparse.Namespace, mixer: str) -> dict:
        """In the process of the measurement, a batch that no memory holds."""
        return costs(argparse.Namespace(**vars(run) | dict(batch_size=10**13)), mixer)

    monkeypatch.setattr(segment, "costs", too_large)
    start(folder, "--mixers", "axial", "--epochs", 0.5)
    assert exit_code(segment.main) == 0
    assert "the costs of axial could not be measured: out of memory: " in capsys.readouterr().out
    (row,), damaged = read_records(folder / "rows.csv", segment.COLUMNS, exact=True)
    measured = ("step_ms", "faster_training", "peak_memory_mib", "infer_ms", "faster_inference", "rounds")
    assert damaged == 0 and row["miou"] >= 0 and {row[name] for name in measured} == {None}
    monkeypatch.setattr(module("result_tables"), "RESULTS", folder)
    (folder / "rows.csv").rename(folder / "segment_camvid.csv")
    line = module("result_tables.segmentation").camvid().splitlines()[2]
    assert line.startswith("| axial | ") and line.endswith(" |  |  |  |  |  |")


@pytest.mark.slow
@pytest.mark.skipif(not (CAMVID.exists() and DEIT.exists()), reason="CamVid or DeiT-Tiny is not beside the repository")
def test_real_scenes_are_learnt(start, module, tmp_path) -> None:
    with tarfile.open(CAMVID) as tar:
        tar.extractall(tmp_path, filter="data")
    data = tmp_path / "camvid"
    read = module("road_scenes").read_scenes(data / "val")
    assert len(read) == 101 and all(image.shape == (3, 360, 480) for image, _ in read)
    options = ["--model", "deit_tiny_patch16_224", "--weights", DEIT, "--img-size", 96, 128, "--patch-size", 8]
    start(data, *options, "--mixers", "nystrom", "--count", 16, "--epochs", 12, "--runs", tmp_path / "runs")
    assert exit_code(module("segment").main) == 0
    (row,), _ = read_records(data / "rows.csv", module("segment").COLUMNS)
    assert row["pixel_accuracy"] > 60  # sky, road and buildings
    assert row["peak_memory_mib"] > 20  # at least the optimizer's state of 5.7 M parameters


def test_unreadable_checkpoint_or_other_settings_are_one_line(folder, start, module, tmp_path) -> None:
    segment, segmenter, road = (module(name) for name in ("segment", "segmenter", "road_scenes"))
    run = start(folder, "--head", "linear", "--epochs", 0.5)
    scenes = road.Scenes(road.read_scenes(folder / "train"), run.img_size, run.batch_size, run.seed)
    segment.train(segmenter.build(run, "softmax"), scenes, dict(lr=0.1), run, tmp_path)
    with pytest.raises(InputError, match="lr=0.1 before, 0.2 now"):
        segment.train(segmenter.build(run, "softmax"), scenes, dict(lr=0.2), run, tmp_path)


def test_other_weights_and_other_validation_scenes_are_other_rows(folder, start, module) -> None:
    segment = module("segment")

    def key(*more: object) -> tuple:
        train, val = (module("road_scenes").read_scenes(folder / split) for split in ("train", "val"))
        return tuple(segment.settings_of(start(folder, *more), train, val).items())

    for name, value in (("first", 0.0), ("second", 1.0)):
        (folder / name).mkdir()
        save_file({"weight": torch.full((2,), value)}, folder / name / "model.safetensors")
    first, second = (key("--weights", folder / name / "model.safetensors") for name in ("first", "second"))
    assert first != second
    (folder / "val/images/0.jpg").write_bytes((folder / "val/images/1.jpg").read_bytes())
    assert key("--weights", folder / "first/model.safetensors") != first
