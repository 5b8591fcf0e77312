"""The paper's table again: epochs that are kept, rows that are right, cards that say what the rows say."""

import copy
import csv
import errno
import importlib
import json
import math
import os
import re
import sys
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from conftest import DATA, exit_code, load_example
from huggingface_hub import ModelCard
from PIL import Image
from reproduction.cards import COLUMNS, CURVE, read_rows, write_cards
from reproduction.shipping import accuracy_of, ship
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

from timm_vix._checks import InputError
from timm_vix._files import write_whole
from timm_vix._records import append_record, read_records
from timm_vix.mixers import MIXERS
from timm_vix.train.finetune import finetune
from timm_vix.train.hub import write_hub

ROOT = Path(__file__).parents[1]
CIFAR10 = DATA / "cifar10.tar.xz"
CHECKPOINTS = ROOT / "examples" / "checkpoints"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six classes of one colour each and noise: 10 training and 4 test images a class."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, number in (("train", 10), ("test", 4)):
        for label in range(6):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in range(number):
                pixels = random.integers(0, 90, (32, 32, 3)) + 25 * np.array([label, 5 - label, 3])
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f"class{label}" / f"{i}.png")
    return folder


@pytest.fixture
def run(images, tmp_path, monkeypatch, capsys):
    """Runs an example in this process; returns exit code, output and errors."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = exit_code(load_example(name).main)
        return code, *capsys.readouterr()

    return call


def test_systems_are_registered_and_take_their_patches():
    example = load_example("reproduce_vix")
    small = {
        name for name in timm.list_models("*_cifar*") if timm.model_entrypoint(name).__module__.startswith("timm_v")
    }
    assert set(example.SYSTEMS) == small
    for system in example.SYSTEMS:
        model = timm.create_model(system, device="meta", **example.patched(system, 2))
        reductions = [info["reduction"] for info in model.feature_info]
        assert reductions[0] == 2, system


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_nothing_approximates_with_as_many_tokens_as_there_are(patch_size):
    example = load_example("reproduce_vix")
    tokens = (32 // patch_size) ** 2
    for system in example.SYSTEMS:
        model = timm.create_model(system, device="meta", **example.patched(system, patch_size))
        few = {
            min(module.num_landmarks, tokens) if hasattr(module, "num_landmarks") else math.prod(module.regions)
            for module in model.modules()
            if hasattr(module, "num_landmarks") or hasattr(module, "regions")
        }
        approximates = {MIXERS["nystrom"], MIXERS["linformer"]} & {type(module) for module in model.modules()}
        assert bool(few) == bool(approximates) and (not few or max(few) == min(64, tokens // 4)), system


def test_the_best_epoch_is_kept_also_after_a_stop(images, tmp_path):
    settings = dict(
        model="vix_softmax_cifar",
        model_kwargs=dict(patch_size=8),
        data_dir=str(images / "train"),
        held_out=0.3,
        keep="best",
        schedule="constant",
        warmup=0.0,
        epochs=5,
        batch_size=14,
        lr=3e-3,
        device="cpu",
        threads=1,
    )
    model, history = finetune(out=str(tmp_path / "whole"), **settings)
    assert {row["lr"] for row in history} == {3e-3}
    best = max(history, key=lambda row: row["top1"])
    card = (tmp_path / "whole" / "hub" / "README.md").read_text()
    assert f"epoch {best['epoch']}, the best on these images" in card and f"{best['top1']:.2f}" in card
    if best["epoch"] < 5:
        last = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)["model"]
        assert any(not torch.equal(value, last[key]) for key, value in model.state_dict().items())
    kept = torch.load(tmp_path / "whole" / "best.pt", weights_only=True)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())

    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm_vix.train.finetune_results.write_figure", stop)
        with pytest.raises(Stop):
            finetune(out=str(tmp_path / "stopped"), **settings)
    again, _ = finetune(out=str(tmp_path / "stopped"), resume=True, **settings)
    assert all(torch.equal(value, kept[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"schedule": "linear"}, ["schedule=linear", "cosine", "constant"]),
        ({"keep": "first"}, ["keep=first", "last", "best"]),
        ({"held_out": 1.0}, ["held_out=1.0", "below 1"]),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(setting, words, images, tmp_path):
    with pytest.raises(ValueError) as error:
        finetune("vix_softmax_cifar", data_dir=str(images), out=str(tmp_path / "out"), **setting)
    assert not [word for word in words if word not in str(error.value)]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rows_are_measured_once_and_cards_are_theirs(run, images, tmp_path):
    arguments = ["--data-dir", images, "--systems", "vix_softmax_cifar", "--recipes", "modern", "--patch-size", 4]
    arguments += ["--epochs", 2, "--device", "cpu", "--threads", 1, "--runs", tmp_path / "runs"]
    arguments += ["--results", tmp_path / "r.csv", "--cards", tmp_path / "cards"]
    code, out, _ = run("reproduce_vix", *arguments)
    assert code == 0
    (row,) = csv.DictReader((tmp_path / "r.csv").read_text().splitlines())
    hub = tmp_path / "runs" / "modern-2-4" / "vix_softmax_cifar" / "hub"

    # the test accuracy, an image at a time
    model = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    names = json.loads((hub / "config.json").read_text())["label_names"]
    right = 0
    for label, name in enumerate(names):
        for path in (images / "test" / name).iterdir():
            pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None] / 255
            right += int(model((pixels - 0.5) / 0.5).argmax()) == label
    assert float(row["top1"]) == pytest.approx(100 * right / 24, abs=0.01)
    assert (row["epochs"], row["patch_size"], row["tokens"], row["paper"]) == ("2", "4", "64", "56.82 (log)")
    assert row["keywords"] == "patch_size=4"
    assert float(row["peak_memory_mib"]) > 4 * 3 * int(row["parameters"]) / 2**20  # weights and AdamW's state alone
    assert float(row["images_per_second"]) > 0 and float(row["faster_than_softmax"]) > 0
    card = (tmp_path / "cards" / "vix_softmax_cifar-patch4-modern-2epochs.md").read_text()
    assert f"| top-1, test images | {float(row['top1']):.2f} % |" in card and "64 (patches" in card
    assert len(list((tmp_path / "cards").iterdir())) == 1
    (hub / "model.safetensors").rename(hub / "moved")
    code, out, _ = run("reproduce_vix", *arguments[-4:-1], tmp_path / "none", "--runs", tmp_path / "runs")
    assert code == 0 and "no card: the weights of no row" in out and not (tmp_path / "none").exists()
    (hub / "moved").rename(hub / "model.safetensors")
    assert "56.82 %, with 1,024 tokens and 40 or more epochs; the best epoch on the test images" in card

    code, out, _ = run("reproduce_vix", *arguments)
    assert code == 0 and "already in" in out

    photo = next((images / "test" / names[0]).iterdir())
    code, out, _ = run("classify", photo, "--model", hub)
    first, answer = out.splitlines()
    assert code == 0 and first == f"{hub}, {len(names)} classes." and answer.startswith(f"{photo}: class")
    assert answer.count("%") == 3


def test_shipped_models_are_small_and_their_cards_say_what_is_stored(run):
    sizes = [path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(sizes) < 10e6
    code, out, _ = run("classify", "--list")
    assert code == 0
    shown = dict(line.split(": ") for line in out.splitlines())
    assert shown.keys() == {folder.name for folder in CHECKPOINTS.iterdir()}
    for name, line in shown.items():
        folder = CHECKPOINTS / name
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
        weights = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.bfloat16}
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        state = model.state_dict()
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32} and weights.keys() == state.keys()
        assert all(torch.equal(tensor.to(state[key].dtype), state[key]) for key, tensor in weights.items())
        shipped = ModelCard.load(folder / "README.md")
        (top1, _) = (result.metric_value for result in shipped.data.eval_results)
        assert f"| top-1, test images | {top1:.2f} % |" in shipped.text and "stored in bfloat16" in shipped.text
        assert f"| parameters | {sum(parameter.numel() for parameter in model.parameters()):,} |" in shipped.text
        assert f"local-dir:examples/checkpoints/{name}" in shipped.text
        assert (
            line == f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB, {top1} % of CIFAR-10's test images"
        )
        # rounding costs next to nothing, and the card has what the row has
        before = [
            float(value) for value in re.search(r"before rounding ([\d.]+) % and ([\d.]+) %", shipped.text).groups()
        ]
        rows, _ = read_rows(ROOT / "examples" / "results" / "reproduce_vix.csv")
        assert before in [[row["top1"], row["top5"]] for row in rows if row["system"] == name]
        assert abs(before[0] - top1) < 0.3


@pytest.mark.skipif(not CIFAR10.exists(), reason=f"{CIFAR10.name} is not beside the repository")
@pytest.mark.slow
def test_shipped_models_recognise_photographs_as_their_cards_say(run, tmp_path):
    photos = []
    with tarfile.open(CIFAR10, "r|xz") as archive:
        tests = (member for member in archive if member.isfile() and member.name.startswith("test/"))
        for i, member in enumerate(tests):
            if i % 40 == 0:
                photos.append(tmp_path / member.name)
                photos[-1].parent.mkdir(parents=True, exist_ok=True)
                photos[-1].write_bytes(archive.extractfile(member).read())
    for folder in CHECKPOINTS.iterdir():
        code, out, _ = run("classify", *photos, "--model", folder.name)
        first, *lines = out.splitlines()
        assert first == f"{folder.name}, 10 classes."
        right = sum(
            line.split(": ")[1].startswith(photo.parent.name) for line, photo in zip(lines, photos, strict=True)
        )
        (top1, _) = ModelCard.load(folder / "README.md").data.eval_results
        # of 250 photographs
        assert code == 0 and 100 * right / len(photos) == pytest.approx(top1.metric_value, abs=8)


def test_what_is_shipped_is_measured_with_the_rounded_weights(images, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vix_softmax_cifar", depth=1, patch_size=8, num_classes=6).eval()
    torch.nn.init.normal_(model.head.weight)
    names = [f"class{i}" for i in range(6)]
    config = dict(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    save_for_hf(model, tmp_path / "hub", dict(label_names=names), safe_serialization=True, data_config=config)
    (row, *_), _ = read_rows(ROOT / "examples" / "results" / "reproduce_vix.csv")
    size = ship(tmp_path / "hub", tmp_path / "shipped", row, str(images))
    shipped = ModelCard.load(tmp_path / "shipped" / "README.md")
    assert size == sum(path.stat().st_size for path in (tmp_path / "shipped").iterdir())
    rounded = copy.deepcopy(model).bfloat16().float()
    right = 0
    for label, name in enumerate(names):
        for path in (images / "test" / name).iterdir():
            pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None] / 255
            right += int(rounded((pixels - 0.5) / 0.5).argmax()) == label
    assert f"| top-1, test images | {100 * right / 24:.2f} % |" in shipped.text
    assert f"before rounding {row['top1']:.2f} % and {row['top5']:.2f} %" in shipped.text
    loaded = timm.create_model(f"local-dir:{tmp_path / 'shipped'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), rounded(x)) and not torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["absent.jpg", "--model", "absent"], ["model=absent is not there", "config.json", "hf-hub:"]),
        (["absent.jpg", "--model", "vix_fnet_cifar"], ["model=vix_fnet_cifar has no trained weights", "hf-hub:"]),
        ([], ["no photo was given", "--list"]),
        (["absent.jpg"], ["absent.jpg does not exist; expected a picture file"]),
        ([Path(__file__).parent], ["is a folder; expected a picture file"]),
        ([__file__], ["test_reproduce.py cannot be read as a picture", "cannot identify"]),
        (["absent.jpg", "--top", "0"], ["top=0", "at least 1"]),
        (["absent.jpg", "--top", "-1"], ["top=-1", "at least 1"]),
    ],
)
def test_classify_says_what_is_missing(arguments, words, run):
    code, _, errors = run("classify", *arguments)
    assert code == 2 and errors.count("\n") == 1 and not [word for word in words if word not in errors]


def test_a_photo_that_cannot_be_read_leaves_the_others(run, tmp_path):
    photos = [tmp_path / name for name in ("first.png", "absent.png", "last.png")]
    for photo in (photos[0], photos[2]):
        Image.effect_noise((40, 40), 60).convert("RGB").save(photo)
    code, out, errors = run("classify", *photos)
    assert code == 2 and errors == f"error: {photos[1]} does not exist; expected a picture file\n"
    assert [line.split(": ")[0] for line in out.splitlines()[1:]] == [str(photos[0]), str(photos[2])]


@pytest.mark.parametrize("architecture", ["hybrid_pin_cifar", "vit_tiny_patch16_224"])
def test_classify_says_that_a_folder_has_no_weights(architecture, run, tmp_path):
    config = json.loads((CHECKPOINTS / "hybrid_pin_cifar" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": architecture, "model_args": {}}))
    code, _, errors = run("classify", "absent.jpg", "--model", tmp_path)
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("error: ")
    assert f"No suitable checkpoints found in {tmp_path}" in errors


@pytest.fixture
def folder(tmp_path):
    """Saves a model of timm's own with four classes, and gives its folder."""

    def save(channels=3, **config):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4, in_chans=channels,
            pretrained_cfg_overlay=dict(crop_pct=1.0),
        )  # fmt: skip
        torch.nn.init.normal_(model.head.weight)
        save_for_hf(model, tmp_path / "hub", config or None, safe_serialization=True)
        return tmp_path / "hub"

    return save


@pytest.mark.parametrize("damage", ["weights", "config", "no JSON", "keyword", "channels", "classes", "head"])
def test_classify_refuses_a_damaged_folder_in_one_line(damage, run, folder, images):
    hub = folder(channels=4 if damage == "channels" else 3)
    config, weights = hub / "config.json", hub / "model.safetensors"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "classes":
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_classes": 7}))
    elif damage == "head":
        write_whole(config, config.read_bytes().replace(b'"num_classes": 4', b'"num_classes": 7'))
    elif damage == "keyword":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_args": {"deepness": 3}}))
    elif damage != "channels":
        config.write_text("{}" if damage == "config" else "{")
    code, out, errors = run("classify", images / "test" / "class0" / "0.png", "--model", hub)
    reason = {
        "weights": "cannot be loaded: ",
        "config": "cannot be loaded: it lacks 'architecture'",
        "no JSON": "cannot be loaded: ",
        "keyword": "deepness",
        "classes": "has 4 classes, but its weights are for 7 classes",
        "head": "size mismatch for head.weight",
        "channels": "takes images of 4 channels; allowed is 1 (grey) or 3 (RGB)",
    }[damage]
    assert (code, out) == (2, "") and errors.startswith(f"error: model={hub} ") and reason in errors
    assert errors.count("\n") == 1


def test_classify_shows_a_grey_model_grey_images(run, folder, images):
    hub, photo = folder(channels=1), images / "test" / "class0" / "0.png"
    code, out, _ = run("classify", photo, "--model", hub, "--top", 4)
    model = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    red, green, blue = np.asarray(Image.open(photo)).astype(float).transpose(2, 0, 1)
    grey = torch.from_numpy(0.299 * red + 0.587 * green + 0.114 * blue).float().round()[None, None] / 255
    with torch.no_grad():
        shares = model((grey - 0.5) / 0.5).softmax(1)[0]
    expected = {str(i): 100 * float(share) for i, share in enumerate(shares)}
    shown = dict(part.split(" ")[:2] for part in out.strip().split(": ")[1].split(", "))
    assert code == 0 and max(shares) - min(shares) > 0.2  # or any answer would do
    assert {name: float(share) for name, share in shown.items()} == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    "names, shown",
    [(["ape", "bee"], "0123"), (["ape", "bee", "cat", "dog", "elk"], "0123"), (["ape", "bee", "cat", "dog"], "abcd")],
)
def test_classify_names_classes_only_by_as_many_names(names, shown, run, folder, images):
    hub = folder(label_names=names)
    code, out, _ = run("classify", images / "test" / "class0" / "0.png", "--model", hub, "--top", 9)
    assert code == 0 and sorted(part[0] for part in out.strip().split(": ")[1].split(", ")) == list(shown)


def test_cards_need_all_columns(tmp_path):
    (tmp_path / "r.csv").write_text("system,recipe\nccn_cifar,paper\n")
    told = r"r.csv was written by another version or program: it lacks keywords, paper, top1"
    with pytest.raises(ValueError, match=told):
        write_cards(tmp_path / "r.csv", lambda row: tmp_path, tmp_path / "cards")


def test_damaged_rows_are_left_out_and_missing_numbers_are_told(tmp_path):
    path = tmp_path / "r.csv"
    committed = ROOT / "examples" / "results" / "reproduce_vix.csv"
    (good, *_), damaged = read_rows(committed)
    assert (list(good), damaged) == (list(COLUMNS), 0)
    append_record(path, COLUMNS, good | dict(seed=1, images_per_second=None, peak_memory_mib=None))
    append_record(path, COLUMNS, good | dict(top1=None))
    append_record(path, COLUMNS, good)
    path.write_bytes(path.read_bytes()[:-40])  # the last line is cut off
    assert [row["seed"] for row in read_rows(path)[0]] == [1] and read_rows(path)[1] == 2
    (tmp_path / "model.safetensors").touch()
    (card,) = write_cards(path, lambda row: tmp_path, tmp_path / "cards")
    assert card.name == "hybrid_pin_cifar-patch4-modern-20epochs-seed1.md"
    assert "| peak memory of a training step | not measured |" in card.read_text()
    append_record(tmp_path / "half.csv", COLUMNS, good)
    append_record(tmp_path / "half.csv", COLUMNS, good | dict(dtype="bfloat16"))
    names = [path.name for path in write_cards(tmp_path / "half.csv", lambda row: tmp_path, tmp_path / "cards")]
    assert names == [f"hybrid_pin_cifar-patch4-modern-20epochs{half}.md" for half in ("", "-bfloat16")]


@pytest.mark.parametrize("more", [["--recipes", "modern", "paper"], ["--cards", "cards"]])
def test_one_model_of_a_system_is_shipped(more, run, images, tmp_path):
    data = ["--data-dir", images] if "--recipes" in more else []
    code, _, errors = run("reproduce_vix", *data, *more, "--ship", tmp_path / "ship", "--results", tmp_path / "r.csv")
    assert code == 2 and "one model of each system: expected --data-dir and one of --recipes" in errors
    assert not (tmp_path / "ship").exists()


@pytest.mark.parametrize(
    "damage, words",
    [
        ("arguments", ["neither --data-dir nor --cards"]),
        ("test", ["test does not exist", "expected"]),
        ("results", ["r.csv was written by another version", "it lacks keywords, paper"]),
        ("curves", ["r_curves.csv was written by another version", "it lacks epochs, patch_size"]),
    ],
)
def test_what_cannot_end_well_is_refused_before_training(damage, words, run, images, tmp_path):
    data, results = tmp_path / "data", tmp_path / "r.csv"
    data.mkdir()
    for split in ("train", "test"):
        if (damage, split) != ("test", "test"):
            (data / split).symlink_to(images / split)
    if damage in ("results", "curves"):
        damaged = results if damage == "results" else tmp_path / "r_curves.csv"
        damaged.write_text("system,recipe\nccn_cifar,paper\n")
    arguments = ["--device", "cpu", "--runs", tmp_path / "runs", "--results", results]
    code, _, errors = run("reproduce_vix", *arguments, *(["--data-dir", data] if damage != "arguments" else []))
    assert code == 2 and errors.count("\n") == 1 and not [word for word in words if word not in errors]
    assert not (tmp_path / "runs").exists()


def test_a_system_that_fails_does_not_take_the_others_with_it(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_vix.measure.job.measure_in_process", lambda job: dict(error="out of memory"))
    (tmp_path / "runs" / "modern-1-4").mkdir(parents=True)
    (tmp_path / "runs" / "modern-1-4" / "vix_mixer_cifar").write_text("where its folder would be")
    arguments = ["--data-dir", images, "--systems", "vix_mixer_cifar", "vix_fnet_cifar", "--recipes", "modern"]
    arguments += ["--patch-size", 4, "--epochs", 1, "--device", "cpu", "--threads", 1, "--runs", tmp_path / "runs"]
    arguments += ["--results", tmp_path / "r.csv", "--cards", tmp_path / "cards"]
    code, _, errors = run("reproduce_vix", *arguments)
    lines = [line for line in errors.splitlines() if "without a row" in line or line.startswith("error")]
    assert code == 2 and lines[0].startswith("error: vix_mixer_cifar, modern: ")
    assert lines[1:] == ["without a row: vix_mixer_cifar (modern)"]
    assert [row["system"] for row in read_rows(tmp_path / "r.csv")[0]] == ["vix_fnet_cifar"]
    assert len(list((tmp_path / "cards").iterdir())) == 1
    (tmp_path / "runs" / "modern-1-4" / "vix_mixer_cifar").unlink()
    assert run("reproduce_vix", *arguments)[0] == 0  # what lacked a row is tried again
    assert len(read_rows(tmp_path / "r.csv")[0]) == 2


def test_another_seed_has_a_run_of_its_own_and_the_speed_of_its_training(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_vix.measure.job.measure_in_process", lambda job: dict(error="out of memory"))
    arguments = ["--data-dir", images, "--systems", "vix_fnet_cifar", "--recipes", "modern", "--patch-size", 4]
    arguments += ["--epochs", 1, "--device", "cpu", "--threads", 1, "--runs", tmp_path / "runs"]
    arguments += ["--results", tmp_path / "r.csv"]
    for seed in (0, 1):
        assert run("reproduce_vix", *arguments, "--seed", seed)[0] == 0
        with (tmp_path / "r.csv").open("a") as file:
            file.write("cut,off")
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == {"modern-1-4", "modern-1-4-seed1"}
    code, out, _ = run("reproduce_vix", *arguments, "--seed", 1)
    assert code == 0 and "2 damaged lines are ignored" in out and "already in" in out
    rows, _ = read_rows(tmp_path / "r.csv")
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(row["images_per_second"] > 0 and row["faster_than_softmax"] is None for row in rows)


def test_the_epochs_of_a_run_are_recorded_once(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_vix.measure.job.measure_in_process", lambda job: dict(error="out of memory"))
    arguments = ["--data-dir", images, "--systems", "vix_fnet_cifar", "--recipes", "modern", "--patch-size", 4]
    arguments += ["--epochs", 3, "--device", "cpu", "--threads", 1, "--runs", tmp_path / "runs"]
    arguments += ["--results", tmp_path / "r.csv"]
    assert run("reproduce_vix", *arguments)[0] == 0
    with (tmp_path / "runs" / "modern-3-4" / "vix_fnet_cifar" / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    curves = tmp_path / "r_curves.csv"
    rows, damaged = read_records(curves, CURVE, exact=True)
    assert damaged == 0 and [row["epoch"] for row in rows] == [1, 2, 3] == [int(row["epoch"]) for row in history]
    for row, epoch in zip(rows, history):
        assert row["held_out_top1"] == pytest.approx(float(epoch["top1"]), abs=0.005)
        assert row["train_loss"] == pytest.approx(float(epoch["train_loss"]), abs=5e-5)
        assert row["seconds"] == pytest.approx(float(epoch["seconds"]), abs=0.05)
    # killed after the second epoch was recorded, and before the run had its row
    curves.write_text("".join(curves.read_text().splitlines(keepends=True)[:3]))
    (tmp_path / "r.csv").unlink()
    assert run("reproduce_vix", *arguments)[0] == 0
    again, _ = read_records(curves, CURVE, exact=True)
    assert again == rows


def test_the_figure_of_training_has_the_hours_of_each_system(monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    figures = importlib.import_module("result_tables.figures")  # needs matplotlib
    names = ("system", "patch_size", "batch_size", "ms")
    timed = [("slow_cifar", "4", "100", "800.0"), ("fast_cifar", "4", "50", "40.0"), ("slow_cifar", "2", "100", "1.0")]
    monkeypatch.setattr(figures, "read", lambda name: [dict(zip(names, row)) for row in timed])
    # 450 steps of 0.8 s, and 900 steps of 0.04 s
    assert figures.hours_per_epoch(4) == pytest.approx({"slow_cifar": 0.1, "fast_cifar": 0.01})
    run = dict(recipe="modern", epochs=20, patch_size=4, seed=0, dtype="float32", threads=1, train_loss=1.0)
    rows = [
        dict(run, system=system, epoch=epoch, seconds=seconds, held_out_top1=top1)
        for system, epoch, seconds, top1 in [
            ("slow_cifar", 2, 7200.0, 45.0),
            ("slow_cifar", 1, 3600.0, 40.0),
            ("fast_cifar", 1, 360.0, 50.0),
            ("fast_cifar", 2, 360.0, 60.0),
        ]
    ]
    rows.append(dict(rows[0], seed=1, seconds=1.0))
    (axes,) = figures.over_time(rows, dict(slow_cifar=2.0, fast_cifar=0.1)).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert list(lines) == ["fast_cifar", "slow_cifar"]  # the best first
    assert lines["slow_cifar"] == ([2.0, 4.0], [40.0, 45.0])
    assert lines["fast_cifar"] == (pytest.approx([0.1, 0.2]), [50.0, 60.0])


def test_a_file_is_replaced_by_a_file_only_and_the_reason_is_the_systems(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=f"{name}: it is there and is no regular file"):
            write_whole(tmp_path / name, b"new")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 2
    path = tmp_path / "file"
    write_whole(path, b"old")
    for number, end in ((errno.ENOSPC, "make room, then resume"), (errno.EIO, "the previous one is intact")):
        monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(number, os.strerror(number))))
        with pytest.raises(OSError, match=f"{os.strerror(number)}; the previous one is intact.*") as error:
            write_whole(path, b"new")
        assert str(error.value).endswith(end) and path.read_bytes() == b"old"


def test_an_interrupted_write_leaves_the_former_file_alone(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path):
    text = (ROOT / "examples" / "results" / "reproduce_vix.csv").read_text()
    (tmp_path / "r.csv").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_rows(tmp_path / "r.csv") == read_rows(ROOT / "examples" / "results" / "reproduce_vix.csv")


def test_models_of_a_table_and_saved_ones_have_rows_beside_each_other(run, images, tmp_path):
    model = timm.create_model("vix_from_timm", source="vit_tiny_patch16_224", mixer="linformer", img_size=32)
    timm.models.save_for_hf(model, tmp_path / "hub", safe_serialization="both")
    command = ["compare_finetune", "cifar10", "--data-dir", images, "--threads", 1, "--device", "cpu", "--img-size", 32]
    command += ["--runs", tmp_path / "runs", "--results", tmp_path]
    saved = f"fitted, all layers={tmp_path / 'hub'}"
    code, _, errors = run(*command, "--models", "vix_softmax_cifar depth=1", "--saved", saved)
    assert (code, errors) == (0, "")
    with (tmp_path / "finetune_cifar10.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["vix_softmax_cifar depth=1", "fitted, all layers"]
    # the saved model came with its weights and keywords, the head apart
    hub = tmp_path / "runs" / "cifar10" / "fitted,_all_layers_32px_1epochs" / "hub"
    net = timm.create_model(f"local-dir:{hub}", pretrained=True)
    assert type(net.blocks[0].attn.core).__name__ == "LinformerAttention"
    code, told, _ = run(*command, "--saved", saved)
    assert code == 0
    assert "already in" in told
    code, _, errors = run(*command, "--saved", saved, "--epochs", 2)
    assert code == 2 and "has fitted, all layers after 1 epochs; another --results keeps 2 apart" in errors


@pytest.mark.parametrize(
    "folder, command",
    [
        ("modern-1-4/vix_fnet_cifar", ["reproduce_vix", "--systems", "vix_fnet_cifar", "--recipes", "modern"]),
        ("cifar10/vix_fnet_cifar_32px_1epochs", ["compare_finetune", "cifar10", "--models", "vix_fnet_cifar"]),
    ],
    ids=["reproduce_vix", "compare_finetune"],
)
def test_trained_weights_without_checkpoint_and_row_stay(folder, command, run, images, tmp_path):
    weights = tmp_path / "runs" / folder / "hub" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"hours of training")
    command += ["--data-dir", images, "--epochs", 1, "--device", "cpu", "--runs", tmp_path / "runs"]
    command += ["--results", tmp_path / "r"] + ["--patch-size", 4] * (command[0] == "reproduce_vix")
    code, _, errors = run(*command)
    assert code == 2 and f"{folder} already holds" in errors
    assert weights.read_bytes() == b"hours of training"


def test_a_folder_without_names_of_classes_is_not_shipped(tmp_path):
    hub = tmp_path / "hub"
    write_hub(
        hub,
        model := timm.create_model("vix_nystrom_cifar", num_classes=4),
        resolve_model_data_config(model),
        ModelCard("---\n---\n"),
    )
    with pytest.raises(InputError, match="hub names no classes; expected the folder of a fine-tuning"):
        accuracy_of(hub, str(tmp_path), "cpu")
