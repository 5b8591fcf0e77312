"""Time of a training step of each system of the longer trainings, all in turn on one machine.

    python examples/step_times.py --threads 1

For each system in examples/results/reproduce_vix.csv that was trained for twenty epochs or more, in its dtype and with
its batch. The rows replace those in examples/results/step_times.csv as a whole, since times of another moment don't
compare. The figure of accuracy over the hours of training is drawn from them.
"""

import argparse
from pathlib import Path

import numpy as np
from reproduction.cards import read_rows
from result_tables.training import is_long

from timm_vix._checks import check_integer
from timm_vix._device import device_name, versions
from timm_vix._files import write_whole
from timm_vix._records import Columns, check_writable, line_of
from timm_vix.cli import in_one_line
from timm_vix.measure.job import JOB, build, make_call, prepare_process, time_interleaved

RESULTS = Path(__file__).parent / "results"
COLUMNS: Columns = dict(
    system=str, keywords=str, patch_size=int, dtype=str, batch_size=int, ms=float, ms_low=float, ms_high=float,
    rounds=int, device_name=str, threads=int, torch=str, timm=str, timm_vix=str,
)  # fmt: skip


def run_all(run: argparse.Namespace) -> None:
    """Time all systems and write their rows."""
    for name in ("threads", "rounds"):
        check_integer(name, getattr(run, name), 1)
    check_writable(run.out)
    names = ("system", "keywords", "patch_size", "dtype", "batch_size")
    # seeds of a system take the same time
    systems = list(dict.fromkeys(tuple(row[n] for n in names) for row in read_rows(run.results)[0] if is_long(row)))
    shared = {**JOB, "img_size": 32, "mode": "train", "threads": run.threads}
    prepare_process(shared)
    calls = []
    for system, keywords, _, dtype, batch_size in systems:
        job = {**shared, "dtype": dtype, "batch_size": batch_size}
        calls.append(make_call(build(f"{system} {keywords}", job), "fused", job))
    times = 1e3 * time_interleaved(calls, {**shared, "rounds": run.rounds, "seconds": 0.0})
    machine = dict(rounds=len(times), device_name=device_name("cpu"), threads=run.threads, **versions())
    rows = []
    for system, column in zip(systems, times.T):
        low, middle, high = (round(float(value), 2) for value in np.percentile(column, (10, 50, 90)))
        rows.append(dict(zip(names, system)) | dict(ms=middle, ms_low=low, ms_high=high) | machine)
        print(f"{system[0]:24} {system[3]:9} {middle:8.1f} ms ({low:.1f} to {high:.1f})", flush=True)
    lines = [line_of(COLUMNS), *(line_of(row[name] for name in COLUMNS) for row in rows)]
    write_whole(run.out, "".join(lines).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "reproduce_vix.csv", help="what was trained")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "step_times.csv")
    in_one_line(run_all, "interrupted")(parser.parse_args())  # rows are written at the end, all at once


if __name__ == "__main__":
    main()
