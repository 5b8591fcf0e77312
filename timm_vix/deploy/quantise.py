"""Post-training quantisation to int8, by each format's own library.

Weights of linear layers and convolutions are symmetric with a scale for each output channel. Their inputs have a range
that is calibrated on images. Everything else stays in float: products of two activations, softmax and other
exponentials, norms, solves, Fourier transforms. So the iterations by which Nyström attention inverts are not rounded.
"""

from pathlib import Path
from typing import Any

import torch

from .formats import needs


def quantise_onnx(path: Path, out: Path, images: torch.Tensor) -> None:
    """Quantise an ONNX file, by ONNX Runtime.

    Args:
        images: (B, C, H, W), prepared.
    """
    with needs("onnx"):
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images.split(1))

        def get_next(self) -> Any:
            image = next(self.left, None)
            return None if image is None else {"images": image.numpy()}

    folded = path.with_name(f"folded_{path.name}")
    # folds the transposes of weights, which are constants only after it
    quant_pre_process(path, folded, skip_symbolic_shape=True)
    graph = onnx.load(folded).graph
    # of a product with a weight for each head there is no int8 kernel
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) != 3}
    layers = ["Conv", "Gemm", "MatMul"]
    # products of two activations, such as those within attention
    products = [node.name for node in graph.node if node.op_type in layers and node.input[1] not in weights]
    quantize_static(
        folded,
        out,
        Reader(),
        op_types_to_quantize=layers,
        nodes_to_exclude=products,
        per_channel=True,
        # the library would round what a layer gives, too, which is what residuals and softmax take
        extra_options={"OpTypesToExcludeOutputQuantization": layers},
    )


def quantise_openvino(model: Any, images: torch.Tensor) -> Any:
    """Quantise OpenVINO's model, by NNCF."""
    with needs("int8"):
        import nncf

    layers = {"MatMul", "Convolution", "GroupConvolution"}
    # products of two activations, such as those within attention
    products = [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() in layers and not any(map(is_constant, node.input_values()))
    ]
    others = {node.get_type_name() for node in model.get_ops()} - layers
    return nncf.quantize(
        model,
        nncf.Dataset([image.numpy() for image in images.split(1)]),
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=products, types=sorted(others), validate=False),
    )


def is_constant(value: Any) -> bool:
    """Whether a value of OpenVINO's graph comes from constants alone."""
    node = value.get_node()
    if node.get_type_name() == "Parameter":
        return False
    return node.get_type_name() == "Constant" or all(is_constant(own) for own in node.input_values())


def forget_unread(module: torch.fx.GraphModule) -> None:
    """Drop the tensors that no node reads: the weights from before they were rounded, which a file would hold too."""
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        if name not in read:
            path, _, own = name.rpartition(".")
            delattr(module.get_submodule(path), own)


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
    forget_unread(quantised)
    two = images[torch.arange(2) % len(images)]  # an example of one image would fix the batch
    return torch.export.export(quantised, (two,), dynamic_shapes=dynamic)
