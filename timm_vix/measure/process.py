"""One row of the cost table: what a model costs in a process of its own, timed in turn with a softmax baseline.

    python -m timm_vix.measure.process '{"model": "vix_nystrom_tiny", ...}'   # prints one row as JSON

Order of events: build the model, call it twice and read the peak memory of the second call, build it again and the
baseline, then time the two in turn, each first in every other round, so that a machine that slows down slows both. A
call is a forward pass in inference mode ("infer"), or forward, backward and a step of AdamW ("train"; bfloat16 as
autocast).
"""

import contextlib
import ctypes
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from timm.models import resolve_model_input_args
from torch import nn

from .._device import device_name, kibibytes, versions
from .._files import one_line
from .._names import parse_model
from ..conversion.freeze import freeze_except
from .flops import counter
from .statistics import verdict

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
# Seconds from which a first call is one like the others: what it spends on getting warm is a few percent at most.
LONG_CALL = 60.0


def build(spec: str, attention: str, job: dict[str, Any]) -> nn.Module:
    """A model of timm's registry with random weights at the job's image size; ``train_only=PART`` freezes the rest.

    Raises:
        ValueError: for a size that the patches don't divide; timm's classes raise as they like.
    """
    name, keywords = parse_model(spec)
    only = keywords.pop("train_only", None)
    set_fused_attn(attention == "fused")
    model = timm.create_model(**resolve_model_input_args(name, dict(img_size=job["img_size"]), **keywords))
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) or (1, 1)
    sides = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    if any(job["img_size"] % side for side in sides):
        raise ValueError(f"img_size={job['img_size']} is no multiple of patch_size={sides[0]} of {name}")
    train = job["mode"] == "train"
    half = job["dtype"] == "bfloat16" and not train
    if only:
        freeze_except(model, only)
    if not train:
        model.requires_grad_(False)  # torch's counter of operations hooks what has gradients, which inference lacks
    return model.train(train).to(job["device"], torch.bfloat16 if half else torch.float32)


def make_call(model: nn.Module, job: dict[str, Any], forward: Optional[Callable] = None) -> Callable[[], None]:
    """What is timed; ``forward`` is the model itself or its compiled twin."""
    forward = model if forward is None else forward  # a compiled module has no truth value
    weight = next(model.parameters())
    channels = model.pretrained_cfg["input_size"][0]
    size = (job["batch_size"], channels, job["img_size"], job["img_size"])
    images = torch.randn(size, device=weight.device, dtype=weight.dtype)
    if job["mode"] == "infer":

        def infer() -> None:
            with torch.inference_mode():
                forward(images)

        return infer
    labels = torch.zeros(job["batch_size"], dtype=torch.int64, device=weight.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    autocast = torch.autocast(weight.device.type, torch.bfloat16, enabled=job["dtype"] == "bfloat16")

    def step() -> None:
        with autocast:
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(call: Callable[[], None], device: str) -> float:
    """Seconds of a call, until the device is done."""
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


class PeakMemory:
    """The most memory in use since this was made or restarted, less what was in use when it was made, in MiB.

    CUDA: of torch's allocator. CPU: of the process, by Linux's high-water mark of resident memory, less the pages of
    programme files that were read in meanwhile; elsewhere by ``getrusage``, or None where that is not known.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.restart()
        if device.startswith("cuda"):
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before, self.files = self.resident("VmRSS"), self.resident("RssFile")

    def restart(self) -> None:
        """Forget the peak so far; what was in use at the beginning stays what is subtracted."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew

    def read(self) -> Optional[float]:
        if self.device.startswith("cuda"):
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20
        if self.device != "cpu":
            return None
        files = self.resident("RssFile") - self.files
        return (self.resident("VmHWM") - self.before - files) / 2**10

    def resident(self, field: str) -> int:
        """KiB of this process."""
        value = kibibytes("/proc/self/status", field)
        if value is not None or field == "RssFile":
            return value or 0
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most // 2**10 if sys.platform == "darwin" else most


def set_malloc(largest: int) -> None:
    """Have glibc give freed blocks above so many bytes back to the system; nothing happens with another C library.

    By default it learns what to keep as it goes, so that the resident memory of equal runs differs by a third.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-3, largest)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 2 * largest)  # M_TRIM_THRESHOLD, in the proportion that glibc keeps


def limit_memory() -> None:
    """Make an allocation beyond the free memory fail here, before the system ends some process to find room."""
    free, used = kibibytes("/proc/meminfo", "MemAvailable"), kibibytes("/proc/self/status", "VmData")
    if free is not None and used is not None:
        import resource

        most, hard = int((used + 0.9 * free) * 2**10), resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard == resource.RLIM_INFINITY or most < hard:  # else somebody has limited it more than this
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def warm_up(device: str) -> None:
    """Start threads and libraries, whose memory and time are not the model's."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    F.layer_norm(F.gelu(x @ x), (64,)).sum().backward()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def tokens_of(model: nn.Module) -> Optional[int]:
    """Tokens of a vision transformer, of its first stage where it has several, prefix tokens included; or None."""
    if hasattr(model, "grids"):  # a convolutional one, whose prefix tokens come in its last stage
        return math.prod(model.grids[0])
    embed = getattr(model, "patch_embed", None)
    patches = getattr(embed, "num_patches", None) or math.prod(getattr(embed, "grid_size", None) or [0])
    # a pooling-based one counts its prefix tokens as num_tokens
    prefix = getattr(model, "num_prefix_tokens", None) or getattr(model, "num_tokens", 0)
    return patches + prefix if patches else None


def take_turns(call: Callable, reference: Optional[Callable], job: dict[str, Any]) -> np.ndarray:
    """Seconds of (call, reference) for each round: (rounds, 2); a reference that is None takes nan."""
    device = job["device"]
    times: list[tuple[float, float]] = []
    both = [other for other in (call, reference) if other is not None]
    # both are warm after it; of a long one the first is also its time in the first round
    long = {other: seconds for other in both if (seconds := timed(other, device)) > LONG_CALL}
    end = time.perf_counter() + job["seconds"]
    while len(times) < job["rounds"] or (time.perf_counter() < end and len(times) < MOST_ROUNDS):
        round_times = {}
        for other in (call, reference) if len(times) % 2 else (reference, call):
            round_times[other] = np.nan if other is None else long.pop(other, 0.0) or timed(other, device)
        times.append((round_times[call], round_times[reference]))
    return np.array(times)


def beside_baseline(call: Callable, job: dict[str, Any]) -> Optional[np.ndarray]:
    """``take_turns`` with the baseline; None where that cannot be built or does not fit beside the model.

    A model that fits is measured then too, alone: what the baseline held is free once this has returned.
    """
    try:
        baseline = build(job["baseline"], "fused", job)
        reference = make_call(baseline, job, torch.compile(baseline) if job["compile"] == "on" else None)
        return take_turns(call, reference, job)
    except Exception:  # also the model's own, which it then raises again
        return None


def compare_times(times: np.ndarray) -> dict[str, Any]:
    """Latencies in ms, and the ratio baseline / model with its spread: 10th to 90th percentile over the rounds.

    One or two rounds have no spread.
    """
    p50, p90 = np.percentile(times[:, 0] * 1e3, (50, 90)).tolist()
    row = dict(latency_p50_ms=p50, latency_p90_ms=p90, rounds=len(times))
    if np.isnan(times[:, 1]).any():
        return row
    low, median, high = np.percentile(times[:, 1] / times[:, 0], (10, 50, 90)).tolist()
    return row | dict(
        baseline_p50_ms=float(np.median(times[:, 1])) * 1e3,
        speedup=median,
        speedup_low=None if len(times) < 3 else low,
        speedup_high=None if len(times) < 3 else high,
        difference=verdict(len(times), low, high),
    )


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """The measured columns of a row; call it in a process that did nothing else, since memory is the process's.

    Args:
        job: ``model`` ("NAME key=value ..."), and what of ``JOB`` is to be otherwise.
    """
    job = {**JOB, **job}
    device = job["device"]
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    if device == "cpu":
        limit_memory()
    set_malloc(2**17)
    warm_up(device)
    memory = PeakMemory(device)
    model = build(job["model"], job["attention"], job)
    forward = torch.compile(model) if job["compile"] == "on" else model
    call = make_call(model, job, forward)
    row: dict[str, Any] = dict(first_call_ms=timed(call, device) * 1e3)
    memory.restart()  # building in float32, compiling and reading libraries are not what a call needs
    flops = counter()
    with flops if forward is model else contextlib.nullcontext():
        call()  # the second step of training is the first with an optimizer's state
    row["peak_memory_mib"] = memory.read()
    set_malloc(2**25)  # the most that glibc would learn: from here on time counts
    if forward is not model:
        with flops:  # a compiled model's kernels have no names that torch could count
            make_call(model, job)()
    weights = [tensor for tensor in model.state_dict().values() if torch.is_tensor(tensor)]
    elements = [4 if tensor.is_floating_point() else tensor.element_size() for tensor in weights]
    row |= dict(
        tokens=tokens_of(model),
        params_m=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        gflops=flops.get_total_flops() / job["batch_size"] / 1e9,
        checkpoint_mib=sum(tensor.numel() * size for tensor, size in zip(weights, elements)) / 2**20,
    )
    if forward is model:
        # built again, so that its weights lie in memory as the baseline's will
        model = forward = build(job["model"], job["attention"], job)
        call = make_call(model, job)
    times = beside_baseline(call, job)
    row |= compare_times(take_turns(call, None, job) if times is None else times)
    row["images_per_s"] = job["batch_size"] / row["latency_p50_ms"] * 1e3
    return row | dict(device_name=device_name(device), **versions())


def explain(error: BaseException) -> str:
    """The reason of a failure in one line, out of memory told apart."""
    text = one_line(error, 200)
    signs = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "Cannot allocate",
        "Storage size calculation",
    )
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return f"out of memory: {text}"
    return text


def run(job: dict[str, Any]) -> dict[str, Any]:
    """``measure`` in a fresh process; a failure comes back as ``{"error": reason}``."""
    command = [sys.executable, "-m", "timm_vix.measure.process", json.dumps(job)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
        try:
            # not communicate(), which closes the input: it is open while this process lives (``end_with_parent``)
            reader.start()
            lines = list(process.stdout or ())
            code = process.wait()
            reader.join()
        except BaseException:
            process.kill()
            raise
    with contextlib.suppress(IndexError, json.JSONDecodeError):
        return json.loads(lines[-1])
    last = one_line(errors[-1]) if errors else "no message"
    return dict(error=f"killed by signal {-code}, perhaps out of memory" if code < 0 else f"exit {code}: {last}")


def end_with_parent() -> None:
    """End this process when its input is closed, as it is when the process that called ``run`` was killed."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        row = measure(json.loads(sys.argv[1]))
    except Exception as error:  # the models and devices are other people's
        row = dict(error=explain(error))
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
