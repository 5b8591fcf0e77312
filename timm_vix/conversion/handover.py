"""Progressive replacement of a module: in training its output moves from the old module's to the new one's.

    y = a·old(x) + (1 - a)·new(x)                      a: 1 before the first step, 0 after the last

One schedule holds a for the whole model. A progressive batch normalisation (SLAB, Guo et al. 2024, arXiv 2405.11582,
section 3.1), self-guided training of structured feed-forward layers (Wei et al. 2024, arXiv 2406.16450, section 3.3)
and every other replacement of one layer by another use the same one.
"""

import math
from typing import Any

import torch
from torch import nn

from .._checks import InputError, check_choice, check_integer

KINDS = ("linear", "cosine")


class HandoverSchedule:
    """The share a of the old modules, from 1 to 0 in a number of steps of the optimizer.

    ``step`` is called once after each step of the optimizer, and nothing else changes a. So a pass that gradient
    checkpointing repeats, passes whose gradients are accumulated, and all processes of a distributed run see the same
    share. The schedule is no part of a model: copies of a model, such as a moving average, share it, and its state is
    saved beside the model's.

    Args:
        steps: T, steps after which only the new modules are left.
        kind: a after t steps: "linear", 1 - t/T; "cosine", (1 + cos(pi·t/T)) / 2.

    Attributes:
        share: a, a float32 tensor without axes on the CPU, which changes in place.
        ended: whether a is 0.

    Example:
        >>> schedule = timm_vix.HandoverSchedule(steps=1000)
        >>> timm_vix.replace_norms(model, images, schedule)
        >>> for images, labels in loader:
        ...     cross_entropy(model(images), labels).backward()
        ...     optimizer.step(), optimizer.zero_grad(), schedule.step()
        >>> timm_vix.finish_handover(model)
    """

    def __init__(self, steps: int, kind: str = "linear") -> None:
        check_integer("steps", steps, 1)
        check_choice("kind", kind, KINDS)
        self.steps, self.kind = steps, kind
        self.taken = 0
        # Compiled code reads a tensor anew in each call, and would be compiled anew for each new number. One without
        # axes may be on the CPU while the model is elsewhere.
        self.share = torch.ones((), dtype=torch.float32, device="cpu")
        self.ended = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "HandoverSchedule":
        return self

    def step(self) -> None:
        """Count a step of the optimizer; after the last one a stays 0."""
        self.move_to(min(self.taken + 1, self.steps))

    def move_to(self, taken: int) -> None:
        """Set the share a to its value after ``taken`` steps."""
        passed = taken / self.steps
        self.taken, self.ended = taken, taken == self.steps
        with torch.no_grad():
            self.share.fill_(1 - passed if self.kind == "linear" else (1 + math.cos(math.pi * passed)) / 2)

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, and the arguments, as plain values."""
        return {"steps": self.steps, "kind": self.kind, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another schedule with the same arguments was.

        Raises:
            ValueError: for a state of other arguments, or that is none; the schedule is then as it was.
        """
        expected = f"expected {{'steps': {self.steps}, 'kind': {self.kind!r}, 'taken': 0 to {self.steps}}}"
        own = self.state_dict()
        if not isinstance(state, dict) or own.keys() != state.keys():
            raise InputError(f"state={state!r}: {expected}")
        taken = state["taken"]
        if any(state[name] != own[name] for name in ("steps", "kind")) or type(taken) is not int:
            raise InputError(f"state={state!r}: {expected}")
        if not 0 <= taken <= self.steps:
            raise InputError(f"state={state!r}: {expected}")
        self.move_to(taken)


class Handover(nn.Module):
    """``a·old(x) + (1 - a)·new(x)``, with the share a of a schedule.

    Both are trained until the schedule ends. From then on the old module is no longer computed, and
    ``finish_handover`` removes it.

    Args:
        old, new: modules that take the same arguments and give one tensor each, of the same shape.
        schedule: one for all modules of a model.

    Example:
        >>> block.norm1 = Handover(block.norm1, TokenBatchNorm(192, 1), schedule)
    """

    def __init__(self, old: nn.Module, new: nn.Module, schedule: HandoverSchedule) -> None:
        super().__init__()
        if not isinstance(schedule, HandoverSchedule):
            raise InputError(f"schedule={schedule!r}: expected a HandoverSchedule")
        self.old, self.new = old, new
        self.schedule = schedule
        self.train(old.training)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The new module is computed at a = 1, too: it may have statistics to gather, and DistributedDataParallel waits
        # for the gradient of every parameter.
        new = self.new(*args, **kwargs)
        if not self.schedule.ended:
            share = self.schedule.share
            return share * self.old(*args, **kwargs) + (1 - share) * new
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            for parameter in self.old.parameters():  # it waits for the old ones as well, until ``finish_handover``
                new = new + 0 * parameter.flatten()[0]
        return new


def finish_handover(model: nn.Module) -> None:
    """Replace each ``Handover`` whose schedule has ended by its new module, in place.

    Args:
        model: not wrapped for several devices; wrap it anew afterwards.

    Raises:
        ValueError: for a model without a ``Handover``, or with a schedule that has not ended; the model is unchanged.
    """
    found = [
        (path, parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, Handover)
    ]
    if not found:
        raise InputError(f"{type(model).__name__} contains no Handover; there is nothing to finish")
    for path, _, name, child in found:
        if not child.schedule.ended:
            raise InputError(
                f"{path}.{name}".lstrip(".") + f" is at step {child.schedule.taken} of {child.schedule.steps} of its "
                "schedule; call finish_handover(model) after the last step"
            )
    for _, parent, name, child in reversed(found):  # the innermost first
        setattr(parent, name, child.new)
