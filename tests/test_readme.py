"""README.md and RESULTS.md say what was measured, and name what exists."""

import argparse
import ast
import csv
import functools
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import timm

import timm_vix
from timm_vix import cli
from timm_vix.conversion import feedforward
from timm_vix.mixers import MIXERS
from timm_vix.stems import hierarchical_mlp

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples" / "results"
README, MEASURED = ROOT / "README.md", RESULTS / "RESULTS.md"
DOCUMENTS = pytest.mark.parametrize("path", [README, MEASURED], ids=lambda path: path.name)
MARK = re.compile(r"<!-- table: ([^\n]+) -->\n")


@pytest.fixture
def tables():
    """examples/tables.py as a module."""
    return importlib.import_module("tables")


def blocks(language: str, path: Path = README) -> list[str]:
    """The code of a document in a language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def prose(path: Path) -> str:
    """What is written by hand, but for code, addresses and HTML comments."""
    text = re.sub(r"<!-- table: .*?<!-- end -->|```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv [\d.]+|<!--.*?-->", " ", text)


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


# Tables


@DOCUMENTS
def test_tables_are_those_of_the_results(tables, path):
    text = path.read_text(encoding="utf-8")
    assert MARK.search(text)
    assert tables.filled(text) == text


def test_every_table_stands_in_a_document(tables):
    names = [name for path in (README, MEASURED) for name in MARK.findall(path.read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(tables.TABLES)


def test_another_figure_is_noticed_and_mended(tables, tmp_path, monkeypatch, capsys):
    copies = [tmp_path / path.name for path in (README, MEASURED)]
    for copy, path in zip(copies, (README, MEASURED)):
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    right = copies[0].read_text(encoding="utf-8")
    wrong = re.sub(r"(\| `vix_nystrom_tiny` \| )0\.", r"\g<1>9.", right)
    assert wrong != right
    copies[0].write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(tables, "DOCUMENTS", copies)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1
    told = capsys.readouterr().err
    assert "README.md" in told and "RESULTS.md" not in told
    assert copies[0].read_text(encoding="utf-8") == wrong
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert tables.main() == 0
    assert copies[0].read_text(encoding="utf-8") == right


def test_an_unknown_mark_is_refused_and_no_text_is_lost(tables):
    with pytest.raises(ValueError, match="kost") as caught:
        tables.filled("<!-- table: kost -->\n<!-- end -->")
    assert "crossovers" in str(caught.value)
    empty = "<!-- table: parts -->\n<!-- end -->\nbetween\n<!-- table: plans -->\n<!-- end -->\n"
    assert "\nbetween\n" in tables.filled(empty)
    without_end = "<!-- table: parts -->\nbetween\n<!-- table: plans -->\n<!-- end -->\n"
    assert tables.filled(without_end).startswith("<!-- table: parts -->\nbetween\n")


def test_cells_are_the_rows_of_the_file(tables):
    """The README's table of costs, against the file read here."""
    with open(RESULTS / "cost_cpu.csv", encoding="utf-8") as file:
        ours = [r for r in csv.DictReader(file) if r["model"] == "vix_performer_tiny" and r["batch_size"] == "1"]
    # RESULTS.md has the rows of the other processor
    speeds = {(r["img_size"], r["mode"], r["dtype"]): r for r in ours if "amx_bf16" not in r["device_name"]}
    lines = README.read_text(encoding="utf-8").splitlines()
    cells = next(line for line in lines if line.startswith("| `vix_performer_tiny` |")).split(" | ")
    for cell, size in zip(cells[1:5], ("224", "384", "512", "1024")):
        for text, mode in zip(cell.split(" / "), ("infer", "train")):
            row = speeds[size, mode, "float32"]
            low, high = float(row["speedup_low"]), float(row["speedup_high"])
            assert (text == "same") == (low <= 1 <= high)
            assert text == "same" or float(text) == pytest.approx(float(row["speedup"]), abs=0.005)
    assert "2,048" not in "\n".join(lines)  # one round


def test_a_ratio_is_told_with_enough_rounds_only(tables):
    cost = importlib.import_module("result_tables.cost")
    row = dict(speedup="1.2345", speedup_low="1.1", speedup_high="1.3", rounds="3")
    assert cost.is_timed(row)
    assert cost.speed(row) == "1.23 (1.10 to 1.30)"
    assert cost.speed(dict(row, speedup_low="0.9")) == "same (0.90 to 1.30)"
    assert not cost.is_timed(dict(row, rounds="2"))
    assert cost.speed(dict(row, speedup_low="", speedup_high="")) == ""


def test_tables_of_a_layer_leave_out_what_was_not_measured(tables, monkeypatch):
    """A stopped benchmark lacks the last tokens of some mixers; a failed one has times without memory."""
    cost = importlib.import_module("result_tables.cost")
    facts = dict(dtype="float32", batch="2", device="cpu", threads="1", torch="2", timm="1", softmax_ms="7.0")
    facts |= dict(ratio="1.5", ratio_low="1.2", ratio_high="1.7", mode="train")
    rows = [
        dict(facts, mixer=mixer, tokens=str(tokens), peak_memory_mib=memory)
        for mixer, tokens, memory in [
            *(("softmax", 1025, "20.0"), ("softmax", 4097, "320.0")),
            *(("axial", 1025, "10.0"), ("nystrom", 1025, "30.0"), ("nystrom", 4097, "")),
        ]
    ]
    monkeypatch.setattr(cost, "read", lambda name: rows)
    ratio = "1.50 (1.20 to 1.70)"
    assert cost.layer_speed("train").splitlines()[2:5] == [
        *("| `softmax` | 7 ms | 7 ms |", f"| `axial` | {ratio} |  |", f"| `nystrom` | {ratio} | {ratio} |")
    ]
    assert cost.layer_memory().splitlines()[2:5] == [
        *("| `softmax` | 10 MiB | 160 MiB | 2.00 |", "| `axial` | 5 MiB |  |  |", "| `nystrom` | 15 MiB |  |  |")
    ]
    rows[1:2] = rows[4:] = []  # one number of tokens has no exponent
    assert cost.layer_memory().splitlines()[2] == "| `softmax` | 10 MiB |  |"


def test_a_step_that_could_not_be_measured_leaves_cells_empty(tables, monkeypatch):
    training = importlib.import_module("result_tables.training")
    steps = dict(peak_memory_mib="", step_ms="", faster_than_all="")
    row = dict(model="vit train_only=mlp", top1="50.0", trained="1500000", **steps)
    monkeypatch.setattr(training, "read", lambda name: [row] if "cifar10" in name else [])
    assert training.parts().splitlines()[2] == "| mlp | CIFAR-10 | 50.0 | 1.50 |  |  |  |"


def test_crossovers_are_interpolated_on_logarithmic_axes(tables):
    cost = importlib.import_module("result_tables.cost")
    spread = dict(speedup_low="0.5", speedup_high="0.5", rounds="5")
    slow = dict(spread, tokens="100", speedup="0.5")
    fast = dict(slow, tokens="10000", speedup="2.0", speedup_low="2.0", speedup_high="2.0")
    cells = {cost.Key("m", True, 1, "infer"): slow, cost.Key("m", True, 2, "infer"): fast}
    assert cost.crossing(cells, "m", "infer", spread=False) == "1,000"
    assert cost.crossing(cells, "m", "infer") == "1,000 (1,000 to 1,000)"
    assert cost.crossing({cost.Key("m", True, 1, "infer"): slow}, "m", "infer") == "not up to 100"
    assert cost.crossing({cost.Key("m", True, 2, "infer"): fast}, "m", "infer") == "below 10,000"


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "softmax"])
def test_docstrings_say_what_was_measured(tables, mixer):
    cost = importlib.import_module("result_tables.cost")
    assert cost.speed_in_a_model(mixer) in " ".join(sys.modules[MIXERS[mixer].__module__].__doc__.split())


def test_the_docstring_of_a_stem_says_what_it_adds(tables):
    mechanisms = importlib.import_module("result_tables.mechanisms")
    assert mechanisms.operations_of_a_stem() in " ".join(hierarchical_mlp.__doc__.split())


def test_the_docstring_of_structured_mlps_says_what_was_measured(tables):
    norms = importlib.import_module("result_tables.norms")
    said = " ".join(feedforward.__doc__.split())
    kept = {(row["kind"], float(row["share"])): row["top1"] for row in norms.read("structured_mlp.csv")}
    low = [kept["low_rank", share] for share in (0.84, 0.63, 0.5)]
    assert f"low rank keeps {low[0]}, {low[1]} and {low[2]} with 84, 63 and 50 % of the weights" in said
    assert f"two blocks (63 %) keep {kept['block', 0.63]} " in said


def test_the_sentences_of_docstrings_are_printed(tables, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--docstrings"])
    assert tables.main() == 0
    printed = capsys.readouterr().out
    assert all(f"{mixer}\n*Speed:*" in printed for mixer in MIXERS if mixer != "softmax")


# Prose


@DOCUMENTS
def test_no_measured_figure_is_written_by_hand(path):
    unit = r"(?:%|times|points?|percent|[MGk]i?B|ms|s|seconds|minutes|hours|GFLOPs)"
    assert re.findall(rf"\d[\d.,]*[ -]{unit}(?![\w-])|\d+\.\d+", prose(path)) == []


def test_the_advice_holds(tables):
    cost = importlib.import_module("result_tables.cost")
    cells = cost.models("tiny")

    def value(mixer: str, size: int, mode: str, column: str) -> float:
        name = "vit_tiny_patch16_224" if mixer == "softmax" else f"vix_{mixer}_tiny"
        return float(cells[cost.Key(name, True, size, mode)][column])

    attention = [name for name in MIXERS if name != "softmax" and MIXERS[name].candidates]
    # few tokens: stay with softmax
    assert all(value(mixer, 224, "infer", "speedup_low") < 1 for mixer in attention)
    # many tokens: Linformer for speed, Nyström for accuracy
    for size in (512, 1024):
        for mode in ("infer", "train"):
            speeds = {mixer: value(mixer, size, mode, "speedup") for mixer in attention}
            assert max(speeds, key=speeds.get) == "linformer"
            assert speeds["nystrom"] > 1
    conversion = importlib.import_module("result_tables.conversion")
    rows = conversion.read_conversions()
    for size in ("224", "448"):
        kept = {m: conversion.find(rows, f"{m}, 4x4 windows", "none", size)["top1"] for m in ("nystrom", "linformer")}
        assert float(kept["nystrom"]) > float(kept["linformer"])
    # a transfer at that size restores most of what is lost
    nystrom = [conversion.find(rows, "nystrom, 4x4 windows", training, "448") for training in ("none", "transfer")]
    before, after = (float(row["relative"]) for row in nystrom)
    assert after - before > (100 - before) / 2
    large = {row["model"]: row for row in rows if row["img_size"] == "1024"}
    top1 = {name: float(row["top1"]) for name, row in large.items()}
    scaled, moved = top1["softmax, scaled logits"], top1.pop("axial, scaled logits, transferred at 448 px")
    assert top1["softmax"] < 100 / 3 and moved > max(top1.values())
    for name in ("softmax, merged to 15 %, scaled logits", "axial, scaled logits"):
        assert scaled - top1[name] < 4 and 1.8 < float(large[name]["faster_than_softmax"]) < 3
    # memory: softmax is linear in the number of tokens, too
    used = {mixer: value(mixer, 1024, "train", "peak_memory_mib") for mixer in ("softmax", *attention)}
    assert min(used.values()) > 0.75 * used["softmax"]
    assert {mixer for mixer in attention if used[mixer] < 0.95 * used["softmax"]} == {"nystrom", "linformer"}


def test_what_is_said_of_the_tables_holds(tables):
    training = importlib.import_module("result_tables.training")
    gains = {line.split(" | ")[0][2:]: line for line in training.compared(1).splitlines()[2:]}
    for change in ("convolutional stem", "rotary positions, softmax, Performer, Nyström"):
        assert "-" not in gains[change]
    long = [row for row in training.read("reproduce_vix.csv") if training.is_long(row)]
    score = {(row["system"], row["patch_size"]): float(row["top1"]) for row in long}
    assert max(score, key=score.get) == ("hybrid_pin_cifar", "2")
    assert 2.5 < score["hybrid_pin_cifar", "2"] - score["hybrid_pin_cifar", "4"] < 3
    curves = [row for row in training.read("reproduce_vix_curves.csv") if training.is_long(row)]
    levip = [
        [float(row["held_out_top1"]) for row in curves if (row["system"], row["patch_size"]) == ("levip_cifar", side)]
        for side in ("2", "4")
    ]
    assert len(levip[0]) == len(levip[1]) == 20 and all(fine - coarse < 0.5 for fine, coarse in zip(*levip))
    assert 0.5 < score["levip_cifar", "4"] - score["levip_cifar", "2"] < 1.5
    top1 = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in training.caltech101().splitlines()[2:9]}
    for column in (0, 2):  # all images, and a part of them
        names = ("deit_tiny_patch16_224.fb_in1k", "vix_nystrom_tiny.deit_fb_in1k", "vix_linformer_tiny.deit_fb_in1k")
        softmax, nystrom, linformer = (float(top1[f"`{name}`"][column]) for name in names)
        assert softmax > nystrom > linformer
    parts = [line.strip("| ").split(" | ") for line in training.parts().splitlines()[2:8]]
    score = {(row[0], row[1]): float(row[2]) for row in parts}
    assert score["attention", "CIFAR-10"] > score["all", "CIFAR-10"]
    assert score["attention", "Caltech-101"] < score["all", "Caltech-101"]
    rows = tables.conversion.read("segment_camvid.csv")
    camvid, lost = {}, {}
    for budget, model in ("2 epochs", "deit_tiny_patch16_224"), ("1 epoch", "vit_small_patch14_dinov2"):
        mine = [row for row in rows if (row["budget"], row["model"]) == (budget, model)]
        faster = {row["mixer"]: float(row["faster_training"]) for row in mine}
        miou = {row["mixer"]: float(row["miou"]) for row in mine}
        camvid[model], lost[model] = faster, {mixer: miou["softmax"] - value for mixer, value in miou.items()}
    tiny = lost["deit_tiny_patch16_224"]
    assert tiny["axial"] < 0.5 and tiny["axial"] < tiny["nystrom"] < 2 < tiny["linformer"]
    assert all(camvid["deit_tiny_patch16_224"][mixer] > 2 for mixer in ("axial", "nystrom", "linformer"))
    small, faster = lost["vit_small_patch14_dinov2"], camvid["vit_small_patch14_dinov2"]
    assert abs(small["axial"]) < 0.2 and faster["axial"] < 1.2 and 0 < small["merged"] < 1
    assert max(faster, key=faster.get) == "merged"
    rows = [row for row in tables.conversion.read("finer_caltech101.csv") if row["top1"] and row["patch_size"] == "8"]
    finer = {budget: {} for budget in ("epochs", "minutes")}
    for row in rows:
        finer[row["budget"]][row["mixer"] + " merged" * bool(row["keywords"].startswith("merge"))] = float(row["top1"])
    order = ["softmax merged", "softmax", "axial", "nystrom", "linformer", "performer"]
    assert sorted(finer["epochs"], key=finer["epochs"].get, reverse=True) == order
    assert max(finer["minutes"], key=finer["minutes"].get) == "softmax merged"
    behind = {mixer for mixer, top1 in finer["minutes"].items() if top1 < finer["minutes"]["softmax"]}
    assert behind == {"performer"}
    fine = [row for row in tables.conversion.read("finer_caltech101.csv") if row["top1"] and row["patch_size"] == "4"]
    assert len(fine) == len(order) and all(float(row["top1"]) < 5 for row in fine)
    rows = tables.conversion.read("deploy.csv")
    lost = {(row["model"], row["dtype"], row["format"]): float(row["eager_top1"]) - float(row["top1"]) for row in rows}
    above = {key: points for key, points in lost.items() if key[1] == "int8" and points > 1}
    assert list(above) == [("nystrom, 4x4 windows", "int8", "openvino")] and max(above.values()) < 1.2
    half = [model for model, dtype, _ in lost if dtype == "bfloat16"]
    assert half == ["softmax", "softmax, merged to 30 %", "axial", "linformer, 4x4 windows"]
    alone, together = ({key: float(row[column]) for key, row in zip(lost, rows)} for column in ("ms_1", "ms_8"))
    fastest = min((key for key in lost if key[0] == "softmax"), key=together.get)
    assert min(alone, key=alone.get)[0] == "softmax"
    assert {key[:2] for key in lost if together[key] < together[fastest]} == {
        ("linformer, 4x4 windows", "bfloat16"),
        ("softmax, merged to 30 %", "bfloat16"),
        ("softmax, merged to 30 %", "int8"),
    }


# Commands, code, names and links


class ParsedError(Exception):
    """Raised where a program would begin, after its arguments were taken."""


def parse(monkeypatch, words: list[str]) -> None:
    """Give a command line to the program's own parser, and stop there."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words)
    program = cli.main
    if words[0] != "timm-vix":
        program = functools.partial(runpy.run_path, str(ROOT / words[0]), run_name="__main__")
    with pytest.raises(ParsedError):
        program()


def command_lines() -> list[list[str]]:
    """The words of every command in the README."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split(" #")[0].split("&&") if part.strip()]


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_commands_take_their_options(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "validate.py").touch()
    program, *rest = words
    if program == "timm-vix":
        parse(monkeypatch, words)
    elif program == "python" and rest[0].startswith("examples/"):
        parse(monkeypatch, rest)
    elif program == "pip":
        extras = re.search(r"\[(.*)\]", rest[-1])[1].split(",")
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
    else:  # timm's script, which is not ours to parse, and pytest
        assert words == ["pytest"] or words[:2] == ["python", "train.py"]


def test_a_wrong_option_is_noticed(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, ["timm-vix", "advise", "--img-sizes-of-all", "224"])
    assert "--img-size" in capsys.readouterr().err


def test_the_marked_commands_are_whole_blocks():
    """.ci/run takes the block after each mark as one command."""
    text = README.read_text(encoding="utf-8")
    for mark, last in (("main job", "python examples/finetune.py"), ("tests", "pytest")):
        block = text.split(f"<!-- ci: {mark} -->\n```bash\n")[1].split("```")[0]
        assert block.startswith("pip install") and block.endswith(f"&& {last}\n") and block.count("\n") == 1


@pytest.mark.parametrize("code", blocks("python"))
def test_code_names_what_exists(code):
    for node in ast.walk(compile(code, "README.md", "exec", ast.PyCF_ONLY_AST)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("timm.", "timm_vix.")):
            assert eval(ast.unparse(node), dict(timm=timm, timm_vix=timm_vix)) is not None
        elif isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"timm", "timm_vix"}
        elif isinstance(node, ast.ImportFrom):
            assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)


def test_the_public_names_are_those_of_the_package():
    section = README.read_text(encoding="utf-8").split("## Python API")[1].split("\n## ")[0]
    calls = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    names = [name for call in calls for name in re.findall(r"`(\w+)\(", call)]
    assert names and all(callable(getattr(timm_vix, name)) for name in names)
    assert set(names) == {name for name in timm_vix.__all__ if name != "models"}


def expand(pattern: str) -> list[str]:
    """Registered names that a pattern of the README stands for, one entry for each choice in braces."""
    choice = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if choice:
        return [name for part in choice[1].split(",") for name in expand(pattern.replace(choice[0], part, 1))]
    return [re.sub(r"\{\w+\}", "*", pattern)]


def test_model_names_are_registered():
    families = r"(?:vix|hybrid|cct|ccn|ccp|cvt|cvn|cvp|levin|levip|pin|pip|fnet2d|vit|deit)_"
    found = re.findall(rf"(?<![\w/]){families}[\w*{{}},]+", README.read_text(encoding="utf-8"))
    found += re.findall(r"--model (\S+)", README.read_text(encoding="utf-8"))
    patterns = {name for pattern in found for name in expand(pattern.rstrip(","))}
    assert len(patterns) > 30
    assert [pattern for pattern in sorted(patterns) if not timm.list_models(pattern)] == []


@pytest.mark.parametrize("path", [README, MEASURED, RESULTS / "README.md"], ids=["README", "RESULTS", "commands"])
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", text)
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors
        elif not link.startswith("https://"):
            assert (path.parent / link.partition("#")[0]).exists(), link


def test_the_contents_list_every_section():
    sections = re.findall(r"^## (.+)$", MEASURED.read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"^- \[(.+)\]\(#", MEASURED.read_text(encoding="utf-8"), re.MULTILINE) == sections


def test_a_figure_of_costs_has_one_row_for_each_point(tables, monkeypatch):
    """And none of another processor beside it."""
    figures, drawn = tables.figures, []
    monkeypatch.setattr(figures, "over_tokens", lambda rows, column: (drawn.append(rows), None))
    assert len(list(figures.costs())) == len(drawn) == 2
    for rows in drawn:
        points = [(row["model"], row["attention"], row["img_size"]) for row in rows]
        assert len(points) == len(set(points)) > 20
