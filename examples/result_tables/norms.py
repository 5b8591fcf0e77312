"""Tables of folded norms and of structured MLPs: what DeiT-Tiny keeps with them, and how fast it is."""

from . import cell, markdown, measured, read


def folded() -> str:
    """The original and the folded models, in float and int8; each beside the original in eager mode."""
    rows = read("fold_norms.csv")
    body = []
    for row in rows:
        training = f"{row['steps']} steps" if int(row["steps"]) else "none"
        body.append([row["norms"], training, f"{row['format']}, {row['dtype']}", row["top1"], row["agreement"]])
        body[-1] += [f"{float(row[f'faster_{batch}']):.2f}" for batch in ("1", "8")]
    head = ["norms", "training", "format", "top-1, %", "the same class as the original, %"]
    # formats of several dtypes stand in one table, which has a column for them
    machine = measured({**row, "dtype": ""} for row in rows)
    return markdown([*head, "times as fast, one image", "eight images"], body, machine)


def structured() -> str:
    """The models with structured MLPs, without training; each beside the original in eager mode."""
    rows = read("structured_mlp.csv")
    body = [
        [
            {"low_rank": "low rank", "block": "blocks"}[row["kind"]],
            cell(row, "weights_left", 3),
            row["top1"],
            row["agreement"],
            *(f"{float(row[f'faster_{batch}']):.2f}" for batch in ("1", "8")),
        ]
        for row in rows
    ]
    head = ["structure", "share of the MLP's weights", "top-1, %", "the same class as the original, %"]
    return markdown([*head, "times as fast, one image", "eight images"], body, measured(rows))
