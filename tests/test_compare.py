"""The comparison: its runs are those of fine-tuning, a failing one is a row, a killed one continues."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from timm_vix import cli
from timm_vix._names import parse_model
from timm_vix._records import read_records
from timm_vix.benchmark import compare
from timm_vix.benchmark.runs import with_checksum
from timm_vix.train.finetune import finetune

ROOT = Path(__file__).parents[1]
load_digits = pytest.importorskip("sklearn.datasets", reason="the images are scikit-learn's digits").load_digits

MODEL = "vit_tiny_patch16_224 patch_size=8 embed_dim=32 depth=1 num_heads=2"
OTHER = "vix_nystrom_cifar patch_size=8 embed_dim=32 depth=1 num_heads=2 num_landmarks=4"
RECIPE = ["--img-size", "32", "--batch-size", "4", "--epochs", "2", "--lr", "1e-3", "--amp", "off", "--threads", "1"]


def command(digits: Path, folder: Path, *models: str) -> list[str]:
    start = ["compare", *models, "--data-dir", str(digits), "--device", "cpu", *RECIPE]
    return [*start, "--runs", str(folder / "runs"), "--out", str(folder / "compare.csv")]


def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["timm-vix", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.slow
def test_runs_are_those_of_finetune_and_a_failing_one_is_a_row(digits, tmp_path, monkeypatch, capfd) -> None:
    broken = f"{MODEL} num_landmarks=3"  # timm's class takes no such keyword
    arguments = command(digits, tmp_path, broken, MODEL)
    assert call(monkeypatch, *arguments) == 0
    records, _ = read_records(tmp_path / "compare.csv", compare.COLUMNS, exact=True)
    assert [(r["model"], r["error"] is None) for r in records] == [(broken, False), (MODEL, True)]
    assert "num_landmarks" in records[0]["error"]
    good = records[1]
    name, *keywords = MODEL.split()
    settings = dict(keyword.split("=") for keyword in keywords)
    _, history = finetune(
        name,
        {key: int(value) for key, value in settings.items()},
        data_dir=str(digits),
        img_size=32,
        batch_size=4,
        epochs=2,
        lr=1e-3,
        amp="off",
        threads=1,
        device="cpu",
        out=str(tmp_path / "direct"),
    )
    assert good["top1"] == pytest.approx(history[-1]["top1"], rel=1e-4)
    assert good["train_s_per_epoch"] > 0 and good["infer_s_per_epoch"] > 0
    trained = timm.create_model(
        name, img_size=32, num_classes=3, **{key: int(value) for key, value in settings.items()}
    )
    assert good["params_m"] == pytest.approx(sum(p.numel() for p in trained.parameters()) / 1e6, rel=1e-4)
    assert good["baseline"] == "vit_tiny_patch16_224"
    assert good["gflops"] > 0 and good["latency_p50_ms"] > 0 and good["step_p50_ms"] > 0
    table = [re.split("  +", line)[:3] for line in capfd.readouterr().out.splitlines()]
    assert [MODEL, "scratch", "1"] in table
    assert call(monkeypatch, *arguments, "--seeds", "0", "1") == 0
    again, _ = read_records(tmp_path / "compare.csv", compare.COLUMNS, exact=True)
    assert again[:2] == records
    assert [(r["model"], r["seed"]) for r in again[2:]] == [(broken, 0), (broken, 1), (MODEL, 1)], (
        "what is good is not trained twice"
    )
    # measured once for a model, whatever the seed
    assert [again[4][key] for key in compare.COSTS] == [good[key] for key in compare.COSTS]
    table = [re.split("  +", line)[:3] for line in capfd.readouterr().out.splitlines()]
    assert [MODEL, "scratch", "2"] in table


@pytest.fixture
def trained(monkeypatch) -> list[Path]:
    """The folders of trainings that take no time; costs depend on the number of threads."""
    folders: list[Path] = []

    def run_one(model, weights, seed, recipe, where, out) -> dict:
        folders.append(out)
        if where["workers"]:
            return dict(error="No space left on device")
        return dict(top1=50.0, img_size=32, batch_size=4, dtype="float32", threads=where["threads"])

    monkeypatch.setattr(compare, "run_one", run_one)
    monkeypatch.setattr(
        compare, "measure_in_process", lambda job: dict(params_m=1.0, latency_p50_ms=float(job["threads"]))
    )
    return folders


def test_a_folder_is_timed_beside_the_softmax_model_of_its_trunk(digits, tmp_path, trained, monkeypatch) -> None:
    name, keywords = parse_model(OTHER)
    save_for_hf(timm.create_model(name, **keywords), tmp_path / "hub", safe_serialization=True)
    measured: list[str] = []
    monkeypatch.setattr(compare, "measure_in_process", lambda job: measured.append(job["baseline"]) or {})
    assert call(monkeypatch, *command(digits, tmp_path, f"local-dir:{tmp_path}/hub")) == 0
    for baseline in measured:
        name, found = parse_model(baseline)
        trunk = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3)
        assert name == "vix_softmax_cifar" and found == dict(trunk, in_chans=3, global_pool="token")
    assert len(measured) == 2


def test_a_failed_run_is_trained_again_and_a_good_one_is_not(digits, tmp_path, trained, monkeypatch, capsys) -> None:
    arguments = command(digits, tmp_path, MODEL)
    assert call(monkeypatch, *arguments, "--workers", "1") == 2
    assert call(monkeypatch, *arguments) == 0
    assert call(monkeypatch, *arguments) == 0
    assert len(trained) == 2 and trained[0] == trained[1]
    records, _ = read_records(tmp_path / "compare.csv", compare.COLUMNS, exact=True)
    assert [record["error"] is None for record in records] == [False, True]
    assert "1 runs" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_that_left_no_checkpoint_starts_anew(digits, tmp_path) -> None:
    (tmp_path / "checkpoint.partial").touch()  # as a full disk leaves it
    settings = dict(data_dir=str(digits), img_size=32, batch_size=4, epochs=1, device="cpu", amp="off", threads=1)
    name, keywords = parse_model(MODEL)
    assert compare.train(dict(settings, model=name, model_kwargs=keywords, out=str(tmp_path)))["epochs"] == 1


def test_seconds_are_those_of_a_slow_clock_with_the_last_threads(digits, tmp_path, monkeypatch) -> None:
    clock = SimpleNamespace(now=0.0, step=100.0, crashes=True)

    def step(*key) -> None:
        clock.now += clock.step

    def evaluate(*arguments) -> tuple[float, float]:
        if clock.crashes and clock.now > 1300:  # after the second epoch
            raise RuntimeError
        clock.now += 7.25
        return 50.0, 100.0

    for module in ("finetune", "loop"):
        monkeypatch.setattr(f"timm_vix.train.{module}.time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr("timm_vix.train.finetune.reseed", step)
    monkeypatch.setattr("timm_vix.train.finetune.evaluate", evaluate)
    name, keywords = parse_model(MODEL)
    settings = dict(data_dir=str(digits), img_size=32, batch_size=4, epochs=2, device="cpu", amp="off")
    settings.update(model=name, model_kwargs=keywords, out=str(tmp_path / "out"))
    with pytest.raises(RuntimeError):
        compare.train(dict(settings, threads=1))
    clock.crashes, clock.step = False, 30.0
    row = compare.train(dict(settings, threads=2))
    # 48 of 60 images are 12 steps
    assert row["train_s_per_epoch"] == pytest.approx(12 * 30) and row["infer_s_per_epoch"] == pytest.approx(7.25)
    clock.step = 100.0
    row = compare.train(dict(settings, threads=1, epochs=1, out=str(tmp_path / "slower")))
    assert row["train_s_per_epoch"] == pytest.approx(1200) and row["infer_s_per_epoch"] == pytest.approx(7.25)


def test_no_threads_are_refused_before_anything_is_trained(digits, tmp_path, trained, monkeypatch, capsys) -> None:
    assert call(monkeypatch, *command(digits, tmp_path, MODEL), "--threads", "0") == 2
    assert "--threads: '0': allowed is a whole number above 0" in capsys.readouterr().err
    assert not trained and not (tmp_path / "compare.csv").exists()


def test_costs_are_those_of_the_same_threads(digits, tmp_path, trained, monkeypatch) -> None:
    for seed, threads in enumerate("1221"):
        assert call(monkeypatch, *command(digits, tmp_path, MODEL), "--seeds", str(seed), "--threads", threads) == 0
    records, _ = read_records(tmp_path / "compare.csv", compare.COLUMNS, exact=True)
    assert [record["latency_p50_ms"] for record in records] == [1, 2, 2, 1]


def test_costs_of_other_threads_are_not_averaged_and_runs_given_twice_count_once(
    digits, tmp_path, trained, monkeypatch, capsys
) -> None:
    assert call(monkeypatch, *command(digits, tmp_path, MODEL), "--seeds", "0", "--threads", "1") == 0
    arguments = [*command(digits, tmp_path, MODEL), "--seeds", "0", "1", "1", "--threads", "2"]
    capsys.readouterr()
    assert call(monkeypatch, *arguments) == 0
    head, line = capsys.readouterr().out.split("\n\n")[1].splitlines()
    columns = dict(zip(re.split(r" {2,}", head), re.split(r" {2,}", line)))
    assert columns["seeds"] == "2" and columns["top1"] == "50"
    place = head.index("step_p50_ms")  # some cells before it are empty
    assert line[place : place + len("step_p50_ms")].split() == ["2"] and "±" not in line and "1.5" not in line


def test_an_indexed_data_set_is_known_by_its_labels() -> None:
    class Sample:
        pass

    def known_by(*labels: int) -> str:
        return with_checksum("some (2 classes)", [(Sample(), label) for label in labels], [])

    assert known_by(0, 1, 1) == known_by(0, 1, 1) != known_by(0, 0, 1)
    assert re.fullmatch(r"some \(2 classes, 3 images [0-9a-f]{8}\)", known_by(0, 1, 1))


def test_costs_are_those_of_this_machine_and_these_versions(digits, tmp_path, trained, monkeypatch) -> None:
    measured: list[dict] = []
    monkeypatch.setattr(compare, "measure_in_process", lambda job: measured.append(job) or dict(latency_p50_ms=1.0))
    for seed, (name, version) in enumerate((("one", "1"), ("two", "1"), ("two", "2"), ("one", "1"))):
        monkeypatch.setattr(compare, "device_name", lambda device, name=name: name)
        monkeypatch.setattr(compare, "versions", lambda version=version: dict(torch=version, timm="1", timm_vix="1"))
        assert call(monkeypatch, *command(digits, tmp_path, MODEL), "--seeds", str(seed)) == 0
        assert len(measured) == 2 * min(seed + 1, 3)


def test_a_cost_that_cannot_be_measured_is_named_and_the_run_stays(
    digits, tmp_path, trained, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(compare, "measure_in_process", lambda job: dict(error="out of memory: 8 GiB"))
    assert call(monkeypatch, *command(digits, tmp_path, MODEL)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of memory: 8 GiB" in line]
    assert [MODEL in line and what in line for line, what in zip(lines, ("inference", "training"))] == [True, True]
    (record,), _ = read_records(tmp_path / "compare.csv", compare.COLUMNS, exact=True)
    assert record["top1"] == 50 and record["error"] is None and record["params_m"] is None


def test_costs_of_which_a_part_is_missing_are_measured_again(digits, tmp_path, trained, monkeypatch) -> None:
    memory = iter([1.0, None, 1.0, 2.0])  # a training step that failed once

    def measure(job: dict) -> dict:
        found = next(memory)
        return dict(error="out of memory") if found is None else dict(latency_p50_ms=found)

    monkeypatch.setattr(compare, "measure_in_process", measure)
    for seed in "012":
        assert call(monkeypatch, *command(digits, tmp_path, MODEL), "--seeds", seed) == 0
    records, _ = read_records(tmp_path / "compare.csv", compare.COLUMNS, exact=True)
    assert [record["step_p50_ms"] for record in records] == [None, 2.0, 2.0]


def test_other_weights_and_images_of_the_same_name_are_other_runs(digits, tmp_path, trained, monkeypatch) -> None:
    for place in ("first", "second"):
        shutil.copytree(digits, tmp_path / place / "digits")
        save_file({place: torch.zeros(1)}, tmp_path / place / "model.safetensors")
    image = tmp_path / "second" / "digits" / "digit0" / "0.png"
    image.write_bytes(image.read_bytes() + b"0")
    shutil.copytree(tmp_path / "first", tmp_path / "moved")

    def start(data: str, weights: str, *more: str) -> int:
        arguments = command(tmp_path / data / "digits", tmp_path, MODEL)
        assert call(monkeypatch, *arguments, "--checkpoint", str(tmp_path / weights / "model.safetensors"), *more) == 0
        return len(trained)

    assert start("first", "first") == 1
    assert start("first", "second") == 2
    assert start("second", "second") == 3
    assert start("first", "first", "--val-dir", str(digits)) == 4
    assert len(set(trained)) == 4
    assert start("moved", "moved") == 4, "the same files at another place"
    # rows of earlier versions have the names only
    path = tmp_path / "compare.csv"
    header, row, *_ = path.read_text().splitlines(keepends=True)
    plain = re.sub(
        r'"(digits \(3 classes), 60 images \w{8}\)"', r"\1)", re.sub(r"(model.safetensors) \w{8}", r"\1", row)
    )
    assert ",model.safetensors,0,digits (3 classes)," in plain
    path.write_text(header + plain)
    assert start("first", "first") == 4
    assert path.read_text() == header + plain


@pytest.mark.slow
def test_a_part_of_a_model_trains(digits, tmp_path, monkeypatch) -> None:
    arguments = command(digits, tmp_path, f"{MODEL} train_only=head", f"{MODEL} train_only=neck")
    assert call(monkeypatch, *arguments, "--epochs", "1") == 0
    head, wrong = read_records(tmp_path / "compare.csv", compare.COLUMNS, exact=True)[0]
    assert head["error"] is None
    assert "neck" in wrong["error"] and "attention, mlp, mixer, head" in wrong["error"]
    (delta,) = (tmp_path / "runs").glob("*/delta.safetensors")
    assert set(load_file(delta)) == {"head.weight", "head.bias"}


@pytest.mark.slow
def test_a_stopped_comparison_continues(digits, tmp_path) -> None:
    # enough epochs that it is still training when it is stopped
    name, keywords = parse_model(OTHER)
    weights = tmp_path / "start.safetensors"
    save_file(timm.create_model(name, img_size=32, num_classes=3, **keywords).state_dict(), weights)
    arguments = [*command(digits, tmp_path, OTHER), "--checkpoint", str(weights)]
    arguments[arguments.index("--epochs") + 1] = "30"
    line = [sys.executable, "-m", "timm_vix", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(line, env=environment(), **pipes) as process:
        for text in process.stdout:
            if re.search(r"epoch 2\b", text):
                break
        process.send_signal(signal.SIGINT)  # as Ctrl-C; the run in the other process saves its step
        rest = process.stdout.read()
    assert process.returncode == 130, rest
    assert "the same command continues" in rest
    assert not (tmp_path / "compare.csv").exists()
    (saved,) = (tmp_path / "runs").glob("*/history.csv")
    epochs = len(saved.read_text().splitlines()) - 1
    assert 2 <= epochs < 30
    # the weights moved
    (tmp_path / "moved").mkdir()
    weights.rename(tmp_path / "moved" / weights.name)
    line[-1] = str(tmp_path / "moved" / weights.name)
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first = int(re.search(r"epoch (\d+)", done.stdout)[1])
    assert first == epochs + 1, "epochs that were finished are not repeated"
    (record,), _ = read_records(tmp_path / "compare.csv", compare.COLUMNS)
    assert record["epochs"] == 30 and record["error"] is None


def test_a_killed_comparison_leaves_no_run_behind(digits, tmp_path) -> None:
    arguments = command(digits, tmp_path, OTHER)
    arguments[arguments.index("--epochs") + 1] = "500"
    line = [sys.executable, "-m", "timm_vix", *arguments]
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            if re.search(r"epoch 1\b", text):
                break
        process.kill()
    # for good, were the run to outlive the comparison: the test's time limit
    while any(str(tmp_path) in read(path) for path in Path("/proc").glob("[0-9]*/cmdline")):
        time.sleep(0.1)


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    "change, words",
    [
        (["vix_nistrom_tiny"], "near names: vix_nystrom_tiny"),
        ([], "no model given"),
        (["local-dir:absent"], "model='local-dir:absent': its configuration can't be read"),
        ([MODEL, "--device", "cuda:9"], "device='cuda:9' is not on this machine"),
        ([MODEL, "--data-dir", "empty"], "holds no images"),
        ([MODEL, "--data-dir", "single"], "one class only, 'digit0'"),
        ([MODEL, "--data-dir", "absent"], "does not exist"),
        ([MODEL, "--checkpoint", "x.pth", "--pretrained"], "both given"),
        ([MODEL, "--checkpoint", "x.pth"], "checkpoint=x.pth is no file"),
        ([MODEL, "--checkpoint", "pretrained"], "checkpoint=pretrained is no file"),
        ([MODEL, "--checkpoint", ""], "checkpoint= is no file"),
        ([MODEL, "--out", "other.csv"], "another version"),
        ([MODEL, "--lr", "0"], "lr=0"),
        ([f"{MODEL} dilations={{1,2}}"], "dilations={1, 2}: expected numbers, text, lists or mappings"),
        ([MODEL, "--data-root", "somewhere"], "data_root=somewhere is for a data set of timm's factory"),
        ([MODEL, "--augment", "much"], "none, light, rand"),
        ([MODEL, "--seeds", "0", "-1"], "seed=-1"),
        ([MODEL, "--from-scratch", "local-dir:somewhere"], "from_scratch=local-dir:somewhere has weights of its own"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_trained(
    change, words, digits, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("model,top1\n")
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "digit0").symlink_to(digits / "digit0")
    monkeypatch.chdir(tmp_path)
    models = [change[0]] if change and change[0][0] != "-" else []
    arguments = [*command(digits, tmp_path, *models), *change[len(models) :]]
    assert call(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not (tmp_path / "runs").exists()


def test_images_in_the_folder_of_the_shell_are_the_same_images(digits, tmp_path, trained, monkeypatch) -> None:
    assert call(monkeypatch, *command(digits, tmp_path, MODEL)) == 0
    monkeypatch.chdir(digits)
    assert call(monkeypatch, *command(Path("."), tmp_path, MODEL)) == 0
    assert len(trained) == 1


def test_a_folder_whose_weights_or_plan_changed_is_another_start(digits, tmp_path, trained, monkeypatch) -> None:
    hub = tmp_path / "runs" / "earlier" / "hub"  # models of an earlier comparison may be compared again
    model = timm.create_model("vix_softmax_cifar", num_classes=3, depth=1)
    save_for_hf(model, hub, safe_serialization=True)
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    models = [f"local-dir:{hub}", f"vix_from_timm layers={plan}"]

    def start() -> int:
        assert call(monkeypatch, *command(digits, tmp_path, *models), "--pretrained") == 0
        return len(trained)

    assert start() == 2 and start() == 2
    model.head.bias.data += 1
    save_for_hf(model, hub, safe_serialization=True)
    assert start() == 3 and start() == 3
    plan.write_text("{ }")
    assert start() == 4 and len(set(trained)) == 4


@pytest.mark.parametrize("pretrained", [[], ["--pretrained"]])
def test_a_folder_starts_from_its_weights_and_its_row_says_so(pretrained, digits, tmp_path, monkeypatch) -> None:
    hub, given = tmp_path / "hub", {}
    save_for_hf(timm.create_model("vix_softmax_cifar", num_classes=3, depth=1), hub, safe_serialization=True)

    def record(function, settings, interactive) -> dict:
        given.update(settings)
        return dict(top1=50.0, img_size=32, batch_size=4, dtype="float32", threads=1)

    monkeypatch.setattr(compare, "call_in_process", record)
    monkeypatch.setattr(compare, "costs_of", lambda model, num_classes, at: dict.fromkeys(compare.COSTS))
    assert call(monkeypatch, *command(digits, tmp_path, f"local-dir:{hub}"), *pretrained) == 0
    (record,), _ = read_records(tmp_path / "compare.csv", compare.COLUMNS, exact=True)
    assert given["pretrained"] is True
    assert re.fullmatch(r"pretrained config.json \w{8} model.safetensors \w{8}", record["start"])
