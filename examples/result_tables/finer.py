"""The table of finer patches: accuracy after equal epochs and after equal time, beside what each attention costs."""

from . import Row, cell, markdown, measured, number_list, read, values
from .cost import speed
from .training import mean_top1

BUDGETS = {"epochs": "equal epochs", "minutes": "equal time"}


def finer() -> str:
    """DeiT-Tiny with smaller patches on Caltech-101: top-1, what training took, and costs."""
    rows = read("finer_caltech101.csv")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: -int(row["patch_size"])):
        groups.setdefault((row["patch_size"], row["mixer"], row["keywords"]), []).append(row)
    budgets = [name for name in BUDGETS if any(row["budget"] == name and row["top1"] for row in rows)]
    body = []
    for (patch, mixer, keywords), mine in groups.items():
        line = [f"{mixer}, {keywords.replace(' ', ', ')}" if keywords else mixer, patch, f"{int(mine[0]['tokens']):,}"]
        for budget in budgets:
            line += accuracy(mine, budget, longest(rows, patch, budget))
        line.append(f"{float(mine[0]['train_ms_an_image']):,.0f} ms")
        line += [speed_of(mine[0], mode) for mode in ("train", "infer")]
        body.append([*line, cell(mine[0], "peak_memory_mib", unit=" MiB")])
    head = ["attention", "patch", "tokens"]
    for budget in budgets:
        # what isn't the budget itself
        head += [f"{BUDGETS[budget]}: {what}" for what in ("top-1 %", "minutes" if budget == "epochs" else "epochs")]
    head += ["step per image", "training, times as fast", "inference, times as fast", "peak memory"]
    return markdown(head, body, f"{images(rows)}{measured(rows)}")


def longest(rows: list[Row], patch: str, budget: str) -> str:
    """The longest training of a budget with such patches; "0" where there is none."""
    limits = [row["limit"] for row in rows if (row["patch_size"], row["budget"]) == (patch, budget)]
    return max(limits, key=float, default="0")


def accuracy(rows: list[Row], budget: str, limit: str) -> list[str]:
    """Top-1 of those rows that had this budget, the mean over seeds, and the minutes or epochs that they took."""
    found = [row for row in rows if (row["budget"], row["limit"]) == (budget, limit) and row["top1"]]
    if not found:
        return [""] * 2
    took = float(found[0]["seconds"]) / 60 if budget == "epochs" else float(found[0]["epochs"])
    return [mean_top1(found), f"{took:.1f}" if budget == "epochs" else f"{took:.2f}"]


def speed_of(row: Row, mode: str) -> str:
    """How many times as fast as softmax, which itself has no number."""
    if row["mixer"] == "softmax" and not row["keywords"]:
        return ""
    return speed({name: row[f"{mode}_{name}"] for name in ("speedup", "speedup_low", "speedup_high")})


def images(rows: list[Row]) -> str:
    """On how many images was trained and validated; empty where nothing was trained."""
    trained = [row for row in rows if row["top1"]]
    if not trained:
        return ""
    numbers = (number_list(f"{int(n):,}" for n in values(trained, name)) for name in ("train_images", "val_images"))
    return "{} training and {} validation images. ".format(*numbers)
