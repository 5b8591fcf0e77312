"""The command ``timm-vix``, run as a user runs it."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import timm_vix
from timm_vix.cli import main, size_of

SCRIPT = """
import json, sys, timm
from beside import VALUE  # as in "python SCRIPT", a module of the script's own folder
print(json.dumps([__name__, sys.argv, VALUE, timm.is_model("vix_nystrom_tiny")]))
sys.exit(7)
"""


def timm_vix_command(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    # "python -m" puts the folder of the call on the path, so the package itself is found through where it lies
    program = f"import sys; sys.path[0] = {str(Path(timm_vix.__file__).parents[1])!r}; from timm_vix.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
