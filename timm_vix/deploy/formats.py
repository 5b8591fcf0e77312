"""The four formats: how an exported program becomes a file, and how the file is called.

==========  =======  ==========================================================================
onnx        .onnx    one file for ONNX Runtime; the library computes no bfloat16 on a CPU
openvino    .xml     with its weights beside it as .bin; read from the ONNX file of the same model
pt2         .pt2     ``torch.export.load(FILE).module()``; compiles with ``torch.compile``
aoti        .pt2     ``torch._inductor.aoti_load_package(FILE)``: machine code for this kind of processor
==========  =======  ==========================================================================

Each takes float32 images (B, C, H, W), prepared as timm's data configuration says, and gives float32 logits (B,
classes), whatever the dtype inside. B is free. Each holds the entries of ``metadata_of``.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import torch

from .._checks import InputError
from .._files import one_line
from .metadata import NAMES, PT2_FILE

SUFFIXES = dict(onnx=".onnx", openvino=".xml", pt2=".pt2", aoti=".pt2")
DTYPES = ("float32", "bfloat16", "int8")
Runner = Callable[[torch.Tensor], torch.Tensor]

OPENVINO_SECTION = "timm_vix"  # of what OpenVINO calls runtime information

# how exporters and runtimes name what they lack
OPERATORS = (
    r"No conversion rule found for operations: ([\w.:, ]+)",
    r"Conversion is failed for: ([\w.:]+)",
    r"Could not find an implementation for (\w+)",
    r"of operator \((\w+)\)",
    r"decomposition.*?((?:aten|prims)[.:]+\w+)",
    r"((?:aten|prims|quantized_decomposed)(?:\.|::)\w+)",
)
# operators that OpenVINO's reader of ONNX files converts wrongly in every dtype: it takes the real and imaginary parts
# of DFT for one more axis
MISREAD = ("DFT",)


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Context that turns the ImportError of a library into a line that names the extra to install."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{error.name or error} is not installed; pip install 'timm-vix[{extra}]' brings it"
        ) from error


@contextlib.contextmanager
def held_by(to: str, dtype: str, dynamic_size: bool = False) -> Iterator[None]:
    """Context that turns the error of an exporter or runtime into a line with the operator and what to try instead."""
    try:
        yield
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:  # exporters and runtimes raise as they like
        operator = operator_of(error)
        if dynamic_size and operator is None:
            raise fixed_size(f"this model with to={to}", one_line(error, 200)) from error
        raise cannot_hold(to, dtype, operator, one_line(error, 200), dynamic_size) from error


def cannot_hold(
    to: str, dtype: Optional[str], operator: Optional[str], reason: str, dynamic_size: bool = False
) -> InputError:
    """The error for an operator that a format lacks in a dtype; without one, for whatever else went wrong.

    Args:
        dtype: None for an operator that the format lacks in all of them.
        dynamic_size: whether images of any size were asked for, which may be why.
    """
    what = f"cannot hold {operator}" if operator else "could not be written"
    mixer = "a mixer without this operator" if operator else "another mixer"
    others = [name for name in SUFFIXES if name != to and (name, dtype) != ("onnx", "bfloat16")]
    remedies = [f"--to {' or '.join(others)}"]
    if dtype:
        to = f"{to} with dtype={dtype}"
        remedies.append(f"--dtype {' or '.join(name for name in DTYPES if name != dtype)}")
    if dynamic_size:
        remedies.append("one size, without --dynamic-size")
    return InputError(f"to={to} {what}: {reason}. Try {', '.join(remedies)}, or {mixer}")


def fixed_size(what: str, reason: str) -> InputError:
    """The error for a model that can't be exported for images of any size."""
    return InputError(
        f"--dynamic-size is not possible for {what}: {reason}; leave it out, and export a file for each size"
    )


def operator_of(error: BaseException) -> Optional[str]:
    """The operator that an error names, if it names one; of a chain of errors, the cause knows best."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for text in map(str, reversed(chain)):
        for pattern in OPERATORS:
            if match := re.search(pattern, text):
                return f"operator {match[1].strip()}"
    return None


def write_onnx(program: torch.export.ExportedProgram, path: Path, optimize: bool = True) -> None:
    """Write an ONNX file that holds its weights.

    ``optimize`` folds batch norms into convolutions, which gives these weights of float32 in a bfloat16 model.
    """
    with needs("onnx"):
        import onnxruntime  # noqa: F401  the check after it runs the file
        import onnxscript  # noqa: F401  torch's exporter is written in it
    torch.onnx.export(
        program,
        (),
        path,
        dynamo=True,
        optimize=optimize,
        verbose=False,
        external_data=False,
        input_names=["images"],
        output_names=["logits"],
    )


def add_metadata_to_onnx(path: Path, metadata: dict[str, str]) -> None:
    """Put entries into an ONNX file."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """The entries of an ONNX file."""
    with needs("onnx"):
        import onnx

    # read, not opened: a session would optimise the graph, as that which runs the file does once more
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def read_onnx_as_openvino(path: Path) -> Any:
    """OpenVINO's model of an ONNX file."""
    with needs("openvino"):
        import onnx
        import openvino
    misread = sorted({node.op_type for node in onnx.load(path).graph.node} & {*MISREAD})
    if misread:
        reason = "OpenVINO reads it from ONNX with another shape"
        raise cannot_hold("openvino", None, f"operator {', '.join(misread)}", reason)
    return openvino.convert_model(path)


def write_openvino(model: Any, path: Path, metadata: dict[str, str]) -> None:
    """Write OpenVINO's .xml and .bin."""
    import openvino

    for name, entry in metadata.items():
        model.set_rt_info(entry, [OPENVINO_SECTION, name])
    # its files compress weights to float16 unless told otherwise; a bfloat16 model's weights are bfloat16 already
    openvino.save_model(model, path, compress_to_fp16=False)


def read_openvino_metadata(path: Path) -> dict[str, str]:
    """The entries of OpenVINO's .xml."""
    with needs("openvino"):
        import openvino

    model = openvino.Core().read_model(path)
    places = {name: [OPENVINO_SECTION, name] for name in NAMES}
    return {name: model.get_rt_info(place).astype(str) for name, place in places.items() if model.has_rt_info(place)}


def write_pt2(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Write torch's own file of an exported program."""
    torch.export.save(program, path, extra_files={PT2_FILE: json.dumps(metadata)})


def write_aoti(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Compile a program for this machine and write what was compiled."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            "to=aoti needs a C++ compiler, and there is none on the PATH; install one, such as g++, or try --to pt2"
        ) from error
    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata})


def open_onnx(path: Path, dtype: str, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # threads that spin after a call would slow down whatever runs beside it, such as a model timed in turn
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # its warnings are about what it optimises, and errors are raised as well
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def openvino_hint(dtype: str) -> dict[str, str]:
    """OpenVINO's option for a dtype. Without it a file is computed in bfloat16 where the processor can."""
    return {"INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32"}


def open_openvino(path: Path, dtype: str, threads: int) -> Runner:
    import openvino

    options = {**openvino_hint(dtype), "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def open_pt2(path: Path, dtype: str, threads: int) -> Runner:
    if dtype == "int8":
        with needs("int8"):
            import torchao.quantization.pt2e  # noqa: F401  registers the operators that quantise
    torch.set_num_threads(threads)
    return torch.export.load(path).module()


def open_aoti(path: Path, dtype: str, threads: int) -> Runner:
    torch.set_num_threads(threads)
    return torch._inductor.aoti_load_package(str(path))


OPEN = dict(onnx=open_onnx, openvino=open_openvino, pt2=open_pt2, aoti=open_aoti)
# of the formats that hold data only
READ_METADATA = dict(onnx=read_onnx_metadata, openvino=read_openvino_metadata)
