"""The report: figures of known curves, tables with damaged lines, and the page in a real browser."""

import csv
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from timm_vix import cli
from timm_vix._figures import png
from timm_vix._records import earlier_records
from timm_vix.benchmark import compare, cost
from timm_vix.benchmark.answer import answer, fastest, mean_top1, speedups
from timm_vix.benchmark.figures import legend, over_tokens, png_of_page, series_of, trade_off
from timm_vix.benchmark.report import COST_COLUMNS, report
from timm_vix.measure.statistics import crossing, crossover, crossover_text, exponent, pareto, verdict

pytest.importorskip("matplotlib", reason="figures need matplotlib")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SIZES = (224, 512, 1024, 2048)


def cost_row(model: str, side: int, ms: float, speedup: float, **other) -> dict:
    row = dict.fromkeys(cost.COLUMNS)
    row |= dict(model=model, attention="fused", img_size=side, tokens=(side // 16) ** 2 + 1, batch_size=1, mode="infer")
    row |= dict(dtype="float32", compile="off", params_m=5.7, gflops=2.5, latency_p50_ms=ms, latency_p90_ms=1.1 * ms)
    row |= dict(images_per_s=1000 / ms, peak_memory_mib=30.0 + side, speedup=speedup, speedup_low=0.9 * speedup)
    row |= dict(
        speedup_high=1.1 * speedup,
        difference=verdict(9, 0.9 * speedup, 1.1 * speedup),
        rounds=9,
        baseline="vit_tiny_patch16_224",
        device="cpu",
    )
    row |= dict(device_name="a <processor>", threads=2, torch="2", timm="1", timm_vix="0", baseline_p50_ms=ms * speedup)
    return row | other


def costs() -> list[dict]:
    """Softmax with time N^2 / 1e4, another model with 0.1 N: they cross at 1,000 tokens."""
    rows = []
    for side in SIZES:
        n = (side // 16) ** 2 + 1
        rows += [cost_row("vit_tiny_patch16_224", side, n * n / 1e4, 1.0), cost_row("vix_x", side, n / 10, n / 1000)]
    return rows


def runs() -> list[dict]:
    rows = []
    for model, ms, top1 in (("vit", 10.0, 80.0), ("vix_<x>", 5.0, 75.0), ("bad", 12.0, 70.0)):
        for seed in (0, 1):
            row = dict.fromkeys(compare.COLUMNS)
            row |= dict(
                model=model, start="scratch", seed=seed, dataset="photos (3 classes)", top1=top1 + seed, top5=90.0
            )
            row |= dict(latency_p50_ms=ms, params_m=5.0, gflops=2.0, peak_memory_train_mib=100.0 + ms, epochs=3)
            row |= dict(
                recipe="lr=0.1", img_size=224, batch_size=32, device="cpu", threads=2, train_s_per_epoch=5.0 + seed
            )
            rows.append(row)
    return rows


def write(path: Path, columns, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(columns), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path


def cells_of(page: Path) -> list[list[str]]:
    """The rows of all tables of a page, as they are read."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.read_text(encoding="utf-8"), re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)] for row in rows]


@pytest.fixture
def tables(tmp_path) -> list[Path]:
    failed = dict(cost_row("huge", 224, 1.0, 1.0), latency_p50_ms=None, error="out of memory: <all>")
    path = write(tmp_path / "cost.csv", cost.COLUMNS, [*costs(), failed])
    path.write_text(path.read_text() + "cut,off\nvit,\x00\n")
    return [path, write(tmp_path / "compare.csv", compare.COLUMNS, runs())]


# --- curves


def test_exponents_are_those_of_the_curves() -> None:
    tokens = [197, 785, 3137, 12545]
    assert exponent(tokens, [n**2 for n in tokens]) == pytest.approx(2)
    # what doesn't depend on the tokens dominates below, and isn't fitted
    assert exponent(tokens, [max(n, 1000) for n in tokens]) == pytest.approx(1)
    assert exponent([197], [1]) is None


def test_a_crossover_is_where_the_curves_cross() -> None:
    tokens = [100, 1000, 10000]
    ratios = [(n / 2000) ** 0.7 for n in tokens]
    assert crossing(tokens, ratios) == pytest.approx(2000)
    found = crossover(tokens[::-1], ratios[::-1], [r / 1.1 for r in ratios[::-1]], [r * 1.1 for r in ratios[::-1]])
    assert found == pytest.approx((2000, 2000 / 1.1 ** (1 / 0.7), 2000 * 1.1 ** (1 / 0.7)))
    assert crossover_text(tokens, found) == "from 2,000 tokens (1,745 to 2,292)"
    assert crossing(tokens, [0.5, 2, 0.9]) is None
    assert crossing(tokens, [2, 0.5, 2]) == pytest.approx(10**3.5)
    assert crossover_text(tokens, (None, 9000.0, None)) == "not up to 10,000 tokens"
    assert crossover_text(tokens, (100.0, 100.0, 100.0)) == "at all sizes (from 100 tokens)"
    assert crossover_text(tokens, (100.0, 100.0, 500.0)) == "from 100 or fewer tokens (below 100 to 500)"
    assert crossover_text(tokens, (200.0, 150.0, None)) == "from 200 tokens (150 to above 10,000)"


def test_the_front_is_what_no_other_point_beats() -> None:
    assert pareto([3, 1, 2, 2, 4], [9, 5, 4, 7, 9]) == [1, 3, 0]


def test_the_figure_of_cost_has_exponents_and_crossovers() -> None:
    _, lines = over_tokens(costs(), "latency_p50_ms")
    assert [line["model"] for line in lines] == ["vit_tiny_patch16_224", "vix_x"]
    assert [float(line["exponent"]) for line in lines] == [2.0, 1.0]
    assert lines[0]["crossover"] == ""
    assert lines[1]["crossover"] == "from 1,000 tokens (909 to 1,111)"


def test_the_figure_of_accuracy_draws_the_front() -> None:
    groups = [runs()[:2], runs()[2:4], runs()[4:]]
    axes = trade_off(groups, "latency_p50_ms").axes[0]
    front = next(line for line in axes.lines if line.get_label() == "Pareto front")
    assert [list(xy) for xy in front.get_xydata()] == [[5.0, 75.5], [10.0, 80.5]]
    markers = {line.get_marker() for line in axes.lines if line.get_marker() not in ("None", "_")}
    assert len(markers) == 3
    assert trade_off([[dict(runs()[0], gflops=None)]], "gflops") is None


def test_a_cost_that_one_seed_lacks_is_that_of_the_others() -> None:
    first, second = runs()[:2]
    axes = trade_off([[dict(first, latency_p50_ms=None), dict(second, latency_p50_ms=8.0)]], "latency_p50_ms").axes[0]
    front = next(line for line in axes.lines if line.get_label() == "Pareto front")
    assert [list(xy) for xy in front.get_xydata()] == [[8.0, 80.5]]


def test_a_name_with_a_tag_has_the_accuracy_of_its_model() -> None:
    rows = [cost_row("vit.augreg", 224, 10.0, 1.0), cost_row("vix_x", 224, 5.0, 2.0)]
    head, body = speedups(rows, [runs()[:2]])
    assert head[-1] == "top-1 (%)" and [cells[-1].text for cells in body] == ["80.5", ""]


def test_folders_have_the_accuracy_of_their_own_models() -> None:
    names = ["local-dir:./first run/hub", "local-dir:./second run/hub", "hf-hub:me/vit.a", "hf-hub:me/vit.b depth=2"]
    trained = [[dict(runs()[0], model=name, top1=80.0 + number)] for number, name in enumerate(names)]
    assert mean_top1(trained) == dict(zip(names, (80.0, 81.0, 82.0, 83.0)))
    _, body = speedups([cost_row(name, 224, 5.0, 2.0) for name in names], trained)
    assert [cells[-1].text for cells in body] == ["80.0", "81.0", "82.0", "83.0"]


def test_rows_measured_under_other_load_are_drawn_by_their_speedups() -> None:
    rows = costs()
    for row in rows[1::2]:  # everything took three times as long while this model was measured
        row |= dict(latency_p50_ms=3 * row["latency_p50_ms"], baseline_p50_ms=3 * row["baseline_p50_ms"])
    softmax, other = over_tokens(rows, "latency_p50_ms")[0].axes[0].lines[:2]
    for (tokens, ms), (_, softmax_ms) in zip(other.get_xydata(), softmax.get_xydata(), strict=True):
        assert softmax_ms / ms == pytest.approx(tokens / 1000)
    for row in rows:
        row |= dict(speedup=None, speedup_low=None, speedup_high=None)
    assert over_tokens(rows, "latency_p50_ms")[0].axes[0].lines[1].get_ydata()[0] == rows[1]["latency_p50_ms"]


def test_axes_have_plain_numbers_and_the_legend_hides_no_point() -> None:
    figure = trade_off([runs()[:2], [dict(row, latency_p50_ms=0.6) for row in runs()[2:4]]], "latency_p50_ms")
    png(figure)
    axes = figure.axes[0]
    texts = [tick.get_text() for tick in axes.get_xticklabels(which="both")]
    assert "0.6" in texts and not [text for text in texts if "e" in text]
    assert not figure.legends[0].get_window_extent().overlaps(axes.get_window_extent())


def test_figures_of_a_group_share_one_legend() -> None:
    rows = costs()
    other = [dict(row, model="vix_y") for row in rows[1::2]]
    # no memory was measured of the second model: the third keeps its look
    drawn, _ = over_tokens([*(dict(row, peak_memory_mib=None) for row in rows), *other], "peak_memory_mib")
    entries = {entry["name"]: entry for entry in legend(series_of([*rows, *other]))}
    assert list(entries) == ["vit_tiny_patch16_224", "vix_x", "vix_y"]
    (line,) = drawn.axes[0].lines
    assert line.get_color() == entries["vix_y"]["color"] != entries["vix_x"]["color"]
    corners = [tuple(map(float, corner.split(","))) for corner in entries["vix_x"]["points"].split()]
    assert set(corners) == {(x, y) for x in (-0.5, 0.5) for y in (-0.5, 0.5)}  # the marker is a square

    groups = [[dict(runs()[0], gflops=None)], runs()[2:4]]
    axes = trade_off(groups, "gflops").axes[0]
    assert axes.lines[0].get_color() == legend(["vit (scratch)", "vix_<x> (scratch)"])[1]["color"]


def test_the_image_in_the_page_has_no_legend_and_larger_text() -> None:
    figure, _ = over_tokens(costs(), "speedup")
    with Image.open(io.BytesIO(png(figure))) as image:
        share = image.width / 7.5 / 110
    assert figure.legends and share == pytest.approx(1, abs=0.01)
    with Image.open(io.BytesIO(png_of_page(figure))) as image:
        assert image.width == 960  # 4.8 inches: text of 10 points is 11 px high where the image is 370 px wide
    assert not figure.legends


def test_a_dollar_sign_in_a_name_is_no_formula() -> None:
    rows = [dict(row, model="a$_b" if row["model"] == "vix_x" else row["model"]) for row in costs()]
    figure, _ = over_tokens(rows, "speedup")
    assert png(figure)
    assert png(trade_off([[dict(row, model="$^$_") for row in runs()[:2]]], "gflops"))


def test_a_figure_is_the_same_file_again() -> None:
    assert png(over_tokens(costs(), "latency_p50_ms")[0]) == png(over_tokens(costs(), "latency_p50_ms")[0])


# --- the answer


def accuracies(**top1: float) -> list[list[dict]]:
    return [[dict(runs()[0], model=model, top1=value)] for model, value in top1.items()]


def test_the_fastest_of_a_size_is_softmax_where_no_difference_was_found() -> None:
    # vix_x has 0.2, 1.03, 4.1 and 16.4 times softmax's speed; 1.03 has a spread around 1
    assert fastest(costs()) == {
        224: "vit_tiny_patch16_224",
        512: "vit_tiny_patch16_224",
        1024: "vix_x",
        2048: "vix_x",
    }
    quick = [dict(row, model="vix_y", speedup=2 * row["speedup"]) for row in costs()[5::2]]
    unfused = [dict(row, attention="unfused", speedup=99.0) for row in costs()[::2]]
    assert fastest([*costs(), *quick, *unfused])[1024] == "vix_y"
    assert fastest([*costs(), *quick, *unfused], allowed=["vix_x"])[1024] == "vix_x"
    assert fastest([dict(row, speedup=None) for row in costs()]) == {}


def test_the_answer_says_what_to_use_at_which_size() -> None:
    assert answer(costs(), []) == (
        "Use vit_tiny_patch16_224 (softmax attention) at 224 and 512 px and vix_x at 1,024 and 2,048 px, "
        "the fastest here."
    )
    slow = [dict(row, speedup=0.5, difference="slower") for row in costs()]
    assert answer(slow, []) == "Use vit_tiny_patch16_224 (softmax attention) at 224 to 2,048 px, the fastest here."


def test_a_size_that_was_not_measured_is_not_recommended() -> None:
    rows = [row for row in costs() if row["model"] != "vix_x" or row["img_size"] != 512]
    trained = accuracies(vit_tiny_patch16_224=60.0, vix_x=75.0)
    assert answer(rows, trained).startswith("Use vix_x at 224 px and vix_x at 1,024 and 2,048 px: the fastest")


def test_accuracy_limits_the_answer() -> None:
    rows = [*costs(), *(dict(row, model="vix_y", speedup=2 * row["speedup"]) for row in costs()[5::2])]
    sizes = "vit_tiny_patch16_224 (softmax attention) at 224 and 512 px and {} at 1,024 and 2,048 px"
    unknown = "; the accuracy of vit_tiny_patch16_224 isn't known, but no other is faster there"
    trained = accuracies(**{"deit.fb_in1k": 80.0, "vix_x.deit_fb_in1k": 75.0, "vix_y": 74.9})
    assert mean_top1(trained) == {"deit": 80.0, "vix_x": 75.0, "vix_y": 74.9}
    assert answer(rows, trained) == (
        f"Use {sizes.format('vix_x')}: the fastest of the models that lose at most 5 points of top-1 to the best, "
        f"deit.fb_in1k with 80.0 % on photos at 224 px{unknown}; without regard to accuracy, {sizes.format('vix_y')} "
        "would be faster."
    )
    trained = accuracies(deit=80.0, vix_y=79.0)
    assert answer(rows, trained) == (
        f"Use {sizes.format('vix_y')}: the fastest of the models that lose at most 5 points of top-1 to the best, "
        f"deit with 80.0 % on photos at 224 px{unknown}."
    )


def test_a_baseline_that_loses_too_much_is_not_recommended() -> None:
    best = "the best, vix_x with 75.0 % on photos at 224 px"
    trained = accuracies(vit_tiny_patch16_224=70.0, vix_x=75.0)
    assert answer(costs(), trained).startswith("Use vit_tiny_patch16_224 (softmax attention) at 224 ")
    trained = accuracies(vit_tiny_patch16_224=60.0, vix_x=75.0)  # slower at 224 px, and still the one to use
    assert answer(costs(), trained) == (
        f"Use vix_x at 224 to 2,048 px: the fastest of the models that lose at most 5 points of top-1 to {best}; "
        "without regard to accuracy, vit_tiny_patch16_224 (softmax attention) at 224 and 512 px and vix_x at 1,024 and "
        "2,048 px would be faster."
    )
    trained = accuracies(vit_tiny_patch16_224=60.0, other=75.0)
    assert answer(costs(), trained) == (
        "None of the models that were timed here is known to lose at most 5 points of top-1 to the best, other with "
        "75.0 % on photos at 224 px."
    )


def test_the_answer_without_a_model_in_both_tables() -> None:
    best = "he most accurate of 2 models trained on photos at 224 px is a with 80.0 % top-1."
    trained = accuracies(a=80.0, b=20.0)
    assert answer([], trained) == f"T{best}"
    assert answer(costs(), trained).endswith(f"px, the fastest here; t{best}")
    assert "none is recommended" in answer([dict(row, speedup=None) for row in costs()], [])


# --- the page


def test_the_page_stands_alone_and_counts_what_it_leaves_out(tables, tmp_path) -> None:
    page, *images = report(tables, tmp_path / "out" / "report.html")
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=['\"](?!data:)", text)
    assert "http" not in text
    assert "out of memory: &lt;all&gt;" in text and "vix_&lt;x&gt;" in text
    cells = cells_of(page)
    assert ["cost.csv", "cost", "8", "1", "2"] in cells
    assert ["compare.csv", "comparison", "6", "0", "0"] in cells
    assert text.index('class="answer"') < text.index("<figure>") < text.index("What was measured on what")
    lead, others = text[: text.index("What was measured on what")], text[text.index("What was measured on what") :]
    assert lead.count("<figure>") == 1 and "Dashed: the Pareto front" in lead
    assert others.count("<figure>") == 6 and text.count('<ul class="legend">') == 3  # of the answer and two groups
    assert ["vix_x", "0.20", "1.02", "4.10", "16.4", ""] in cells
    trend = next(row for row in cells if row[:2] == ["vix_x", "1.00"])
    assert trend[-1] == "from 1,000 tokens (909 to 1,111)"
    assert next(row[-2:] for row in cells if row[:1] == ["vix_x"] and len(row) > 20) == [f"{1000 / 19.7}", "1"]
    assert "multiply-add as two" in html.unescape(text)
    assert len(images) == 7
    for path in images:
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 300


def test_the_time_of_an_epoch_has_its_number_of_images_and_the_last_one_counts(tmp_path) -> None:
    rows = [row | dict(epoch_images=1000, epoch_s=12.5) for row in costs()]
    again = [row | dict(epoch_images=4000, epoch_s=50.0) for row in rows[1:]]
    page, *_ = report([write(tmp_path / "cost.csv", cost.COLUMNS, [*rows, *again])], tmp_path / "report.html")
    found = [row for row in cells_of(page) if len(row) > 20]
    start = COST_COLUMNS.index("epoch_images")
    assert COST_COLUMNS[start : start + 2] == ("epoch_images", "epoch_s") and len(found) == len(rows)
    assert [row[start : start + 2] for row in found] == [["1000", "12.5"], *[["4000", "50.0"]] * (len(rows) - 1)]


def test_what_a_table_says_is_text_and_no_markup(tmp_path) -> None:
    evil = "\"'><img src=x onerror=alert(1)>"
    words = {name: f"{name}{evil}" for name, kind in cost.COLUMNS.items() if kind is str and name != "error"}
    kept = dict(attention="fused", mode="infer", difference="none")
    failed = dict(cost_row("huge", 224, 1.0, 1.0), latency_p50_ms=None, error=evil)
    rows = [row | words | kept | {"model": row["model"] + evil} for row in costs()]
    trained = [row | {name: f"{row[name]}{evil}" for name in ("model", "start", "dataset", "recipe")} for row in runs()]
    paths = [
        write(tmp_path / "cost.csv", cost.COLUMNS, [*rows, failed]),
        write(tmp_path / f"{evil.replace('/', '')}.csv", compare.COLUMNS, trained),
    ]
    page, *_ = report(paths, tmp_path / "report.html")
    elements: list[tuple[str, dict]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: elements.append((tag, dict(attributes)))  # type: ignore[method-assign]
    parser.feed(page.read_text(encoding="utf-8"))
    assert len([tag for tag, _ in elements if tag == "img"]) == 7
    assert len([tag for tag, _ in elements if tag == "script"]) == 1
    assert not [attributes for _, attributes in elements if "onerror" in attributes]
    assert len([attributes for tag, attributes in elements if tag == "img" and evil in attributes["alt"]]) == 7


def test_each_machine_has_its_figures_and_a_table_given_twice_counts_once(tmp_path) -> None:
    paths = [
        write(tmp_path / f"{name}.csv", cost.COLUMNS, [dict(row, device_name=name) for row in costs()])
        for name in ("first", "second")
    ]
    again = write(tmp_path / "again.csv", cost.COLUMNS, [dict(row, device_name="first", gflops=9.5) for row in costs()])
    paths += [again, write(tmp_path / "compare.csv", compare.COLUMNS, runs())]
    page, *images = report([*paths, paths[-1]], tmp_path / "report.html")
    assert len([image for image in images if "first" in image.name]) == 3
    assert len([image for image in images if "second" in image.name]) == 3
    cells = cells_of(page)
    assert sorted(row[9] for row in cells if len(row) > 20) == ["2.5"] * 8 + ["9.5"] * 8
    assert next(row for row in cells if row[:2] == ["bad", "scratch"])[2] == "2"  # seeds


def test_each_recipe_and_machine_of_a_comparison_has_its_figures(tmp_path) -> None:
    others = [
        *[dict(row, recipe="lr=0.2", top1=50.0) for row in runs()],
        *[dict(row, device="cuda", device_name="a card", latency_p50_ms=0.5, top1=60.0) for row in runs()],
    ]
    page, *images = report(
        [write(tmp_path / "compare.csv", compare.COLUMNS, [*runs(), *others])], tmp_path / "report.html"
    )
    assert len(images) == len(set(images)) == 3 * 4
    cells = cells_of(page)
    assert [row[2:4] for row in cells if row[:1] == ["vit"]] == [["2", "80.5 ± 0.71"], ["2", "50"], ["2", "60"]]
    assert "Recipe: lr=0.1" in page.read_text() and "Recipe: lr=0.2" in page.read_text()
    assert "cuda (a card), threads: 2" in page.read_text()


def test_a_failure_is_shown_with_its_setting_and_not_after_another_attempt(tmp_path) -> None:
    failed = dict(cost_row("vit", 2048, 1.0, 1.0), latency_p50_ms=None, error="out of memory", mode="train")
    unfused = dict(failed, attention="unfused")
    run = dict(runs()[0], top1=None, threads=None, error="killed")
    tables = [
        write(
            tmp_path / "cost.csv", cost.COLUMNS, [failed, unfused, dict(cost_row("vit", 2048, 9.0, 1.0), mode="train")]
        ),
        write(tmp_path / "compare.csv", compare.COLUMNS, [run, dict(run, seed=7), runs()[0]]),
    ]
    page, *_ = report(tables, tmp_path / "report.html")
    assert re.findall(r'<li class="failure">(.*?)</li>', page.read_text()) == [
        "vit, unfused, 2048 px, batch 1, train, float32: failed: out of memory",
        "vit, seed 7, from scratch: killed",
    ]


def test_a_run_without_a_data_set_is_a_damaged_line(tmp_path) -> None:
    rows = [*runs(), dict(runs()[0], dataset="other"), dict(runs()[0], dataset=None)]
    page, *_ = report([write(tmp_path / "compare.csv", compare.COLUMNS, rows)], tmp_path / "report.html")
    cells = cells_of(page)
    assert ["compare.csv", "comparison", "7", "0", "1"] in cells


@pytest.mark.parametrize(
    "cell", [{"tokens": -5}, {"peak_memory_mib": -1.0}, {"speedup": float("nan")}, {"speedup": float("inf")}], ids=str
)
def test_a_number_that_nothing_can_be_is_a_damaged_line(cell, tmp_path) -> None:
    path = write(tmp_path / "cost.csv", cost.COLUMNS, [*costs(), costs()[0] | cell])
    page, *_ = report([path], tmp_path / "report.html")
    cells = cells_of(page)
    assert ["cost.csv", "cost", "8", "0", "1"] in cells


def test_a_table_is_not_replaced_by_its_page(tables, monkeypatch) -> None:
    before = tables[0].read_bytes()
    monkeypatch.chdir(tables[0].parent)
    with pytest.raises(ValueError, match="out=cost.csv is one of the tables"):
        report(tables, Path("cost.csv"))
    assert tables[0].read_bytes() == before


def test_one_resolution_is_no_curve(tmp_path) -> None:
    page, *images = report([write(tmp_path / "cost.csv", cost.COLUMNS, costs()[:2])], tmp_path / "report.html")
    assert not images and "need rows of several image sizes" in page.read_text()


@pytest.mark.parametrize(
    "text, words",
    [
        ("a,b\n1,2\n", "another version"),
        ("", "lacks model"),
        (",".join(cost.COLUMNS) + "\nx\n", "no good row"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_table_is_one_line(text, words, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "table.csv"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["timm-vix", "report", str(path), "--out", str(tmp_path / "report.html")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line and "table.csv" in line
    assert not (tmp_path / "report.html").exists()


def test_images_per_second_are_those_of_the_best_batch(tmp_path) -> None:
    rows = [
        dict(cost_row("x", 224, 10.0 * batch**0.5, 1.0), batch_size=batch, images_per_s=100.0 * batch**0.5)
        for batch in (1, 4)
    ]
    page, *_ = report([write(tmp_path / "cost.csv", cost.COLUMNS, rows)], tmp_path / "report.html")
    cells = cells_of(page)
    assert [row[-2:] for row in cells if len(row) > 20] == [["200.0", "4"]] * 2


def test_the_command_says_what_it_wrote(tables, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "report.html"
    monkeypatch.setattr(sys, "argv", ["timm-vix", "report", *map(str, tables), "--out", str(out)])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cost.csv: 8 good rows, 1 failed, 2 damaged lines"
    assert lines[2] == f"{out} and 7 figures beside it"


# --- a real browser

PROBE = """<script>
const head = [...document.querySelectorAll("th button")].filter(b => b.textContent === "latency_p50_ms").pop();
const table = head.closest("table"), column = [...head.closest("tr").children].indexOf(head.closest("th"));
const values = () => [...table.tBodies[0].rows].map(row => row.children[column].textContent);
const before = values(); head.click(); const up = values(); head.click(); const down = values();
const whole = image => image.complete && image.naturalWidth > 300 && image.clientWidth <= innerWidth && !!image.alt;
const images = [...document.images].map(whole);
const page = document.documentElement, answer = document.querySelector(".answer"), box = answer.getBoundingClientRect();
const seen = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2) === answer;
const found = JSON.stringify({before, up, down, images, width: page.scrollWidth, window: innerWidth,
  answer: seen && box.bottom < innerHeight && box.right <= innerWidth ? answer.textContent : null,
  small: [...document.querySelectorAll("body *")].filter(e => parseFloat(getComputedStyle(e).fontSize) < 14).length,
  sorted: head.closest("th").getAttribute("aria-sort")});
const note = document.createElement("pre"); note.id = "probe"; note.textContent = found;
(parent === window ? document : parent.document).body.append(note);
</script>"""


def browse(text: str, width: int, folder: Path) -> tuple[str, list[str]]:
    """Open a page in a frame of this width, which a window could not have; its document and what the console says."""
    frame = f"<!DOCTYPE html><body><iframe width={width} height=800 srcdoc='{html.escape(text, quote=True)}'></iframe>"
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--enable-logging=stderr", "--v=0"]
    command += ["--dump-dom", str(folder / "frame.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or google-chrome on the PATH")
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_a_browser_shows_and_sorts_it(width, tables, tmp_path) -> None:
    page, *images = report(tables, tmp_path / "report.html")
    document, console = browse(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), width, tmp_path)
    assert not console
    found = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', document)[1]))
    numbers = sorted(float(value) for value in found["before"])
    assert found["before"] != found["up"] and [float(value) for value in found["up"]] == numbers
    assert [float(value) for value in found["down"]] == numbers[::-1]
    assert found["sorted"] == "descending"
    assert found["images"] == [True] * len(images)
    assert found["window"] == pytest.approx(width, abs=20) and found["width"] <= found["window"]
    assert found["answer"].startswith("Use vit_tiny_patch16_224 (softmax attention) at 224 and 512 px and vix_x at")
    assert found["small"] == 0


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or google-chrome on the PATH")
def test_an_error_in_the_console_would_be_seen(tmp_path) -> None:
    _, console = browse("<body><script>absent.click()</script></body>", 390, tmp_path)
    assert len(console) == 1 and "absent is not defined" in console[0]


@pytest.mark.parametrize("out", ["", ".", "folder"])
def test_a_page_needs_the_name_of_a_file(out, tables, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="is a folder; expected the name of a file"):
        report(tables, Path(out))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_of_zeros_is_no_empty_table(tmp_path) -> None:
    path = tmp_path / "cost.csv"
    path.write_bytes(bytes(200_000))  # after a power failure; longer than the longest cell that Python reads
    with pytest.raises(ValueError, match="was written by another version or program"):
        earlier_records(path, cost.COLUMNS)
