"""Cost of softmax and of every mixer from 224 to 2,048 px (197 to 16,385 tokens): ``timm-vix cost`` in many parts.

    python examples/cost_over_resolution.py                         # all: many hours on two CPU cores, mostly softmax
    python examples/cost_over_resolution.py --sizes tiny --img-size 224 512 1024 --dtype float32          # 20 minutes
    python examples/cost_over_resolution.py --device cuda --compile off on --out cost_cuda.csv

Rows are appended to examples/results/cost_cpu.csv one by one; stopped at any time, the same command continues.
"""

import argparse
import itertools
import sys
from pathlib import Path

import timm

import timm_vix
from timm_vix.benchmark import cost
from timm_vix.cli import in_one_line

MIXERS = [name for name in timm_vix.mixers.MIXERS if name != "softmax"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=("tiny", "small", "base"))
    parser.add_argument("--mixers", nargs="+", default=MIXERS, choices=MIXERS)
    parser.add_argument("--img-size", type=int, nargs="+", default=[224, 384, 512, 1024, 2048])
    parser.add_argument("--mode", nargs="+", default=["infer", "train"], choices=("infer", "train"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--compile", nargs="+", default=["off"], choices=("off", "on"))
    parser.add_argument("--batch-size", nargs="+", default=["1"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", default="9", help="least number of paired rounds")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "cost_cpu.csv"))
    given = parser.parse_args()
    code = 0
    sweep = argparse.ArgumentParser(prog="timm-vix cost")
    cost.add_arguments(sweep)
    parts = itertools.product(given.dtype, given.compile, given.sizes, given.img_size, given.mode)
    for dtype, compiled, size, img_size, mode in parts:
        print(f"== {size}, {img_size} px, {mode}, {dtype}, compile {compiled}", flush=True)
        options = ["--img-size", str(img_size), "--mode", mode, "--dtype", dtype, "--compile", compiled]
        options += ["--batch-size", *given.batch_size, "--device", given.device, "--threads", given.threads]
        # on a CPU one step of softmax takes a minute at 2,048 px
        slow = given.device == "cpu" and img_size > 1024
        options += ["--rounds", "1", "--seconds", "0"] if slow else ["--rounds", given.rounds]
        models = [name for mixer in given.mixers if timm.is_model(name := f"vix_{mixer}_{size}")]
        if not models:
            continue
        part = sweep.parse_args([*models, *options, "--out", given.out])
        try:  # here and not in a process that a kill of this one would leave running
            in_one_line(cost.main)(part)
        except SystemExit as end:
            code = end.code
            if code == 130:
                return code
            # a part that failed; the others may do
    return code


if __name__ == "__main__":
    sys.exit(main())
