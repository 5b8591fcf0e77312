"""What DeiT-Tiny keeps when the layers of its MLPs become structured ones, without training, and how fast it is then.

    python examples/structured_mlp.py --images nips17_dev --weights deit_tiny_patch16_224.safetensors \\
        --data-dir caltech101/train

``structure_mlp`` fits the layers to images of the data folder. Top-1 is that of the labelled photographs, and the time
is measured in turn with the original. Each row is appended to examples/results/structured_mlp.csv; stopped at any time,
the same command continues.
"""

import argparse
import copy
from pathlib import Path

import torch
from fold_norms import BATCHES, SOURCE, times_beside

from timm_vix._checks import check_integer
from timm_vix._device import device_name, versions
from timm_vix._records import Columns, append_record, check_writable, earlier_records, key_of
from timm_vix.cli import in_one_line
from timm_vix.conversion.feedforward import structure_mlp
from timm_vix.deploy.check import accuracy, open_labelled, read_calibration
from timm_vix.train.teacher import build_teacher

STRUCTURES = [*(("low_rank", share) for share in (0.84, 0.63, 0.5)), *(("block", share) for share in (0.63, 0.32))]
# what a row is, and what it tells
KEY: Columns = dict(kind=str, share=float, fitted_to=int, images=int, device_name=str, threads=int)
COLUMNS: Columns = {
    **KEY,
    **dict(weights_left=float, top1=float, agreement=float),
    **{f"{name}_{batch}": float for batch in BATCHES for name in ("ms", "faster")},
    **dict(torch=str, timm=str, timm_vix=str),
}


def run_all(run: argparse.Namespace) -> None:
    """Measure what has no row yet."""
    for name in ("fit", "count", "rounds", "threads"):
        check_integer(name, getattr(run, name), 1)
    torch.set_num_threads(run.threads)
    check_writable(run.out)
    known, _ = earlier_records(run.out, COLUMNS)
    done = {key_of(row, KEY) for row in known}
    original, config = build_teacher(SOURCE, weights=run.weights)
    photographs = open_labelled(run.images, original, run.count, config)
    fitted_to = read_calibration(run.data_dir, run.fit, config)
    shared = dict(images=len(photographs), device_name=device_name("cpu"), threads=run.threads)
    for kind, share in STRUCTURES:
        row = dict(kind=kind, share=share, fitted_to=len(fitted_to), **shared)
        if key_of(row, KEY) in done:
            continue
        model = copy.deepcopy(original)
        left = structure_mlp(model, kind, share, fitted_to)
        scores = accuracy(dict(original=original, this=model), photographs, config)
        row["weights_left"] = round(sum(left.values()) / len(left), 3)  # all layers are of the same size
        row |= {name: round(scores[name]["this"], 2) for name in ("top1", "agreement")}
        row |= times_beside(original, model, config, run.rounds)
        append_record(run.out, COLUMNS, row | versions())
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="labelled photographs: labels.csv and images/")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data-dir", required=True, type=Path, help="other images, which the layers are fitted to")
    parser.add_argument("--fit", type=int, default=48, help="number of these images")
    parser.add_argument("--count", type=int, default=1000, help="photographs")
    parser.add_argument("--rounds", type=int, default=25, help="least number of rounds of a latency")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "structured_mlp.csv")
    in_one_line(run_all)(parser.parse_args())


if __name__ == "__main__":
    main()
