"""ONNX Runtime and OpenVINO give the outputs of an exported model, for any number of images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import condition, distance, rounding, since
from small_models import CONVERTED, build
from torch import nn

pytestmark = [
    pytest.mark.slow,
    since("2.9", "exports not all mixers"),
    # of torch's exporter
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


IMAGES = torch.zeros(3, 3, 32, 32)
DYNAMIC = dict(dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))


def check(model: nn.Module, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """Compare with a function of images, for other numbers of them than the export saw."""
    for number in (1, 5):
        x = torch.randn(number, 3, 32, 32)
        bound = rounding(torch.float32, condition(nn.Module.__call__, model, x))
        assert distance(torch.from_numpy(function(x.numpy())), model(x)) < bound, number


def in_openvino(source: Any) -> Callable[[np.ndarray], np.ndarray]:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is in the extra 'ecosystem'")
    # in single precision also where the processor has a faster one
    compiled = openvino.compile_model(openvino.convert_model(source), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: compiled(x)[0]


# compiling is slow, and test_export.py has the other mixers
@torch.no_grad()
@pytest.mark.parametrize("kind", ["nystrom", CONVERTED])
def test_both_runtimes_read_a_file(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is in the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="onnxscript is in the extra 'onnx'")
    model, file = build(kind), tmp_path / "model.onnx"
    torch.onnx.export(model, (IMAGES,), file, dynamo=True, verbose=False, **DYNAMIC)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    check(model, lambda x: session.run(None, {session.get_inputs()[0].name: x})[0])
    check(model, in_openvino(file))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["performer", CONVERTED])
def test_openvino_takes_an_exported_program(kind):
    depth = {} if kind == CONVERTED else dict(depth=1)
    model = build(kind, **depth)
    check(model, in_openvino(torch.export.export(model, (IMAGES,), **DYNAMIC)))
