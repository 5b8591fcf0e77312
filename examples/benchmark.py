"""Time and memory of each token mixer against softmax attention, one layer of ViT-Ti width.

    python examples/benchmark.py --out examples/results/mixers.csv   # hours, mostly softmax at 16,385 tokens

Each row pairs a mixer with timm's attention through scaled_dot_product_attention: the two are timed in turn, and the
ratio is the median over the pairs (above 1: the mixer is faster), low and high are their quartiles. Peak memory is that
of a training step in a process of its own, less what the process holds before it. Rows are appended one by one; what is
there already is not repeated.
"""

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import timm_vix  # noqa: F401  registers the names
from timm_vix._checks import InputError, check_integer
from timm_vix._device import device_name, find_device
from timm_vix._names import parse_model
from timm_vix._records import Columns, append_record, earlier_records, key_of
from timm_vix.cli import in_one_line
from timm_vix.measure.job import timed, warm_up
from timm_vix.measure.memory import PeakMemory, set_malloc
from timm_vix.mixers import MIXERS
from timm_vix.mixers._keywords import check_keywords

COLUMNS: Columns = dict(
    mixer=str, tokens=int, batch=int, mode=str, dtype=str, options=str,
    ms=float, softmax_ms=float, ratio=float, ratio_low=float, ratio_high=float, peak_memory_mib=float,
    device=str, threads=int, torch=str, timm=str,
)  # fmt: skip
KEY = ("mixer", "tokens", "mode", "dtype", "options", "device", "threads")


def layer(mixer: str, side: int, options: dict) -> torch.nn.Module:
    name = "vit_tiny_patch16_224" if mixer == "softmax" else f"vix_{mixer}_tiny"
    return timm.create_model(name, img_size=16 * side, depth=1, **options).blocks[0].attn


def step(module: torch.nn.Module, x: torch.Tensor, train: bool) -> float:
    def call() -> None:
        if train:
            module(x).float().square().mean().backward()
        else:
            with torch.inference_mode():
                module(x)

    return timed(call, x.device.type)


def in_turn(ours: torch.nn.Module, other: torch.nn.Module, x: torch.Tensor, train: bool, pairs: int) -> list[float]:
    """Time two layers in turn.

    Returns:
        The median milliseconds of either, how many times as fast ours is, the median over the pairs, and its quartiles.
    """
    for module in (other, ours):
        step(module, x, train)
    times = [(step(ours, x, train), step(other, x, train)) for _ in range(pairs)]
    ratios = sorted(b / a for a, b in times)
    milliseconds = [statistics.median(own) * 1e3 for own in zip(*times)]
    quartiles = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return [round(number, 3) for number in (*milliseconds, statistics.median(ratios), *quartiles)]


def peak_memory(args: argparse.Namespace) -> None:
    """Print the MiB that a training step adds in this process."""
    if args.device == "cpu":
        set_malloc(2**17)
    warm_up(args.device)
    module, x = prepare(args, args.only)
    memory = PeakMemory(args.device)
    step(module, x, True)
    print(memory.read())


def prepare(args: argparse.Namespace, mixer: str) -> tuple[torch.nn.Module, torch.Tensor]:
    side = math.isqrt(args.tokens[0] - 1)
    dtype = getattr(torch, args.dtype[0])
    train = args.mode[0] == "train"
    module = layer(mixer, side, keywords_of(args.options) if mixer == args.only else {})
    batch = max(1, args.batch_tokens // args.tokens[0])
    x = torch.randn(batch, args.tokens[0], 192, device=args.device, dtype=dtype, requires_grad=train)
    return module.to(args.device, dtype).train(train), x


def keywords_of(options: list[str]) -> dict[str, Any]:
    """Keywords from words such as num_landmarks=64, read as ``timm-vix cost`` reads those of a model."""
    return parse_model(" ".join(["mixer", *options]), find=str)[1]


def row(args: argparse.Namespace) -> dict:
    """Time ``args.only`` against softmax at the first tokens, mode and dtype of ``args``."""
    train = args.mode[0] == "train"
    ours, x = prepare(args, args.only)
    softmax, _ = prepare(args, "softmax")
    ms, softmax_ms, *ratios = in_turn(ours, softmax, x, train, args.pairs)
    command = [sys.executable, __file__, "--memory", "--only", args.only, "--tokens", str(args.tokens[0])]
    command += ["--dtype", args.dtype[0], "--mode", "train", "--device", args.device]
    command += ["--batch-tokens", str(args.batch_tokens), "--threads", str(args.threads), "--options", *args.options]
    # a process that ends for lack of memory leaves the times
    done = subprocess.run(command, capture_output=True, text=True) if train else None
    memory = round(float(done.stdout), 1) if done and done.returncode == 0 else None
    return dict(
        mixer=args.only,
        tokens=args.tokens[0],
        batch=x.shape[0],
        mode=args.mode[0],
        dtype=args.dtype[0],
        options=" ".join(args.options),
        ms=ms,
        softmax_ms=softmax_ms,
        **dict(zip(("ratio", "ratio_low", "ratio_high"), ratios)),
        peak_memory_mib=memory,
        device=device_of(args),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
    )


def check_numbers(args: argparse.Namespace) -> None:
    """Raise InputError for numbers of threads, pairs or tokens with which no layer can be timed."""
    for name in ("threads", "pairs"):
        check_integer(name, getattr(args, name), 1)
    for tokens in args.tokens:
        if tokens < 2 or math.isqrt(tokens - 1) ** 2 != tokens - 1:
            raise InputError(f"tokens={tokens}: expected 1 more than a square, such as 197, for a class token")


def device_of(args: argparse.Namespace) -> str:
    """The device as a row has it."""
    return device_name(args.device)


def measure_all(args: argparse.Namespace) -> None:
    """Measure what has no row yet."""
    check_numbers(args)
    check_integer("batch_tokens", args.batch_tokens, 1)
    for mixer in [args.only] if args.only else args.mixers:
        check_keywords(mixer, keywords_of(args.options))
    args.device = find_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory:
        peak_memory(args)
        return
    done = {key_of(record, KEY) for record in earlier_records(args.out, COLUMNS)[0]}
    wanted = list(itertools.product(args.dtype, args.mode, args.tokens, args.mixers))
    for i, (dtype, mode, tokens, mixer) in enumerate(wanted):
        if (mixer, tokens, mode, dtype, " ".join(args.options) or None, device_of(args), args.threads) in done:
            continue
        one = argparse.Namespace(**vars(args))
        one.only, one.tokens, one.mode, one.dtype = mixer, [tokens], [mode], [dtype]
        if tokens > 10000:
            one.pairs = 1  # half a minute a step of softmax
        result = row(one)
        append_record(args.out, COLUMNS, result)
        memory = result["peak_memory_mib"]
        print(
            f"[{i + 1}/{len(wanted)}] {mixer:9s} {tokens:6d} {mode:5s} {dtype:8s} {result['ms']:9.2f} ms, "
            f"softmax / {mixer} {result['ratio']:.2f}{f', {memory} MiB' if memory else ''}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=MIXERS, choices=MIXERS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 577, 1025, 4097, 16385], help="1 + a square")
    parser.add_argument("--mode", nargs="+", default=["infer", "train"], choices=("infer", "train"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="images a batch = this / tokens")
    parser.add_argument("--options", nargs="*", default=[], help="keywords of the mixer, e.g. num_landmarks=64")
    parser.add_argument("--out", type=Path, default=Path("mixers.csv"))
    parser.add_argument("--only", choices=MIXERS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    in_one_line(measure_all)(parser.parse_args())


if __name__ == "__main__":
    main()
