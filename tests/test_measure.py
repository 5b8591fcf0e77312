"""What is measured: kernels that really run, memory of a known size, times in turn."""

import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from timm_vix import _device, models
from timm_vix.benchmark.baselines import attention_of, baseline_of
from timm_vix.measure import job as job_module
from timm_vix.measure.attention import UnfusedAttention, unfused_attention
from timm_vix.measure.job import (
    JOB,
    build,
    count_columns,
    make_call,
    measure_in_process,
    measure_together,
    time_interleaved,
    time_with_or_without_baseline,
)
from timm_vix.measure.process import call_in_process
from timm_vix.measure.statistics import compare_times

ROOT = Path(__file__).parents[1]
SMALL = "depth=1 embed_dim=32 num_heads=2 patch_size=8"
QUICK = dict(img_size=32, batch_size=2, device="cpu", threads=1, rounds=3, seconds=0.0)
SOFTMAX = f"vix_softmax_cifar {SMALL}"
FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


def job(model: str, baseline: str = SOFTMAX, **settings) -> dict:
    return {**QUICK, "model": model, "baseline": baseline, **settings}


# --- attention, fused and unfused


def operators(call) -> set[str]:
    """The operators that run in a call, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return {event.key for event in profiled.key_averages()}


OFTEN = ("vix_softmax_cifar", "cvt_cifar")  # timm's own attention, and one of ours
CONTROLS = sorted({baseline_of(name) for name in timm.list_models(module=models.__all__)})


@pytest.mark.parametrize("control", [pytest.param(c, marks=[] if c in OFTEN else pytest.mark.slow) for c in CONTROLS])
def test_rows_of_a_softmax_control_run_the_kernels_that_they_name(control) -> None:
    """In inference, and of the small ones in training too."""
    img_size = timm.get_pretrained_cfg(control.split()[0]).input_size[-1]
    kinds = attention_of(control, ["fused", "unfused"])
    assert "unfused" in kinds
    for mode in ("infer", "train") if "cifar" in control else ("infer",):
        setting = {**JOB, "img_size": img_size, "mode": mode, "batch_size": 1 if mode == "infer" else 2}
        model = build(control, setting)
        for kind in kinds:
            run = operators(make_call(model, kind, setting))
            expected = {FUSED, f"{FUSED}_backward"} if mode == "train" else {FUSED}
            assert {name for name in run if "attention" in name} - {"aten::scaled_dot_product_attention"} == (
                expected if kind == "fused" else set()
            )


def test_a_control_that_never_runs_fused_has_no_row_that_says_so() -> None:
    assert attention_of("levit_128s", ["fused", "unfused"]) == attention_of("levit_128s", ["fused"]) == ["unfused"]
    assert attention_of("vit_tiny_patch16_224", ["fused"]) == ["fused"]
    assert attention_of("levit_128s", []) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize(
    "control", [SOFTMAX, f"vix_softmax_cifar_rope {SMALL}", "cvt_cifar depths=(1,1,1) embed_dims=(16,16,16)"]
)
def test_compiled_rows_run_the_kernels_that_they_name(control, mode) -> None:
    """``SDPBackend.MATH`` doesn't do: the compiler replaces it by the fused kernel."""
    setting = {**JOB, "img_size": 32, "mode": mode}
    for kind in ("fused", "unfused"):
        torch._dynamo.reset()
        call = make_call(build(control, setting), kind, setting, compiled=True)
        call()
        assert (FUSED in operators(call)) is (kind == "fused")


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(scale=0.3),
        dict(is_causal=True),
        dict(attn_mask=(torch.arange(7) != 3).expand(5, 7)),
        dict(attn_mask=torch.linspace(-2, 2, 35).reshape(5, 7)),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_unfused_attention_is_the_function_that_it_replaces(options) -> None:
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    results = []
    for function in (F.scaled_dot_product_attention, unfused_attention):
        y = function(q, k, v, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for value, expected in zip(*results):
        torch.testing.assert_close(value, expected)
    with UnfusedAttention():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **options), results[0][0])


def test_unfused_attention_drops_weights_at_the_rate_that_is_asked_for() -> None:
    n = 4096
    equal = torch.zeros(1, 1, n)
    kept = unfused_attention(torch.zeros(1, n, 1), equal.mT, torch.eye(n)[None], dropout_p=0.25)[0] != 0
    # 16 million draws: six standard deviations
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=6 * math.sqrt(0.25 * 0.75) / n)


# --- timing


def test_a_model_beside_itself_is_no_difference_and_a_slower_one_is() -> None:
    seconds, baseline = np.ones(5), np.array([1.1, 0.9, 1.0, 1.05, 0.95])
    assert compare_times(seconds, baseline)["difference"] == "none"
    assert compare_times(seconds, 2 * baseline)["difference"] == "faster"
    slower = compare_times(2 * seconds, baseline)
    assert slower["difference"] == "slower"
    assert slower["speedup_low"] < slower["speedup"] == 0.5 < slower["speedup_high"]
    assert (slower["latency_p50_ms"], slower["baseline_p50_ms"]) == (2000, 1000)
    for few, spread in ((2, False), (4, True)):  # three to four rounds have a spread, and are no proof
        row = compare_times(seconds[:few], 2 * baseline[:few])
        assert row["difference"] == "unknown" and (row["speedup_low"] is not None) is spread
    assert "speedup" not in compare_times(seconds)


def test_calls_are_timed_in_turn_and_change_their_order() -> None:
    order = []
    calls = [lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c")]
    assert time_interleaved(calls, dict(QUICK, rounds=4)).shape == (4, 3)
    assert "".join(order) == "abc" + 2 * "abccba"
    order.clear()
    time_interleaved(calls, dict(QUICK, rounds=2), settle=True)
    assert "".join(order) == "abc" + "aabbcc" + "ccbbaa"


def test_of_a_long_call_the_first_is_its_time_in_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "LONG_CALL", 60.0)
    seconds = dict(softmax=iter((61.0, 70.0)), model=iter((1.0, 2.0, 3.0)))
    monkeypatch.setattr(job_module, "timed", lambda name, device: next(seconds[name]))
    times = time_interleaved(["softmax", "model"], dict(QUICK, rounds=2))
    assert times.tolist() == [[61.0, 2.0], [70.0, 3.0]]


# --- memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_peak_memory_is_that_of_the_tensors() -> None:
    program = """
import torch
from timm_vix.measure.job import warm_up
from timm_vix.measure.memory import PeakMemory
warm_up("cpu")
torch.ones(100 * 2**18).sum()  # 100 MiB before the start don't count
memory = PeakMemory("cpu")
a = torch.ones(64 * 2**18)
b = a + 1  # 128 MiB live
del b
c = torch.ones(16 * 2**18)
print(memory.read())
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(128, abs=4)


# --- rows


def test_a_row_has_what_was_measured() -> None:
    row = measure_in_process(job(f"vix_nystrom_cifar {SMALL} num_landmarks=4", mode="train"))
    assert "error" not in row, row
    assert row["tokens"] == 17
    model = timm.create_model("vix_nystrom_cifar", depth=1, embed_dim=32, num_heads=2, patch_size=8, num_landmarks=4)
    parameters = sum(p.numel() for p in model.parameters())
    assert row["params_m"] == parameters / 1e6
    assert row["checkpoint_mib"] == pytest.approx(4 * parameters / 2**20)
    assert row["rounds"] == 3
    assert 0 < row["latency_p50_ms"] <= row["latency_p90_ms"]
    assert row["images_per_s"] == pytest.approx(2000 / row["latency_p50_ms"])
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert row["first_call_ms"] > 0 and row["gflops"] > 0 and row["peak_memory_mib"] >= 0


def test_models_that_are_timed_together_have_the_columns_of_one_alone() -> None:
    specs = [f"vix_fnet_cifar {SMALL}", *(f"vix_nystrom_cifar {SMALL} num_landmarks={count}" for count in (4, 0))]
    jobs = [job(model) for model in (specs[0], specs[1], SOFTMAX, specs[2])]
    together = call_in_process(measure_together, jobs)
    alone = measure_in_process(jobs[0])
    assert "num_landmarks=0" in together.pop()["error"]
    assert set(together[0]) == set(alone) - {"first_call_ms", "peak_memory_mib", "no_baseline"}
    same = ("gflops", "params_m", "checkpoint_mib", "tokens", "rounds", "fused", "device_name", "torch")
    assert {name: together[0][name] for name in same} == {name: alone[name] for name in same}
    assert [row["fused"] for row in together] == [False, True, True]
    fnet, nystrom, softmax = together
    assert softmax["speedup"] == softmax["speedup_low"] == softmax["speedup_high"] == 1
    assert fnet["baseline_p50_ms"] == nystrom["baseline_p50_ms"] == softmax["latency_p50_ms"]


def test_models_are_timed_together_without_a_baseline_that_fails() -> None:
    row, wrong = measure_together([job(SOFTMAX, "vit_tiny_patch16_224 depth=no"), job("vit_tiny_patch16_224 depth=no")])
    assert row["latency_p50_ms"] > 0 and "speedup" not in row and wrong["error"]


def test_a_model_that_fits_is_measured_alone_where_its_baseline_does_not() -> None:
    row = measure_in_process(job(f"vix_fnet_cifar {SMALL}", f"{SOFTMAX} mlp_ratio=1000000000000"))
    assert "error" not in row, row
    assert row["latency_p50_ms"] > 0 and "speedup" not in row and row["no_baseline"]


def test_what_a_baseline_held_that_does_not_fit_is_free_again(monkeypatch) -> None:
    built = []

    def fail(calls, job):
        if len(calls) > 1:
            built.append(weakref.ref(calls[1].__closure__[0].cell_contents))
            raise MemoryError
        assert built[0]() is None
        return np.ones((1, 1))

    monkeypatch.setattr(job_module, "time_interleaved", fail)
    times, reason = time_with_or_without_baseline(lambda: None, dict(JOB, baseline=SOFTMAX, img_size=32))
    assert times.shape == (1, 1) and reason.startswith("out of memory")
    assert len(built) == 1


def gflops_of(spec: str, **settings) -> float:
    setting = {**JOB, **job(spec, **settings)}
    return count_columns(make_call(build(spec, setting), "fused", setting), setting)["gflops"]


def test_weights_that_pass_from_stage_to_stage_are_counted_in_inference() -> None:
    # torch's counter of operations follows their gradients, which inference mode has not
    narrow, wide = (
        gflops_of(f"pin_cifar base_dims=({dim},{dim},{dim}) heads=(1,1,1) stride=4 patch_size=4 num_landmarks=4")
        for dim in (8, 16)
    )
    assert 0 < narrow < wide


def test_a_step_of_a_part_goes_back_only_to_what_trains() -> None:
    forward, whole = gflops_of(SOFTMAX), gflops_of(SOFTMAX, mode="train")
    part = gflops_of(f"{SOFTMAX} train_only=head", mode="train")
    last = 2 * 32 * 10 / 1e9  # the classifier's weights are all that has a gradient
    assert part == pytest.approx(forward + last) and whole > 2.5 * forward


@pytest.mark.slow
def test_a_compiled_model_is_measured_beside_a_compiled_baseline() -> None:
    row, expected = (measure_in_process(job(SOFTMAX, compile=setting)) for setting in ("on", "off"))
    assert "error" not in row, row
    assert row["gflops"] == expected["gflops"]
    assert row["first_call_ms"] > 0 and row["speedup"] > 0


def test_a_baseline_has_compiled_before_it_is_timed(monkeypatch) -> None:
    calls: list[tuple] = []

    def make(model, attention, job, compiled=False):
        return lambda: calls.append(("baseline", compiled))

    def time(functions, job):
        calls.append("timed")
        return np.ones((1, len(functions)))

    monkeypatch.setattr(job_module, "make_call", make)
    monkeypatch.setattr(job_module, "time_interleaved", time)
    for setting, before in (("on", [("baseline", True)]), ("off", [])):
        calls.clear()
        time_with_or_without_baseline(lambda: None, dict(JOB, baseline=SOFTMAX, img_size=32, compile=setting))
        assert calls == [*before, "timed"]


# --- machines


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"model name": "AMD EPYC", "flags": "fpu avx2 fma"}, "AMD EPYC (avx2)"),
        ({"model name": "Xeon", "flags": "avx2 avx512f avx512_bf16 amx_tile amx_bf16"},
         "Xeon (avx2 avx512f avx512_bf16 amx_bf16)"),
        ({"model name": "Some RISC"}, "Some RISC"),
    ],
)  # fmt: skip
def test_a_processor_is_named_with_the_instructions_that_decide_its_speed(fields, name, monkeypatch) -> None:
    monkeypatch.setattr(_device, "fields_of", lambda path: fields)
    assert _device.device_name("cpu") == name


@pytest.mark.parametrize("device", ["mps", "mps:0"])
def test_the_clock_stops_when_the_device_is_done(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(True))
    job_module.timed(lambda: None, device)
    assert waited


def test_a_gpu_in_the_processor_has_a_name_of_its_own() -> None:
    """Or a plan would take the times of one for those of the other."""
    assert _device.device_name("mps:0") == _device.device_name("mps") != _device.device_name("cpu")
