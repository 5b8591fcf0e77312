"""The learning rate of a training: a linear warm-up from a hundredth of it, and half a cosine, as timm has them."""

import torch
from timm.scheduler import CosineLRScheduler


def warmup_and_cosine(
    optimizer: torch.optim.Optimizer, lr: float, steps: int, warmup_steps: int, lr_min: float = 0.0
) -> CosineLRScheduler:
    """The schedule of an optimizer whose learning rate is ``lr``, for ``scheduler.step_update(step)`` before each step.

    Args:
        lr_min: to which the cosine falls; with ``lr`` itself the rate is constant after the warm-up.
    """
    return CosineLRScheduler(
        optimizer,
        max(steps, 2),  # timm warns at 1
        lr_min=lr_min,
        warmup_t=warmup_steps,
        warmup_lr_init=lr / 100,
        t_in_epochs=False,
    )
