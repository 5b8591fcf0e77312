"""Write a model to a file of another runtime, and check that the file computes what the model does."""

import contextlib
import copy
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from .._checks import InputError, check_at_most_one, check_choice
from .._names import parse_model
from .._records import check_writable
from .._weights import check_weights
from ..conversion.delta import load_delta
from ..slots.model import hosts_of, mixer_name
from ..train.teacher import build_teacher
from . import quantise
from .check import BATCHES, known_images, parity
from .classifier import address_of, class_names, preparation_of
from .formats import (
    DTYPES,
    OPEN,
    SUFFIXES,
    Runner,
    add_metadata_to_onnx,
    fixed_size,
    held_by,
    read_onnx_as_openvino,
    write_aoti,
    write_onnx,
    write_openvino,
    write_pt2,
)
from .metadata import metadata_of

# from so many calibration images on, one of so many is held out
FEW = 10


class WithFloat32(nn.Module):
    """A model that takes and gives float32, whatever it computes in."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.to(self.dtype)).float()


def build(
    spec: str,
    weights: Optional[str] = None,
    pretrained: bool = False,
    img_size: Optional[int] = None,
    dynamic_size: bool = False,
    delta: Optional[str] = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model in eval mode, and timm's data configuration for it.

    Args:
        spec: "NAME key=value ...", with a name or the path of a folder as for ``address_of``.
        weights: A file; else ``pretrained`` asks for timm's, and a folder or a place of the Hub brings its own.
        delta: A file of ``save_delta``, which is put onto these weights.

    Raises:
        ValueError: for a wrong name, keywords or weights that don't fit, a model that takes one size only, and a
            preparation of images that can't be used.
    """
    name, keywords = parse_model(spec, lambda name: address_of(name, trained=False))
    if "pretrained" in keywords:
        raise InputError(f"pretrained={keywords['pretrained']}: expected --pretrained or --weights FILE instead")
    check_at_most_one(weights=weights, pretrained=pretrained)
    check_weights("weights", weights)
    if not weights and not pretrained and ":" not in name:
        raise InputError(f"model={name} would have random weights; give --weights FILE or --pretrained")
    if img_size and keywords.get("img_size", img_size) != img_size:
        raise InputError(f"img_size={img_size} and img_size={keywords['img_size']} were both given; allowed is one")
    img_size = keywords.pop("img_size", img_size)
    if dynamic_size:
        keywords["dynamic_img_size"] = True
    try:
        model, config = build_teacher(name, keywords, weights, img_size, called="model")
    except InputError as error:
        if dynamic_size and "dynamic_img_size" in str(error):
            raise fixed_size(name, "it takes no dynamic_img_size") from error
        raise
    preparation_of(model, f"model={name}")  # nothing could open the file of a model without one
    if delta:
        load_delta(model, delta)
    return model, config


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print and warn of on their way; errors are raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def capture(
    model: nn.Module, config: dict[str, Any], dtype: torch.dtype, dynamic_size: bool
) -> tuple[torch.export.ExportedProgram, Any]:
    """The model as torch's exported program, and which of its dimensions are free."""
    channels, height, width = config["input_size"]
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic_size:
        patch = model.patch_embed.patch_size
        for axis, name in ((2, "height"), (3, "width")):
            # traced at another size than the model's own, at which positions aren't resampled
            free[axis] = patch[axis - 2] * torch.export.Dim(f"{name}_in_patches", min=2, max=4096)
        height, width = height + patch[0], width + 2 * patch[1]
    images = torch.zeros(2, channels, height, width)
    with torch.no_grad():
        program = torch.export.export(WithFloat32(model, dtype).eval(), (images,), dynamic_shapes=(free,))
    return program, (free,)


def write(
    model: nn.Module,
    config: dict[str, Any],
    to: str,
    dtype: str,
    path: Path,
    calibration: Optional[torch.Tensor] = None,
    dynamic_size: bool = False,
    note: str = "",
) -> None:
    """Write a model to a file in a folder of its own, where what it is made from may lie beside it."""
    metadata = metadata_of(model, config, class_names(model), dtype, note)
    inner = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    with quiet(), held_by(to, dtype, dynamic_size):
        program, free = capture(model, config, inner, dynamic_size)
        if to in ("pt2", "aoti"):
            if calibration is not None:
                program = quantise.quantise_program(program, calibration, free)
            (write_pt2 if to == "pt2" else write_aoti)(program, path, metadata)
            return
        exported = path.with_name("float.onnx") if to == "openvino" or calibration is not None else path
        write_onnx(program, exported, optimize=dtype != "bfloat16")
        if to == "openvino":
            ir = read_onnx_as_openvino(exported)
            write_openvino(ir if calibration is None else quantise.quantise_openvino(ir, calibration), path, metadata)
            return
        if calibration is not None:
            quantise.quantise_onnx(exported, path, calibration)
        if path.with_name(f"{path.name}.data").exists():  # torch does so above 1.5 GB, whatever it is asked for
            raise InputError("to=onnx: the weights are too large for one ONNX file; try --to openvino, pt2 or aoti")
        add_metadata_to_onnx(path, metadata)


def export_model(
    model: nn.Module,
    config: dict[str, Any],
    to: str,
    dtype: str,
    out: Path,
    calibration: Optional[torch.Tensor] = None,
    dynamic_size: bool = False,
    threads: Optional[int] = None,
    note: str = "",
) -> tuple[Runner, dict[str, Any]]:
    """Write a model to the file ``out``, which is kept only if its outputs match those of eager mode.

    Args:
        model: In eval mode, float32.
        config: timm's data configuration of its images.
        to: "onnx", "openvino", "pt2" or "aoti".
        dtype: "float32", "bfloat16" or "int8".
        out: The file, with the suffix of its format.
        calibration: For int8, prepared images (B, C, H, W). Of ten or more, each tenth is held out, and compared.
        dynamic_size: The file takes images of other sizes, too, in whole patches.
        threads: CPU threads with which the returned function runs the file, and torch from here on; None: torch's
            number.
        note: What there is to know about the weights, for the metadata of the file.

    Returns:
        A function that runs the file, and a dict with its size in MB and the rows of ``parity``.

    Raises:
        ValueError: for an operator that the format lacks, with a remedy, and for outputs that differ from eager mode's.
        OSError: for a file that can't be written.

    Example:
        >>> model, config = build("deit_tiny_patch16_224", pretrained=True)
        >>> run, found = export_model(model, config, "onnx", "float32", Path("deit.onnx"))
    """
    check_choice("to", to, tuple(SUFFIXES))
    check_choice("dtype", dtype, DTYPES)
    if out.suffix != SUFFIXES[to]:
        raise InputError(f"out={out}: expected a name that ends in {SUFFIXES[to]} for to={to}")
    if dynamic_size:
        check_dynamic(model, to)
    if (dtype == "int8") != (calibration is not None):
        raise InputError(f"dtype={dtype}: images to calibrate on are for int8, which needs them (--calibrate DIR)")
    check_writable(out)
    partial = out.with_name(f"{out.name}.partial")
    aside = partial / "former"
    for path in aside.iterdir() if aside.is_dir() else ():  # of a run that was killed while it replaced the files
        os.replace(path, out.with_name(path.name))
    shutil.rmtree(partial, ignore_errors=True)
    weights = out.with_suffix(".bin")
    if to == "openvino" and weights.exists() and not (out.is_file() and weights.is_file()):
        raise InputError(
            f"out={out}: OpenVINO writes weights to {weights}, which is there without such a model; choose another name"
        )
    try:
        partial.mkdir()
        written = partial / out.name
        calibrating, held_out = calibration, None
        if calibration is not None and len(calibration) >= FEW:
            held_out = calibration[::FEW]
            calibrating = calibration[torch.arange(len(calibration)) % FEW > 0]
        write(model, config, to, dtype, written, calibrating, dynamic_size, note)
        threads = threads or torch.get_num_threads()
        torch.set_num_threads(threads)
        with held_by(to, dtype, dynamic_size):
            batches = trials(config, calibration, dynamic_size, model)
            batches += [] if held_out is None else [held_out]
            rounded = WithFloat32(model, torch.bfloat16) if dtype == "bfloat16" else None
            rows = parity(model, OPEN[to](written, dtype, threads), batches, dtype, rounded)
        files = [path for path in (written.with_suffix(".bin"), written) if path.exists()]
        size = sum(path.stat().st_size for path in files) / 1e6
        replace_files(files, out, aside)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return OPEN[to](out, dtype, threads), dict(size_mb=size, parity=rows)


def replace_files(files: list[Path], out: Path, aside: Path) -> None:
    """Put the files of a model in their place, or on a failure leave those of the former model there.

    Args:
        files: a file of weights, where there is one, and last the file that is named.
        out: the place of the file that is named.
        aside: a folder, which isn't there yet, for the files of the former model meanwhile.
    """
    if len(files) == 1:
        os.replace(files[0], out)
        return
    places = [out.with_name(path.name) for path in files]
    former = [place for place in reversed(places) if place.exists()]
    try:
        aside.mkdir()
        for place in former:  # the named file first: a pair of old and new must never be read as a model
            os.replace(place, aside / place.name)
        for path, place in zip(files, places):
            os.replace(path, place)
    except BaseException:
        for path, place in zip(files, places):
            if (kept := aside / place.name).exists():
                os.replace(kept, place)
            elif place not in former and not path.exists():
                place.unlink()
        raise


def check_dynamic(model: nn.Module, to: str) -> None:
    """Raise ValueError for a model that can't be exported for images of any size, before minutes of export."""
    for path, host in hosts_of(model).items():
        if getattr(host.core, "exports_one_grid", False):  # softmax may be torch's own core
            raise fixed_size(f"mixer={mixer_name(host)!r}", f"{path} counts the patches of one grid")
        if getattr(host, "trained_tokens", 0):
            raise fixed_size("scale_logits", f"the factor of the logits of {path} is that of one number of tokens")
    if to == "openvino" and getattr(model, "pos_embed", None) is not None:
        raise fixed_size("to=openvino", "OpenVINO resamples learned positions otherwise than torch")


def trials(
    config: dict[str, Any], calibration: Optional[torch.Tensor], dynamic_size: bool, model: nn.Module
) -> list[torch.Tensor]:
    """Batches of two sizes on which eager and exported are compared, of another image size too where that is free."""
    known = known_images(config["input_size"], max(BATCHES))
    if calibration is not None:
        known = calibration[torch.arange(max(BATCHES)) % len(calibration)]
    batches = [known[:count] for count in BATCHES]
    if dynamic_size:
        (height, width), (rows, columns) = model.patch_embed.patch_size, model.patch_embed.grid_size
        larger, flat = (rows + 2, columns + 1), (max(2, rows // 3), 2 * columns)
        batches += [known_images((known.shape[1], r * height, c * width), max(BATCHES)) for r, c in (larger, flat)]
    return batches
