"""Variants of axial attention in all layers of DeiT-Tiny, untrained: how near each comes to softmax attention.

    python examples/axial_variants.py --images nips17_dev --weights deit_tiny_patch16_224.safetensors --img-size 224 448

The docstring of ``timm_vix/mixers/axial.py`` has the notation. A row of the grid is summarised outside of the strip R
for each column, by the log l of its mass and by an attended key and value. Here this is written out for any variant,
without regard to time. Rows are appended to examples/results/axial_variants.csv as they come.

Shapes: A images and heads, H rows and W columns, D head width.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from convert_deit import read_images, softmax
from timm.data import create_transform, resolve_data_config
from torch import nn
from tqdm import tqdm

from timm_vix._device import device_name, versions
from timm_vix._records import Columns, append_record, earlier_records, key_of
from timm_vix._weights import check_weights
from timm_vix.cli import in_one_line

COLUMNS: Columns = dict(
    variant=str,
    img_size=int,
    images=int,
    keys=int,
    top1=float,
    softmax_top1=float,
    agreement=float,
    divergence=float,
    device_name=str,
    threads=int,
    torch=str,
    timm=str,
    timm_vix=str,
)
KEY = ("variant", "img_size", "images")
VARIANTS: dict[str, dict[str, Any]] = {
    "one summary of each row, strips of 2 (built in)": {},
    "columns first (built in)": dict(columns_first=True),
    "mean of rows first and columns first": dict(both=True),
    "strips of 1 (built in)": dict(strip_width=1),
    "strips of 4 (built in)": dict(strip_width=4),
    "strips of 7 (built in)": dict(strip_width=7),
    "two summaries of each row": dict(pieces=2),
    "four summaries of each row": dict(pieces=4),
    "four summaries of each row, strips of 1": dict(pieces=4, strip_width=1),
    "one summary of two rows": dict(rows=2),
    "second order, diagonal": dict(curvature=True),
}


def summaries(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, outside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attended keys and values (A, R, W, D), entropies (A, R, W) and variances of keys (A, R, W, D) of R groups.

    Args:
        q: the query of each group and column, scaled, (A, R, W, D).
        k, v: the M tokens of each group, (A, R, M, D).
        outside: which of them are outside of a column's strip, (W, M).
    """
    logits = torch.matmul(q, k.transpose(2, 3)).masked_fill(~outside, -1e30)
    log_p = logits.log_softmax(3)
    p = log_p.exp()
    entropy = (-p * log_p).sum(3).masked_fill(~outside.any(1), -1e30)  # of a piece within the strip: left out
    mean = torch.matmul(p, k)
    return mean, torch.matmul(p, v), entropy, torch.matmul(p, k.square()) - mean.square()


def axial_rows(
    q: torch.Tensor, prefix: list[torch.Tensor], k: torch.Tensor, v: torch.Tensor, given: dict[str, Any]
) -> torch.Tensor:
    """Attention of the patches, (A, H, W, D), of scaled queries, keys and values (A, H, W, D) and prefix tokens."""
    width, pieces, rows = given.get("strip_width", 2), given.get("pieces", 1), given.get("rows", 1)
    H, W = q.shape[1:3]
    strip, piece = torch.arange(W) // width, torch.arange(W) * pieces // W
    # several rows have one query for each column, their mean
    at = q.unflatten(1, (H // rows, rows)).mean(2)
    tokens = [t.unflatten(1, (H // rows, rows)).flatten(2, 3) for t in (k, v)]
    found = []
    for number in range(pieces):
        outside = (strip.unsqueeze(1) != strip) & (piece == number)
        found.append(summaries(at, *tokens, outside.repeat(1, rows)))
    y = torch.empty_like(v)
    for j in range(W):
        own = (strip == strip[j]).nonzero().flatten()
        query = q[:, :, j]
        keys, values = ([first, t[:, :, own].flatten(1, 2)] for first, t in zip(prefix, (k, v)))
        logits = [torch.matmul(query, torch.cat(keys, 1).transpose(1, 2))]
        for mean, value, entropy, variance in found:
            far = torch.matmul(query, mean[:, :, j].transpose(1, 2)) + entropy[:, :, j].unsqueeze(1)
            if given.get("curvature"):
                away = query.unsqueeze(2) - at[:, :, j].unsqueeze(1)
                far = far + 0.5 * (away.square() * variance[:, :, j].unsqueeze(1)).sum(3)
            logits.append(far)
            values.append(value[:, :, j])
        y[:, :, j] = torch.matmul(torch.cat(logits, 2).softmax(2), torch.cat(values, 1))
    return y


class Variant(nn.Module):
    """A variant with the weights of timm's attention, (B, N, C) -> (B, N, C)."""

    def __init__(self, attn: nn.Module, num_prefix_tokens: int, grid: tuple[int, int], given: dict[str, Any]) -> None:
        super().__init__()
        self.attn, self.num_prefix_tokens, self.grid, self.given = attn, num_prefix_tokens, grid, given

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        P, h = self.num_prefix_tokens, self.attn.num_heads
        q, k, v = self.attn.qkv(x).unflatten(2, (3, h, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        q = q * q.shape[2] ** -0.5
        first = torch.matmul(torch.matmul(q[:, :P], k.transpose(1, 2)).softmax(2), v)
        prefix, patches = [k[:, :P], v[:, :P]], [t[:, P:].unflatten(1, self.grid) for t in (q, k, v)]

        def along(columns: bool) -> torch.Tensor:
            turned = [t.transpose(1, 2) for t in patches] if columns else patches
            y = axial_rows(turned[0], prefix, turned[1], turned[2], self.given)
            return y.transpose(1, 2) if columns else y

        if self.given.get("both"):
            y = (along(True) + along(False)) / 2
        else:
            y = along(self.given.get("columns_first", False))
        y = torch.cat([first, y.flatten(1, 2)], 1).unflatten(0, (len(x), h))
        return self.attn.proj(y.transpose(1, 2).flatten(2))


def num_keys(H: int, W: int, given: dict[str, Any]) -> int:
    """With how many keys a query of the patches is multiplied, in both passes."""
    width, pieces, rows = given.get("strip_width", 2), given.get("pieces", 1), given.get("rows", 1)
    return (W + width * H + pieces * H // rows) * (2 if given.get("both") else 1)


@torch.inference_mode()
def logits_of(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, title: str) -> torch.Tensor:
    return torch.cat([model(part) for part in tqdm(images.split(4), title, leave=False, disable=None)])


def measure_all(given: argparse.Namespace) -> None:
    """Measure what has no row yet."""
    check_weights("weights", given.weights)
    if given.threads:
        torch.set_num_threads(given.threads)
    rows, _ = earlier_records(given.out, COLUMNS)
    known = {key_of(row, KEY) for row in rows}
    for size in given.img_size:
        model = softmax(given.weights, size)
        config = resolve_data_config(dict(input_size=(3, size, size)), model=model)
        images, labels = read_images(given.images, given.count, create_transform(**config))
        original, grid = [block.attn for block in model.blocks], model.patch_embed.grid_size
        wanted = [name for name in VARIANTS if (name, size, len(images)) not in known]
        expected = logits_of(model, images, "softmax") if wanted else None
        for name in wanted:
            for block, attn in zip(model.blocks, original):
                block.attn = Variant(attn, model.num_prefix_tokens, grid, VARIANTS[name])
            logits = logits_of(model, images, name)
            p = expected.softmax(1)
            row = dict(
                variant=name,
                img_size=size,
                images=len(images),
                keys=num_keys(*grid, VARIANTS[name]),
                top1=round(100 * float((logits.argmax(1) == labels).float().mean()), 1),
                softmax_top1=round(100 * float((expected.argmax(1) == labels).float().mean()), 1),
                agreement=round(100 * float((logits.argmax(1) == expected.argmax(1)).float().mean()), 1),
                divergence=round(float((p * (expected.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()), 4),
                device_name=device_name("cpu"),
                threads=torch.get_num_threads(),
                **versions(),
            )
            append_record(given.out, COLUMNS, row)
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="folder with labels.csv and images/")
    parser.add_argument("--weights", required=True, help="of deit_tiny_patch16_224")
    parser.add_argument("--img-size", nargs="+", type=int, default=[224])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "axial_variants.csv")
    in_one_line(measure_all)(parser.parse_args())


if __name__ == "__main__":
    main()
