"""Table of segmentation: softmax and efficient attention, trained by one recipe."""

from . import Row, cell, markdown, measured, read


def camvid() -> str:
    """mIoU, time and memory on CamVid; softmax comes first in each block of equal model, size and budget."""
    rows = read("segment_camvid.csv")
    body = []
    for row in sorted(rows, key=lambda row: (block_of(rows, row), row["mixer"] != "softmax")):
        mixer = f"{row['mixer']} ({row['keywords']})" if row["keywords"] else row["mixer"]
        backbone = f"`{row['model']}`, {row['img_size']}, {row['tokens']} tokens, {row['head']} head"
        accuracy = [f"{float(row[name]):.1f}" for name in ("miou", "pixel_accuracy")]
        training = [f"{float(row['epochs']):.1f}", f"{float(row['train_s']) / 60:.1f} min"]
        # the ratios are paired, so the times of other rows would be of another measurement
        step, infer = (cell(row, name, unit=" ms") * (row["mixer"] == "softmax") for name in ("step_ms", "infer_ms"))
        costs = [step, faster(row, "training"), cell(row, "peak_memory_mib", unit=" MiB")]
        inference = [infer, faster(row, "inference")]
        body.append([mixer, backbone, row["budget"], *accuracy, *training, *costs, *inference])
    head = ["", "backbone", "budget", "mIoU %", "pixels right %", "epochs", "training", "step", "faster training"]
    head += ["peak memory", "inference", "faster inference"]
    return markdown(head, body, measured(rows))


def block_of(rows: list[Row], row: Row) -> int:
    """The place of the first row of equal model, size, head and budget."""
    names = ("model", "img_size", "head", "trained_blocks", "budget")
    return next(i for i, other in enumerate(rows) if all(other[name] == row[name] for name in names))


def faster(row: Row, kind: str) -> str:
    """How many times as fast as softmax, which has none."""
    return "" if row["mixer"] == "softmax" else cell(row, f"faster_{kind}", 2)
