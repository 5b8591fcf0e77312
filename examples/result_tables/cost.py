"""Tables of time, memory and operations: one layer (mixers.csv), whole models (cost_cpu.csv, cost_systems.csv)."""

import math
from typing import NamedTuple, Optional

from timm_vix.measure.statistics import crossover
from timm_vix.mixers import MIXERS

from . import Row, markdown, measured, number_list, read

# A ratio of times is told only with a spread over at least so many rounds.
LEAST_ROUNDS = 3
# LeViT adds a bias to its logits, for which timm computes the matrix of attention weights.
UNFUSED = ("levin_128s mixer=softmax", "levip_128s mixer=softmax")
MODES = {"infer": "inference", "train": "training"}


class Key(NamedTuple):
    model: str
    fused: bool
    img_size: int
    mode: str


def speed(row: Optional[Row], spread: bool = True) -> str:
    """How many times as fast as the baseline; "same" where 1 is within the 10th to 90th percentile."""
    if row is None or not row["speedup_low"]:
        return ""
    low, high = float(row["speedup_low"]), float(row["speedup_high"])
    median = "same" if low <= 1 <= high else f"{float(row['speedup']):.2f}"
    return f"{median} ({low:.2f} to {high:.2f})" if spread else median


def is_timed(row: Row) -> bool:
    return int(row["rounds"]) >= LEAST_ROUNDS and bool(row["speedup_low"])


def layers() -> list[Row]:
    return [row for row in read("mixers.csv") if row["dtype"] == "float32"]


def timed_layers(mode: str) -> list[Row]:
    """Rows of one layer but for single pairs, whose spread is a point."""
    return [row for row in layers() if row["mode"] == mode and row["ratio_low"] != row["ratio_high"]]


def with_quartiles(row: Row) -> str:
    """The ratio of two layers' times, and its quartiles."""
    return f"{float(row['ratio']):.2f} ({float(row['ratio_low']):.2f} to {float(row['ratio_high']):.2f})"


def layer_speed(mode: str) -> str:
    """Speed of a layer relative to softmax through SDPA, for each number of tokens."""
    rows = timed_layers(mode)
    tokens = sorted({int(row["tokens"]) for row in rows})
    cells = {(row["mixer"], int(row["tokens"])): row for row in rows}
    body = []
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        line = []
        for row in (cells.get((mixer, n)) for n in tokens):
            if row is None:
                line.append("")
            elif mixer == "softmax":
                line.append(f"{float(row['softmax_ms']):.0f} ms")
            else:
                line.append(with_quartiles(row))
        body.append([f"`{mixer}`", *line])
    return markdown(["", *(f"{n:,} tokens" for n in tokens)], body, measured(rows))


def packages(mode: str) -> str:
    """Speed of a layer relative to that of the public package with the same mechanism."""
    rows = [row for row in read("public_packages.csv") if row["mode"] == mode]
    tokens = sorted({int(row["tokens"]) for row in rows})
    cells = {(row["mixer"], row["package"], row["dtype"], int(row["tokens"])): row for row in rows}
    body = []
    for mixer, package, dtype in dict.fromkeys(key[:3] for key in cells):
        own = [cells.get((mixer, package, dtype, n)) for n in tokens]
        body.append([f"`{mixer}`", package, dtype, *(with_quartiles(row) if row else "" for row in own)])
    head = ["", "package", "dtype", *(f"{n:,} tokens" for n in tokens)]
    return markdown(head, body, measured({**row, "dtype": ""} for row in rows))


def layer_memory() -> str:
    """Peak memory of a training step of one layer and image, and its exponent in the number of tokens."""
    rows = [row for row in layers() if row["mode"] == "train" and int(row["tokens"]) > 1000]
    rows = [row for row in rows if row["peak_memory_mib"]]
    tokens = sorted({int(row["tokens"]) for row in rows})
    cells = {(row["mixer"], int(row["tokens"])): float(row["peak_memory_mib"]) / int(row["batch"]) for row in rows}
    body = []
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        used = [cells.get((mixer, n)) for n in tokens]
        line = ["" if value is None else f"{value:.0f} MiB" for value in used]
        known = len(used) > 1 and None not in used[-2:]
        slope = f"{math.log(used[-1] / used[-2]) / math.log(tokens[-1] / tokens[-2]):.2f}" if known else ""
        body.append([f"`{mixer}`", *line, slope])
    return markdown(["", *(f"{n:,} tokens" for n in tokens), "exponent"], body, measured(rows))


def speed_in_a_model(mixer: str) -> str:
    """The sentence of a mixer's module about the speed of a whole ViT-Ti with it."""
    cells = models("tiny")
    name = f"vix_{mixer}_tiny"
    timed = {mode: [row for key, row in cells.items() if (key.model, key.mode) == (name, mode)] for mode in MODES}
    rows = {mode: sorted(filter(is_timed, found), key=lambda row: int(row["tokens"])) for mode, found in timed.items()}
    fast = {mode: number_list(f"{float(row['speedup']):.2f}" for row in found) for mode, found in rows.items()}
    tokens = number_list(f"{int(row['tokens']):,}" for row in rows["infer"])
    first = rows["infer"][0]
    return (
        f"*Speed:* a whole ViT-Ti is {fast['infer']} times as fast as with softmax through SDPA at {tokens} tokens in "
        f"inference, and {fast['train']} times in training, in {first['dtype']} on {first['threads']} CPU threads "
        "(``examples/results/cost_cpu.csv``)."
    )


def has_amx(device_name: Optional[str]) -> bool:
    """Whether a row is of the processor with matrix instructions for bfloat16."""
    return "amx_bf16" in (device_name or "")


def models(size: str, batch_size: str = "1", dtype: str = "float32", amx: bool = False) -> dict[Key, Row]:
    """Rows of cost_cpu.csv beside a ViT of that size, of processors with or without matrix instructions (AMX)."""
    return {
        Key(row["model"], row["attention"] == "fused", int(row["img_size"]), row["mode"]): row
        for row in read("cost_cpu.csv")
        if (row["dtype"], row["batch_size"]) == (dtype, batch_size) and row["baseline"] == f"vit_{size}_patch16_224"
        if row["compile"] == "off"
        if has_amx(row["device_name"]) == amx
    }


def name_of(key: Key) -> str:
    return f"`{key.model}`" if key.fused else f"`{key.model}`, unfused"


def sizes(cells: dict[Key, Row]) -> list[int]:
    return sorted({key.img_size for key in cells})


def model_speed(size: str, mode: str, amx: bool = False) -> str:
    """Speed of whole models beside softmax through SDPA over the image size, and softmax's own milliseconds."""
    cells = {key: row for key, row in models(size, amx=amx).items() if key.mode == mode and is_timed(row)}
    body = []
    for name, fused in dict.fromkeys(key[:2] for key in cells):
        found = [cells.get(Key(name, fused, pixels, mode)) for pixels in sizes(cells)]
        line = [speed(row) for row in found]
        if fused and name.startswith("vit_"):
            line = [f"{float(row['latency_p50_ms']):.0f} ms, {text}" if row else "" for row, text in zip(found, line)]
        body.append([name_of(Key(name, fused, 0, mode)), *line])
    return markdown(["", *(f"{pixels:,} px" for pixels in sizes(cells))], body, measured(cells.values()))


def half_precision() -> str:
    """Speed of ViT-Ti in bfloat16 beside softmax in bfloat16, and from how many tokens it is above 1."""
    cells = {key: row for key, row in models("tiny", dtype="bfloat16", amx=True).items() if key.fused and is_timed(row)}
    places = sorted({(key.mode, key.img_size) for key in cells})
    body = []
    for name in dict.fromkeys(key.model for key in cells):
        found = [cells.get(Key(name, True, pixels, mode)) for mode, pixels in places]
        if name.startswith("vit_"):
            line = [f"{float(row['latency_p50_ms']):,.0f} ms" if row else "" for row in found] + [""] * len(MODES)
        else:
            line = [speed(row, spread=False) for row in found]
            line += [crossing(cells, name, mode, spread=False) for mode in MODES]
        body.append([f"`{name}`", *line])
    head = [f"{MODES[mode]}, {pixels:,} px" for mode, pixels in places]
    head += [f"{what}, faster from (tokens)" for what in MODES.values()]
    return markdown(["", *head], body, measured(cells.values()))


def model_memory(size: str) -> str:
    """Peak memory of a training step of one image, with weights and AdamW's state, over the image size."""
    cells = {key: row for key, row in models(size).items() if key.mode == "train"}
    body = []
    for name, fused in dict.fromkeys(key[:2] for key in cells):
        found = [cells.get(Key(name, fused, pixels, "train")) for pixels in sizes(cells)]
        line = [f"{float(row['peak_memory_mib']):,.0f} MiB" if row else "" for row in found]
        body.append([name_of(Key(name, fused, 0, "train")), *line])
    versions = [dict(row, rounds="") for row in cells.values()]  # a peak of memory is the same in every round
    return markdown(["", *(f"{pixels:,} px" for pixels in sizes(cells))], body, measured(versions))


def model_operations() -> str:
    """GFLOPs of the forward pass of one image, for both sizes of model."""
    cells = {size: models(size) for size in ("tiny", "small")}
    places = [(size, pixels) for size in cells for pixels in sizes(cells[size])]
    body = []
    for name in dict.fromkeys(key.model for key in cells["tiny"] if key.fused):
        line = []
        for size, pixels in places:
            row = cells[size].get(Key(name.replace("tiny", size), True, pixels, "infer"))
            line.append(f"{float(row['gflops']):,.1f}" if row else "")
        body.append([f"`{name.replace('tiny', '*')}`", *line])
    return markdown(["", *(f"{size}, {pixels:,} px" for size, pixels in places)], body)


def crossing(cells: dict[Key, Row], model: str, mode: str, spread: bool = True) -> str:
    """From how many tokens a model is faster than softmax, by interpolation, and what the ratios' spread allows."""
    mine = [row for key, row in cells.items() if (key.model, key.mode) == (model, mode) and is_timed(row)]
    tokens = [int(row["tokens"]) for row in mine]
    ratios = ([float(row[column]) for row in mine] for column in ("speedup", "speedup_low", "speedup_high"))
    median, earliest, latest = crossover(tokens, *ratios)
    if median is None:
        return f"not up to {max(tokens):,}"
    least = min(tokens)
    early, middle = ("" if n is None else f"below {least:,}" if n == least else f"{n:,.0f}" for n in (earliest, median))
    if not spread or latest == least:
        return middle
    return f"{middle} ({early} to {'' if latest is None else f'{latest:,.0f}'})"


def crossovers() -> str:
    """From how many tokens each mechanism is faster in a model of ViT-Ti's size."""
    cells = models("tiny")
    names = [name for name in dict.fromkeys(key.model for key in cells) if name.startswith("vix_")]
    body = [[f"`{name}`", *(crossing(cells, name, mode) for mode in MODES)] for name in names]
    return markdown(
        ["", "inference from (tokens)", "training from (tokens)"], body, measured(filter(is_timed, cells.values()))
    )


def is_shown(model: str) -> bool:
    """Whether the README shows a model: softmax, and the mechanisms that a plan tries."""
    return not model.startswith("vix_") or bool(MIXERS[model.split("_")[1]].candidates)


def cost() -> str:
    """The README's table: speed of inference and training beside softmax, crossovers and memory."""
    cells = models("tiny")
    at = sorted({key.img_size for key, row in cells.items() if is_timed(row)})
    body = []
    for name in filter(is_shown, dict.fromkeys(key.model for key in cells if key.fused)):
        line = []
        for found in ([cells.get(Key(name, True, pixels, mode)) for mode in MODES] for pixels in at):
            if name.startswith("vit_"):
                line.append(" / ".join(f"{float(row['latency_p50_ms']):,.0f}" for row in found if row) + " ms")
            else:
                line.append(" / ".join(filter(None, (speed(row, spread=False) for row in found))))
        faster_from = ["", ""]
        if name.startswith("vix_"):
            faster_from = [crossing(cells, name, mode, spread=False) for mode in MODES]
        memory = f"{float(cells[Key(name, True, at[-1], 'train')]['peak_memory_mib']):,.0f} MiB"
        body.append([f"`{name}`", *line, " / ".join(filter(None, faster_from)), memory])
    head = [
        "",
        *(f"{pixels:,} px" for pixels in at),
        "faster from (tokens), inference / training",
        f"training memory, {at[-1]:,} px",
    ]
    return markdown(head, body)


def precision() -> str:
    """The one sentence about precision: what was measured on what, and how far softmax is from itself."""
    rows = [row for size in ("tiny", "small") for row in models(size).values() if is_timed(row)]
    control = [float(row["speedup"]) for row in rows if row["model"] == row["baseline"] and row["attention"] == "fused"]
    devices = {row["device"] for row in rows}
    gpu = "" if "cuda" in devices else " No GPU was measured."
    return (
        f"{measured(rows)} Each model is timed in turn with softmax attention through SDPA. A ratio is the median over "
        f"the rounds, and *same* means that 1 is within its 10th to 90th percentile. Softmax timed against itself gave "
        f"{min(control):.2f} to {max(control):.2f}.{gpu}"
    )


def systems() -> str:
    """The paper's other systems and parallel blocks, each beside its own control, in whole models."""
    rows = read("cost_systems.csv")
    cells = {(row["model"], row["baseline"], int(row["img_size"]), row["mode"]): row for row in rows}
    places = list(dict.fromkeys(key[2:] for key in cells))
    body = []
    for model, baseline in dict.fromkeys(key[:2] for key in cells):
        beside = f"`{baseline}`, unfused" if baseline in UNFUSED else f"`{baseline}`"
        body.append([f"`{model}`", beside, *(speed(cells.get((model, baseline, *place))) for place in places)])
    return markdown(["", "beside", *(f"{MODES[mode]}, {size} px" for size, mode in places)], body, measured(rows))
