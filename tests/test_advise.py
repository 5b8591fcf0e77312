"""The advice: sizes that are measured, the words that rows give, and one real measurement."""

import sys

import pytest

from timm_vix import cli
from timm_vix._records import read_records
from timm_vix.benchmark import advise
from timm_vix.benchmark.cost import COLUMNS
from timm_vix.mixers import MIXERS


def row(mixer: str, side: int, ms: float, memory: float, speedup: float) -> dict:
    name = "vit_tiny_patch16_224" if mixer == "softmax" else f"vix_{mixer}_tiny"
    spread = dict(speedup=speedup, speedup_low=speedup / 1.1, speedup_high=speedup * 1.1)
    spread["baseline_p50_ms"] = ms * speedup
    return dict(model=f"{name} depth=2", img_size=side, tokens=(side // 16) ** 2 + 1, latency_p50_ms=ms, error=None,
                peak_memory_mib=memory, difference="none" if 0.91 < speedup < 1.1 else "faster", **spread)  # fmt: skip


def test_sizes_end_at_the_one_that_was_asked_for() -> None:
    assert advise.image_sizes(1024, 16) == [160, 256, 400, 640, 1024]
    assert advise.image_sizes(224, 16) == [160, 176, 192, 208, 224]
    assert advise.image_sizes(32, 16) == [32]
    with pytest.raises(ValueError, match="img_size=1000 is no multiple of patch_size=16"):
        advise.image_sizes(1000, 16)


def test_every_mixer_is_measured_in_the_same_trunk() -> None:
    jobs = advise.jobs_of([224], "depth=2 patch_size=16", dict(device="cpu"))
    assert {job["model"].split()[0] for job in jobs[1:]} == {f"vix_{m}_tiny" for m in MIXERS if m != "softmax"}
    assert {job["baseline"] for job in jobs} == {jobs[0]["model"]} == {"vit_tiny_patch16_224 depth=2 patch_size=16"}


def test_the_advice_names_the_fastest_the_smallest_and_the_crossovers() -> None:
    rows = [row("softmax", 160, 10, 20, 1), row("nystrom", 160, 12, 25, 0.5), row("fnet", 160, 5, 30, 2)]
    rows += [row("softmax", 640, 100, 60, 1), row("nystrom", 640, 50, 40, 2), row("fnet", 640, 20, 50, 5)]
    rows += [dict(row("linformer", 640, 1, 1, 1), error="out of memory")]
    text = advise.advice(rows)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    # between 101 tokens (0.5) and 1,601 (2) the two cross in the middle of the logarithms, at 402
    assert "from 402 tokens (333 to 486)" in lines["nystrom"]
    assert "at all sizes (from 101 tokens)" in lines["fnet"]
    assert "At 640 px, 1,601 tokens: fastest is fnet, smallest nystrom." in text
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["fnet", "nystrom", "softmax"]
    even = advise.advice([row("softmax", 160, 10, 20, 1), row("fnet", 160, 9.8, 30, 1.02)])
    assert "At 160 px, 101 tokens: no mixer is measurably faster than softmax, smallest softmax." in even


def test_times_that_were_taken_in_turn_decide() -> None:
    slow = row("linformer", 640, 95, 30, 2.1)  # while the machine was half as fast
    text = advise.advice([row("softmax", 640, 100, 60, 1), slow, row("fnet", 640, 66, 30, 1.5)])
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["linformer", "fnet", "softmax"]
    assert "fastest is linformer, smallest" in text
    text = advise.advice([row("softmax", 640, 100, 60, 1), row("nystrom", 640, 52, 30, 1.9), slow])
    assert "fastest is linformer (nystrom as fast within the spread), smallest" in text
    few = row("fnet", 640, 20, 50, 5) | dict(difference="unknown")
    assert advise.advice([row("softmax", 640, 100, 60, 1), few]).splitlines()[1].endswith("50")


def test_what_could_not_be_measured_is_named() -> None:
    alone = dict(speedup=None, speedup_low=None, speedup_high=None, difference=None)
    small = [row("softmax", 160, 10, 20, 1), row("nystrom", 160, 12, 25, 0.5), row("fnet", 160, 5, 30, 2)]
    failed = dict(row("softmax", 640, 1, 1, 1), error="out of memory: 12 GiB")
    text = advise.advice([*small, failed, row("nystrom", 640, 50, 40, 2) | alone, row("fnet", 640, 20, 50, 5) | alone])
    assert "softmax, 640 px: failed: out of memory: 12 GiB" in text
    assert "At 640 px, 1,601 tokens: softmax could not be measured, fastest of the others is fnet, smallest" in text
    assert "no baseline" in text.splitlines()[1]
    text = advise.advice([*small, failed, dict(row("fnet", 640, 1, 1, 1), error="killed")])
    assert "nothing could be measured at 640 px; at 160 px, 101 tokens: fastest is fnet" in text
    few = dict(speedup_low=None, speedup_high=None, difference="unknown", rounds=2)
    text = advise.advice([row("softmax", 640, 100, 60, 1) | few, row("fnet", 640, 20, 50, 5) | few])
    assert "too few rounds to tell what is faster than softmax" in text and "5.00 (two rounds)" in text


@pytest.mark.parametrize("memory", [False, True])
def test_it_measures_here(memory, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(advise, "MIXERS", ["softmax", "fnet"])
    arguments = ["--img-size", "32", "--depth", "1", "--rounds", "3", "--seconds", "0", "--threads", "1"]
    arguments += ["--device", "cpu", "--out", str(tmp_path / "a.csv")] + ["--memory"] * memory
    monkeypatch.setattr(sys, "argv", ["timm-vix", "advise", *arguments])
    cli.main()
    out = capsys.readouterr().out
    assert "At 32 px, 5 tokens: " in out
    assert ("smallest" in out) is ("MiB" in out) is memory
    records, damaged = read_records(tmp_path / "a.csv", COLUMNS, exact=True)
    assert ([record["model"].split("_")[1] for record in records], damaged) == (["tiny", "fnet"], 0)
    assert all(record["latency_p50_ms"] > 0 and record["gflops"] > 0 for record in records)
    assert [record["peak_memory_mib"] is not None for record in records] == [memory] * 2


@pytest.mark.parametrize(
    "out, line",
    [([], "interrupted; nothing was kept: --out FILE keeps what is measured"),
     (["--out", "a.csv"], "interrupted; the same command continues")],
)  # fmt: skip
def test_ctrl_c_says_what_is_kept(out, line, tmp_path, monkeypatch, capsys) -> None:
    def stop(*arguments, **keywords) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(advise, "sweep", stop)
    monkeypatch.setattr(sys, "argv", ["timm-vix", "advise", "--img-size", "32", "--device", "cpu", *out])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--img-size", "100"], "error: img_size=100 is no multiple of patch_size=16"),
        (["--img-size", "64", "--device", "cuda:7"], "error: device='cuda:7' is not on this machine"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["timm-vix", "advise", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(words)
