"""Table of segmentation: softmax and efficient attention, trained by one recipe."""

from . import Row, markdown, measured, read


def camvid() -> str:
    """mIoU, time and memory on CamVid; softmax comes first in each block of equal model, size and budget."""
    rows = read("segment_camvid.csv")
    body = []
    for row in sorted(rows, key=lambda row: (block_of(rows, row), row["mixer"] != "softmax")):
        mixer = f"{row['mixer']} ({row['keywords']})" if row["keywords"] else row["mixer"]
        backbone = f"`{row['model']}`, {row['img_size']}, {row['tokens']} tokens, {row['head']} head"
        accuracy = [f"{float(row[name]):.1f}" for name in ("miou", "pixel_accuracy")]
        training = [f"{float(row['epochs']):.1f}", f"{float(row['train_s']) / 60:.1f} min"]
        costs = [cost(row, "step_ms", "ms"), faster(row, "training"), cost(row, "peak_memory_mib", "MiB")]
        inference = [cost(row, "infer_ms", "ms"), faster(row, "inference")]
        body.append([mixer, backbone, row["budget"], *accuracy, *training, *costs, *inference])
    head = ["", "backbone", "budget", "mIoU %", "pixels right %", "epochs", "training", "step", "faster training"]
    head += ["peak memory", "inference", "faster inference"]
    return markdown(head, body, measured(rows))


def block_of(rows: list[Row], row: Row) -> int:
    """The place of the first row of equal model, size, head and budget."""
    names = ("model", "img_size", "head", "trained_blocks", "budget")
    return next(i for i, other in enumerate(rows) if all(other[name] == row[name] for name in names))


def cost(row: Row, name: str, unit: str) -> str:
    """A cost with its unit; nothing where it wasn't measured."""
    return f"{float(row[name]):,.0f} {unit}" if row[name] else ""


def faster(row: Row, kind: str) -> str:
    """How many times as fast as softmax, which has none; nothing where it wasn't measured."""
    ratio = row[f"faster_{kind}"]
    return f"{float(ratio):.2f}" if ratio and row["mixer"] != "softmax" else ""
