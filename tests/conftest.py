"""What the tests share: small models of every mixer, and the data that lies beside the repository.

A mixer that is in ``MIXERS`` is tested by being there; ``OPTIONS`` only adds keywords that deserve a run of their own.
"""

import copy
import functools
import importlib.util
import io
import multiprocessing
import os
import pkgutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from http.server import ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

# read when the client is imported: a test reaches no Hub but the one that it starts
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import timm
import torch
from hub_server import Hub
from PIL import Image
from timm.layers import Attention, to_2tuple
from torch import nn
from torch.torch_version import TorchVersion

import timm_vix
from timm_vix import mixers
from timm_vix._names import parse_model
from timm_vix.mixers import MIXERS
from timm_vix.mixers._mechanism import AttentionMechanism

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
DEIT = DATA / "deit_tiny_patch16_224.fb_in1k.safetensors"
PHOTOGRAPHS = DATA / "nips17_dev.tar"

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

OPTIONS: dict[str, list[dict]] = {
    # small windows, so that the 7x5 grid of most tests has several, with padding
    "atrous": [{"window_size": 2}, {"dilations": (3, 1), "window_size": 3}, {"dilations": 1}],
    # groups of which the last are smaller, and cells without patches
    "latent": [{"group_size": 3, "latents_per_group": 2}, {"group_size": 4}],
    "linformer": [{}, {"sharing": "headwise"}, {"sharing": "none"}, {"window_size": 2}],
    "nystrom": [{}, {"conv_residual": True}, {"window_size": 3}],
    "softmax": [{}, {"conv_residual": True, "locality": 0.05}],
    "performer": [{}, {"redraw_interval": 3}, {"learned_features": True}],
}


def variants(positions: tuple[str | None, ...], which: slice, **marks) -> list:
    """Mixer, rotary positions and options, for a slice of each mixer's options."""
    return [
        pytest.param(
            mixer, rope, options, id="-".join([mixer, *([rope] if rope else []), *map(str, options.values())]), **marks
        )
        for mixer, mixer_class in MIXERS.items()
        for rope in positions
        for options in OPTIONS.get(mixer, [{}])[which]
        if rope is None or mixer_class.supports_rotary
    ]


# each mixer once
PLAIN = variants((None,), slice(1))
# each option without positions, and each mixer's first option with axial ones
FEW_VARIANTS = variants((None,), slice(None)) + variants(("axial",), slice(1))
# positions and options seldom act together, so the other pairs of them are slow tests
VARIANTS = [
    *FEW_VARIANTS,
    *variants(("axial",), slice(1, None), marks=pytest.mark.slow),
    *variants(("1d",), slice(None), marks=pytest.mark.slow),
]
# the same for tests that take long: by default each mixer once
OTHERS_ARE_SLOW = [
    *PLAIN,
    *variants((None,), slice(1, None), marks=pytest.mark.slow),
    *variants(("axial", "1d"), slice(None), marks=pytest.mark.slow),
]
# what keeps a small converted model from being softmax: few landmarks and projected tokens, and small groups
FEW = {"nystrom": {"num_landmarks": 4}, "linformer": {"num_proj_tokens": 4}, "latent": {"group_size": 2}}
# mechanisms in which queries and keys of patches have no effect
VALUES_ONLY = [name for name, kind in MIXERS.items() if getattr(kind, "uses_values_only", False)]
# prefix tokens: the class token; none; class and registers; registers without a class token
LAYOUTS = {
    "class": {},
    "no_prefix": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4},
    "registers_only": {"class_token": False, "reg_tokens": 4, "global_pool": "avg", "no_embed_class": True},
}

# All names that timm takes after `import timm_vix`.
REGISTERED = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm_vix.")]

torch.set_num_threads(1)
# A shell that starts the tests in the background has Ctrl-C ignored, and programs that the tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def small_arguments(mixer: str, **kwargs) -> dict:
    """What ``timm.create_model`` is given for a 7x5 patch grid, 2 blocks of 2 heads of width 16, 5 classes.

    Nyström has a third as many landmarks as patches, and latent attention has groups of at most 3 x 3 patches. With the
    defaults both are softmax on this grid: it has a landmark for each patch, and lies in one group.
    """
    arguments = dict(img_size=(14, 10), patch_size=2, embed_dim=32, depth=2, num_heads=2, num_classes=5, qkv_bias=True)
    arguments |= dict(mixer=mixer, **kwargs)
    if mixer == "nystrom":
        height, width = (side // arguments["patch_size"] for side in to_2tuple(arguments["img_size"]))
        arguments.setdefault("num_landmarks", max(1, height * width // 3))
    if mixer == "latent":
        arguments.setdefault("group_size", 3)
    return arguments


def small(mixer: str, rope: str | None = None, **kwargs) -> nn.Module:
    """A model in eval mode of ``small_arguments``, with lively weights; keywords override."""
    return lively(timm.create_model("vix_softmax_cifar", rope=rope, **small_arguments(mixer, **kwargs)).eval())


def lively(model: nn.Module) -> nn.Module:
    """Weights far enough from the initial ones that attention isn't uniform and no parameter is zero."""
    if next(model.parameters()).is_meta:
        return model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def without_values(name: str, **keywords) -> nn.Module:
    """A model on the meta device. What draws and scales initial values does nothing: it takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for method in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_"):
            patch.setattr(torch.Tensor, method, lambda tensor, *_, **__: tensor)
        return timm.create_model(name, device="meta", **keywords)


@functools.cache
def on_meta(spec: str) -> nn.Module:
    """The model of "NAME key=value ..." without values, for tests that look at it and change nothing."""
    name, keywords = parse_model(spec)
    return without_values(name, **keywords)


def is_narrow(name: str) -> bool:
    """Whether a name is of a width that is tested by default: small and base differ from tiny in nothing else."""
    return not {"small", "base"} & set(name.split("_"))


def check_every_mixer(name: str) -> None:
    """A registered model takes each of ``MIXERS`` instead of its own."""
    for mixer in MIXERS:
        model = without_values(name, mixer=mixer)
        expected = Attention if mixer == "softmax" else MIXERS[mixer]
        assert {type(module) for module in model.modules()} & {Attention, *MIXERS.values()} == {expected}


def set_long(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """From so many tokens on every mixer computes activations again in the backward pass."""
    modules = [import_module(f"timm_vix.mixers.{module.name}") for module in pkgutil.iter_modules(mixers.__path__)]
    long = [module for module in modules if hasattr(module, "LONG")]
    assert long
    for module in long:
        monkeypatch.setattr(module, "LONG", tokens)


def image(model: nn.Module, batch: int = 2) -> torch.Tensor:
    """Random images of the model's size."""
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size)


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative Euclidean distance."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def rounding(dtype: torch.dtype, condition: float = 1.0) -> float:
    """The largest relative distance that rounding explains on any processor: 300 roundings, times the condition.

    The worst that was seen is 19: gradients of Nyström attention, whose landmarks solve a system of equations. A bound
    that a wrong result may meet fails.
    """
    bound = 300 * torch.finfo(dtype).eps * max(1.0, condition)
    assert bound < 0.1, "a bound that shows nothing"
    return bound


def heads_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values of tokens (B, N, C), by the formula: (3, B, h, N, D)."""
    y = x @ module.qkv.weight.T + module.qkv.bias
    return y.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)


def joined(module: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """The output of a slot for what its heads give, by the formula: (B, h, N, D) -> (B, N, C)."""
    return y.transpose(1, 2).flatten(2) @ module.proj.weight.T + module.proj.bias


def check_equal(
    found: torch.Tensor, expected: torch.Tensor, inputs: torch.Tensor | Sequence[torch.Tensor], bound: float
) -> None:
    """Values agree within a relative distance, and so do the gradients of a random sum of them, for each input.

    Some gradients are 0 but for rounding: a hundredth of the norm of all gradients is the least norm to compare with.
    """
    assert distance(found, expected) < bound
    weight = torch.randn_like(expected)
    mine, right = (
        torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True, materialize_grads=True)
        for y in (found, expected)
    )
    least = 0.01 * torch.cat([gradient.flatten() for gradient in right]).norm()
    for i, (one, other) in enumerate(zip(mine, right)):
        assert (one - other).norm() < bound * max(other.norm(), least), f"gradient of input {i}"


def condition(function: Callable[..., torch.Tensor], *inputs: nn.Module | torch.Tensor) -> float:
    """How many times as far the value of a function moves as its inputs, both relatively; measured in float64.

    Each input moves by a random millionth of itself, of a module each parameter.
    """

    def moved(value: nn.Module | torch.Tensor, step: float) -> nn.Module | torch.Tensor:
        value = copy.deepcopy(value).double() if isinstance(value, nn.Module) else value.detach().double().clone()
        with torch.no_grad():
            for tensor in value.parameters() if isinstance(value, nn.Module) else [value]:
                tensor.mul_(1 + step * torch.randn_like(tensor))
        return value

    step = 1e-6
    here, there = (function(*(moved(value, by) for value in inputs)) for by in (0, step))
    return distance(there, here) / step


def gradients(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gradients of the outputs' squares with respect to the input and all parameters, in a row."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return torch.cat([t.grad.flatten() for t in (x, *model.parameters())])


def in_two_processes(work: Callable[[int], Any], folder: Path) -> dict[int, Any]:
    """What ``work(rank)`` gives in each of two processes that share a process group, by rank; plain values."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        store = f"file://{folder / 'store'}"
        try:
            torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
            results.put((rank, work(rank), None))
            torch.distributed.destroy_process_group()
        except Exception:
            results.put((rank, None, traceback.format_exc()))

    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    found = {}
    try:
        for _ in processes:
            rank, result, error = results.get()  # however slow the machine is; a test's own limit ends it
            assert error is None, error
            found[rank] = result
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()  # the other one waits for a rank that failed
    return found


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Skip a test on a torch that is older than ``version``, and say what it cannot do."""
    old = TorchVersion(torch.__version__) < version
    return pytest.mark.skipif(old, reason=f"torch before {version} {what}")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def deit() -> Path:
    if not DEIT.exists():
        pytest.skip(f"needs the DeiT-Tiny weights at {DEIT}")
    return DEIT


@pytest.fixture(scope="session")
def photographs() -> Path:
    if not PHOTOGRAPHS.exists():
        pytest.skip(f"needs the photographs at {PHOTOGRAPHS}")
    return PHOTOGRAPHS


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Three digits, 20 PNG files each."""
    folder = tmp_path_factory.mktemp("digits")
    data = pytest.importorskip("sklearn.datasets", reason="the images are scikit-learn's digits").load_digits()
    for label in range(3):
        (folder / f"digit{label}").mkdir()
        for i, image in enumerate(data.images[data.target == label][:20]):
            pixels = Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32))
            pixels.save(folder / f"digit{label}" / f"{i}.png")
    return folder


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a Hub that runs in this process."""
    Hub.files, Hub.private = {}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load_example(name: str) -> Any:
    """The module of an example, anew."""
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def exit_code(main: Callable[[], None]) -> int:
    """The exit code of a command that runs in this process."""
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def vit(name: str = "vit_tiny_patch16_224", **kwargs) -> nn.Module:
    """A ViT in eval mode, timm's own unless ``name`` says otherwise: 4x4 patches, 4 blocks, 2 heads of width 16."""
    arguments = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    return timm.create_model(name, **{**arguments, **kwargs}).eval()


def with_each_mixer(host: Callable[..., nn.Module], mixers: Sequence[str] = tuple(MIXERS)) -> nn.Module:
    """A converted model in which each layer has another mixer, for compilers and exporters, which take long."""
    model = host(depth=len(mixers))
    timm_vix.convert(model, layers={i: {"mixer": mixer, **FEW.get(mixer, {})} for i, mixer in enumerate(mixers)})
    return model


def scripted(model: nn.Module) -> nn.Module:
    """The model in TorchScript, saved and loaded."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The Gaussian error linear unit, by its formula."""
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


# mechanisms whose keys may lie on a coarser grid than the queries
PROJECTED = {
    name: kind
    for name, kind in MIXERS.items()
    if issubclass(kind, AttentionMechanism) and not kind.needs_self_attention
}
