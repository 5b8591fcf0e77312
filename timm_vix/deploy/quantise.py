"""Post-training quantisation to int8, by each format's own library.

Weights of linear layers and convolutions are symmetric with a scale for each output channel. Their inputs have a range
that is calibrated on images. Everything else stays in float: products of two activations, softmax and other
exponentials, norms, solves, Fourier transforms. So the iterations by which Nyström attention inverts are not rounded.
"""

from pathlib import Path
from typing import Any

import torch

from .formats import needs

# the operators that hold weights, as ONNX and OpenVINO name them
LAYERS = {"Conv", "Gemm", "MatMul", "Convolution"}


def quantise_onnx(path: Path, out: Path, images: torch.Tensor) -> None:
    """Quantise an ONNX file, by NNCF.

    NNCF moves outliers of activations into weights and corrects biases. ONNX Runtime's own quantiser does neither, and
    kept less of DeiT-Tiny's accuracy on photographs.

    Args:
        images: (B, C, H, W), prepared.
    """
    with needs("onnx"):
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

    folded = path.with_name(f"folded_{path.name}")
    # folds the transposes of weights, which are constants only after it
    quant_pre_process(path, folded, skip_symbolic_shape=True)
    model = onnx.load(folded)
    constants = {tensor.name for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in LAYERS]
    products = [node.name for node in layers if constants.isdisjoint(node.input)]
    others = {node.op_type for node in model.graph.node} - LAYERS
    onnx.save(by_nncf(model, [{"images": image.numpy()} for image in images.split(1)], products, others), out)


def quantise_openvino(model: Any, images: torch.Tensor) -> Any:
    """Quantise OpenVINO's model, by NNCF."""
    layers = [node for node in model.get_ops() if node.get_type_name() in LAYERS]
    products = [node.get_friendly_name() for node in layers if not any(map(is_constant, node.input_values()))]
    others = {node.get_type_name() for node in model.get_ops()} - LAYERS
    return by_nncf(model, [image.numpy() for image in images.split(1)], products, others)


def by_nncf(model: Any, inputs: list[Any], products: list[str], others: set[str]) -> Any:
    """A model quantised where a layer has weights.

    Args:
        inputs: What the model is calibrated on.
        products: The names of the matrix products of two activations, such as those within attention.
        others: All operators but those of ``LAYERS``.
    """
    with needs("int8"):
        import nncf

    scope = nncf.IgnoredScope(names=products, types=sorted(others), validate=False)
    return nncf.quantize(
        model,
        nncf.Dataset(inputs),
        subset_size=len(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=scope,
    )


def is_constant(value: Any) -> bool:
    """Whether a value of OpenVINO's graph comes from constants alone."""
    node = value.get_node()
    if node.get_type_name() == "Parameter":
        return False
    return node.get_type_name() == "Constant" or all(is_constant(own) for own in node.input_values())


def quantise_program(program: torch.export.ExportedProgram, images: torch.Tensor, dynamic: Any) -> Any:
    """Quantise an exported program, by torchao's PT2E and its quantiser for x86."""
    with needs("int8"):
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in images.split(8):
        prepared(batch)
    quantised = convert_pt2e(prepared)
    return torch.export.export(quantised, (images[:2],), dynamic_shapes=dynamic)
