"""Write the measured tables and figures of the README from the files in examples/results.

python examples/tables.py            # rewrites README.md between its <!-- table: NAME --> marks
python examples/tables.py --check    # fails if README.md differs from the results
python examples/tables.py --figures  # draws examples/results/cost_*.png anew
"""

import argparse
import csv
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples" / "results"


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cost(mode: str) -> str:
    """Speed of a layer relative to softmax through SDPA, for each number of tokens."""
    table = [row for row in rows("mixers.csv") if row["mode"] == mode and row["dtype"] == "float32"]
    tokens = sorted({int(row["tokens"]) for row in table})
    cells = {(row["mixer"], int(row["tokens"])): row for row in table}
    body = []
    for mixer in dict.fromkeys(row["mixer"] for row in table):
        measured = [cells.get((mixer, n)) for n in tokens]
        if mixer == "softmax":
            body.append([mixer, *(f"{float(row['softmax_ms']):.0f} ms" if row else "" for row in measured)])
        else:
            body.append([f"`{mixer}`", *(f"{float(row['ratio']):.2f}" if row else "" for row in measured)])
    return markdown(["", *(f"{n:,} tokens" for n in tokens)], body)


def memory() -> str:
    """Peak memory of a training step of one layer and image, and its exponent in the number of tokens."""
    table = [row for row in rows("mixers.csv") if row["mode"] == "train" and int(row["tokens"]) > 1000]
    tokens = sorted({int(row["tokens"]) for row in table})
    cells = {(row["mixer"], int(row["tokens"])): float(row["peak_memory_mib"]) / int(row["batch"]) for row in table}
    body = []
    for mixer in dict.fromkeys(row["mixer"] for row in table):
        values = [cells[mixer, n] for n in tokens]
        slope = math.log(values[-1] / values[-2]) / math.log(tokens[-1] / tokens[-2])
        body.append([f"`{mixer}`", *(f"{value:.0f} MiB" for value in values), f"{slope:.2f}"])
    return markdown(["", *(f"{n:,} tokens" for n in tokens), "exponent"], body)


def whole_models(size: str, dtype: str = "float32") -> dict[tuple[str, bool, int, str], dict[str, str]]:
    """Rows of cost_cpu.csv for models of a ViT's size, by model, fused, image size and mode."""
    table = [row for row in rows("cost_cpu.csv") if row["dtype"] == dtype and not row["error"]]
    return {
        (row["model"], row["attention"] == "fused", int(row["img_size"]), row["mode"]): row
        for row in table
        if row["baseline"] == f"vit_{size}_patch16_224" and row["batch_size"] == "1"
    }


def ratio(row: dict[str, str] | None, told: bool = True) -> str:
    """Speed over softmax through SDPA, its spread told or not; a spread that holds 1 is no difference."""
    if row is None or not row["speedup"]:
        return ""
    spread = (
        f" ({float(row['speedup_low']):.2f} to {float(row['speedup_high']):.2f})" if told and row["speedup_low"] else ""
    )
    return f"{float(row['speedup']):.2f}{spread}" if row["difference"] != "none" else f"none{spread}"


def trade_off() -> str:
    """What each mixer costs in a whole model at 512 and 1,024 px, beside softmax, fused and unfused."""
    cells = whole_models("tiny")
    top1 = {}
    if (RESULTS / "compare_caltech101.csv").exists():
        for row in rows("compare_caltech101.csv"):
            top1.setdefault(row["model"].split(".")[0].split()[0], []).append(row["top1"])
    memory = {key[:2]: float(row["peak_memory_mib"]) for key, row in cells.items() if key[2:] == (1024, "train")}
    head = ["model", "GFLOPs, 1,024 px", "inference, 512 px", "inference, 1,024 px", "training, 512 px"]
    head += ["training, 1,024 px", "training memory, 1,024 px"] + ["top-1 %, 160 px"] * bool(top1)
    body = []
    for model, fused in dict.fromkeys(key[:2] for key in cells):
        at = [cells.get((model, fused, *place)) for place in ((512, "infer"), (1024, "infer"), (512, "train"))]
        at.append(cells.get((model, fused, 1024, "train")))
        flops = f"{float(at[1]['gflops']):.1f}" if at[1] else ""
        size = f"{memory[model, fused]:.0f} MiB" if (model, fused) in memory else ""
        name = f"`{model}`" if fused else f"`{model}`, unfused"
        if model == "vit_tiny_patch16_224" and fused:
            times = [f"{float(row['latency_p50_ms']):.0f} ms" if row else "" for row in at]
        else:
            times = [ratio(row) for row in at]
        scores = [float(value) for value in top1.get(model.replace("vit_", "deit_"), top1.get(model, [])) if value]
        score = [f"{sum(scores) / len(scores):.1f}" if scores else ""] * bool(top1)
        body.append([name, flops, *times, size, *score])
    return markdown(head, body)


def resolutions(dtype: str, leave_out: tuple[int, ...] = (), crossovers: bool = False) -> str:
    """Speed over softmax at each size of model and image, but for some of ViT-Ti's, inference and training."""
    cells = {size: whole_models(size, dtype) for size in ("tiny", "small")}
    places = [
        (size, pixels)
        for size in cells
        for pixels in sorted({key[2] for key in cells[size]})
        if size != "tiny" or pixels not in leave_out
    ]
    body = []
    for family in dict.fromkeys(key[0].removesuffix("_tiny") for key in cells["tiny"] if key[0].startswith("vix_")):
        line = []
        for size, pixels in places:
            found = [cells[size].get((f"{family}_{size}", True, pixels, mode)) for mode in ("infer", "train")]
            line.append(", ".join(ratio(row, told=False) for row in found if row))
        if crossovers:
            line += [overtakes(cells["tiny"], f"{family}_tiny", mode) for mode in ("infer", "train")]
        body.append([f"`{family}_*`", *line])
    head = ["model", *(f"{size}, {pixels:,} px" for size, pixels in places)]
    return markdown(head + ["inference from (tokens)", "training from (tokens)"] * crossovers, body)


def overtakes(cells: dict[tuple[str, bool, int, str], dict[str, str]], model: str, mode: str) -> str:
    """From how many tokens a model of ViT-Ti's size is faster than softmax, and what the ratios' spread allows."""
    from timm_vix.measure.statistics import crossover

    mine = [row for key, row in cells.items() if (key[0], key[3]) == (model, mode)]
    known = {row["img_size"]: int(row["tokens"]) for row in cells.values() if row["model"] == row["baseline"]}
    tokens = [known[row["img_size"]] for row in mine]
    ratios = ([float(row[key] or row["speedup"]) for row in mine] for key in ("speedup", "speedup_low", "speedup_high"))
    median, earliest, latest = crossover(tokens, *ratios)
    if median is None or earliest is None or latest is None:
        return ""
    least = min(tokens)
    if latest == least:
        return f"below {least}"
    early = f"below {least}" if earliest == least else f"{earliest:.0f}"
    return f"{f'below {least}' if median == least else f'{median:.0f}'} ({early} to {latest:.0f})"


def systems() -> str:
    """The paper's other systems and parallel blocks, each beside its own control, in whole models."""
    table = [row for row in rows("cost_systems.csv") if not row["error"]]
    cells = {(row["model"], row["baseline"], int(row["img_size"]), row["mode"]): row for row in table}
    places = list(dict.fromkeys(key[2:] for key in cells))
    body = []
    for model, baseline in dict.fromkeys(key[:2] for key in cells):
        body.append([f"`{model}`", f"`{baseline}`", *(ratio(cells.get((model, baseline, *place))) for place in places)])
    names = {"infer": "inference", "train": "training"}
    return markdown(["model", "beside", *(f"{names[mode]}, {size} px" for size, mode in places)], body)


def conversions() -> str:
    """What conversion keeps of DeiT-Tiny on labelled photographs, and what it costs, transferred or not."""
    table = rows("convert_deit_tiny.csv")
    mixers = list(dict.fromkeys(row["model"].split(",")[0] for row in table))
    told: set[tuple[str, str]] = set()
    body = []
    for row in sorted(table, key=lambda row: (int(row["img_size"]), mixers.index(row["model"].split(",")[0]))):
        key = (row["model"], row["img_size"])
        known = key in told  # transfer changes no cost
        told.add(key)
        costs = ["" if known else row[name] for name in ("gflops", "faster_than_softmax", "gradient_memory_mib")]
        found = [f"{float(row['top1']):.1f}", f"{row['relative']} %"]
        body.append([row["model"], row["training"], row["img_size"], *found, *costs])
    head = ["model", "training", "px", "top-1 %", "of softmax", "GFLOPs", "times as fast", "gradient memory, MiB"]
    return markdown(head, body)


def parts() -> str:
    """What training only a part of DeiT-Tiny scores and costs, on two sets of images."""
    body = []
    for table, images in (("parts_caltech101", "Caltech-101"), ("parts_cifar10", "CIFAR-10")):
        for row in {row["model"]: row for row in rows(f"finetune_{table}.csv")}.values():
            only = row["model"].partition("train_only=")[2] or "all"
            trained, memory = f"{float(row['trained']) / 1e6:.2f}", f"{float(row['peak_memory_mib']):.0f} MiB"
            speed = f"{float(row['step_ms']):.0f} ms" if only == "all" else f"{float(row['faster_than_all']):.2f}"
            body.append([only, images, f"{float(row['top1']):.1f}", trained, memory, speed])
    head = ["what trains", "images", "top-1 %", "parameters (M)", "memory of a step", "times as fast"]
    return markdown(head, body)


def reproduced() -> str:
    """The paper's number, ours by its recipe and by the modern one; and what a step of 128 images costs."""
    full = {("paper", "40"): "40, 100", ("modern", "100"): "40, 100"}  # epochs of the whole protocol, by recipe
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows("reproduce_vix.csv"):
        epochs = full.get((row["recipe"], row["epochs"]), row["epochs"])
        groups.setdefault((row["system"], row["patch_size"], epochs), []).append(row)
    body = []
    for key, mine in groups.items():
        ours = []
        for recipe in ("paper", "modern"):
            scores = [float(row["top1"]) for row in mine if row["recipe"] == recipe]  # one for each seed
            ours.append(f"{sum(scores) / len(scores):.1f}" if scores else "")
        # the modern recipe's batch is the same for all; nothing is known of a step that could not be measured
        step = next((row for row in mine if row["recipe"] == "modern" and row["peak_memory_mib"]), None)
        costs = [""] * 3
        if step:
            costs = [f"{float(step['peak_memory_mib']):.0f} MiB", f"{float(step['images_per_second']):.0f}"]
            costs.append(f"{float(step['faster_than_softmax']):.2f}")
        body.append([f"`{key[0]}`", *key[1:], mine[0]["paper"], *ours, *costs])
    head = ["system", "patch", "epochs", "paper %", "its recipe %", "modern %", "memory of a step", "images/s"]
    return markdown([*head, "times as fast"], body)


def figures() -> None:
    """Speed of inference beside softmax, and memory of training, over resolution."""
    from timm_vix._records import read_records
    from timm_vix.benchmark.cost import COLUMNS
    from timm_vix.benchmark.figures import over_tokens, png

    records, _ = read_records(RESULTS / "cost_cpu.csv", COLUMNS)
    wanted = [r for r in records if r["dtype"] == "float32" and r["baseline"] == "vit_tiny_patch16_224"]
    for name, mode, cost in (("speed", "infer", "speedup"), ("memory", "train", "peak_memory_mib")):
        figure, _ = over_tokens([r for r in wanted if r["mode"] == mode and r["batch_size"] == 1], cost)
        (RESULTS / f"cost_{name}.png").write_bytes(png(figure))


def finetuned(table: str) -> str:
    """Accuracy and time of the last epoch of each model."""
    last = {row["model"]: row for row in rows(f"finetune_{table}.csv")}
    body = [
        [
            f"`{model}`",
            f"{float(row['top1']):.1f}",
            f"{float(row['top5']):.1f}",
            row["epoch"],
            f"{float(row['parameters']) / 1e6:.2f}",
        ]
        for model, row in last.items()
    ]
    return markdown(["model", "top-1 %", "top-5 %", "epochs", "parameters (M)"], body)


def caltech101() -> str:
    """Accuracy of the last epoch on all of Caltech-101 and on a part of it, and the time of an epoch."""
    whole, part = (
        {row["model"]: row for row in rows(f"finetune_{name}.csv")} for name in ("caltech101", "caltech101_part")
    )
    times = {row["model"]: row for row in rows("cost_caltech101.csv")}
    body = []
    for model in dict.fromkeys([*whole, *part]):
        scores = [
            f"{float(r[model][top]):.1f}" if model in r else "" for r in (whole, part) for top in ("top1", "top5")
        ]
        softmax = model.startswith("deit_tiny")  # ViT-Ti under another name
        cost = times.get("vit_tiny_patch16_224" if softmax else model.replace(".deit_fb_in1k", ""))
        seconds, memory = (
            (f"{float(cost['epoch_s']):.0f} s", f"{float(cost['peak_memory_mib']):.0f} MiB") if cost else ("", "")
        )
        body.append([f"`{model}`", *scores, seconds, "" if softmax else ratio(cost), memory])
    head = ["model", "30 a class: top-1 %", "top-5 %", "10 a class: top-1 %", "top-5 %", "an epoch", "times as fast"]
    head.append("memory of a step")
    return markdown(head, body)


TABLES = {
    "inference": lambda: cost("infer"),
    "training": lambda: cost("train"),
    "memory": memory,
    "whole models": trade_off,
    "caltech101": caltech101,
    "cifar10": lambda: finetuned("cifar10"),
    "claims": lambda: finetuned("claims"),
    "resolutions": lambda: resolutions("float32", leave_out=(512, 1024), crossovers=True),
    "bfloat16": lambda: resolutions("bfloat16"),
    "systems": systems,
    "conversions": conversions,
    "parts": parts,
    "reproduced": reproduced,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--figures", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    given = parser.parse_args()
    check, path = given.check, given.readme
    if given.figures:
        figures()
    before = text = path.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "\n<!-- end -->"
        if start not in text:
            print(f"error: README.md has no mark {start.strip()}", file=sys.stderr)
            return 2
        head, rest = text.split(start, 1)
        text = head + start + table() + end + rest.split(end, 1)[1]
    if check:
        if text != before:
            print("error: README.md differs from examples/results; run python examples/tables.py", file=sys.stderr)
        return int(text != before)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
