"""Table of dense features: how near the patch tokens of a converted backbone are to the original's, and its speed."""

from . import markdown, measured, read, values


def dense_features() -> str:
    """Each conversion at each size of image, softmax first."""
    rows = read("dense_features.csv")
    cells = {(row["model"], row["training"], row["img_size"]): row for row in rows}
    sizes = values(rows, "img_size")
    body = []
    for model, training in dict.fromkeys(key[:2] for key in cells):
        line = []
        for row in (cells.get((model, training, size)) for size in sizes):
            line += [
                f"{float(row['cosine']):.3f}" if row else "",
                f"{float(row['relative_error']):.2f}" if row else "",
                f"{float(row['faster_than_softmax']):.2f}" if row else "",
                f"{float(row['gradient_memory_mib']):,.0f} MiB" if row else "",
            ]
        body.append([model, training, *line])
    columns = ("cosine", "relative error", "times as fast", "gradient memory")
    counts = {row["img_size"]: (row["tokens"], row["images"]) for row in rows}
    numbers = "; ".join(f"{size} px: {tokens} tokens, {images} images" for size, (tokens, images) in counts.items())
    head = ["converted", "training", *(f"{size} px: {column}" for size in sizes for column in columns)]
    return markdown(head, body, f"{numbers}. {measured(rows)}")
