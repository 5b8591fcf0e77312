"""Whole models that timm ships, measured by their names: published sizes, sizes they can't take, real runs."""

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from timm_vix.benchmark import compare, cost
from timm_vix.benchmark.baselines import baseline_of
from timm_vix.measure.job import build, count_columns, make_call, measure_together, size_columns

# side of the images in pixels; parameters in millions and giga multiply-adds as their papers or timm give them
FAMILIES = {
    "convit_tiny": (224, 5.7, 1.26),
    "crossvit_tiny_240": (240, 7.0, 1.6),
    "tnt_s_patch16_224": (224, 23.8, 5.2),
    "swin_tiny_patch4_window7_224": (224, 28.3, 4.5),
    "convnext_atto": (224, 3.7, 0.55),
    "nextvit_small": (224, 31.7, 5.8),
    "poolformer_s12": (224, 11.9, 1.8),
}
JOB = dict(mode="infer", dtype="float32", device="cpu", batch_size=1, attention="fused", compile="off", threads=1)
QUICK = dict(JOB, rounds=1, seconds=0.0, baseline="vit_tiny_patch16_224 depth=1")


@pytest.mark.parametrize("name", FAMILIES)
def test_operations_and_parameters_are_the_published_ones(name):
    side, params, macs = FAMILIES[name]
    assert timm.get_pretrained_cfg(name).input_size[-1] == side
    job = dict(JOB, img_size=side)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model = build(name, dict(job, device="meta"))
        row = size_columns(model) | count_columns(make_call(model, "fused", job), job)
    assert row["params_m"] == pytest.approx(params, rel=0.01)
    assert row["gflops"] == pytest.approx(2 * macs, rel=0.03)
    assert baseline_of(name) == "vit_tiny_patch16_224"


def test_a_model_at_a_size_that_it_cannot_take_says_its_own():
    (row,) = measure_together([dict(QUICK, model="crossvit_tiny_240", img_size=64)])
    assert all(word in row["error"] for word in ("img_size=64", "crossvit_tiny_240", "240"))


def test_a_small_model_of_timm_is_measured():
    (row,) = measure_together([dict(QUICK, model="convnext_atto", img_size=32)])
    assert row["latency_p50_ms"] > 0 and row["speedup"] > 0 and "error" not in row


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cost_at_the_size_that_a_model_is_made_for(name, mode, tmp_path):
    settings = dict(img_size=[FAMILIES[name][0]], batch_size=[1], mode=[mode], dtype=["float32"], compile=["off"])
    (job,) = cost.jobs_of([name], settings, None, [])
    (row,) = cost.sweep([job | dict(device="cpu", threads=1, rounds=1, seconds=0.0)], tmp_path / "cost.csv")
    assert row["error"] is None and row["latency_p50_ms"] > 0 and row["peak_memory_mib"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compare_trains_it(name, digits, tmp_path):
    where = dict(data_dir=str(digits), val_dir=None, data_root=None, workers=0, device="cpu", threads=2)
    recipe = dict(epochs=1, batch_size=16, amp="off")
    (row,) = compare.compare([(name, False)], [0], recipe, where, tmp_path / "compare.csv", tmp_path / "runs")
    assert row["error"] is None and 0 <= row["top1"] <= 100 and row["img_size"] == FAMILIES[name][0]
