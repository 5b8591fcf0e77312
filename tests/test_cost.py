"""The cost table: operations by formula, memory of a known size, rows that survive a kill, failures that are rows."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from timm_vix import cli, models
from timm_vix._names import parse_model
from timm_vix._records import append_record, read_records
from timm_vix.benchmark.cost import COLUMNS, baseline_of, plan, summary, sweep
from timm_vix.measure.flops import counter
from timm_vix.measure.process import JOB, beside_baseline, compare_times, run, take_turns
from timm_vix.mixers import SoftmaxAttention
from timm_vix.mixers._layout import cell_grid
from timm_vix.models.checkpoints import MECHANISMS

ROOT = Path(__file__).parents[1]
SMALL = "depth=1 embed_dim=32 num_heads=2 patch_size=8"
SETTINGS = dict(img_size=[32], dtype=["float32"], compile=["off"], mode=["infer"], batch_size=[2])
QUICK = dict(device="cpu", threads=1, rounds=3, seconds=0.0)


# --- floating-point operations, from the shapes alone; a multiply-add is two

B, P, C, DEPTH, HEADS, CLASSES = 2, 16, 192, 12, 3, 1000


def trunk(n: int) -> int:
    """Everything but the mixers: patch embedding, MLPs of ratio 4, classifier."""
    return 2 * (n - 1) * 3 * P * P * C + DEPTH * 2 * (2 * n * C * 4 * C) + 2 * C * CLASSES


def softmax(n: int) -> float:
    return 2 * n * C * 3 * C + 2 * (2 * n * n * C) + 2 * n * C * C


def few(n: int, m: int) -> float:
    """N tokens ask m, or m ask N: folded into both projections, or with a projection on the side of N each."""
    folded = 2 * (2 * n * HEADS * m * C) + 2 * (2 * HEADS * m * (C // HEADS) * C)
    return folded if HEADS * m < C + m else 2 * (2 * n * m * C) + 2 * (2 * n * C * C)


def linformer(n: int) -> float:
    rows, columns = cell_grid(49, (int((n - 1) ** 0.5),) * 2)
    k = rows * columns
    return 2 * k * (n - 1) * C + 2 * (k + 1) * C * 2 * C + few(n, k + 1)


def nystrom(n: int) -> float:
    rows, columns = cell_grid(49, (int((n - 1) ** 0.5),) * 2)
    m, head = rows * columns + 1, C // HEADS
    inverse = 1 + 2 * (8 - 1) + 2  # products of (m, m) matrices: A^T A, two a Newton step
    solve = HEADS * (2 * m * m * head * 4 + inverse * 2 * m**3)  # logits, A V, A^T E, Z E
    return 2 * m * C * 3 * C + 2 * few(n, m) + solve


def performer(n: int, features: int = 64) -> float:
    """Features of queries and keys, their sums with the values and a column of ones, and what the queries read."""
    projections = 2 * n * C * 3 * C + 2 * n * C * C
    return projections + 2 * (2 * n * features * C) + 2 * n * features * (C + HEADS) + 2 * n * features * C


def token_mlp(n: int) -> float:
    return 2 * (2 * n * (C // 2) * C)


def fourier(n: int) -> float:
    return 2.5 * n * C * np.log2(C) + 5 * n * (C // 2 + 1) * np.log2(n)


@pytest.mark.parametrize("side", [14, 32], ids=lambda side: f"{16 * side}px")
@pytest.mark.parametrize(
    "name, mixer",
    [
        ("vit_tiny_patch16_224", softmax),
        ("vix_linformer_tiny", linformer),
        ("vix_nystrom_tiny", nystrom),
        ("vix_performer_tiny", performer),
        ("vix_fnet_tiny", fourier),
        ("vix_mixer_tiny", token_mlp),
    ],
)
def test_operations_are_those_of_the_formula(name, mixer, side) -> None:
    model = timm.create_model(name, img_size=16 * side).eval()
    with torch.inference_mode(), counter() as flops:
        model(torch.zeros(B, 3, 16 * side, 16 * side))
    n = side * side + 1
    assert flops.get_total_flops() == pytest.approx(B * (trunk(n) + DEPTH * mixer(n)), rel=0.02)


@pytest.mark.parametrize(
    "name, mixer, again",
    [("vit_tiny_patch16_224", softmax, lambda n: 2 * n * n * C), ("vix_mixer_tiny", token_mlp, lambda n: 0)],
)
def test_a_training_step_is_three_times_the_forward_pass(name, mixer, again) -> None:
    """But for the patch embedding, whose images have no gradient, and the scores that SDPA computes again."""
    side, n = 14, 197
    model = timm.create_model(name)
    with counter() as flops:
        model(torch.zeros(B, 3, 16 * side, 16 * side)).sum().backward()
    expected = 3 * (trunk(n) + DEPTH * mixer(n)) - 2 * (n - 1) * 3 * P * P * C + DEPTH * again(n)
    assert flops.get_total_flops() == pytest.approx(B * expected, rel=0.005)


def test_fourier_transforms_count_by_their_formulas() -> None:
    x = torch.zeros(3, 8, 16)
    for transform, expected in (
        (lambda: torch.fft.fft(x.to(torch.complex64), dim=1), 3 * 16 * 5 * 8 * 3),
        (lambda: torch.fft.rfft(x, dim=2), 3 * 8 * 2.5 * 16 * 4),
        (lambda: torch.fft.irfft(torch.zeros(3, 8, 9, dtype=torch.complex64), n=16, dim=2), 3 * 8 * 2.5 * 16 * 4),
        (lambda: torch.fft.fft2(x.to(torch.complex64)), 3 * (16 * 5 * 8 * 3 + 8 * 5 * 16 * 4)),
    ):
        with counter() as flops:
            transform()
        assert flops.get_total_flops() == expected


def test_fused_attention_and_its_backward_count_as_the_products_they_are() -> None:
    n, c = 65, 32
    totals = []
    for fused in (True, False):
        timm.layers.set_fused_attn(fused)
        model = timm.create_model("vit_tiny_patch16_224", img_size=128, depth=1, embed_dim=c, num_heads=2)
        timm.layers.set_fused_attn(True)
        with counter() as flops:
            model(torch.zeros(1, 3, 128, 128)).sum().backward()
        totals.append(flops.get_total_flops())
    # the fused backward computes the scores once more
    assert totals[0] - totals[1] == 2 * n * n * c


# --- timing


def test_a_model_beside_itself_is_no_difference_and_a_slower_one_is() -> None:
    times = np.array([[1.0, 1.1], [1.0, 0.9], [1.0, 1.0], [1.0, 1.05], [1.0, 0.95]])
    assert compare_times(times)["difference"] == "none"
    assert compare_times(times * [1, 2])["difference"] == "faster"
    slower = compare_times(times * [2, 1])
    assert slower["difference"] == "slower"
    assert slower["speedup_low"] < slower["speedup"] == 0.5 < slower["speedup_high"]
    for few, spread in ((2, False), (4, True)):  # three to four rounds have a spread, and are no proof
        row = compare_times((times * [1, 2])[:few])
        assert row["difference"] == "unknown" and (row["speedup_low"] is not None) is spread
    assert "speedup" not in compare_times(times * [1, np.nan])


def test_the_two_take_turns_and_change_order() -> None:
    order = []
    times = take_turns(lambda: order.append("model"), lambda: order.append("softmax"), dict(QUICK, rounds=4))
    assert times.shape == (4, 2)
    assert order[2:] == ["softmax", "model", "model", "softmax"] * 2


def test_of_a_long_call_the_first_is_its_time_in_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm_vix.measure.process.LONG_CALL", 0.5)
    order = []

    def softmax() -> None:
        order.append("softmax")
        time.sleep(0.6 if len(order) < 4 else 0)

    times = take_turns(lambda: order.append("model"), softmax, dict(QUICK, rounds=2))
    assert order == ["model", "softmax", "model", "model", "softmax"]
    assert times[0, 1] >= 0.6


# --- memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_peak_memory_is_that_of_the_tensors() -> None:
    program = """
import torch
from timm_vix.measure.process import PeakMemory, warm_up
warm_up("cpu")
torch.ones(100 * 2**18).sum()  # 100 MiB before the start don't count
memory = PeakMemory("cpu")
a = torch.ones(64 * 2**18)
b = a + 1  # 128 MiB live
del b
c = torch.ones(16 * 2**18)
print(memory.read())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(128, abs=4)


# --- rows


def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def jobs(models: list[str], **settings) -> list[dict]:
    planned = plan(models, {**SETTINGS, **settings}, None, [])
    return [{**job, **QUICK} for job in planned]


def test_softmax_of_the_same_trunk_stands_beside_each_model_fused_and_unfused() -> None:
    planned = plan(["vix_nystrom_small patch_size=8 num_landmarks=64", "swin_tiny_patch4_window7_224"],
                   {**SETTINGS, "mode": ["infer", "train"]}, None, ["fused", "unfused"])  # fmt: skip
    rows = [(job["model"], job["attention"], job["baseline"]) for job in planned if job["mode"] == "train"]
    small, tiny = "vit_small_patch16_224 patch_size=8", "vit_tiny_patch16_224"
    assert rows == [
        (small, "fused", small),
        (small, "unfused", small),
        (tiny, "fused", tiny),
        (tiny, "unfused", tiny),
        ("vix_nystrom_small patch_size=8 num_landmarks=64", "fused", small),
        ("swin_tiny_patch4_window7_224", "fused", tiny),
    ]
    assert len(planned) == 12


def on_meta(spec: str) -> nn.Module:
    name, keywords = parse_model(spec)
    return timm.create_model(name, device="meta", **keywords)


def trunk_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.named_parameters() if ".attn" not in name}


@pytest.mark.parametrize("name", sorted(set(timm.list_models(module=models.__all__)) - {"fnet2d_cifar"}))
def test_the_baseline_of_every_model_of_ours_is_softmax_on_the_same_trunk(name) -> None:
    baseline = on_meta(baseline_of(name))
    assert trunk_of(baseline) == trunk_of(on_meta(name))
    efficient = [m for m in baseline.modules() if isinstance(m, MECHANISMS)]
    assert all(isinstance(module, SoftmaxAttention) for module in efficient)


@pytest.mark.parametrize(
    "spec, baseline",
    [
        ("vix_from_timm source=eva02_tiny_patch14_224 mixer=nystrom", "eva02_tiny_patch14_224"),
        ("vix_nystrom_tiny patch_size=8 stem=conv num_landmarks=4", "vit_tiny_patch16_224 patch_size=8"),
        ("ccp_7 depth=2 num_features=8", "cct_7 depth=2"),
        ("cvn_13 embed_strides=(2,2,2) conv_residual=True key_stride=1", "cvt_13 embed_strides=(2,2,2) key_stride=1"),
        ("pin_tiny stride=16 num_landmarks=4", "pin_tiny mixer=softmax stride=16"),
        ("hybrid_pip_tiny.in1k mixer=nystrom", "hybrid_pip_tiny mixer=softmax"),
        ("levin_128s key_dim=8 train_only=head", "levin_128s mixer=softmax key_dim=8"),
        ("cvt_cifar", "cvt_cifar"),
        ("fnet2d_cifar", "hybrid_vit_cifar"),
        ("fnet2d_cifar stem=conv_pool embed_dim=64 patch_size=4 proj_drop_rate=0.1 train_only=head",
         "hybrid_vit_cifar stem=conv_pool embed_dim=64 patch_size=4 proj_drop_rate=0.1"),
    ],
)  # fmt: skip
def test_a_baseline_has_the_keywords_of_the_trunk(spec, baseline) -> None:
    assert baseline_of(spec) == baseline
    on_meta(baseline)


def test_another_baseline_is_another_row(tmp_path, monkeypatch) -> None:
    measured = []
    row = dict(latency_p50_ms=1.0, images_per_s=1.0)
    monkeypatch.setattr("timm_vix.benchmark.cost.run", lambda job: measured.append(job["baseline"]) or row)
    for given in (None, "deit_tiny_patch16_224", None, "deit_tiny_patch16_224"):
        planned = plan(["vix_nystrom_tiny"], SETTINGS, given, [])
        sweep([job | QUICK for job in planned], tmp_path / "cost.csv")
    assert measured == ["vit_tiny_patch16_224", "deit_tiny_patch16_224"]


def test_rows_of_another_machine_and_rows_without_a_measurement_do_not_stand_for_this_ones(
    tmp_path, monkeypatch, capsys
) -> None:
    path, measured = tmp_path / "cost.csv", []
    row = dict(latency_p50_ms=1.0, latency_p90_ms=1.0, images_per_s=1.0)
    monkeypatch.setattr("timm_vix.benchmark.cost.run", lambda job: measured.append(job["model"]) or row)
    planned = jobs([f"vix_softmax_cifar {SMALL}"])
    (mine,) = sweep(planned, path)
    path.write_text("")
    append_record(path, COLUMNS, dict(mine, device_name="another processor"))
    append_record(path, COLUMNS, dict(mine, latency_p50_ms=None))
    for times in (2, 2):
        (again,) = sweep(planned, path)
        assert len(measured) == times and again["device_name"] == mine["device_name"]
    assert "1 damaged lines" in capsys.readouterr().out


def test_more_rounds_are_measured_and_other_versions_told(tmp_path, monkeypatch, capsys) -> None:
    path, measured = tmp_path / "cost.csv", []
    row = dict(latency_p50_ms=1.0, latency_p90_ms=1.0, images_per_s=1.0, torch="1.0")
    monkeypatch.setattr("timm_vix.benchmark.cost.run", lambda job: measured.append(job["rounds"]) or row)
    (job,) = jobs([f"vix_softmax_cifar {SMALL}"])
    for rounds in (3, 3, 2, 9, 9):
        (record,) = sweep([job | dict(rounds=rounds)], path)
        assert record["rounds"] == max(measured)
    assert measured == [3, 9]
    assert "1 of 1 rows are there already, 1 of them by other versions" in capsys.readouterr().out


def test_a_table_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("timm_vix.benchmark.cost.run", lambda job: pytest.fail("measured for nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*cost.csv"):
        sweep(jobs([f"vix_softmax_cifar {SMALL}"]), tmp_path / "file" / "cost.csv")


def test_a_model_that_fits_is_measured_alone_where_its_baseline_does_not() -> None:
    (job,) = jobs([f"vix_fnet_cifar {SMALL}"])
    row = run(dict(job, baseline="vit_tiny_patch16_224 embed_dim=3000000"))
    assert "error" not in row, row
    assert row["latency_p50_ms"] > 0 and "speedup" not in row


def test_what_a_baseline_held_that_does_not_fit_is_free_again(monkeypatch) -> None:
    built = []

    def fail(call, reference, job):
        built.append(weakref.ref(reference.__closure__[0].cell_contents))
        raise MemoryError

    monkeypatch.setattr("timm_vix.measure.process.take_turns", fail)
    job = dict(JOB, baseline=f"vix_softmax_cifar {SMALL}", img_size=32)
    assert beside_baseline(lambda: None, job) is None
    assert built[0]() is None


def test_the_table_shows_the_smallest_batch_whatever_the_order(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "timm_vix.benchmark.cost.run",
        lambda job: dict(latency_p50_ms=7.0 * job["batch_size"], latency_p90_ms=1.0, images_per_s=1.0),
    )
    text = summary(sweep(jobs([f"vix_softmax_cifar {SMALL}"], batch_size=[32, 2]), tmp_path / "cost.csv"))
    assert " 14 (1)" in text and "224" not in text


def test_weights_that_pass_from_stage_to_stage_are_counted_in_inference() -> None:
    # torch's counter of operations follows their gradients, which inference mode has not
    (job,) = jobs(["pin_cifar base_dims=(8,8,8) heads=(1,1,1) stride=4 patch_size=4 num_landmarks=4"])
    row = run(job)
    assert "error" not in row, row
    assert row["gflops"] > 0 and row["params_m"] > 0


def test_a_row_has_what_was_measured() -> None:
    (job,) = jobs([f"vix_nystrom_cifar {SMALL} num_landmarks=4"], mode=["train"])
    row = run(job)
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
    assert {"torch", "timm", "timm_vix", "device_name"} <= set(row)
    assert set(row) | {"epoch_images", "epoch_s", "error"} | set(job) >= set(COLUMNS)


def test_a_step_of_a_part_goes_back_only_to_what_trains() -> None:
    infer, whole = jobs([f"vix_softmax_cifar {SMALL}"], mode=["infer", "train"])
    head = dict(whole, model=f"{whole['model']} train_only=head")
    forward, both, part = (run(job)["gflops"] for job in (infer, whole, head))
    last = 2 * 32 * 10 / 1e9  # the classifier's weights are all that has a gradient
    assert part == pytest.approx(forward + last) and both > 2.5 * forward


@pytest.mark.slow
def test_a_compiled_model_is_measured_beside_a_compiled_baseline() -> None:
    (eager,) = jobs([f"vix_softmax_cifar {SMALL}"])
    row, expected = run(dict(eager, compile="on")), run(eager)
    assert "error" not in row, row
    assert row["gflops"] == expected["gflops"]
    assert row["first_call_ms"] > expected["first_call_ms"] and row["speedup"] > 0


def test_what_fails_is_a_row_with_its_reason_and_the_sweep_goes_on(tmp_path, capsys) -> None:
    models = [f"vix_softmax_cifar {SMALL}", f"vix_nystrom_cifar {SMALL} num_landmarks=300"]
    planned = [*jobs(models[1:]), *jobs(models[:1], batch_size=[10**8]), *jobs(models[:1])]
    planned[1]["model"] = "vit_tiny_patch16_224"
    records = sweep(planned, tmp_path / "cost.csv", epoch_images=1000)
    assert "num_landmarks=300" in records[0]["error"]
    assert records[1]["error"].startswith("out of memory")
    assert records[2]["error"] is None
    assert records[2]["epoch_s"] == pytest.approx(1000 / records[2]["images_per_s"], abs=0.051)
    assert len((tmp_path / "cost.csv").read_text().splitlines()) == 4
    assert capsys.readouterr().out.count("failed: ") == 2
    assert all(record["device_name"] and record["torch"] and record["timm_vix"] for record in records)
    # nothing is measured twice
    before = (tmp_path / "cost.csv").read_bytes()
    assert sweep(planned, tmp_path / "cost.csv") == records
    assert (tmp_path / "cost.csv").read_bytes() == before


def test_a_killed_sweep_continues_where_it_stopped(tmp_path) -> None:
    path = tmp_path / "cost.csv"
    mark = "mlp_ratio=1.25"  # tells this test's processes from those of tests beside it
    arguments = [f"vix_{mixer}_cifar {SMALL} {mark}" for mixer in ("fnet", "performer")]
    command = [sys.executable, "-m", "timm_vix", "cost", *arguments, "--img-size", "32", "--softmax", "--threads", "1"]
    command += ["--rounds", "3", "--seconds", "0", "--device", "cpu", "--out", str(path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    end = time.time() + 300
    while not (path.exists() and path.read_text().count("\n") == 2):
        assert time.time() < end and process.poll() is None
        time.sleep(0.01)
    time.sleep(1)  # the next row's process has started
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.time() + 30
    while [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark in read(p)]:
        assert time.time() < end, "the process of a row outlived the sweep"
        time.sleep(0.1)
    path.write_text(path.read_text() + path.read_text().splitlines()[1][:40])  # killed in the middle of a line
    header, first, cut = path.read_text().splitlines()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = path.read_text().splitlines()
    assert lines[:3] == [header, first, cut] and len(lines) == 4
    assert "1 damaged lines" in done.stdout and "1 of 2 rows are there" in done.stdout
    records, damaged = read_records(path, COLUMNS)
    assert [record["model"].split()[0] for record in records] == ["vix_fnet_cifar", "vix_performer_cifar"]
    assert damaged == 1


def read(path: Path) -> str:
    try:
        return path.read_text().replace("\0", " ")
    except OSError:
        return ""


# --- tables


TABLE = dict(name=str, count=int, value=float)


def test_damaged_lines_are_counted_and_the_good_ones_kept(tmp_path) -> None:
    path = tmp_path / "table.csv"
    append_record(path, TABLE, dict(name='a, "quoted"\nname', count=1, value=0.5))
    good = path.read_bytes()
    path.write_bytes(good + b'x,1\nx,1,2,3\nx,one,2\nx,1,two\n\xff,1,1\n"x,1,1\n\n\0\nb,,\n')
    append_record(path, TABLE, dict(name="c"))
    records, damaged = read_records(path, TABLE)
    assert records == [
        dict(name='a, "quoted" name', count=1, value=0.5),
        dict(name="b", count=None, value=None),
        dict(name="c", count=None, value=None),
    ]
    assert damaged == 7


@pytest.mark.parametrize(
    "header, words", [("name,count", "lacks value"), ("", "lacks name"), ("name,count,value,x", "also x")]
)
def test_a_table_of_another_version_is_refused(tmp_path, header, words) -> None:
    path = tmp_path / "table.csv"
    path.write_text(header + "\n")
    with pytest.raises(ValueError, match=f"another version.*{words}"):
        read_records(path, TABLE, exact=True)


# --- the command


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["vix_nistrom_tiny"], ["'vix_nistrom_tiny' is not registered", "near names: vix_nystrom_tiny"]),
        (["vix_nystrom_tiny depth"], ["'depth' is no key=value"]),
        (["vix_nystrom_tiny", "--device", "cuda:7"], ["device='cuda:7' is not on this machine", "allowed are auto"]),
        (["vix_nystrom_tiny", "--baseline", "vit_tiny"], ["'vit_tiny' is not registered", "near names"]),
    ],
)
def test_wrong_input_is_one_line(arguments, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["timm-vix", "cost", *arguments, "--out", str(tmp_path / "cost.csv")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "cost.csv").exists()


def test_a_file_of_another_version_is_not_appended_to(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "cost.csv"
    path.write_text("model,ms\nvit,1\n")
    monkeypatch.setattr(sys, "argv", ["timm-vix", "cost", "vix_nystrom_tiny", "--out", str(path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "another version" in capsys.readouterr().err
    assert path.read_text() == "model,ms\nvit,1\n"


def test_a_sweep_that_measured_nothing_says_why(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        "timm_vix.benchmark.cost.run", lambda job: json.loads('{"error": "img_size=100 is no multiple"}')
    )
    path = str(tmp_path / "cost.csv")
    monkeypatch.setattr(sys, "argv", ["timm-vix", "cost", "vix_nystrom_tiny", "--img-size", "100", "--out", path])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no row could be measured: img_size=100" in capsys.readouterr().err
    assert len(Path(path).read_text().splitlines()) == 4
