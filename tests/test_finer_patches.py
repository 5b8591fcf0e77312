"""Finer patches: weights that are resampled as they should be, budgets of epochs and of time, runs that go on."""

import csv
import importlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import exit_code, load_example
from safetensors.torch import load_file, save_file
from timm.layers import Attention

from timm_vix._device import device_name, find_dtype
from timm_vix._records import append_record
from timm_vix.measure.job import JOB, build, tokens_of
from timm_vix.measure.statistics import compare_times

ROOT = Path(__file__).parents[1]
SOURCE = "vit_tiny_patch16_224 embed_dim=32 depth=2 num_heads=2"
NYSTROM = "nystrom num_landmarks=4"


@pytest.fixture
def finer():
    return load_example("finer_patches")


@pytest.fixture
def weights(tmp_path):
    """Of a small ViT with patches of 16x16 on a grid of 4x4."""
    torch.manual_seed(0)
    name, *keywords = SOURCE.split()
    given = {key: int(value) for key, value in (text.split("=") for text in keywords)}
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model(name, img_size=64, num_classes=7, **given).state_dict(), path)
    return path


@pytest.fixture
def run(finer, digits, weights, tmp_path, monkeypatch, capsys):
    """Runs the example in this process, with costs as if they had been measured; returns exit code, rows, errors."""
    out = tmp_path / "rows.csv"

    def measured(mixer, keywords):
        place = dict(mixer=mixer, keywords=keywords, source=SOURCE, img_size=64, patch_size=8, batch_size=8)
        place |= dict(dtype=str(find_dtype("auto", "cpu")).removeprefix("torch."), device_name=device_name("cpu"))
        place |= dict(threads=1, torch=str(torch.__version__), timm=timm.__version__)
        budget = dict(budget="epochs", limit=0.0, train_images=0, val_images=0, seed=0)
        return {**place, **budget, "tokens": 65, "rounds": 5, "train_ms_an_image": 2.5, "infer_speedup": 1.25}

    for row in (measured("softmax", None), measured(*NYSTROM.split())):
        append_record(out, finer.COLUMNS, row)

    def call(*arguments):
        fixed = ["--data-dir", digits, "--weights", weights, "--source", SOURCE, "--img-size", 64, "--device", "cpu"]
        fixed += ["--threads", 1, "--per-class", 9, "--val-per-class", 2, "--out", out, "--runs", tmp_path / "runs"]
        monkeypatch.setattr(sys, "argv", [str(text) for text in ("finer_patches", *fixed, *arguments)])
        code = exit_code(finer.main)
        return code, list(csv.DictReader(out.read_text().splitlines()))[2:], capsys.readouterr().err

    return call


def interrupt_at(step, finer, monkeypatch):
    """Press Ctrl-C in this step of the next training."""
    plain = finer.seed_step

    def pressed(run, epoch, number):
        plain(run, epoch, number)
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(finer, "seed_step", pressed)
    return lambda: monkeypatch.setattr(finer, "seed_step", plain)


def test_patches_and_positions_are_resampled(finer, weights, tmp_path):
    """Least squares: the finer kernel answers a small patch as the trained one answers that patch enlarged."""
    row = dict(source=SOURCE, mixer="softmax", keywords=None, img_size=64, patch_size=8)
    row |= dict(train_images=1, val_images=1, batch_size=8, dtype="float32", budget="epochs", limit=1.0, seed=0)
    given = dict(weights=str(weights), data_dir=None, runs=str(tmp_path), img_size=64, batch_size=8, seed=0, threads=1)
    settings = finer.settings_of(row, finer.argparse.Namespace(**given), "cpu")
    net, _ = finer.build_model(settings, torch.float32, 3)
    trained = load_file(weights)
    pixels = torch.eye(256).view(256, 1, 16, 16)
    reduced = F.interpolate(pixels, (8, 8), mode="bicubic", antialias=True, align_corners=False).flatten(1)  # (256, 64)
    kernels = trained["patch_embed.proj.weight"].flatten(0, 1).flatten(1)  # (C·3, 256)
    wanted, *_ = np.linalg.lstsq(reduced.double().numpy(), kernels.double().numpy().T, rcond=None)
    found = net.patch_embed.proj.weight.detach().flatten(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(found, wanted.T, atol=1e-5)
    grid = trained["pos_embed"][:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    finer_grid = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(net.pos_embed[:, 1:].detach(), finer_grid)
    torch.testing.assert_close(net.pos_embed[:, :1].detach(), trained["pos_embed"][:, :1])


def test_interrupted_epochs_end_as_uninterrupted_ones(run, finer, tmp_path, monkeypatch):
    command = ("--epochs", 2, "--mixers", "softmax", NYSTROM)
    release = interrupt_at(1, finer, monkeypatch)
    code, rows, errors = run(*command)
    assert (code, rows) == (130, []) and "checkpoint.pt; the same command continues" in errors
    release()
    code, rows, _ = run(*command)
    assert code == 0
    assert [(row["mixer"], row["keywords"], row["steps"], row["epochs"]) for row in rows] == [
        ("softmax", "", "6", "2.0"),
        ("nystrom", "num_landmarks=4", "6", "2.0"),
    ]
    # the costs are those that were measured before
    assert {(row["tokens"], row["train_ms_an_image"], row["infer_speedup"]) for row in rows} == {("65", "2.5", "1.25")}
    assert run(*command)[1] == rows  # nothing is trained twice
    # the same where nobody pressed Ctrl-C
    (tmp_path / "whole.csv").write_text("".join((tmp_path / "rows.csv").read_text().splitlines(True)[:3]))
    run("--epochs", 2, "--mixers", "softmax", "--runs", tmp_path / "whole", "--out", tmp_path / "whole.csv")
    paths = [next((tmp_path / runs).glob("*softmax*/checkpoint.pt")) for runs in ("runs", "whole")]
    states = [torch.load(path, weights_only=True) for path in paths]
    assert states[0]["position"]["step"] == states[1]["position"]["step"] == 6
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)


def test_time_that_was_spent_is_not_given_again(run, finer, tmp_path, monkeypatch):
    command = ("--minutes", 1000, "--mixers", NYSTROM)

    def spend(seconds):
        """Act as if the steps of the checkpoint had taken so long; return the checkpoint before."""
        (path,) = tmp_path.glob("runs/*/checkpoint.pt")
        state = torch.load(path, weights_only=True)
        torch.save({**state, "position": {**state["position"], "seconds": seconds}}, path)
        return state

    interrupt_at(0, finer, monkeypatch)
    assert run(*command)[:2] == (130, [])
    state = spend(30_000.0)
    assert state["position"]["step"] == 1 and 0 < state["position"]["seconds"] < 1000
    release = interrupt_at(1, finer, monkeypatch)
    assert run(*command)[:2] == (130, [])
    state = spend(60_000.0)
    assert 30_000 < state["position"]["seconds"] < 31_000
    # the cosine follows the time: half of it was gone before this step
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.5e-4, rel=1e-3)
    release()
    code, (row,), _ = run(*command)
    assert (code, row["budget"], row["limit"], row["steps"], row["seconds"]) == (0, "minutes", "1000.0", "2", "60000.0")
    assert float(row["epochs"]) == pytest.approx(2 / 3, abs=1e-3)
    assert 0 <= float(row["top1"]) <= 100


def test_costs_are_those_of_the_model_beside_softmax(run, finer, tmp_path, monkeypatch):
    def measured(job):
        model, softmax = (build(job[name], {**JOB, **job}) for name in ("model", "baseline"))
        assert {type(block.attn) for block in softmax.blocks} == {Attention}
        assert {block.attn.core.num_landmarks for block in model.blocks} == {2}
        assert job["batch_size"] == 8 and job["threads"] == 1
        train = job["mode"] == "train"
        times = compare_times(np.array([0.08, 0.16, 0.4]) * (1 + train), np.array([0.4, 0.4, 0.4]))
        return {**times, "tokens": tokens_of(model), "peak_memory_mib": 70.5 if train else 1.0}

    monkeypatch.setattr(finer, "measure_in_process", measured)
    code, (row,), errors = run("--epochs", 0, "--mixers", "nystrom num_landmarks=2", "--patch-size", 16)
    assert (code, errors, row["tokens"], row["rounds"], row["peak_memory_mib"]) == (0, "", "17", "3", "70.5")
    assert [row[name] for name in ("top1", "steps", "seconds", "train_images")] == ["", "", "", "27"]
    # milliseconds of one of 8 images; ratios of 5, 2.5 and 1 in inference, their 10th and 90th percentile between them
    assert (float(row["infer_ms_an_image"]), float(row["train_ms_an_image"])) == (20.0, 40.0)
    assert [float(row[f"infer_{name}"]) for name in finer.SPEEDS] == pytest.approx([2.5, 1.3, 4.5])
    assert [float(row[f"train_{name}"]) for name in finer.SPEEDS] == pytest.approx([1.25, 0.65, 2.25])
    assert not (tmp_path / "runs").exists()  # nothing was trained


def test_one_that_fails_leaves_the_others(run, finer, monkeypatch):
    monkeypatch.setattr(finer, "measure_in_process", lambda job: dict(error="out of memory: 8 GiB"))
    code, (row,), errors = run("--epochs", 0.5, "--mixers", "axial", "softmax")  # the costs of softmax are known
    assert code == 2 and "axial, patch 8, 0.5 epochs" in errors and "out of memory" in errors
    assert (row["mixer"], row["steps"]) == ("softmax", "2")


def test_table_has_both_budgets_in_the_line_of_a_mixer(finer, tmp_path, monkeypatch):
    tables = importlib.import_module("result_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    costs = dict(tokens=785, rounds=5, train_ms_an_image=250.4, peak_memory_mib=1234.5)
    costs |= dict(train_speedup=1.5, train_speedup_low=1.4, train_speedup_high=1.6)
    costs |= dict(infer_speedup=1.02, infer_speedup_low=0.9, infer_speedup_high=1.2)
    trainings = [("softmax", "epochs", 0, "", "", ""), ("softmax", "minutes", 10, 0.75, 601, 80.04)]
    trainings += [("axial", "epochs", 1, 1, 480, 78.0), ("axial", "minutes", 10, 1.25, 600, 81.0)]
    trainings += [("axial", "minutes", 1, 0.1, 60, 20.0)]  # a shorter trial
    for mixer, budget, limit, epochs, seconds, top1 in trainings:
        row = dict(mixer=mixer, patch_size=8, budget=budget, limit=limit, epochs=epochs, seconds=seconds, top1=top1)
        row |= dict(costs, train_images=2975, val_images=1395, threads=2, dtype="bfloat16")
        append_record(tmp_path / "finer_caltech101.csv", finer.COLUMNS, row)
    lines = importlib.import_module("result_tables.finer").finer().splitlines()
    assert lines[2:4] == [
        "| softmax | 8 | 785 |  |  | 80.0 | 0.75 | 250 ms |  |  | 1,234 MiB |",
        "| axial | 8 | 785 | 78.0 | 8.0 | 81.0 | 1.25 | 250 ms | 1.50 (1.40 to 1.60) | "
        "same (0.90 to 1.20) | 1,234 MiB |",
    ]
    assert lines[-1].startswith("2,975 training and 1,395 validation images. *Measured on: 2 CPU threads, bfloat16")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--minutes", "-1"), ("minutes=-1.0", "0 or more")),
        (("--epochs", "nan"), ("epochs=nan", "finite")),
        (("--epochs", 1, "--patch-size", 8, 0), ("patch_size=[8, 0]", "1 or more")),
        (("--epochs", 1, "--per-class", 0), ("per_class=0", "above 0")),
        (("--epochs", 1, "--img-size", 0), ("img_size=0", "above 0")),
        (("--epochs", 1, "--weights", "none.pth"), ("none.pth", ".safetensors or .pth")),
        (("--epochs", 1, "--mixers", "nystrum"), ("nystrum", "nystrom")),
        (("--epochs", 1, "--data-dir", "nowhere"), ("nowhere",)),
    ],
)
def test_wrong_input_is_one_error(run, tmp_path, arguments, told):
    code, rows, errors = run(*arguments)
    assert (code, rows) == (2, []) and "Traceback" not in errors
    assert all(text in errors for text in told), errors
    assert not (tmp_path / "runs").exists()
