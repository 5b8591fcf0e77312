"""What DeiT-Tiny and its conversions keep and cost as files for deployment: top-1 on photographs, size and latency.

    python examples/deploy.py --images nips17_dev --weights deit_tiny_patch16_224.safetensors \\
        --calibrate caltech101/train

The folder holds labels.csv (file, imagenet_class) and images/. Each row is timed in turn with eager mode and
torch.compile, so it needs a quiet machine: about two hours on two cores. Rows are appended to
examples/results/deploy.csv as they come; stopped at any time, the same command continues.
"""

import argparse
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_vix._checks import InputError, positive
from timm_vix._device import device_name, fields_of, versions
from timm_vix._records import Columns, append_record, check_writable, earlier_records, key_of
from timm_vix.cli import in_one_line
from timm_vix.data.folders import find_unlabelled, read_labels
from timm_vix.deploy.check import accuracy, latency, open_labelled, read_calibration
from timm_vix.deploy.export import build, export_model
from timm_vix.deploy.formats import SUFFIXES

SOURCE = "deit_tiny_patch16_224"
MODELS = {
    "softmax": SOURCE,
    "softmax, merged to 30 %": f"vix_from_timm source={SOURCE} mixer=softmax merge=0.3",
    "nystrom, 4x4 windows": f"vix_from_timm source={SOURCE} mixer=nystrom num_landmarks=49 window_size=4",
    "axial": f"vix_from_timm source={SOURCE} mixer=axial",
    "linformer, 4x4 windows": f"vix_from_timm source={SOURCE} mixer=linformer num_proj_tokens=49 window_size=4",
}
FORMATS = {
    "onnx": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
    "pt2": ("float32", "bfloat16"),
    "aoti": ("float32", "bfloat16", "int8"),
}
BATCHES = (1, 8)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
COLUMNS: Columns = dict(
    model=str,
    format=str,
    dtype=str,
    img_size=int,
    images=int,
    calibration_images=int,
    size_mb=float,
    top1=float,
    eager_top1=float,
    agreement=float,
    **{
        f"{name}_{batch}": float
        for batch in BATCHES
        for name in ("ms", "eager_ms", "compiled_ms", "faster_than_eager", "faster_than_compiled")
    },
    threads=int,
    device_name=str,
    instructions=str,
    torch=str,
    timm=str,
    timm_vix=str,
    runtime=str,
    error=str,
)
KEY = ("model", "format", "dtype", "img_size", "images", "calibration_images", "threads", "device_name")
RUNTIMES = dict(onnx="onnxruntime", openvino="openvino")


def jobs(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the table, without what is measured."""
    machine = dict(threads=given.threads, device_name=device_name("cpu"))
    images = min(given.limit, len(read_labels(given.images, 1000)[0]))
    calibration = min(given.calibrate_images, len(find_unlabelled(given.calibrate)))
    for model in given.models:
        for to in given.formats:
            for dtype in FORMATS[to]:
                calibrated = calibration if dtype == "int8" else None
                job = dict(model=model, format=to, dtype=dtype, img_size=224, images=images)
                yield {**job, "calibration_images": calibrated, **machine}


def measure(
    job: dict[str, Any], given: argparse.Namespace, model: nn.Module, config: dict[str, Any], compiled: Any
) -> dict[str, Any]:
    """Accuracy, size and time of one row, or why there is no such file."""
    to, dtype = job["format"], job["dtype"]
    calibration = read_calibration(given.calibrate, given.calibrate_images, config) if dtype == "int8" else None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"model{SUFFIXES[to]}"
        try:
            run, found = export_model(model, config, to, dtype, out, calibration, threads=job["threads"])
        except InputError as error:
            if isinstance(error.__cause__, ImportError):  # a library is missing: no result
                raise
            return dict(error=str(error))
        photographs = open_labelled(given.images, model, given.limit, config)
        scores = accuracy(dict(eager=model, file=run), photographs, config)
        row = dict(
            size_mb=round(found["size_mb"], 2),
            top1=round(scores["top1"]["file"], 2),
            eager_top1=round(scores["top1"]["eager"], 2),
            agreement=round(scores["agreement"]["file"], 2),
        )
        for batch in BATCHES:
            pixels = torch.randn(batch, *config["input_size"])
            eager, other = latency(run, [model, compiled], pixels, given.rounds)
            row |= {
                f"ms_{batch}": round(eager["latency_p50_ms"], 2),
                f"eager_ms_{batch}": round(eager["baseline_p50_ms"], 2),
                f"compiled_ms_{batch}": round(other["baseline_p50_ms"], 2),
                f"faster_than_eager_{batch}": round(eager["speedup"], 2),
                f"faster_than_compiled_{batch}": round(other["speedup"], 2),
            }
    return row


def measure_all(given: argparse.Namespace) -> None:
    """Measure what has no row yet."""
    torch.set_num_threads(given.threads)
    check_writable(given.out)
    rows, _ = earlier_records(given.out, COLUMNS)
    known = {key_of(row, KEY) for row in rows if not (row["error"] and given.retry_failed)}
    left = [job for job in jobs(given) if key_of(job, KEY) not in known]
    present = fields_of("/proc/cpuinfo").get("flags", "").split()
    instructions = " ".join(name for name in INSTRUCTIONS if name in present)
    for name in dict.fromkeys(job["model"] for job in left):
        model, config = build(MODELS[name], given.weights)
        compiled = torch.compile(model, dynamic=False)
        for job in (job for job in left if job["model"] == name):
            measured = measure(job, given, model, config, compiled)  # which says what isn't installed
            runtime = RUNTIMES.get(job["format"], "torch")
            facts = dict(instructions=instructions, runtime=f"{runtime} {version(runtime)}", **versions())
            row = {**job, **facts, **measured}
            append_record(given.out, COLUMNS, row)
            shown = row.get("error") or {key: row[key] for key in ("size_mb", "top1", "agreement", "ms_1", "ms_8")}
            print(f"{name}, {job['format']}, {job['dtype']}: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--calibrate", required=True, type=Path, help="folder of images for int8")
    parser.add_argument("--calibrate-images", type=positive, default=400)
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--limit", type=positive, default=1000, help="photographs")
    parser.add_argument("--rounds", type=positive, default=25, help="least number of rounds of a latency")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--retry-failed", action="store_true", help="export again what failed before")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "deploy.csv")
    in_one_line(measure_all)(parser.parse_args())


if __name__ == "__main__":
    main()
