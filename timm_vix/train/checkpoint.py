"""The checkpoint and the history of a training run. Each file is replaced as a whole, or left as it was."""

import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._checks import InputError
from .._files import one_line, write_table, write_whole
from ..data.images import Images


class Checkpoint:
    """What a run needs to be continued: weights, optimizer, position, and the settings that must be the same.

    It also keeps which images are damaged, so that a continued run doesn't decode all of them again.

    Args:
        path: The file.
        settings: Plain values. Those that an earlier version did not record are not compared.
        position: How far the run is, as plain values; the run changes it as it goes.
        images: The images of the run.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        position: dict[str, Any],
        images: Sequence[Images] = (),
    ) -> None:
        self.path, self.settings, self.images = path, settings, images
        self.model, self.optimizer, self.position = model, optimizer, position

    def save(self) -> None:
        """Write the file; raise OSError if that fails, and leave the previous one."""
        write_tensors(
            self.path,
            dict(
                settings=self.settings,
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                position=self.position,
                damaged=[sorted(part.damaged) for part in self.images],
            ),
        )

    def read(self) -> dict[str, Any]:
        """The content of the file; raise ValueError for a damaged one."""
        state = read_tensors(self.path)
        parts = ("settings", "model", "optimizer", "position")
        missing = [name for name in parts if not isinstance(state.get(name), dict)]
        if missing:
            raise InputError(f"resume: {self.path} has no {missing[0]}; expected a checkpoint of this training")
        return state

    def check_settings(self, saved: dict[str, Any]) -> None:
        """Raise ValueError for settings of a checkpoint that differ from these, naming both."""
        differing = [
            f"{name}={before} before, {now} now"
            for name, value in self.settings.items()
            if name in saved and saved[name] != value
            for before, now in [only_differing(saved[name], value)]
        ]
        if differing:
            raise InputError(f"resume: settings differ from those of {self.path}: {'; '.join(differing)}")

    def restore(self, state: dict[str, Any]) -> None:
        """Take weights, optimizer and position of what ``read`` gave; raise ValueError for other settings."""
        self.check_settings(state["settings"])
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch raises by kind of damage
            raise InputError(f"resume: {self.path} is not of this training: {one_line(error)}") from error
        self.position.update(state["position"])
        for part, damaged in zip(self.images, state.get("damaged", [])):  # earlier versions kept them elsewhere
            part.damaged.update(damaged)


def only_differing(before: Any, now: Any) -> tuple[Any, Any]:
    """Two values that differ; of two mappings only the entries that do."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before, now
    pairs = {
        name: only_differing(before.get(name), now.get(name))
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    }
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values as ``torch.load(..., weights_only=True)`` reads them."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def read_tensors(path: Path) -> dict[str, Any]:
    """What ``write_tensors`` wrote, on the CPU; raise ValueError for a file that is missing or damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises by kind of damage
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a checkpoint")
    return content


def clear(out: Path, files: Iterable[str]) -> None:
    """Make the folder, and remove the ``files`` and the model that an earlier run left there, and nothing else."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in files:
            (out / name).unlink(missing_ok=True)
        if (out / "hub").exists():
            shutil.rmtree(out / "hub")
    except OSError as error:
        raise OSError(f"out={out} cannot be written: {error.strerror}; choose a folder that can") from error


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """One row per epoch as CSV, with every column that a row has."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    write_table(path, columns, [[row.get(name) for name in columns] for row in history])
