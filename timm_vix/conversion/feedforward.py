"""Structured weights in the feed-forward layers of a trained ViT.

    low_rank:  W x -> U (V x)                    V: (r, n), U: (m, r)
    block:     W x -> B_2 shuffle(B_1 x)         B_1: b blocks (k/b, n/b), B_2: b blocks (m/b, k/b); k = min(m, n)

Wei et al. 2024 (arXiv 2406.16450), sections 3.1 (LowRank, BlockShuffle) and 3.3 (self-guided training, which is a
hand-over from the dense layer, see ``handover.py``). The shuffle gives each block of B_2 an equal part of what each
block of B_1 made; with it this is a Monarch matrix (Dao et al. 2022, arXiv 2204.00595, section 3.1).

*Names:* ``share`` is the share of the dense weights that is left: r·(m + n) / (m·n), or k·(m + n) / (b·m·n).

*Differs:* the paper trains from scratch. Here U V is the best approximation of rank r of a trained layer for the inputs
that it has: with the principal directions U of its outputs, V = U^T W. In a Monarch matrix each pair of blocks has rank
k/b^2, and its part of W is approximated so, for the inputs of its block. Biases take up what is lost on average.

*Accuracy:* the layers of a small ViT have full rank. Of DeiT-Tiny's 85.4 % top-1 on 1,000 photographs, fitted to 48
other images and without training, low rank keeps 70.2, 38.3 and 14.5 with 84, 63 and 50 % of the weights, and two
blocks (63 %) keep 28.3 (``examples/results/structured_mlp.csv``). So such a layer is a beginning for training by a
hand-over from the dense one. The paper finds it worth its loss from a width of 1,536 on.

Shapes: m outputs and n inputs of a layer, r rank, b blocks, k width between.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Optional

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn
from torch.nn.functional import linear

from .._checks import InputError, check_choice, is_number
from .._modules import is_plain_linear
from ._fitting import LayerFit, fit_in_one_pass
from .handover import Handover, HandoverSchedule

KINDS = ("low_rank", "block")
LAYERS = {Mlp: ("fc1", "fc2"), GluMlp: ("fc1", "fc2"), SwiGLU: ("fc1_g", "fc1_x", "fc2")}


class LowRankLinear(nn.Module):
    """U (V x) + bias: (..., n) -> (..., m).

    Args:
        rank: r.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.first = nn.Parameter(torch.empty(rank, in_features, **dd))
        self.second = nn.Parameter(torch.empty(out_features, rank, **dd))
        self.bias = nn.Parameter(torch.zeros(out_features, **dd))
        for weight in (self.first, self.second):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(linear(x, self.first), self.second, self.bias)

    def dense(self) -> torch.Tensor:
        """The weight (m, n) of the linear layer that this is."""
        return self.second @ self.first

    def approximate(self, weight: torch.Tensor, covariance: torch.Tensor) -> None:
        """Take the best approximation of a weight (m, n) for inputs of a covariance (n, n)."""
        second, first = principal_factors(weight, covariance, self.first.shape[0])
        self.second.copy_(second)
        self.first.copy_(first)


class BlockLinear(nn.Module):
    """B_2 shuffle(B_1 x) + bias, block-diagonal: (..., n) -> (..., m).

    Args:
        blocks: b; divides m and n, and its square divides k.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.blocks, width = blocks, min(in_features, out_features)
        self.first = nn.Parameter(torch.empty(blocks, width // blocks, in_features // blocks, **dd))
        self.second = nn.Parameter(torch.empty(blocks, out_features // blocks, width // blocks, **dd))
        self.bias = nn.Parameter(torch.zeros(out_features, **dd))
        for weight in (self.first, self.second):
            nn.init.normal_(weight, std=weight.shape[2] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, shape = self.blocks, x.shape[:-1]
        y = torch.bmm(x.reshape(-1, b, self.first.shape[2]).transpose(0, 1), self.first.transpose(1, 2))
        # (from block, token, to block, part) -> (to block, token, from block, part)
        y = y.reshape(b, y.shape[1], b, -1).transpose(0, 2).flatten(2)
        y = torch.bmm(y, self.second.transpose(1, 2)).transpose(0, 1)
        return y.reshape(*shape, self.bias.shape[0]) + self.bias

    def dense(self) -> torch.Tensor:
        """The weight (m, n) of the linear layer that this is."""
        b, part = self.blocks, self.first.shape[1] // self.blocks
        rows = []
        for i in range(b):
            pairs = [
                self.second[i, :, j * part : (j + 1) * part] @ self.first[j, i * part : (i + 1) * part]
                for j in range(b)
            ]
            rows.append(torch.cat(pairs, dim=1))
        return torch.cat(rows)

    def approximate(self, weight: torch.Tensor, covariance: torch.Tensor) -> None:
        """Take the best approximation of each pair of blocks of a weight (m, n) for inputs of a covariance (n, n)."""
        b, part = self.blocks, self.first.shape[1] // self.blocks
        m, n = weight.shape[0] // b, weight.shape[1] // b
        for i in range(b):
            for j in range(b):
                inputs = slice(j * n, (j + 1) * n)
                pair = weight[i * m : (i + 1) * m, inputs]
                second, first = principal_factors(pair, covariance[inputs, inputs], part)
                self.second[i, :, j * part : (j + 1) * part].copy_(second)
                self.first[j, i * part : (i + 1) * part].copy_(first)


def principal_factors(weight: torch.Tensor, covariance: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U (m, r) and V (r, n) for which U V x is nearest to W x: the principal directions of W x, and its parts there."""
    _, directions = torch.linalg.eigh(weight @ covariance @ weight.T)  # ascending
    u = directions[:, -rank:]
    return u, u.T @ weight


def structure_mlp(
    model: nn.Module,
    kind: str = "low_rank",
    share: float = 0.5,
    images: Optional[torch.Tensor] = None,
    schedule: Optional[HandoverSchedule] = None,
) -> dict[str, float]:
    """Replace the linear layers of a trained ViT's MLPs by structured ones that approximate them, in place.

    timm's ``save_for_hf`` can't name these layers, so a model that it saves doesn't load. Save the state dict; what
    loads it is the same model, structured with the same ``kind`` and ``share``.

    Args:
        model: timm model with ``Mlp``, ``GluMlp`` or ``SwiGLU`` of linear layers.
        kind: "low_rank" or "block", see the module.
        share: of a layer's weights that are left, at most; above 0, below 1. Blocks come in whole numbers.
        images: (B, 3, H, W) as the model takes them, some dozens, whose activations weigh the errors. None: all inputs
            of a layer count alike.
        schedule: of a hand-over from the dense layers, which are kept until ``finish_handover``; None: they go at once.

    Returns:
        For each layer the share of its weights that is left.

    Raises:
        ValueError: for a model without such layers, or for layers that no such structure fits; the model is then as it
            was.

    Example:
        >>> schedule = timm_vix.HandoverSchedule(steps=10_000, kind="cosine")
        >>> timm_vix.structure_mlp(model, "low_rank", 0.63, images, schedule)
    """
    check_choice("kind", kind, KINDS)
    if not is_number(share) or not 0 < share < 1:
        raise InputError(f"share={share!r}: expected a number above 0 and below 1")
    layers = {path: layer for path, _, _, layer in mlp_layers(model)}
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no MLP of timm's Mlp, GluMlp or SwiGLU; there is nothing to structure"
        )
    for path, layer in layers.items():
        if not is_plain_linear(layer):
            raise InputError(f"{path} is a {type(layer).__name__}; expected an nn.Linear without adapter and hook")
    structured = {
        path: structure(path, layer, kind, share).requires_grad_(layer.weight.requires_grad)
        for path, layer in layers.items()
    }

    def fit(path: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inputs = x.flatten(0, -2).cpu().double()
        mean = inputs.mean(0)
        approximate(structured[path], layers[path], (inputs - mean).T @ (inputs - mean) / len(inputs), mean)
        return structured[path](x)

    if images is None:
        for path, layer in layers.items():
            n = layer.in_features
            approximate(structured[path], layer, torch.eye(n).double(), torch.zeros(n).double())
    else:
        fit_in_one_pass(model, [LayerFit(path, layer, partial(fit, path)) for path, layer in layers.items()], images)
    for path, parent, name, layer in mlp_layers(model):
        new = structured[path].train(layer.training)
        setattr(parent, name, new if schedule is None else Handover(layer, new, schedule))
    weights = {path: new.first.numel() + new.second.numel() for path, new in structured.items()}
    return {path: weights[path] / layer.weight.numel() for path, layer in layers.items()}


@torch.no_grad()
def approximate(new: nn.Module, layer: nn.Linear, covariance: torch.Tensor, mean: torch.Tensor) -> None:
    """Bring a structured layer near to a dense one, for inputs of this covariance and mean."""
    weight = layer.weight.cpu().double()
    new.approximate(weight, covariance)
    lost = (weight - new.dense().cpu().double()) @ mean  # on average
    new.bias.copy_(lost if layer.bias is None else lost + layer.bias.cpu().double())


def mlp_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Path, parent, name and module of the layers of a model's MLPs."""
    for path, module in list(model.named_modules()):
        for name in LAYERS.get(type(module), ()):
            yield f"{path}.{name}".lstrip("."), module, name, getattr(module, name)


def structure(path: str, layer: nn.Linear, kind: str, share: float) -> Any:
    """A structured layer with at most this share of the weights, initialised at random and not yet fitted.

    Raises:
        ValueError: where there is none.
    """
    m, n, dd = layer.out_features, layer.in_features, dict(device=layer.weight.device, dtype=layer.weight.dtype)
    if kind == "low_rank":
        rank = int(share * m * n / (m + n))
        if rank < 1:
            raise InputError(
                f"share={share}: {path} ({m}x{n}) would have no rank; expected at least {(m + n) / m / n:.3f}"
            )
        return LowRankLinear(n, m, rank, **dd)
    width = min(m, n)
    possible = [b for b in range(2, width + 1) if m % b == 0 and n % b == 0 and width % b**2 == 0]
    fitting = [b for b in possible if width * (m + n) <= share * b * m * n]
    if not fitting:
        shares = ", ".join(f"{width * (m + n) / (b * m * n):.3f}" for b in possible) or "none"
        raise InputError(
            f"share={share}: {path} ({m}x{n}) has block structures of these shares: {shares}; expected no less"
        )
    return BlockLinear(n, m, fitting[0], **dd)
