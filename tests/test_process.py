"""Processes of their own: what they return, why they failed, and that they end with the process that asked."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional

import pytest
import torch

from timm_vix.measure.process import call_in_process, explain

ROOT = Path(__file__).parents[1]


def print_without_end(text: str) -> Optional[str]:
    print(f'epoch 1\n{{"error": "printed, not returned"}}\n{text}', end="")
    return text or None


def test_a_result_is_what_was_returned_and_not_what_was_printed(capfd, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    assert call_in_process(print_without_end, "") is None
    assert call_in_process(print_without_end, "loading ...") == "loading ..."
    assert capfd.readouterr().out == ""
    assert call_in_process(print_without_end, "loading ...", interactive=True) == "loading ..."
    assert capfd.readouterr().out == '  epoch 1\n  {"error": "printed, not returned"}\n  loading ...\n'


def test_a_failure_in_another_process_is_its_reason_in_one_line() -> None:
    assert call_in_process(int, "x") == dict(error="invalid literal for int() with base 10: 'x'")
    assert call_in_process(sys.exit, "no\nroom") == dict(error="exit 1: room")
    killed = call_in_process(signal.raise_signal, int(signal.SIGKILL))
    assert killed == dict(error="killed by signal 9, perhaps out of memory")
    assert call_in_process(bytearray, 2**60) == dict(error="out of memory: MemoryError")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert explain(caught.value).startswith("out of memory: ")


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are listed by Linux")
def test_a_process_ends_with_the_one_that_asked() -> None:
    program = "import time; from timm_vix.measure.process import call_in_process; call_in_process(time.sleep, 600.5)"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    try:
        while not (running := children_of(parent.pid)):
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    while any(Path(f"/proc/{child}").exists() for child in running):  # for good, were it to outlive: the test's limit
        time.sleep(0.05)


def children_of(pid: int) -> list[str]:
    tasks = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
    return [child for task in tasks if task.exists() for child in task.read_text().split()]
