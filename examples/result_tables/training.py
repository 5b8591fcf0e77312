"""Tables of training: Caltech-101, parts of a model, and CIFAR-10 from random weights."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import timm

from timm_vix import models
from timm_vix._records import grouped
from timm_vix.benchmark.baselines import baseline_of
from timm_vix.mixers import MIXERS

from . import Row, cell, markdown, measured, read
from .cost import speed


def parts() -> str:
    """What training only a part of DeiT-Tiny scores and costs, on two sets of images."""
    tables = {"Caltech-101": read("finetune_parts_caltech101.csv"), "CIFAR-10": read("finetune_parts_cifar10.csv")}
    body = []
    for images, rows in tables.items():
        for row in last_epochs(rows):
            only = row["model"].partition("train_only=")[2] or "all"
            line = [only, images, cell(row, "top1", 1), f"{float(row['trained']) / 1e6:.2f}"]
            line.append(cell(row, "peak_memory_mib", unit=" MiB"))
            # the ratio is paired, so a time beside it would be of another measurement
            line += [cell(row, "step_ms", unit=" ms"), ""] if only == "all" else ["", cell(row, "faster_than_all", 2)]
            body.append(line)
    head = ["trained part", "images", "top-1 %", "parameters (M)", "peak memory", "step", "times as fast"]
    return markdown(head, body, measured(row for rows in tables.values() for row in rows))


def last_epochs(rows: list[Row]) -> list[Row]:
    return list({row["model"]: row for row in rows}.values())


def accuracies(row: Row) -> list[str]:
    """Top-1 and top-5."""
    return [f"{float(row[name]):.1f}" for name in ("top1", "top5")]


def finetuned(name: str) -> str:
    """Accuracy of the last epoch of each model."""
    rows = read(f"finetune_{name}.csv")
    body = []
    for row in last_epochs(rows):
        body.append([f"`{row['model']}`", *accuracies(row), row["epoch"], f"{float(row['parameters']) / 1e6:.2f}"])
    return markdown(["", "top-1 %", "top-5 %", "epochs", "parameters (M)"], body, measured(rows))


def caltech101() -> str:
    """Accuracy of the last epoch on all of Caltech-101 and on a part of it, and the time of an epoch."""
    tables = [read("finetune_caltech101.csv"), read("finetune_caltech101_part.csv")]
    whole, part = ({row["model"]: row for row in last_epochs(rows)} for rows in tables)
    times = {row["model"]: row for row in read("cost_caltech101.csv")}
    body = []
    for model in dict.fromkeys([*whole, *part]):
        line = []
        for found in (whole.get(model), part.get(model)):
            line += accuracies(found) if found else ["", ""]
        softmax = model.startswith("deit_tiny")  # ViT-Ti under another name
        cost = times.get("vit_tiny_patch16_224" if softmax else model.replace(".deit_fb_in1k", ""))
        costs = ["", "", ""]
        if cost:
            costs = [f"{float(cost['epoch_s']):.0f} s", "" if softmax else speed(cost)]
            costs.append(f"{float(cost['peak_memory_mib']):,.0f} MiB")
        body.append([f"`{model}`", *line, *costs])
    head = ["", "30 a class: top-1 %", "top-5 %", "10 a class: top-1 %", "top-5 %", "an epoch", "times as fast"]
    below = f"Accuracy: {measured([*tables[0], *tables[1]])} Time and memory: {measured(times.values())}"
    return markdown([*head, "memory of a step"], body, below)


def compared_caltech101() -> str:
    """Accuracy after the short recipe of timm-vix compare, from DeiT-Tiny's weights."""
    rows = [row for row in read("compare_caltech101.csv") if row["start"] != "scratch"]
    body = [[f"`{row['model']}`", *accuracies(row), row["epochs"]] for row in rows]
    return markdown(["", "top-1 %", "top-5 %", "epochs"], body, measured(rows))


def reproduced() -> str:
    """All systems by mixer: the paper's number, ours by two recipes, softmax in its place; and what each costs.

    A system with longer trainings has a table of these instead, and one with a few epochs no row of one epoch.
    """
    all_rows = read("reproduce_vix.csv")
    rows = [row for row in all_rows if not is_replaced(row, all_rows)]
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    order = list(MIXERS)
    body = []
    for key, mine in sorted(groups.items(), key=lambda item: order.index(mixer_of(item[0][0]))):
        ours = [mean_top1([row for row in mine if row["recipe"] == recipe]) for recipe in RECIPES]
        baseline = (baseline_of(key[0]), *key[1:])  # whose rows count where longer trainings replace them, too
        control = [row for row in all_rows if key_of(row) == baseline and row["recipe"] == "modern"]
        softmax = "" if baseline == key else mean_top1(control)
        # the modern recipe's batch is the same for all; nothing is known of a step that could not be measured
        step = next((row for row in mine if row["recipe"] == "modern" and row["peak_memory_mib"]), None)
        costs = [f"{float(mine[0]['parameters']) / 1e6:.2f}", f"{1e3 * float(mine[0]['gflops']):.0f}", *[""] * 2]
        if step:
            costs[2:] = [f"{float(step['peak_memory_mib']):,.0f} MiB", f"{float(step['faster_than_softmax']):.2f}"]
        body.append([mixer_of(key[0]), f"`{key[0]}`", *key[1:], mine[0]["paper"], *ours, softmax, *costs])
    head = ["mixer", "system", "patch", "epochs", "dtype", "paper %", "paper's recipe %", "modern %"]
    head += ["the softmax model in its place, modern %", "parameters (M)", "MFLOPs", "peak memory"]
    return markdown([*head, "times as fast"], body, measured({**row, "dtype": ""} for row in rows))


def key_of(row: Row) -> tuple[str, str, str, str]:
    """What a line of the table of all systems stands for: system, patch size, epochs and dtype."""
    return row["system"], row["patch_size"], epochs_of(row), row["dtype"]


def is_replaced(row: Row, rows: list[Row]) -> bool:
    """Whether a row is one of the longer trainings, or its system was trained for more epochs."""
    others = [other for other in rows if all(other[name] == row[name] for name in ("system", "patch_size"))]
    return is_long(row) or any(int(other["epochs"]) > int(row["epochs"]) for other in others)


def is_long(row: Mapping[str, Any]) -> bool:
    """Whether a row of a training on CIFAR-10 is one of the longer ones, by the modern recipe."""
    return (int(row["epochs"]), row["recipe"]) == (LONG, "modern")


def longer() -> str:
    """The longer trainings by the modern recipe, best first: the paper's number, ours, and what each costs."""
    rows = [row for row in read("reproduce_vix.csv") if is_long(row)]
    groups = grouped(rows, ("system", "patch_size", "epochs", "dtype"))
    body = []
    for (name, patch_size, epochs, dtype), mine in sorted(groups.items(), key=lambda item: -float(mean_top1(item[1]))):
        first = mine[0]
        spread = [float(row["top1"]) for row in mine]
        ours = f"{min(spread):.1f} to {max(spread):.1f}" if len(mine) > 1 else mean_top1(mine)
        line = [f"`{name}`", patch_size, first["tokens"], epochs, dtype, first["paper"], ours]
        line.append(f"{float(first['top5']):.1f}")
        line += [f"{float(first['parameters']) / 1e6:.2f}", f"{1e3 * float(first['gflops']):.0f}"]
        line += [cell(first, "peak_memory_mib", unit=" MiB"), cell(first, "faster_than_softmax", 2)]
        body.append(line)
    head = ["system", "patch", "tokens", "epochs", "dtype", "paper %", "top-1 %", "top-5 %", "parameters (M)", "MFLOPs"]
    head += ["peak memory", "training, times as fast"]
    return markdown(head, body, measured({**row, "dtype": ""} for row in rows))


def mixer_of(system: str) -> str:
    """The name in ``MIXERS`` of a registered system's mixer."""
    families = [getattr(models, family) for family in models.__all__]
    found = {row.name: row.mixer for family in families for row in getattr(family, "NAMES", [])}
    return found.get(system, "fnet")  # fnet2d has one mixer only


def epochs_of(row: Row) -> str:
    """Epochs of a run; the whole protocol trains 40 by the paper's recipe and 100 by the modern one."""
    full = {("paper", "40"): "40, 100", ("modern", "100"): "40, 100"}
    return full.get((row["recipe"], row["epochs"]), row["epochs"])


def mean_top1(rows: list[Row]) -> str:
    """The mean over seeds; empty without rows."""
    return f"{statistics.mean(float(row['top1']) for row in rows):.1f}" if rows else ""


RECIPE_NAMES = dict(paper="paper's recipe", modern="modern recipe")
RECIPES = tuple(RECIPE_NAMES)
LONG = 20  # epochs of the trainings that have a table of their own
DTYPES = ("float32", "bfloat16")
TRACT = " tract=0.1"  # what follows the recipe's name
# Pairs of systems that differ in one thing; the names end in _cifar, or where they say rope in _cifar_rope.
COMPARISONS = {
    "convolutional stem": "vix_softmax hybrid_vit, vix_linformer hybrid_vil, vix_performer hybrid_vip, "
    "vix_nystrom hybrid_vin, vix_fnet hybrid_fnet, vix_mixer hybrid_mixer, pin hybrid_pin, pip hybrid_pip, "
    "vix_softmax+rope hybrid_vit+rope, vix_linformer+rope hybrid_vil+rope, vix_performer+rope hybrid_vip+rope, "
    "vix_nystrom+rope hybrid_vin+rope",
    "rotary positions, softmax, Performer, Nyström": "vix_softmax vix_softmax+rope, vix_performer vix_performer+rope, "
    "vix_nystrom vix_nystrom+rope, hybrid_vit hybrid_vit+rope, hybrid_vip hybrid_vip+rope, hybrid_vin hybrid_vin+rope",
    "rotary positions, axial, ReLU and latent attention, retention, gpsa": "vix_axial vix_axial+rope, "
    "vix_relu vix_relu+rope, vix_latent vix_latent+rope, vix_retention vix_retention+rope, vix_gpsa vix_gpsa+rope",
    "rotary positions, Linformer": "vix_linformer vix_linformer+rope, hybrid_vil hybrid_vil+rope",
    "Nyström or Performer for softmax": "vix_softmax vix_nystrom, vix_softmax vix_performer, "
    "vix_softmax+rope vix_nystrom+rope, vix_softmax+rope vix_performer+rope, hybrid_vit hybrid_vin, "
    "hybrid_vit hybrid_vip, hybrid_vit+rope hybrid_vin+rope, hybrid_vit+rope hybrid_vip+rope",
    "Linformer for softmax": "vix_softmax vix_linformer, hybrid_vit hybrid_vil",
    "Linformer for softmax, rotary positions": "vix_softmax+rope vix_linformer+rope, hybrid_vit+rope hybrid_vil+rope",
    "MLP mixing for softmax": "vix_softmax vix_mixer, hybrid_vit hybrid_mixer",
    "Fourier mixing for softmax": "vix_softmax vix_fnet, hybrid_vit hybrid_fnet",
    "axial attention for softmax": "vix_softmax vix_axial",
    "ReLU attention for softmax": "vix_softmax vix_relu",
    "latent attention for softmax": "vix_softmax vix_latent",
    "retention for softmax": "vix_softmax vix_retention",
    "positional attention (gpsa) for softmax": "vix_softmax vix_gpsa",
    "axial, ReLU, latent or positional attention or retention for softmax, rotary positions": "vix_softmax+rope "
    "vix_axial+rope, vix_softmax+rope vix_relu+rope, vix_softmax+rope vix_latent+rope, "
    "vix_softmax+rope vix_gpsa+rope, vix_softmax+rope vix_retention+rope",
    "Legendre memory for softmax": "vix_softmax vix_legendre",
    "Hyena for softmax": "vix_softmax vix_hyena",
    "wavelet bands (scattering) for softmax": "vix_softmax vix_scattering",
    "pooling for softmax": "vix_softmax vix_pool",
    "no mixing of tokens (glu) for softmax": "vix_softmax vix_glu",
    "CCN or CCP for CCT": "cct ccn, cct ccp",
    "CvN or CvP for CvT": "cvt cvn, cvt cvp",
}


def system(name: str) -> str:
    """The registered name: "vix_softmax+rope" is vix_softmax_cifar_rope."""
    stem, _, rope = name.partition("+")
    registered = f"{stem}_cifar_rope" if rope else f"{stem}_cifar"
    timm.model_entrypoint(registered)  # a misspelt one is no pair that wasn't trained
    return registered


def least_and_most(gains: Sequence[float]) -> str:
    return f"{min(gains):+.1f} to {max(gains):+.1f}" if len(gains) > 1 else f"{gains[0]:+.1f}"


def compared(epochs: int, recipes: Sequence[str] = RECIPES) -> str:
    """What one change is worth after so many epochs with patches of 4x4: least and most points over pairs of systems.

    The two of a pair are of one dtype, float32 where both have it, and of seed 0.
    """
    scores = {
        (row["system"], row["recipe"], row["dtype"]): float(row["top1"])
        for row in read("reproduce_vix.csv")
        if (row["patch_size"], row["epochs"], row["seed"]) == ("4", str(epochs), "0")
    }

    def gains(before: str, after: str, change: str = "") -> list[float]:
        """The points by each recipe; empty for a pair that was not trained by all of them."""
        found = []
        for recipe in recipes:
            both = [((before, recipe, dtype), (after, recipe + change, dtype)) for dtype in DTYPES]
            found += [scores[two] - scores[one] for one, two in both if {one, two} <= scores.keys()][:1]
        return found if len(found) == len(recipes) else []

    changes = {
        change: [gains(*map(system, pair.split())) for pair in pairs.split(", ")]
        for change, pairs in COMPARISONS.items()
    }
    trained = dict.fromkeys(name for name, _, _ in scores)
    changes["TrAct for the gradient of the first layer"] = [gains(name, name, TRACT) for name in trained]
    body = []
    for change, pairs in changes.items():
        if found := list(filter(None, pairs)):
            body.append([change, str(len(found)), *map(least_and_most, zip(*found))])
    return markdown(["change", "pairs", *(f"{RECIPE_NAMES[recipe]}, points" for recipe in recipes)], body)
