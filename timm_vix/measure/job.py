"""What a model costs: one row of the cost table, timed in turn with a softmax baseline.

``measure`` is one model in a process of its own. It builds the model, calls it twice and reads the peak memory of the
second call. Then it builds the model again and the baseline beside it, and times the two in turn. ``measure_together``
times several models in turn with one baseline, and reads no memory.

A call is a forward pass in inference mode ("infer"), or forward, backward and a step of AdamW ("train"; bfloat16 as
autocast).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_input_data_config
from timm.layers import set_fused_attn
from timm.models import resolve_model_input_args
from torch import nn

from .._checks import InputError
from .._device import autocast, device_name, versions
from .._names import parse_model
from ..conversion.freeze import freeze_except
from .attention import UnfusedAttention
from .flops import counter, has_fused_attention
from .memory import PeakMemory, limit_memory, set_malloc
from .process import call_in_process, explain
from .statistics import compare_times

Call = Callable[[], None]

# What a job holds, with its defaults; "rounds" is the least number, "seconds" the time that they may fill.
JOB: dict[str, Any] = dict(
    attention="fused",
    img_size=224,
    batch_size=1,
    mode="infer",
    dtype="float32",
    compile="off",
    device="cpu",
    threads=1,
    baseline="vit_tiny_patch16_224",
    rounds=9,
    seconds=5.0,
)
MOST_ROUNDS = 200
# A first call of more seconds than this counts as a timed one, since its warm-up is a few percent of it at most.
LONG_CALL = 60.0


def build(spec: str, job: dict[str, Any]) -> nn.Module:
    """A model of timm's registry with random weights at the job's image size; ``train_only=PART`` freezes the rest.

    Raises:
        InputError: for a size that the patches don't divide; timm's classes raise as they like.
    """
    name, keywords = parse_model(spec)
    only = keywords.pop("train_only", None)
    set_fused_attn(True)  # whatever the environment says; see ``make_call``
    with size_in_error(spec, job):
        model = timm.create_model(**resolve_model_input_args(name, dict(img_size=job["img_size"]), **keywords))
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) or (1, 1)
    sides = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    if any(job["img_size"] % side for side in sides):
        raise InputError(f"img_size={job['img_size']} is no multiple of patch_size={sides[0]} of {name}")
    train = job["mode"] == "train"
    half = job["dtype"] == "bfloat16" and not train
    if only:
        freeze_except(model, only)
    if not train:
        model.requires_grad_(False)  # torch's counter of operations hooks what has gradients, which inference lacks
    return model.train(train).to(job["device"], torch.bfloat16 if half else torch.float32)


@contextlib.contextmanager
def size_in_error(spec: str, job: dict[str, Any]) -> Iterator[None]:
    """If a timm model fails at a size other than its own, raise an error that names its own size."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # timm's classes raise as they like
        name, reason = parse_model(spec)[0], explain(error)
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
        own = cfg.input_size[-1] if cfg is not None and cfg.fixed_input_size else job["img_size"]
        if own == job["img_size"] or reason.startswith("out of memory"):
            raise
        raise InputError(f"img_size={job['img_size']}: {name} is made for {own} and fails here: {reason}") from error


def make_call(model: nn.Module, attention: str, job: dict[str, Any], compiled: bool = False) -> Call:
    """What is timed: a forward pass or a training step, on random images.

    Args:
        attention: "fused": ``scaled_dot_product_attention`` as torch chooses, or "unfused": as two matrix products.
    """
    forward = torch.compile(model) if compiled else model
    weight = next(model.parameters())
    channels = resolve_input_data_config(model, {})["input_size"][0]
    size = (job["batch_size"], channels, job["img_size"], job["img_size"])
    images = torch.randn(size, device=weight.device, dtype=weight.dtype)
    kernels = UnfusedAttention() if attention == "unfused" else contextlib.nullcontext()
    if job["mode"] == "infer":

        def infer() -> None:
            with torch.inference_mode(), kernels:
                forward(images)

        return infer
    labels = torch.zeros(job["batch_size"], dtype=torch.int64, device=weight.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    matrix_products = autocast(job["device"], getattr(torch, job["dtype"]))

    def step() -> None:
        with matrix_products, kernels:
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(call: Call, device: str) -> float:
    """Seconds of a call, until the device is done."""
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):  # the device of a tensor has an index
        torch.mps.synchronize()
    return time.perf_counter() - start


def time_interleaved(calls: Sequence[Call], job: dict[str, Any], settle: bool = False) -> np.ndarray:
    """Seconds of each call in each round: (rounds, calls).

    In a round each is called once, in every other round in the opposite order, so that a machine that slows down slows
    all of them. With ``settle`` a call that isn't timed comes before each timed one: in it the threads of another
    runtime stop waiting for more work, and the weights come back into the caches, as where one model runs alone.
    """
    device = job["device"]
    first = [timed(call, device) for call in calls]  # all are warm after it
    times: list[list[float]] = []
    end = time.perf_counter() + job["seconds"]
    while len(times) < job["rounds"] or (time.perf_counter() < end and len(times) < MOST_ROUNDS):
        row = [0.0] * len(calls)
        for i in reversed(range(len(calls))) if len(times) % 2 else range(len(calls)):
            if not times and first[i] > LONG_CALL:
                row[i] = first[i]  # of a long call, its first is also its time in the first round
                continue
            if settle:
                calls[i]()
            row[i] = timed(calls[i], device)
        times.append(row)
    return np.array(times)


def warm_up(device: str) -> None:
    """Start threads and libraries, whose memory and time are not the model's."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    F.layer_norm(F.gelu(x @ x), (64,)).sum().backward()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def prepare_process(job: dict[str, Any]) -> None:
    """Make this process one in which nothing but the job is measured."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    if job["device"] == "cpu":
        limit_memory()
    warm_up(job["device"])


def tokens_of(model: nn.Module) -> Optional[int]:
    """Tokens of a vision transformer, of its first stage where it has several, prefix tokens included; or None."""
    if hasattr(model, "grids"):  # a convolutional one, whose prefix tokens come in its last stage
        return math.prod(model.grids[0])
    embed = getattr(model, "patch_embed", None)
    patches = getattr(embed, "num_patches", None) or math.prod(getattr(embed, "grid_size", None) or [0])
    # a pooling-based one counts its prefix tokens as num_tokens
    prefix = getattr(model, "num_prefix_tokens", None) or getattr(model, "num_tokens", 0)
    return patches + prefix if patches else None


def size_columns(model: nn.Module) -> dict[str, Any]:
    """Tokens, parameters in millions, and MiB of a checkpoint in float32."""
    weights = [tensor for tensor in model.state_dict().values() if torch.is_tensor(tensor)]
    elements = [4 if tensor.is_floating_point() else tensor.element_size() for tensor in weights]
    return dict(
        tokens=tokens_of(model),
        params_m=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        checkpoint_mib=sum(tensor.numel() * size for tensor, size in zip(weights, elements)) / 2**20,
    )


def count_columns(call: Call, job: dict[str, Any]) -> dict[str, Any]:
    """GFLOPs of one image in a call, and whether a fused kernel of attention was among them (None: not known)."""
    with counter() as flops:
        call()
    known = job["device"].startswith(("cpu", "cuda"))
    fused = has_fused_attention(flops) if known else None
    return dict(gflops=flops.get_total_flops() / job["batch_size"] / 1e9, fused=fused)


def time_beside_baseline(call: Call, job: dict[str, Any]) -> np.ndarray:
    """Seconds in each round: (rounds, 2) of the call and the baseline."""
    baseline = make_call(build(job["baseline"], job), "fused", job, job["compile"] == "on")
    if job["compile"] == "on":
        baseline()  # a first call that compiles isn't one like the others, however long it takes
    return time_interleaved([call, baseline], job)


def time_with_or_without_baseline(call: Call, job: dict[str, Any]) -> tuple[np.ndarray, Optional[str]]:
    """``time_beside_baseline``, or where the baseline cannot be built or does not fit, the call alone: (rounds, 1).

    Returns:
        The seconds, and why there is no baseline.
    """
    try:
        return time_beside_baseline(call, job), None
    except Exception as error:  # also the model's own, which it then raises again
        reason = explain(error)
    return time_interleaved([call], job), reason  # what the baseline held is free by now


def time_columns(seconds: np.ndarray, baseline: Optional[np.ndarray], job: dict[str, Any]) -> dict[str, Any]:
    """The columns of ``compare_times``, and images per second."""
    row = compare_times(seconds, baseline)
    return row | dict(images_per_s=job["batch_size"] / row["latency_p50_ms"] * 1e3)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """The measured columns of a row; call it in a process that did nothing else, since memory is the process's.

    Args:
        job: ``model`` ("NAME key=value ..."), and the entries of ``JOB`` that differ from its defaults.

    Returns:
        Columns of the cost table, ``fused``, see ``count_columns``, and ``no_baseline``: why there is none, or None.
    """
    job = {**JOB, **job}
    device, spec, attention, compiled = job["device"], job["model"], job["attention"], job["compile"] == "on"
    set_malloc(2**17)
    prepare_process(job)
    memory = PeakMemory(device)
    model = build(spec, job)
    call = make_call(model, attention, job, compiled)
    with size_in_error(spec, job):
        row: dict[str, Any] = dict(first_call_ms=timed(call, device) * 1e3)
    memory.restart()  # building in float32, compiling and reading libraries are not what a call needs
    # the second step of training is the first with an optimizer's state
    if compiled:
        call()
        row["peak_memory_mib"] = memory.read()
    else:
        row |= count_columns(call, job)
        row["peak_memory_mib"] = memory.read()
    set_malloc(2**25)  # the most that glibc would learn: from here on time counts
    if compiled:  # its kernels have no names that torch could count
        row |= count_columns(make_call(model, attention, job), job)
    row |= size_columns(model)
    if not compiled:
        # built again, so that its weights lie in memory as the baseline's will
        model = build(spec, job)
        call = make_call(model, attention, job)
    times, row["no_baseline"] = time_with_or_without_baseline(call, job)
    row |= time_columns(times[:, 0], times[:, 1] if times.shape[1] > 1 else None, job)
    return row | dict(device_name=device_name(device), **versions())


def measure_together(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of jobs that differ in their model only and don't compile, without memory and first call.

    All models and the baseline are in memory at once and timed in turn. A model that fails has a row with its reason.
    """
    job = {**JOB, **jobs[0]}
    set_malloc(2**25)
    prepare_process(job)
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for spec in dict.fromkeys([job["baseline"], *(one["model"] for one in jobs)]):
        try:
            model = build(spec, job)
            call = make_call(model, job["attention"], job)
            with size_in_error(spec, job):
                rows[spec] = size_columns(model) | count_columns(call, job)
            calls[spec] = call
        except Exception as error:  # timm's classes raise as they like
            rows[spec] = dict(error=explain(error))
    seconds = dict(zip(calls, time_interleaved(list(calls.values()), job).T))
    for spec, own in seconds.items():
        rows[spec] |= time_columns(own, seconds.get(job["baseline"]), job)
    machine = dict(device_name=device_name(job["device"]), **versions())
    return [rows[one["model"]] | machine for one in jobs]


def measure_in_process(job: dict[str, Any]) -> dict[str, Any]:
    """``measure`` in a fresh process; a failure comes back as ``{"error": reason}``."""
    return call_in_process(measure, job)
