"""Compilers, exporters, checkpointing and data parallelism, over all mixers."""

import copy
import os
import socket

import pytest
import torch
from conftest import (
    FEW_VARIANTS,
    OTHERS_ARE_SLOW,
    condition,
    distance,
    gradients,
    image,
    lively,
    rounding,
    scripted,
    since,
    small,
    vit,
    with_each_mixer,
)
from torch import nn

CASES = FEW_VARIANTS
in_one_graph = since(
    "2.14", "compiles some mixers with a graph break, and torch 2.11 Fourier mixing with wrong gradients"
)
for_any_batch = since(
    "2.9", "exports no autograd function with a batch of any size, and no forward hook that keeps something"
)

# what torch itself deprecates, inside its exporters
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def agree(model: nn.Module, other: nn.Module, x: torch.Tensor, function=nn.Module.__call__) -> bool:
    """Whether two models have the same value, but for rounding."""
    expected = function(model, x)
    return distance(function(other, x), expected) < rounding(torch.float32, condition(function, model, x))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def check_compiled(model: nn.Module) -> None:
    """Compiled without a break it has the same gradients in training and the same value in inference."""
    compiled, x = torch.compile(model.train(), fullgraph=True, backend="aot_eager"), image(model)
    assert agree(model, compiled, x, gradients)
    with torch.no_grad():
        assert agree(model.eval(), compiled.eval(), x)


def check_exported(model: nn.Module) -> None:
    """Exported for batches of any size it has the same value with another batch."""
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (image(model),), dynamic_shapes=({0: batch},))
    assert agree(model, program.module(), image(model, batch=3))


@torch.no_grad()
def check_scripted(model: nn.Module) -> None:
    """Scripted, saved and loaded it has the same value, in batches of two and of one."""
    loaded, x = scripted(model), image(model)
    assert agree(model, loaded, x)
    assert agree(model, loaded, x[:1])


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check_compiled, marks=[in_one_graph, pytest.mark.slow]),
        pytest.param(check_exported, marks=for_any_batch),
        check_scripted,
    ],
)
def test_a_model_with_each_mixer_in_a_layer(check):
    """Each mixer alone, with its options, is a slow test of the same checks."""
    check(lively(with_each_mixer(vit)))


def without_redraw(options: dict) -> dict:
    """Options without the counter of passes, which breaks a graph and is a hook that TorchScript doesn't take."""
    return options | {"redraw_interval": 0} if "redraw_interval" in options else options


@in_one_graph
@pytest.mark.slow
@pytest.mark.parametrize("mixer, rope, options", CASES)
def test_compiles_in_one_graph(mixer, rope, options):
    check_compiled(small(mixer, rope, **without_redraw(options), depth=1))


@in_one_graph
@pytest.mark.slow
@pytest.mark.parametrize("mixer, rope, options", CASES)
def test_compiles_with_inductor(mixer, rope, options):
    model = small(mixer, rope, **options, depth=1)
    compiled, x = torch.compile(model, fullgraph=True), image(model)
    assert agree(model, compiled, x)
    assert agree(model, compiled, x, gradients)


@since("2.14", "compiles some mixers with a graph break")
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("mixer, rope, options", CASES)
def test_a_compiled_dynamic_model_follows_the_image(mixer, rope, options):
    model = small(mixer, rope, **options, dynamic_img_size=True, depth=1)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    for size in ((14, 10), (8, 18), (14, 10), (4, 4)):
        assert agree(twin, compiled, torch.randn(2, 3, *size)), size


@for_any_batch
@pytest.mark.slow
@pytest.mark.parametrize("mixer, rope, options", CASES)
def test_torch_export(mixer, rope, options):
    check_exported(small(mixer, rope, **options, depth=1))


@pytest.mark.slow
@pytest.mark.parametrize("mixer, rope, options", CASES)
def test_torchscript(mixer, rope, options):
    check_scripted(small(mixer, rope, **without_redraw(options), depth=1))


@since("2.9", "traces not even timm's own attention, which reads a flag while it is traced")
@pytest.mark.parametrize("mixer, rope, options", CASES)
def test_fx_traces(mixer, rope, options):
    """What timm's feature extraction does."""
    from timm.models import FeatureGraphNet

    model = small(mixer, rope, **options, depth=1)
    graph = FeatureGraphNet(model, out_indices=(0,), out_map=None)
    x = image(model)
    expected = model.forward_intermediates(x, indices=[0], output_fmt="NLC", intermediates_only=True)[0]
    bound = rounding(torch.float32, condition(nn.Module.__call__, model, x))
    assert distance(graph(x)[0][:, model.num_prefix_tokens :], expected) < bound


@since("2.9", "exports not all mixers")
@pytest.mark.slow
@pytest.mark.parametrize("mixer, rope, options", CASES)
def test_onnx(mixer, rope, options, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = small(mixer, rope, **options, depth=1)
    x = image(model)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = image(model)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert distance(torch.from_numpy(y), model(x)) < rounding(torch.float32, condition(nn.Module.__call__, model, x))


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("mixer, rope, options", OTHERS_ARE_SLOW)
def test_checkpointing_leaves_gradients_alone(mixer, rope, options, dynamic):
    model = small(mixer, rope, **options, dynamic_img_size=dynamic).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = image(model)
    for _ in range(4):  # past a redraw
        assert torch.equal(gradients(twin, x), gradients(model, x))


def train_in_parallel(rank: int, port: int, path: str) -> None:
    """Four steps of gradients of half of a batch in each of two processes, for every variant."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for variant in CASES:
        mixer, rope, options = variant.values
        torch.manual_seed(rank)  # the replicas differ until DDP makes them equal
        model = small(mixer, rope, **options).train()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for step in range(4):
            model.zero_grad()
            x = torch.randn(4, 3, 14, 10, generator=torch.Generator().manual_seed(step))
            parallel(x[2 * rank : 2 * rank + 2]).square().sum(1).mean().backward()
        results[variant.id] = (model.state_dict(), [p.grad for p in model.parameters()])
    torch.save(results, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_gradients_are_those_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_in_parallel, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for variant in CASES:
        mixer, rope, options = variant.values
        model = small(mixer, rope, **options).train()
        state, grads = first[variant.id]
        for mine, other in zip(grads, second[variant.id][1], strict=True):
            assert torch.equal(mine, other), variant.id
        model.load_state_dict(state)
        for module in model.modules():
            if hasattr(module, "passes"):
                module.passes -= 1  # the features are those of the last pass already
        x = torch.randn(4, 3, 14, 10, generator=torch.Generator().manual_seed(3))
        model(x).square().sum(1).mean().backward()
        for mine, expected in zip(grads, [p.grad for p in model.parameters()], strict=True):
            assert (mine - expected).norm() <= rounding(torch.float32, 3) * (1 + expected.norm()), variant.id
