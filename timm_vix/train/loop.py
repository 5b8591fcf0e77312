"""The loop that all training shares: a step is taken whole, saved now and then, and Ctrl-C waits for its end."""

import time
from collections.abc import Callable, Iterable, Iterator
from threading import Event
from typing import Any, Optional

import torch
from tqdm import tqdm

from .._checks import InputError
from .checkpoint import Checkpoint


class Loop:
    """Steps of an optimizer, counted in the position of a checkpoint.

    The position holds the ``step`` of the current stage (an epoch, or a stage of a transfer) and the ``seconds`` that
    its steps have taken so far.

    Args:
        checkpoint: What is saved; its optimizer takes the steps.
        every: Steps between two checkpoints.
        asked: Set when the user wants the run to stop, see ``deferred_interrupt``.
        save: Saves the checkpoint, and whatever else belongs beside it; None: the checkpoint alone.
        show: Whether a progress bar is shown, if the output is a terminal.
        continued_by: What continues a stopped run, such as "the same command", for the message after Ctrl-C.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        every: int,
        asked: Event,
        save: Optional[Callable[[], None]] = None,
        show: bool = True,
        continued_by: str = "resume",
    ) -> None:
        self.checkpoint, self.every, self.asked, self.show = checkpoint, every, asked, show
        self.save = save or checkpoint.save
        self.continued_by = continued_by

    def steps(self, stage: str, batches: Iterable[Any], total: Optional[int]) -> Iterator[Any]:
        """Yield the batches of a stage's remaining steps; the caller calls ``update`` once for each.

        Args:
            stage: Its name, for the progress bar and for errors.
            batches: Those of the steps from ``position["step"]`` on.
            total: Steps of the stage; None: their number isn't known beforehand.

        Raises:
            KeyboardInterrupt: for Ctrl-C, after the step was finished and a checkpoint saved.
        """
        position = self.checkpoint.position
        start = time.perf_counter() - position["seconds"]
        hidden = None if self.show else True  # None: hidden where the output is no terminal
        self.stage, self.total = stage, total
        self.bar = tqdm(batches, stage, total, False, initial=position["step"], disable=hidden)
        for batch in self.bar:
            yield batch
            position["step"] += 1
            position["seconds"] = time.perf_counter() - start
            if position["step"] % self.every == 0 and not self.asked.is_set():
                self.save()
            self.stop_if_asked()

    def update(self, loss: torch.Tensor, advice: str) -> None:
        """Take one step down the gradient of ``loss``; ``advice`` says what to do if it isn't finite.

        Raises:
            ValueError: for a loss that is infinite or not a number; the parameters are left as they were.
        """
        if not loss.isfinite():
            step = self.checkpoint.position["step"] + 1
            raise InputError(f"the loss became {loss.item()} in {self.stage}, step {step}; {advice}")
        self.checkpoint.optimizer.zero_grad()
        loss.backward()
        self.checkpoint.optimizer.step()

    def note(self, text: str) -> None:
        """Show ``text`` beside the progress bar."""
        self.bar.set_postfix_str(text, refresh=False)

    def stop_if_asked(self) -> None:
        """Save and raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.asked.is_set():
            self.save()
            of_all = f" of {self.total}" if self.total else ""
            raise KeyboardInterrupt(
                f"interrupted in {self.stage} after {self.checkpoint.position['step']}{of_all} steps; "
                f"saved {self.checkpoint.path}; {self.continued_by} continues from there"
            )
