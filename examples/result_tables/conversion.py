"""Tables of the conversion of DeiT-Tiny: accuracy, plans, transfers, and what was tried."""

import json
from typing import Optional

from convert_deit import KEY

from timm_vix._records import key_of

from . import RESULTS, Row, cell, markdown, measured, read, values
from .cost import Key, is_shown, is_timed, models, speed

# What the README shows of all conversions; transfer is of the same size of image where a row says so.
SHOWN = (
    "softmax",
    "softmax, scaled logits",
    "softmax, merged to 30 %",
    "softmax, merged to 15 %, scaled logits",
    "axial",
)
SHOWN += ("axial, scaled logits", "nystrom, 4x4 windows", "nystrom, 4x4 windows, scaled logits")
SHOWN += ("linformer, 4x4 windows", "performer, 256 learned features")
# The conversion in the last column of the README's table of sizes, and the head of that column.
ADVISED = "softmax, merged to 30 %"
ADVISED_IN_WORDS = "DeiT-Tiny with tokens merged to 30 %: share of its top-1 left, speedup with one image on 1 thread"


def read_conversions() -> list[Row]:
    """The rows of convert_deit_tiny.csv; of those of one conversion the last."""
    return list({key_of(row, KEY): row for row in read("convert_deit_tiny.csv")}.values())


def conversions() -> str:
    """What conversion keeps of DeiT-Tiny on labelled photographs, and what it costs, transferred or not."""
    rows = read_conversions()
    mixers = list(dict.fromkeys(row["model"].split(",")[0] for row in rows))
    with_costs: set[tuple[str, str]] = set()
    body = []
    for row in sorted(rows, key=lambda row: (int(row["img_size"]), mixers.index(row["model"].split(",")[0]))):
        key = (row["model"], row["img_size"])
        costs = [""] * 4
        if key not in with_costs:  # transfer changes no cost
            costs = [row["gflops"], times(row), row["threads"], row["gradient_memory_mib"]]
        with_costs.add(key)
        shares = [row["relative"], share_of_scaled(row, rows)]
        images = f"{int(row['images']):,}"
        body.append([row["model"], row["training"], row["img_size"], images, row["top1"], *shares, *costs])
    head = ["converted", "training", "px", "photographs", "top-1 %", "% of softmax", "% of softmax with scaled logits"]
    return markdown([*head, "GFLOPs", "times as fast", "threads", "gradient memory, MiB"], body, measured(rows))


def share_of_scaled(row: Row, rows: list[Row]) -> str:
    """The top-1 of a conversion with scaled logits in percent of that of softmax with scaled logits."""
    if "scaled logits" not in row["model"]:
        return ""
    softmax = find(rows, "softmax, scaled logits", "none", row["img_size"])
    return f"{100 * float(row['top1']) / float(softmax['top1']):.1f}" if softmax else ""


def find(rows: list[Row], model: str, training: str, img_size: str) -> Optional[Row]:
    """The row of a conversion; of two transfers that at the images' own size, which its name tells."""
    names = (f"{model}, transferred at {img_size} px", model)
    found = [row for row in rows if (row["training"], row["img_size"]) == (training, img_size)]
    return next((row for name in names for row in found if row["model"] == name), None)


def kept(row: Optional[Row], column: str) -> str:
    """Accuracy, or that in percent of softmax's, and the size of the transfer's images where it is another one."""
    if row is None:
        return ""
    elsewhere = row["training"] == "transfer" and row["img_size"] != "224" and "transferred at" not in row["model"]
    return row[column] + " (at 224 px)" * elsewhere


def times(row: Row) -> str:
    return f"{float(row['faster_than_softmax']):.2f}"


def conversions_in_short() -> str:
    """The accuracy after conversion of all layers at each image size, untrained and after transfer.

    Of the sizes at which all photographs were looked at.
    """
    rows = read_conversions()
    most = max(rows, key=lambda row: int(row["images"]))["images"]
    rows = [row for row in rows if row["images"] == most]
    sizes = values(rows, "img_size")
    body = []
    for model in SHOWN:
        line = []
        for size in sizes:
            untrained, transferred = (find(rows, model, training, size) for training in ("none", "transfer"))
            either = untrained or transferred
            shown = [kept(row, "top1") for row in (untrained, transferred)]
            line += [*shown, times(either) if either else ""]
        body.append([model, *line])
    head = [f"{size} px: {what}" for size in sizes for what in ("untrained", "transferred", "times as fast")]
    photographs = ", ".join(f"{int(number):,}" for number in values(rows, "images"))
    return markdown(["converted", *head], body, f"Top-1 on {photographs} labelled photographs. {measured(rows)}")


def advice() -> str:
    """Which attention mechanisms are faster than softmax at each image size, and what a conversion keeps there."""
    cells = models("tiny")
    tokens = {key.img_size: row["tokens"] for key, row in cells.items() if is_timed(row)}
    rows = read_conversions()
    tokens |= {int(row["img_size"]): row["tokens"] for row in rows}
    names = [name for name in dict.fromkeys(key.model for key in cells) if name.startswith("vix_") and is_shown(name)]
    body = []
    for pixels in sorted(tokens):
        faster = {mode: faster_at(cells, names, pixels, mode) for mode in ("infer", "train")}
        untrained, transferred = (find(rows, ADVISED, training, str(pixels)) for training in ("none", "transfer"))
        keeps = f"{kept(untrained, 'relative')} %" if untrained else "not measured"
        keeps += f" ({kept(transferred, 'relative')} % after transfer)" if transferred else ""
        keeps += f", {times(untrained)} times as fast" if untrained else ""
        speeds = [", ".join(f"{name} {ratio}" for name, ratio in faster[mode].items()) or "none" for mode in faster]
        if not any(key.img_size == pixels for key in cells):
            speeds = ["not measured"] * 2
        body.append([f"{pixels:,} px", f"{int(tokens[pixels]):,}", *speeds, keeps])
    head = ["image", "tokens", "faster in inference", "faster in training", ADVISED_IN_WORDS]
    return markdown(head, body)


def faster_at(cells: dict[Key, Row], names: list[str], pixels: int, mode: str) -> dict[str, str]:
    """Mechanisms that are faster than softmax beyond the spread of their ratio, fastest first."""
    rows = {name.split("_")[1]: cells.get(Key(name, True, pixels, mode)) for name in names}
    found = {name: row for name, row in rows.items() if row and is_timed(row) and float(row["speedup_low"]) > 1}
    order = sorted(found, key=lambda name: -float(found[name]["speedup"]))
    return {name: speed(found[name], spread=False) for name in order}


# what a plan keeps, and of how many images, on the half that chose it and on the other
HALVES = (("kept", "images"), ("held_out_kept", "held_out_images"))


def plans() -> str:
    """What timm-vix plan found: what is kept on the images that chose and on others, and how fast it is."""
    body = []
    for path in sorted(RESULTS.glob("plan_*.json")):
        plan = json.loads(path.read_text(encoding="utf-8"))
        kept = [f"{100 * plan[name]:.1f} % ({plan[images]})" for name, images in HALVES]
        merged = ", ".join(map(str, plan["merge"])) if plan["merge"] else "none"
        body.append([f"[{path.stem}]({path.name})", str(plan["img_size"]), f"{100 * plan['keep']:.0f} %", *kept])
        alike = max(row["speedup"] for row in plan["curve"] if row["agreement"] >= plan["keep"])
        body[-1] += [f"{plan['speedup']:.2f}", f"{alike:.2f}", str(plan["latency_batch"]), str(plan["threads"])]
        body[-1] += ["yes" if plan.get("scale_logits") else "no", f"{len(plan['layers'])} of {plan['depth']}", merged]
    head = ["plan", "px", "target", "kept (half that chose)", "kept (other half)", "times as fast"]
    head += ["times as fast with that share of predictions", "batch", "threads", "scaled logits", "layers converted"]
    return markdown([*head, "patches that each layer merges"], body)


def merging() -> str:
    """Inference of DeiT-Tiny with merged tokens, beside softmax, for two sizes of images and of batches."""
    rows = read("cost_merging.csv")
    body = []
    for row in sorted(rows, key=lambda row: (int(row["img_size"]), int(row["batch_size"]))):
        merge = row["model"].partition("merge=")[2]
        body.append([f"`merge={merge}`", row["img_size"], row["batch_size"], f"{float(row['latency_p50_ms']):.0f} ms"])
        body[-1].append(speed(row))
    return markdown(["merging", "px", "batch size", "latency", "times as fast as softmax"], body, measured(rows))


def transfers() -> str:
    """What each transfer saw and reached."""
    rows = read("transfer.csv")
    body = []
    for row in rows:
        settings = [row["tokens"], row["images"], row["block_steps"], row["distill_steps"], row["batch_size"]]
        # without a classifier there is nothing to agree on
        found = [cell(row, "agreement", 1), row["feature_distance"], f"{float(row['seconds']) / 60:.0f}"]
        other = "" if row["source"].startswith("deit_tiny") else f", in `{row['source']}`"
        body.append([f"{row['mixer']}, {row['keywords']}{other}", *settings, row["dtype"], *found])
    head = ["converted", "tokens", "images", "steps of stage 1", "steps of stage 2", "batch", "dtype"]
    return markdown([*head, "agreement, %", "error of last tokens", "minutes"], body, measured(rows))


def axial_variants() -> str:
    """How near each variant of axial attention comes to softmax attention, at each size."""
    rows = read("axial_variants.csv")
    cells = {(row["variant"], row["img_size"]): row for row in rows}
    sizes = values(rows, "img_size")
    body = []
    for variant in values(rows, "variant"):
        line = [variant]
        for row in (cells.get((variant, size)) for size in sizes):
            line += [row["keys"], row["agreement"], row["divergence"], row["top1"]] if row else [""] * 4
        body.append(line)
    columns = ("keys a query", "same class as softmax, %", "divergence", "top-1, %")
    head = ["variant", *(f"{size} px: {column}" for size in sizes for column in columns)]
    softmax = ", ".join(
        f"at {size} px {found}" for size, found in {r["img_size"]: r["softmax_top1"] for r in rows}.items()
    )
    return markdown(head, body, f"{rows[0]['images']} photographs; softmax's top-1 is {softmax} %. {measured(rows)}")


def studies() -> list[str]:
    return values(read("convert_tried.csv"), "study")


def tried(study: str) -> str:
    """One study of convert_tried.csv."""
    rows = [row for row in read("convert_tried.csv") if row["study"] == study]
    below = f"*Measured on: {rows[0]['images']}.*"
    return markdown(["change", rows[0]["measure"]], [[row["change"], row["found"]] for row in rows], below)
