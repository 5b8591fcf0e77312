"""Public packages with one of our mechanisms: an oracle of Linformer, and the example that times them beside ours."""

import csv
import sys

import pytest
import timm
import torch
from conftest import distance, load_example

linformer = pytest.importorskip("linformer", reason="the package is in the extra 'ecosystem'")
# one of them reads its version by distutils
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*distutils:DeprecationWarning")]


def test_linformer_is_that_of_the_package():
    """Without prefix tokens, whose keys the package would project too."""
    torch.manual_seed(0)
    keywords = dict(num_proj_tokens=16, sharing="headwise", class_token=False, global_pool="avg", qkv_bias=False)
    ours = timm.create_model("vix_linformer_tiny", img_size=(96, 160), depth=1, **keywords).blocks[0].attn.double()
    theirs = linformer.LinformerSelfAttention(192, 60, k=16, heads=3).double()
    with torch.no_grad():
        ours.core.token_proj.normal_()
        keys, values = ours.core.token_proj.flatten(2)
        theirs.proj_k.copy_(keys.T)
        theirs.proj_v.copy_(values.T)
        for own, part in zip((theirs.to_q, theirs.to_k, theirs.to_v), ours.qkv.weight.chunk(3)):
            own.weight.copy_(part)
        theirs.to_out.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 60, 192, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (ours, theirs):
        y = module(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for own, expected in zip(*results):
        assert distance(own, expected) < 1e-9


@pytest.mark.parametrize("mixer", ["nystrom", "linformer", "performer"])
def test_a_package_is_timed_beside_ours(mixer, tmp_path, monkeypatch):
    example, out = load_example("public_packages"), tmp_path / "rows.csv"
    words = ["--mixers", mixer, "--tokens", "197", "--dtype", "float32", "--pairs", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["example", *words, "--out", str(out)])
    example.main()
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["mode"] for row in rows] == ["infer", "train"]
    for row in rows:
        assert not row["error"] and row["package"].split()[0] in ("nystrom-attention", "linformer", "performer-pytorch")
        assert float(row["ratio"]) == pytest.approx(float(row["package_ms"]) / float(row["ms"]), rel=0.01)
    before = out.read_text()
    example.main()
    assert out.read_text() == before
