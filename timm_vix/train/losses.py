"""How far a converted model is from what it was: block by block, and as a whole. Equations in ``transfer``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class BlockMatching(nn.Module):
    """Stage 1: the relative squared error of each converted block on the teacher's own tokens, (layers,)."""

    def __init__(self, teacher: nn.Module, student: nn.Module, layers: list[int]) -> None:
        super().__init__()
        # in a tuple, so that DDP sees no parameters of it
        self.teacher = (teacher,)
        self.blocks = nn.ModuleDict({str(index): student.blocks[index] for index in layers})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        calls: dict[str, tuple] = {}

        def note(index: str) -> Any:
            def hook(block: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
                calls[index] = args, kwargs, output

            return hook

        blocks = self.teacher[0].blocks
        handles = [blocks[int(i)].register_forward_hook(note(i), with_kwargs=True) for i in self.blocks]
        try:
            with torch.no_grad():
                self.teacher[0](images)
        finally:
            for handle in handles:
                handle.remove()
        errors = []
        for index, block in self.blocks.items():
            args, kwargs, wanted = calls[index]
            x, wanted = args[0].float(), wanted.float()
            errors.append((block(*args, **kwargs).float() - wanted).square().sum() / (wanted - x).square().sum())
        return torch.stack(errors)


class Distillation(nn.Module):
    """Stage 2: relative squared error of the last tokens, and divergence of the predictions, (2,)."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.teacher = (teacher,)
        self.student = student

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.teacher[0].forward_features(images)
            logits = self.teacher[0].forward_head(wanted).float()
        tokens = self.student.forward_features(images)
        mine = self.student.forward_head(tokens).float().log_softmax(-1)
        wanted = wanted.float()
        feature = (tokens.float() - wanted).square().sum() / wanted.square().sum()
        # a model without a classifier has no predictions to agree on
        has_head = self.student.num_classes > 0
        divergence = F.kl_div(mine, logits.log_softmax(-1), log_target=True, reduction="batchmean") if has_head else 0.0
        return torch.stack([feature, torch.as_tensor(divergence, device=feature.device, dtype=feature.dtype)])
