"""Time of one attention layer beside that of the best known package with the same mechanism.

    pip install "nystrom-attention>=0.0.14" "linformer>=0.2.3" "performer-pytorch>=1.1.4"
    python examples/public_packages.py --out examples/results/public_packages.csv    # ten minutes on a quiet machine

Both layers have ViT-Ti's width, random weights, and the same number of landmarks, projections or features; they get the
same tokens, about 4,096 a batch, and are timed in turn. A ratio above 1 means that the layer of this package is faster.
Rows are appended as they come; what is there already is not repeated.
"""

import argparse
import itertools
import math
import os
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmark import check_numbers, in_turn, layer
from torch import nn

from timm_vix._checks import InputError
from timm_vix._device import device_name, versions
from timm_vix._records import Columns, append_record, check_writable, earlier_records, key_of
from timm_vix.cli import in_one_line

DIM, HEADS = 192, 3
COLUMNS: Columns = dict(
    mixer=str,
    package=str,
    tokens=int,
    batch=int,
    mode=str,
    dtype=str,
    ms=float,
    package_ms=float,
    ratio=float,
    ratio_low=float,
    ratio_high=float,
    device_name=str,
    threads=int,
    torch=str,
    timm=str,
    timm_vix=str,
    error=str,
)
KEY = ("mixer", "package", "tokens", "mode", "dtype", "device_name", "threads")


def nystrom_attention(tokens: int) -> nn.Module:
    found = import_module("nystrom_attention").NystromAttention
    return found(DIM, dim_head=DIM // HEADS, heads=HEADS, num_landmarks=64, residual=False)


def linformer(tokens: int) -> nn.Module:
    return import_module("linformer").LinformerSelfAttention(DIM, tokens, k=64, heads=HEADS)


def performer_pytorch(tokens: int) -> nn.Module:
    return import_module("performer_pytorch").SelfAttention(DIM, heads=HEADS, dim_head=DIM // HEADS, nb_features=256)


# the package, its layer, and the keywords with which ours computes as much
PACKAGES: dict[str, tuple[str, Callable[[int], nn.Module], dict[str, Any]]] = {
    "nystrom": ("nystrom-attention", nystrom_attention, dict(num_landmarks=64)),
    "linformer": ("linformer", linformer, dict(num_proj_tokens=64, sharing="headwise")),
    "performer": ("performer-pytorch", performer_pytorch, dict(num_features=256)),
}


def package_of(mixer: str) -> str:
    """Name and version of the package.

    Raises:
        InputError: where it isn't installed.
    """
    name = PACKAGES[mixer][0]
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError as error:
        raise InputError(f"{name} is not installed; pip install '{name}'") from error


def measure(mixer: str, tokens: int, mode: str, dtype: str, pairs: int) -> dict[str, Any]:
    """The measured columns of a row, or why the package doesn't run."""
    _, package, keywords = PACKAGES[mixer]
    train, kind = mode == "train", getattr(torch, dtype)
    torch.manual_seed(0)
    ours = layer(mixer, math.isqrt(tokens - 1), keywords).to(kind).train(train)
    theirs = package(tokens).to(kind).train(train)
    batch = max(1, 4096 // tokens)
    x = torch.randn(batch, tokens, DIM, dtype=kind, requires_grad=train)
    try:
        times = in_turn(ours, theirs, x, train, pairs)
    except RuntimeError as error:  # one that has no half precision
        return dict(batch=batch, error=str(error).splitlines()[0])
    return dict(batch=batch, **dict(zip(("ms", "package_ms", "ratio", "ratio_low", "ratio_high"), times)))


def measure_all(given: argparse.Namespace) -> None:
    """Measure what has no row yet."""
    check_numbers(given)
    torch.set_num_threads(given.threads)
    packages = {mixer: package_of(mixer) for mixer in given.mixers}
    check_writable(given.out)
    done = {key_of(row, KEY) for row in earlier_records(given.out, COLUMNS)[0]}
    for mixer, dtype, mode, tokens in itertools.product(given.mixers, given.dtype, given.mode, given.tokens):
        job = dict(mixer=mixer, package=packages[mixer], tokens=tokens, mode=mode, dtype=dtype)
        job |= dict(device_name=device_name("cpu"), threads=given.threads)
        if key_of(job, KEY) in done:
            continue
        row = {**job, **versions(), **measure(mixer, tokens, mode, dtype, given.pairs)}
        append_record(given.out, COLUMNS, row)
        shown = row.get("error") or f"{row['ms']:.2f} ms, {row['ratio']:.2f} times as fast as {job['package']}"
        print(f"{mixer}, {tokens} tokens, {mode}, {dtype}: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=list(PACKAGES), choices=PACKAGES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 577, 1025, 4097], help="1 + a square")
    parser.add_argument("--mode", nargs="+", default=["infer", "train"], choices=("infer", "train"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("public_packages.csv"))
    in_one_line(measure_all)(parser.parse_args())


if __name__ == "__main__":
    main()
