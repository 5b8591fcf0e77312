"""Table of exported models: accuracy, size and latency of each format beside eager mode and torch.compile."""

from . import markdown, measured, read


def deployment() -> str:
    """DeiT-Tiny and its conversions as files; softmax comes first."""
    rows = read("deploy.csv")
    body = []
    for row in rows:
        accuracy = [f"{float(row['top1']):.1f} ({float(row['top1']) - float(row['eager_top1']):+.1f})"]
        calibrated = [row["calibration_images"] or ""]
        body.append([row["model"], row["format"], row["dtype"], *calibrated, f"{float(row['size_mb']):.1f}", *accuracy])
        for batch in ("1", "8"):
            ratios = [row[f"faster_than_{name}_{batch}"] for name in ("eager", "compiled")]
            body[-1] += [f"{float(row[f'ms_{batch}']):.1f} ms", " / ".join(f"{float(ratio):.2f}" for ratio in ratios)]
    head = ["model", "format", "dtype", "calibrated on images", "MB", "top-1, % (beside eager)"]
    for batch in (1, 8):
        head += [f"batch {batch}", f"batch {batch}: times as fast as eager / compiled"]
    # rows of several dtypes stand in one table, which has a column for them
    machine = measured({**row, "dtype": ""} for row in rows)
    return markdown(
        head, body, f"{machine} Instruction sets: {' '.join(sorted({row['instructions'] for row in rows}))}."
    )
