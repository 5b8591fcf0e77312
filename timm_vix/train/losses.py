"""How far a converted model is from what it was: block by block, and as a whole. Equations in ``transfer``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn


class BlockMatching(nn.Module):
    """Stage 1: the relative squared error of each converted block on the teacher's own tokens, (layers,).

    Args:
        layers: the converted ones.
        mean_free: weight of the error without its mean over the tokens.
        pass_through: weight of the error after the teacher's last block. It is one more value; each step it is the
            error that comes from one of the layers.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        layers: list[int],
        mean_free: float = 0.0,
        pass_through: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers, self.mean_free, self.pass_through = layers, mean_free, pass_through
        # in a tuple, so that DDP sees no parameters of it
        self.teacher = (teacher,)
        self.blocks = nn.ModuleDict({str(index): student.blocks[index] for index in layers})

    def forward(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        calls: dict[int, tuple] = {}

        def note(index: int) -> Any:
            def hook(block: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
                calls[index] = args, kwargs, output

            return hook

        blocks = self.teacher[0].blocks
        handles = [block.register_forward_hook(note(i), with_kwargs=True) for i, block in enumerate(blocks)]
        try:
            with torch.no_grad():
                self.teacher[0](images)
        finally:
            for handle in handles:
                handle.remove()
        errors = []
        sent = self.layers[step % len(self.layers)] if self.pass_through else None
        for index in self.layers:
            args, kwargs, wanted = calls[index]
            y = self.blocks[str(index)](*args, **kwargs)
            x, wanted = args[0].float(), wanted.float()
            error = squared(y.float() - wanted, self.mean_free)
            errors.append(relative(error, (wanted - x).square().sum(), x.square().sum()))
            if index == sent:
                errors_behind = self.error_behind(y, index, calls)
        if self.pass_through:
            errors.append(self.pass_through * errors_behind)
        return torch.stack(errors)

    def error_behind(self, y: torch.Tensor, layer: int, calls: dict[int, tuple]) -> torch.Tensor:
        """The relative squared error of the last block's output, given y (B, N, C) instead of block ``layer``'s."""
        blocks = self.teacher[0].blocks
        for index in range(layer + 1, len(blocks)):
            args, kwargs, _ = calls[index]
            y = blocks[index](y, *args[1:], **kwargs)
        wanted = calls[len(blocks) - 1][2].float()
        size = wanted.square().sum()
        return relative(squared(y.float() - wanted, self.mean_free), size, size)


class Distillation(nn.Module):
    """Stage 2: relative squared error of the last tokens, and divergence of the predictions, (2,)."""

    def __init__(self, teacher: nn.Module, student: nn.Module, mean_free: float = 0.0) -> None:
        super().__init__()
        self.teacher = (teacher,)
        self.student = student
        self.mean_free = mean_free

    def forward(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.teacher[0].forward_features(images)
            logits = self.teacher[0].forward_head(wanted).float()
        tokens = self.student.forward_features(images)
        mine = self.student.forward_head(tokens).float().log_softmax(-1)
        wanted = wanted.float()
        size = wanted.square().sum()
        feature = relative(squared(tokens.float() - wanted, self.mean_free), size, size)
        # a model without a classifier has no predictions to agree on
        if not self.student.num_classes:
            # zero, but of the head too: DistributedDataParallel waits for the gradients of its parameters
            return torch.stack([feature, 0.0 * mine.sum()])
        divergence = F.kl_div(mine, logits.log_softmax(-1), log_target=True, reduction="sum")
        return torch.stack([feature, divergence / mean_of_processes(feature.new_tensor(float(len(images))))])


def squared(error: torch.Tensor, mean_free: float) -> torch.Tensor:
    """The squared error of tokens (B, N, C), and ``mean_free`` times that without its mean over the tokens."""
    whole = error.square().sum()
    return whole + mean_free * (error - error.mean(1, keepdim=True)).square().sum() if mean_free else whole


def relative(error: torch.Tensor, change: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A squared error relative to the squared ``change`` that a block makes to its ``tokens``, all of them scalars.

    A block whose last layers are zero changes nothing. The error is then relative to the rounding of the tokens, below
    which float32 could not show a change.
    """
    rounding = torch.finfo(torch.float32).eps ** 2
    least = torch.finfo(torch.float32).tiny
    return error / torch.maximum(mean_of_processes(change), rounding * mean_of_processes(tokens)).clamp_min(least)


def mean_of_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean over the processes that share a batch, of a scalar without a gradient; in one process the scalar itself.

    DistributedDataParallel takes the mean of the gradients. With such a mean in the denominator, that is the gradient
    of the whole batch.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    value = value.clone()
    distributed.all_reduce(value)
    return value / distributed.get_world_size()
