"""The command ``timm-vix``."""

import argparse
import importlib
import io
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
from torch.nn.attention import SDPBackend, sdpa_kernel

import timm_vix
from timm_vix import cli, models
from timm_vix._checks import InputError
from timm_vix.measure.flops import counter

SCRIPT = """
import json, sys, timm
from beside import VALUE
print(json.dumps([__name__, sys.argv, VALUE, timm.is_model("vix_nystrom_tiny")]))
sys.exit(7)
"""


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["timm-vix", *arguments])
    cli.main()


@pytest.mark.parametrize(
    "name",
    [
        "vix_softmax_tiny_rope",
        "vix_nystrom_tiny",
        "vix_linformer_cifar",
        "vix_performer_cifar_rope",
        "hybrid_fnet_cifar",
        "hybrid_mixer_tiny",
        "ccn_cifar",
        "cvp_cifar",
        "levin_128s",
        "pin_cifar",
        "fnet2d_cifar",
    ],
)
def test_list_is_right_about_the_whole_model(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = timm.create_model(name).eval().requires_grad_(False)
    image = torch.zeros(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter() as counted:
        model(image)
    parameters, flops, tokens = cli.size_of(name)
    assert (parameters, flops) == (sum(p.numel() for p in model.parameters()), counted.get_total_flops())
    firsts = {"cvp_cifar": 1024, "pin_cifar": 1025, "levin_128s": None, "fnet2d_cifar": 1024}
    assert tokens == (firsts[name] if name in firsts else model.forward_features(image).shape[1])

    call(monkeypatch, "list", name)
    header, row, *_, note = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "name"
    hub = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k" if "tiny" in name else "-"
    hub = "timm/levit_128s.fb_dist_in1k" if "levi" in name else hub
    assert row.split() == [name, f"{parameters / 1e6:.2f}", f"{flops / 1e9:.2f}", str(tokens or "-"), hub]
    assert note.startswith("Default weights")


def test_list_counts_a_multiply_add_as_two() -> None:
    # timm's table of results gives vit_tiny_patch16_224 1.26 G multiply-adds
    assert cli.size_of("vix_softmax_tiny_rope")[1] == pytest.approx(2.51e9, rel=0.01)


def test_list_takes_a_pattern(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    call(monkeypatch, "list", "vix_*_cifar")
    names = [line.split()[0] for line in capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]]
    assert names == timm.list_models("vix_*_cifar")


def test_list_without_a_pattern_has_all_our_names_and_no_other() -> None:
    assert cli.matching_names("*") == timm.list_models(module=models.__all__)
    assert {"vix_nystrom_tiny", "hybrid_vil_cifar", "ccn_7"} < set(cli.matching_names("*"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["list", "vix_nistrom_tiny"], "no model matches 'vix_nistrom_tiny'; near names: vix_nystrom_tiny"),
        (["list", "resnet50"], "no model matches 'resnet50'; near names: none"),
        (["run", "absent.py", "--model", "x"], "'absent.py' is no file"),
        (["run"], "required: SCRIPT"),
        (["lits"], "invalid choice: 'lits'"),
        ([], "required: COMMAND"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_2(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *arguments)
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: timm-vix")
    assert words in error


@pytest.mark.parametrize(
    "error, code, words",
    [
        (InputError("img_size=7"), 2, "error: img_size=7\n"),
        (OSError("cannot write a.csv"), 2, "error: cannot write a.csv\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues\n"),
        (KeyboardInterrupt("saved step 3"), 130, "saved step 3\n"),
    ],
)
def test_what_is_not_a_defect_is_one_line(error, code, words, monkeypatch, capsys) -> None:
    def fail(arguments) -> None:
        raise error

    monkeypatch.setattr("timm_vix.benchmark.cost.main", fail)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "cost", "vix_nystrom_tiny")
    assert stop.value.code == code
    assert capsys.readouterr().err == words


def test_a_kill_ends_a_command_as_an_exit(monkeypatch) -> None:
    """So what is half written is removed, as after Ctrl-C."""
    removed = []

    def wait(arguments) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            removed.append("half a file")

    monkeypatch.setattr("timm_vix.deploy.export_command.main", wait)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, "export", "x", "--to", "onnx", "--out", "x.onnx")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143 and removed == ["half a file"]


def test_only_a_command_that_goes_on_says_so(monkeypatch, capsys) -> None:
    def fail(arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_vix.deploy.export_command.main", fail)
    with pytest.raises(SystemExit):
        call(monkeypatch, "export", "x", "--to", "onnx", "--out", "x.onnx")
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_wants_no_more_is_no_error() -> None:
    command = [sys.executable, "-u", "-m", "timm_vix", "list", "vix_*_cifar"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("name")
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


def test_a_defect_shows_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr("timm_vix.benchmark.cost.main", lambda arguments: [].index(3))
    with pytest.raises(ValueError, match="is not in list"):
        call(monkeypatch, "cost", "vix_nystrom_tiny")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_subcommand_explains_itself(name, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, name, "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    module = importlib.import_module(f"timm_vix.{cli.COMMANDS[name][0]}")
    assert module.__doc__.strip() in out
    assert ("--out" in out) == (name not in ("push", "serve"))  # they write no file


def test_a_command_imports_no_other() -> None:
    program = """
import sys
import time
from timm_vix import cli
sys.argv = ["timm-vix", "list", "vix_fnet_cifar"]
cli.main()
heavy = ("timm_vix.data", "timm_vix.train", "timm_vix.planning", "timm_vix.benchmark", "matplotlib")
others = [name for name in sys.modules if name.startswith(heavy)]
assert not others, others
"""
    root = str(Path(timm_vix.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_run_is_python_with_our_names(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "beside.py").write_text("VALUE = 'beside the script'")
    script = os.path.join("scripts", "script.py")
    arguments = ["--model", "vix_nystrom_tiny", "-h", "--", "--model-kwargs", "num_landmarks=16"]
    paths = [str(Path(timm_vix.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "timm_vix", "run", script, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == ["__main__", [script, *arguments], "beside the script", True]
    assert done.returncode == 7


@pytest.mark.parametrize("error", [MemoryError("allocate"), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture) -> None:
    def command(arguments: argparse.Namespace) -> None:
        raise error

    with pytest.raises(SystemExit, match="2"):
        cli.in_one_line(command)(argparse.Namespace())
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory: ") and told.count("\n") == 1


def test_another_error_of_torch_keeps_its_traceback() -> None:
    def command(arguments: argparse.Namespace) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.in_one_line(command)(argparse.Namespace())


def test_a_notebook_has_an_output_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # without ``reconfigure``, like that of IPython
    cli.in_one_line(lambda arguments: print("done"))(argparse.Namespace())
    assert sys.stdout.getvalue() == "done\n"
