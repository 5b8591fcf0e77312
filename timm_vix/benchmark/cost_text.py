"""Rows of ``timm-vix cost`` as text: a line about one row, and the table of a sweep."""

from .._records import Record, aligned, grouped

NOTE = (
    "ms and MiB at the smallest batch; with mode=train a training step. x softmax: speed over the softmax baseline,\n"
    "timed in turn, fused where a fused kernel can run it. none: the spread over the rounds (10th to 90th percentile)\n"
    "contains 1, so no difference was measured. few rounds: with fewer than five, no difference is reported."
)


def describe(record: Record) -> str:
    """One line about one row."""
    what = f"{record['model']}{', unfused' * (record['attention'] == 'unfused')}"
    what += f", {record['img_size']} px, batch {record['batch_size']}, {record['mode']}, {record['dtype']}"
    what += ", compiled" * (record["compile"] == "on")
    if record.get("error"):
        return f"{what}: failed: {record['error']}"
    memory = record.get("peak_memory_mib")
    size = "" if memory is None else f", {memory:.0f} MiB"
    return f"{what}: {record['latency_p50_ms']:.4g} ms, {ratio(record)}{size}"


def ratio(record: Record) -> str:
    """Times the baseline's speed, with the spread, and whether that is a difference."""
    if record.get("speedup") is None:
        return "no baseline"
    if record.get("speedup_low") is None:
        return f"{record['speedup']:.2f} x softmax ({'one round' if record['rounds'] == 1 else 'two rounds'})"
    text = f"{record['speedup']:.2f} x softmax ({record['speedup_low']:.2f} to {record['speedup_high']:.2f})"
    return text + {"none": ": none", "unknown": ": few rounds"}.get(record["difference"], "")


def summary(records: list[Record]) -> str:
    """A table for the terminal: one line for each model and setting, batch sizes joined."""
    groups = grouped(records, ("img_size", "mode", "dtype", "compile", "model", "attention", "baseline"))
    several = len({baseline for *_, baseline in groups}) > 1
    head = ["px", "mode", "dtype", "compile", "model"]
    head += ["ms (p90)", "x softmax (spread)", "images/s at best batch", "MiB"]
    lines = [head]
    for (size, mode, dtype, compiled, model, kind, baseline), group in groups.items():
        good = [record for record in group if record["error"] is None]
        name = model if kind == "fused" else f"{model}, unfused"
        name += f", beside {baseline}" if several and baseline != model else ""
        start = [str(size), mode, dtype, compiled, name]
        if not good:
            lines.append([*start, f"failed: {group[0]['error']}"[:90]])
            continue
        first = min(good, key=lambda record: record["batch_size"])
        best = max(good, key=lambda record: record["images_per_s"])
        latency = f"{first['latency_p50_ms']:.4g} ({first['latency_p90_ms']:.4g})"
        throughput = f"{best['images_per_s']:.4g} at {best['batch_size']}"
        memory = "" if first["peak_memory_mib"] is None else f"{first['peak_memory_mib']:.0f}"
        lines.append([*start, latency, ratio(first).replace(" x softmax", ""), throughput, memory])
    return f"{aligned(lines)}\n\n{NOTE}"
