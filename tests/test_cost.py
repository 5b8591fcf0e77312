"""The cost table: which rows are measured, beside what, and rows that survive a kill; failures are rows."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import exit_code, on_meta
from timm.models import save_for_hf
from torch import nn

from timm_vix import cli, models
from timm_vix._checks import InputError
from timm_vix._names import parse_model
from timm_vix._records import append_record, read_records
from timm_vix.benchmark.baselines import baseline_of
from timm_vix.benchmark.cost import COLUMNS, jobs_of, sweep
from timm_vix.benchmark.cost_text import summary
from timm_vix.mixers._mechanism import MechanismHost
from timm_vix.mixers.softmax import SoftmaxAttention
from timm_vix.train.hub import note_classes_once

ROOT = Path(__file__).parents[1]
SMALL = "depth=1 embed_dim=32 num_heads=2 patch_size=8"
SETTINGS = dict(img_size=[32], dtype=["float32"], compile=["off"], mode=["infer"], batch_size=[2])
QUICK = dict(device="cpu", threads=1, rounds=3, seconds=0.0)
MEASURE = "timm_vix.benchmark.cost.measure_in_process"


def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def jobs(models: list[str], **settings) -> list[dict]:
    planned = jobs_of(models, {**SETTINGS, **settings}, None, [])
    return [{**job, **QUICK} for job in planned]


def test_softmax_of_the_same_trunk_stands_beside_each_model_fused_and_unfused() -> None:
    planned = jobs_of(["vix_nystrom_small patch_size=8 num_landmarks=64", "swin_tiny_patch4_window7_224"],
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
    unfused = jobs_of(["vix_nystrom_tiny", "levit_128s"], SETTINGS, "levit_128s", ["fused", "unfused"])
    assert [(job["model"], job["attention"]) for job in unfused] == [
        ("levit_128s", "unfused"),
        ("vix_nystrom_tiny", "fused"),
    ]


@pytest.mark.slow
def test_a_fused_row_of_a_model_that_ran_no_fused_kernel_is_a_failure(tmp_path) -> None:
    (job,) = jobs_of(["levit_128s"], {**SETTINGS, "img_size": [64]}, "levit_128s", [])
    records = sweep([job | QUICK, job | QUICK | dict(attention="fused")], tmp_path / "cost.csv")
    assert records[0]["attention"] == "unfused" and records[0]["latency_p50_ms"] > 0
    assert "fused" in records[1]["error"] and records[1]["latency_p50_ms"] is None


def trunk_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.named_parameters() if ".attn" not in name}


@pytest.mark.parametrize("name", sorted(set(timm.list_models(module=models.__all__)) - {"fnet2d_cifar"}))
def test_the_baseline_of_every_model_of_ours_is_softmax_on_the_same_trunk(name) -> None:
    baseline = on_meta(baseline_of(name))
    assert trunk_of(baseline) == trunk_of(on_meta(name))
    hosts = [module for module in baseline.modules() if isinstance(module, MechanismHost)]
    assert not [host for host in hosts if not isinstance(host.core, SoftmaxAttention)]


def test_the_name_of_a_folder_may_have_spaces(tmp_path):
    folder = f"local-dir:{tmp_path}/my runs/hub"
    assert parse_model(f"{folder} img_size=64 mixer=softmax") == (folder, dict(img_size=64, mixer="softmax"))
    assert parse_model(folder) == (folder, {})


@pytest.mark.parametrize(
    "spec, baseline",
    [
        ("vix_from_timm source=eva02_tiny_patch14_224 mixer=nystrom", "eva02_tiny_patch14_224"),
        ("vix_nystrom_tiny patch_size=8 num_landmarks=4", "vit_tiny_patch16_224 patch_size=8"),
        ("vix_nystrom_tiny patch_size=8 stem=conv", "vix_nystrom_tiny mixer=softmax patch_size=8 stem=conv"),
        ("vix_performer_tiny.deit_fb_in1k rope=axial mlp=daff", "vix_performer_tiny mixer=softmax rope=axial mlp=daff"),
        ("vix_nystrom_tiny stem=t2t", "vix_nystrom_tiny mixer=softmax stem=t2t stem_mixer=softmax"),
        ("ccp_7 depth=2 num_features=8", "cct_7 depth=2"),
        ("cvn_13 embed_strides=(2,2,2) conv_residual=True key_stride=1", "cvt_13 embed_strides=(2,2,2) key_stride=1"),
        ("pin_tiny stride=16 num_landmarks=4", "pin_tiny mixer=softmax stride=16"),
        ("hybrid_pip_tiny.in1k mixer=nystrom", "hybrid_pip_tiny mixer=softmax"),
        ("pip_tiny stem=t2t stride=16", "pip_tiny mixer=softmax stem=t2t stride=16 stem_mixer=softmax"),
        ("levin_128s stem=t2t", "levin_128s mixer=softmax stem=t2t stem_mixer=softmax"),
        ("levin_128s key_dim=8 train_only=head", "levin_128s mixer=softmax key_dim=8"),
        ("cvt_cifar", "cvt_cifar"),
        ("vix_performer_tiny merge=0.5 depth=2", "vit_tiny_patch16_224 depth=2"),
        ("vix_softmax_cifar merge=5 patch_size=4", "vix_softmax_cifar patch_size=4"),
        ("vix_from_timm source=deit_tiny_patch16_224 mixer=softmax merge=0.3", "deit_tiny_patch16_224"),
        ("vix_from_timm source=vit_tiny_patch16_224 norms=batch depth=3", "vit_tiny_patch16_224 depth=3"),
        ("t2t_vin_tiny stem_mixer=performer depth=2", "t2t_vit_tiny depth=2 stem_mixer=softmax"),
        ("vix_nystrom_cifar stem=t2t patch_size=4", "vix_softmax_cifar stem=t2t patch_size=4 stem_mixer=softmax"),
        ("fnet2d_cifar", "hybrid_vit_cifar"),
        ("fnet2d_cifar stem=conv_pool embed_dim=64 patch_size=4 proj_drop_rate=0.1 train_only=head",
         "hybrid_vit_cifar stem=conv_pool embed_dim=64 patch_size=4 proj_drop_rate=0.1"),
    ],
)  # fmt: skip
def test_a_baseline_has_the_keywords_of_the_trunk(spec, baseline) -> None:
    assert baseline_of(spec) == baseline
    on_meta(baseline)


@pytest.mark.parametrize(
    "spec, baseline",
    [
        ("vix_nystrom_tiny num_landmarks=4 patch_size=8 img_size=32 depth=1",
         "vit_tiny_patch16_224 patch_size=8 depth=1"),
        ("vix_performer_tiny stem=conv depth=1", "vix_performer_tiny mixer=softmax stem=conv depth=1"),
        ("cvn_13 embed_strides=(2,2,2) depths=(1,1,1)", "cvt_13 embed_strides=[2,2,2] depths=[1,1,1]"),
        ("vix_from_timm source=vit_tiny_patch16_224 mixer=nystrom depth=1 source_kwargs={'qk_norm':True}",
         "vit_tiny_patch16_224 depth=1 qk_norm=True"),
    ],
)  # fmt: skip
def test_the_baseline_of_a_folder_is_that_of_the_model_in_it(spec, baseline, tmp_path) -> None:
    name, keywords = parse_model(spec)
    folder = tmp_path / "my runs" / "hub"
    save_for_hf(timm.create_model(name, num_classes=3, **keywords), folder, safe_serialization=True)
    found = baseline_of(f"local-dir:{folder}")
    # what timm adds when it saves a model
    assert set(found.split()) == {*baseline.split(), "num_classes=3", "in_chans=3", "global_pool=token"}
    assert trunk_of(on_meta(found)) == trunk_of(on_meta(f"{baseline} num_classes=3"))
    # what is given comes before what was saved
    assert set(baseline_of(f"local-dir:{folder} num_classes=5").split()) == {*found.split(), "num_classes=5"} - {
        "num_classes=3"
    }


def test_the_baseline_of_a_folder_that_holds_no_model_of_ours_is_the_default(tmp_path) -> None:
    save_for_hf(timm.create_model("vit_small_patch16_224", depth=1), tmp_path, safe_serialization=True)
    assert baseline_of(f"local-dir:{tmp_path}") == "vit_tiny_patch16_224"


def test_the_baseline_of_a_trained_folder_has_its_classes(tmp_path) -> None:
    save_for_hf(timm.create_model("vix_nystrom_tiny", depth=1, num_classes=3), tmp_path, safe_serialization=True)
    note_classes_once(tmp_path / "config.json")
    assert on_meta(baseline_of(f"local-dir:{tmp_path}")).num_classes == 3


@pytest.mark.parametrize(
    "architecture, arguments, words",
    [
        ("vix_from_timm", dict(source="local-dir:{place}"), "is no model of timm itself"),
        ("vix_from_timm", dict(source="vit_tiny_patch16_224.x checkpoint_path={place}"), "can't be written"),
        ("vix_from_timm", dict(source_kwargs=dict(checkpoint_path="{place}")), "checkpoint_path: a saved"),
        ("vix_from_timm", dict(source_kwargs="{place}"), "expected a mapping"),
        ("vix_nystrom_tiny", dict(checkpoint_path="{place}"), "checkpoint_path: a saved"),
        ("vix_nystrom_tiny", dict(act_layer="gelu checkpoint_path={place}"), "can't be written"),
        ("vix_nystrom_tiny", dict(depth=10**9), "depth=1000000000"),
        ("local-dir:{place}", {}, "can't be read"),
    ],
)
def test_the_configuration_of_a_folder_names_no_file_for_its_baseline(architecture, arguments, words, tmp_path) -> None:
    save_for_hf(timm.create_model("vix_nystrom_cifar", depth=1), tmp_path / "place", safe_serialization=True)
    config = dict(architecture=architecture, pretrained_cfg=dict(num_classes=1000), model_args=arguments)
    text = json.dumps(config).replace("{place}", str(tmp_path / "place"))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=words):
        baseline_of(f"local-dir:{tmp_path}")


def test_a_folder_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="absent.*: its configuration can't be read"):
        baseline_of(f"local-dir:{tmp_path}/absent")


def test_another_baseline_is_another_row(tmp_path, monkeypatch) -> None:
    measured = []
    row = dict(latency_p50_ms=1.0, images_per_s=1.0, first_call_ms=1.0)
    monkeypatch.setattr(MEASURE, lambda job: measured.append(job["baseline"]) or row)
    for given in (None, "deit_tiny_patch16_224", None, "deit_tiny_patch16_224"):
        planned = jobs_of(["vix_nystrom_tiny"], SETTINGS, given, [])
        sweep([job | QUICK for job in planned], tmp_path / "cost.csv")
    assert measured == ["vit_tiny_patch16_224", "deit_tiny_patch16_224"]


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The models of measurements that take no time."""
    models: list[str] = []
    row = dict(latency_p50_ms=1.0, latency_p90_ms=1.0, images_per_s=8.0, first_call_ms=1.0, rounds=3)
    monkeypatch.setattr(MEASURE, lambda job: models.append(job["model"]) or row)
    return models


def test_a_folder_or_plan_that_changed_is_measured_again(tmp_path, measured) -> None:
    path, plan, hub = tmp_path / "cost.csv", tmp_path / "plan.json", tmp_path / "hub"
    plan.write_text("{}")
    save_for_hf(timm.create_model("vix_fnet_cifar", depth=1), hub, safe_serialization=True)
    specs = [f"vix_from_timm layers={plan}", f"local-dir:{hub}", "vix_nystrom_tiny"]

    def measured_now() -> list[str]:
        measured.clear()
        records = sweep(jobs(specs), path)
        assert [record["model"] for record in records] == specs
        return list(measured)

    assert measured_now() == specs and measured_now() == []
    plan.write_text("{ }")
    assert measured_now() == specs[:1] and measured_now() == []
    config = hub / "config.json"
    config.write_text(config.read_text() + "\n")
    assert measured_now() == specs[1:2] and measured_now() == []
    plan.write_text("{}")  # as it was when the first row was measured
    assert measured_now() == []


def test_a_table_of_an_earlier_version_is_continued(tmp_path, measured) -> None:
    path, plan = tmp_path / "cost.csv", tmp_path / "plan.json"
    plan.write_text("{}")
    earlier = {name: kind for name, kind in COLUMNS.items() if name != "files"}
    specs = ["vix_nystrom_tiny", f"vix_from_timm layers={plan}"]
    for record in sweep(jobs(specs), tmp_path / "new.csv"):
        append_record(path, earlier, record)
    measured.clear()
    before = path.read_bytes()
    (known,) = sweep(jobs(specs[:1]), path)
    assert measured == [] and known["files"] is None and path.read_bytes() == before
    for _ in range(2):  # nobody knows what the plan was then
        sweep(jobs(specs), path)
        assert measured == specs[1:]
    records, damaged = read_records(path, COLUMNS, exact=True)
    assert [record["model"] for record in records] == [*specs, specs[1]] and damaged == 0
    assert [record["files"] is None for record in records] == [True, True, False]


def test_an_epoch_of_another_number_of_images_is_computed_from_the_speed_that_was_measured(
    tmp_path, measured, capsys
) -> None:
    path, planned = tmp_path / "cost.csv", jobs(["vix_nystrom_tiny", "vix_fnet_tiny"])
    first = sweep(planned, path, epoch_images=1000)
    for _ in range(2):
        again = sweep(planned, path, epoch_images=4000)
        assert again == [record | dict(epoch_images=4000, epoch_s=500.0) for record in first]
    assert len(measured) == 2 and first[0]["epoch_s"] == 125.0
    assert capsys.readouterr().out.count("2 of them are added again with the time of 4000 images an epoch") == 1
    assert read_records(path, COLUMNS, exact=True) == ([*first, *again], 0)
    assert sweep(planned, path) == again  # where nobody asks for a number


def test_rows_of_another_machine_and_rows_without_a_measurement_do_not_stand_for_this_ones(
    tmp_path, monkeypatch, capsys
) -> None:
    path, measured = tmp_path / "cost.csv", []
    row = dict(latency_p50_ms=1.0, latency_p90_ms=1.0, images_per_s=1.0, first_call_ms=1.0)
    monkeypatch.setattr(MEASURE, lambda job: measured.append(job["model"]) or row)
    planned = jobs([f"vix_softmax_cifar {SMALL}"])
    (mine,) = sweep(planned, path)
    path.write_text("")
    append_record(path, COLUMNS, dict(mine, device_name="another processor"))
    append_record(path, COLUMNS, dict(mine, latency_p50_ms=None))
    for times in (2, 2):
        (again,) = sweep(planned, path)
        assert len(measured) == times and again["device_name"] == mine["device_name"]
    assert "1 damaged lines" in capsys.readouterr().out


def test_more_rounds_are_measured_and_other_versions_are_named(tmp_path, monkeypatch, capsys) -> None:
    path, measured = tmp_path / "cost.csv", []
    row = dict(latency_p50_ms=1.0, latency_p90_ms=1.0, images_per_s=1.0, first_call_ms=1.0, torch="1.0")
    monkeypatch.setattr(MEASURE, lambda job: measured.append(job["rounds"]) or row)
    (job,) = jobs([f"vix_softmax_cifar {SMALL}"])
    for rounds in (3, 3, 2, 9, 9):
        (record,) = sweep([job | dict(rounds=rounds)], path)
        assert record["rounds"] == max(measured)
    assert measured == [3, 9]
    assert "1 of 1 rows are there already, 1 of them by other versions" in capsys.readouterr().out


def test_a_failure_hides_no_earlier_measurement(tmp_path, monkeypatch) -> None:
    path, good = (
        tmp_path / "cost.csv",
        dict(latency_p50_ms=1.0, latency_p90_ms=1.0, images_per_s=1.0, first_call_ms=1.0),
    )
    (job,) = jobs([f"vix_softmax_cifar {SMALL}"])
    for rounds, found in ((3, good), (9, dict(error="out of memory"))):
        monkeypatch.setattr(MEASURE, lambda job, found=found: found)
        sweep([job | dict(rounds=rounds)], path)
    monkeypatch.setattr(MEASURE, lambda job: pytest.fail("measured twice"))
    (record,) = sweep([job | dict(rounds=3)], path)
    assert record["error"] is None and record["latency_p50_ms"] == 1


def test_a_failure_is_measured_again_only_where_that_is_asked_for(tmp_path, monkeypatch, capsys) -> None:
    bad = dict(error="out of memory")
    good = dict(latency_p50_ms=1.0, latency_p90_ms=1.0, images_per_s=1.0, first_call_ms=1.0)
    results, measured = [bad, bad, good], []
    monkeypatch.setattr(MEASURE, lambda job: measured.append(job["model"]) or results[len(measured) - 1])
    path = tmp_path / "cost.csv"
    command = ["timm-vix", "cost", f"vix_fnet_cifar {SMALL}", "--img-size", "32", "--softmax", "--device", "cpu"]
    command += ["--threads", "1", "--out", str(path)]
    again = ["--retry-failed"]
    # the option, calls so far, exit code
    for option, calls, code in [([], 1, 2), ([], 1, 2), (again, 2, 2), (again, 3, 0), (again, 3, 0), ([], 3, 0)]:
        monkeypatch.setattr(sys, "argv", [*command, *option])
        assert exit_code(cli.main) == code and len(measured) == calls
        assert ("out of memory" in capsys.readouterr().err) == (code == 2)
    records, damaged = read_records(path, COLUMNS)
    assert ([record["error"] for record in records], damaged) == ([bad["error"], bad["error"], None], 0)


def test_a_model_beside_two_baselines_has_two_lines(tmp_path, monkeypatch) -> None:
    row = dict(latency_p90_ms=1.0, images_per_s=1.0, first_call_ms=1.0, rounds=3, speedup_low=None)
    monkeypatch.setattr(MEASURE, lambda job: row | dict(latency_p50_ms=5.0, speedup=1.0 + ("tiny" in job["baseline"])))
    planned = jobs_of(["vit_small_patch16_224", "vix_nystrom_small"], SETTINGS, None, ["fused"])
    text = summary(sweep([job | QUICK for job in planned], tmp_path / "cost.csv"))
    lines = [line for line in text.splitlines() if "vit_small_patch16_224" in line]
    assert any("vit_small_patch16_224, beside vit_tiny_patch16_224" in line and "2.00" in line for line in lines)
    assert any("beside" not in line and "1.00" in line for line in lines)


def test_why_a_baseline_has_no_time_is_told(tmp_path, monkeypatch, capsys) -> None:
    row = dict(latency_p50_ms=1.0, latency_p90_ms=1.0, images_per_s=1.0, first_call_ms=1.0)
    monkeypatch.setattr(MEASURE, lambda job: row | dict(no_baseline="out of memory: 8 GiB"))
    (job,) = jobs([f"vix_softmax_cifar {SMALL}"])
    sweep([job], tmp_path / "cost.csv")
    assert (
        f"{job['baseline']} could not be timed beside {job['model']}: out of memory: 8 GiB" in capsys.readouterr().out
    )


def test_rows_that_were_timed_together_do_not_stand_for_those_with_memory(tmp_path, monkeypatch) -> None:
    path, measured = tmp_path / "cost.csv", []
    row = dict(latency_p50_ms=1.0, latency_p90_ms=1.0, images_per_s=1.0, rounds=3)
    together = [*jobs([f"vix_softmax_cifar {SMALL}"]), *jobs([f"vix_fnet_cifar {SMALL}"])]
    monkeypatch.setattr(
        "timm_vix.benchmark.cost.call_in_process",
        lambda function, jobs: measured.append(len(jobs)) or [row | dict(gflops=i) for i in range(len(jobs))],
    )
    monkeypatch.setattr(MEASURE, lambda job: measured.append("alone") or row | dict(first_call_ms=2.0))
    for is_together in (True, True, False, False, True):
        records = sweep(together, path, together=is_together)
    assert measured == [2, "alone", "alone"]
    assert [record["first_call_ms"] for record in records] == [2, 2]


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(MEASURE, lambda job: pytest.fail("measured for nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*cost.csv"):
        sweep(jobs([f"vix_softmax_cifar {SMALL}"]), tmp_path / "file" / "cost.csv")


def test_the_table_shows_the_smallest_batch_whatever_the_order(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        MEASURE,
        lambda job: dict(latency_p50_ms=7.0 * job["batch_size"], latency_p90_ms=1.0, images_per_s=1.0),
    )
    text = summary(sweep(jobs([f"vix_softmax_cifar {SMALL}"], batch_size=[32, 2]), tmp_path / "cost.csv"))
    assert " 14 (1)" in text and "224" not in text


@pytest.mark.slow
def test_what_fails_is_a_row_with_its_reason_and_the_sweep_goes_on(tmp_path, capsys) -> None:
    models = [f"vix_softmax_cifar {SMALL}", f"vix_nystrom_cifar {SMALL} num_landmarks=0"]
    planned = [*jobs(models[1:]), *jobs(models[:1], batch_size=[10**11]), *jobs(models[:1])]
    planned[1]["model"] = "vit_tiny_patch16_224"
    records = sweep(planned, tmp_path / "cost.csv", epoch_images=1000)
    assert "num_landmarks=0" in records[0]["error"]
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


@pytest.mark.slow
def test_a_killed_sweep_continues_where_it_stopped(tmp_path) -> None:
    path = tmp_path / "cost.csv"
    mark = "mlp_ratio=1.25"  # tells this test's processes from those of tests beside it
    arguments = [f"vix_{mixer}_cifar {SMALL} {mark}" for mixer in ("fnet", "performer")]
    command = [sys.executable, "-m", "timm_vix", "cost", *arguments, "--img-size", "32", "--softmax", "--threads", "1"]
    command += ["--rounds", "3", "--seconds", "0", "--device", "cpu", "--out", str(path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    while not any("measure.process" in line and "vix_performer" in line for line in command_lines(mark)):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while command_lines(mark):  # for good, were the process of a row to outlive the sweep: the test's time limit
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


def command_lines(mark: str) -> list[str]:
    """Those of the running processes that hold a word."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            lines.append(path.read_text().replace("\0", " "))
    return [line for line in lines if mark in line]


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
    monkeypatch.setattr(MEASURE, lambda job: dict(error="img_size=100 is no multiple"))
    path = str(tmp_path / "cost.csv")
    monkeypatch.setattr(sys, "argv", ["timm-vix", "cost", "vix_nystrom_tiny", "--img-size", "100", "--out", path])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no row could be measured: img_size=100" in capsys.readouterr().err
    assert len(Path(path).read_text().splitlines()) == 4
