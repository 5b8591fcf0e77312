"""Write a model to a file for deployment, and check that the file computes what the model does.

MODEL is a name of timm or of this package, the folder of a run or a place of the Hub (hf-hub:USER/NAME), with keywords
as "NAME key=value ...". A conversion is a name too, also one by a plan:
    "vix_from_timm source=deit_tiny_patch16_224 mixer=softmax layers=plan.json"

Formats: onnx (ONNX Runtime), openvino (.xml with .bin), pt2 (torch.export), aoti (compiled for this processor).
The batch is of any size. With --dynamic-size the image is, too, but not for mixers that count the patches of a grid,
which that option names. int8 is post-training quantisation: weights of linear layers and convolutions per channel,
their inputs calibrated on a folder of images; all else stays in float. Logits are compared with those of eager mode in
float32, for int8 also of the tenth of the calibration images that is held out. A file that fails this is not kept, and
a file that was there stays.

The file holds in its metadata how images are prepared, and the names of the classes. timm-vix serve and
examples/classify.py take files of onnx and openvino.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._checks import InputError, positive
from ..data.decoding import image_mode
from ..mixers import MIXERS
from .check import accuracy, latency, open_labelled, read_calibration
from .classifier import class_names, note_of_weights
from .export import build, export_model
from .formats import DTYPES, OPENVINO_SECTION, SUFFIXES, openvino_hint
from .metadata import PREPARATION, PT2_FILE


def describe(spec: str, out: Path, to: str, dtype: str, found: dict[str, Any]) -> str:
    """What was written and how far it is from eager mode, as text."""
    lines = [
        f"{spec} -> {out}: {to}, {dtype}, {found['size_mb']:.1f} MB",
        f"it is opened by {opened_by(to, dtype, out)}",
    ]
    for row in found["parity"]:
        shape = "x".join(map(str, row["shape"]))
        lines.append(
            f"images {shape}: largest error of a logit {row['error']:.2g}, "
            f"the same top-1 on {row['same']} of {row['shape'][0]}"
        )
    last = found["parity"][-1]
    if dtype == "int8" and last["same"] < 0.95 * last["shape"][0]:
        lines.append(
            "int8 changes more answers than it should: give --calibrate more images like those that the model will "
            "see, or try another --to"
        )
    return "\n".join(lines)


def opened_by(to: str, dtype: str, out: Path) -> str:
    """The Python that opens a file for prepared images."""
    first = "import torchao.quantization.pt2e; " if (to, dtype) == ("pt2", "int8") else ""  # registers its operators
    path = json.dumps(str(out))
    call = dict(
        onnx=f"onnxruntime.InferenceSession({path})",
        openvino=f'openvino.Core().compile_model({path}, "CPU", {json.dumps(openvino_hint(dtype))})',
        pt2=f"torch.export.load({path}).module()",
        aoti=f"torch._inductor.aoti_load_package({path})",
    )
    return first + call[to]


def metadata_read_by(to: str, out: Path) -> str:
    """The Python that reads the metadata of a file, names with text in JSON."""
    path = json.dumps(str(out))
    return dict(
        onnx=f"onnxruntime.InferenceSession({path}).get_modelmeta().custom_metadata_map",
        openvino=f'openvino.Core().read_model({path}).get_rt_info("{OPENVINO_SECTION}").value',
        pt2=f'extra = {{"{PT2_FILE}": ""}}; torch.export.load({path}, extra_files=extra)',
        aoti=f"torch._inductor.aoti_load_package({path}).get_metadata()",
    )[to]


def prepared_by(config: dict[str, Any]) -> str:
    """The Python that prepares a picture of PIL's, by timm's data configuration."""
    transform = f"timm.data.create_transform({', '.join(f'{name}={config[name]!r}' for name in PREPARATION)})"
    return f'{transform}(PIL.ImageOps.exif_transpose(image).convert("{image_mode(config["input_size"][0])}"))'


def classes_in_words(model: nn.Module) -> str:
    """The first and the last class of a model by name."""
    names = class_names(model)
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} to {names[-1]}, {len(names)} in all"


def describe_latency(row: dict[str, Any], batch: int, threads: int) -> str:
    """A latency beside that of eager mode, as text."""
    low, high = row["speedup_low"], row["speedup_high"]
    spread_text = "" if low is None else f" ({low:.2f} to {high:.2f})"
    return (
        f"batch {batch}, {threads} threads: {row['latency_p50_ms']:.4g} ms, eager {row['baseline_p50_ms']:.4g} ms: "
        f"{row['speedup']:.2f} x{spread_text}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    fixed = ", ".join(name for name, mixer in MIXERS.items() if mixer.exports_one_grid)
    add("model", metavar="MODEL", help="a name, a folder or hf-hub:USER/NAME; or 'NAME key=value ...'")
    add("--to", required=True, choices=tuple(SUFFIXES), help="the format")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and matrix products; default: float32")
    add("--out", required=True, type=Path, help=f"the file; {', '.join(f'{k}: {v}' for k, v in SUFFIXES.items())}")
    add("--weights", help="file with the weights, .safetensors or .pth (a state dict; nothing else is unpickled)")
    add("--pretrained", action="store_true", help="timm's weights of the model")
    add("--delta", metavar="FILE", help="a file of timm_vix.save_delta, which is put onto these weights")
    add("--img-size", type=positive, help="side of the images in pixels; default: the model's own")
    add(
        "--dynamic-size",
        action="store_true",
        help=f"any size in whole patches; not with {fixed}, and no learned positions in openvino",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="DIR",
        help="folder of images, or folders below it, to calibrate int8",
    )
    add("--calibrate-images", type=positive, default=400, help="how many of them, spread over the folder; default: 400")
    add("--data-dir", type=Path, help="labelled images for top-1: class folders, or labels.csv with FILE,CLASS")
    add("--limit", type=positive, help="how many of these, spread over the folder; default: all")
    add("--threads", type=positive, default=min(2, os.cpu_count() or 1), help="CPU threads for timing; default: 2")
    add("--rounds", type=positive, default=9, help="least number of rounds of timing; default: 9")


def main(arguments: argparse.Namespace) -> None:
    """Export as the command line asks, and print what the file keeps and saves."""
    to, dtype, threads = arguments.to, arguments.dtype, arguments.threads
    if dtype == "int8" and arguments.calibrate is None:
        raise InputError("dtype=int8 needs --calibrate DIR, a folder of images like those that the model will see")
    if (to, dtype) == ("onnx", "bfloat16"):
        raise InputError(
            "to=onnx with dtype=bfloat16: ONNX Runtime computes no bfloat16 on a CPU; allowed are --dtype float32 "
            "or int8, or --to openvino, pt2 or aoti"
        )
    if dtype != "int8" and arguments.calibrate is not None:
        raise InputError(f"--calibrate is for dtype=int8; dtype={dtype} needs no calibration")
    model, config = build(
        arguments.model,
        arguments.weights,
        arguments.pretrained,
        arguments.img_size,
        arguments.dynamic_size,
        arguments.delta,
    )
    labelled = open_labelled(arguments.data_dir, model, arguments.limit, config) if arguments.data_dir else None
    calibration = None
    if arguments.calibrate:
        calibration = read_calibration(arguments.calibrate, arguments.calibrate_images, config)
    note = ""
    if (arguments.pretrained or arguments.weights) and not arguments.delta:
        try:
            note = note_of_weights(arguments.model.split()[0], model, from_file=bool(arguments.weights))
        except InputError as error:  # such a file shows how fast the model is
            note = str(error)
    options = (calibration, arguments.dynamic_size, threads, note)
    run, found = export_model(model, config, to, dtype, arguments.out, *options)
    print(describe(arguments.model, arguments.out, to, dtype, found), flush=True)
    if note:
        print(note, flush=True)
    print(f"its images are prepared by {prepared_by(config)}; its classes are {classes_in_words(model)}", flush=True)
    print(f"both are in its metadata too, which is read by {metadata_read_by(to, arguments.out)}", flush=True)
    if labelled:
        scores = accuracy(dict(eager=model, file=run), labelled, config)
        print(
            f"top-1 {scores['top1']['file']:.2f} %, eager {scores['top1']['eager']:.2f} %, "
            f"the same answer on {scores['agreement']['file']:.2f} % of {scores['images']} images",
            flush=True,
        )
    for batch in (1, 8):
        images = torch.randn(batch, *config["input_size"])
        (row,) = latency(run, [model], images, arguments.rounds)
        print(describe_latency(row, batch, threads), flush=True)
