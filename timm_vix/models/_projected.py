"""Attention of queries, keys and values that somebody else projects, for hosts that are not a ViT.

The mechanisms are those of ``mixers/``; here there may be fewer keys than queries, and values of another width.

Shapes: q (B, h, Nq, D), k (B, h, Nk, D), v (B, h, Nk, E) -> (B, h, Nq, E); N = P + H·W tokens of a grid.
"""

import inspect
from typing import Any, Optional

import torch
from timm.layers import register_notrace_function
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from .._checks import check_choice, check_integer, check_number
from ..mixers._favor import favor_attention, orthogonal_features
from ..mixers._resample import pool_patches
from ..mixers._slot import Grid, cell_grid, count_bias
from ..mixers.nystrom import DEFAULT_LANDMARKS, KERNEL_SIZE, landmark_values
from ..mixers.performer import DEFAULT_FEATURES


# A leaf for torch.fx: the widths of q and v are known to the run alone.
@torch.fx.wrap
@register_notrace_function
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + bias) v for few queries or few keys.

    Fused kernels want values as wide as the keys, and what SDPA falls back to looks every row over for a mask that
    hides the whole of it: a tenth of LeViT's time.
    """
    if q.shape[3] == v.shape[3]:
        return scaled_dot_product_attention(q, k, v, attn_mask=bias)
    logits = torch.matmul(q, k.transpose(2, 3)) * q.shape[3] ** -0.5
    return torch.matmul(torch.softmax(logits if bias is None else logits + bias, dim=3), v)


class ProjectedMixer(nn.Module):
    """What these mechanisms share."""

    def options(self) -> dict[str, Any]:
        """The keywords with which it was built, for those who compare models."""
        return {}


class ProjectedSoftmax(ProjectedMixer):
    """Softmax attention, the control."""

    def __init__(
        self, like: torch.Tensor, head_dim: int, value_width: int, grids: tuple[Grid, Grid], num_prefix_tokens: int
    ) -> None:
        super().__init__()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v)


class ProjectedPerformer(ProjectedMixer):
    """Performer attention, see ``mixers/performer.py``."""

    features: torch.Tensor

    def __init__(
        self,
        like: torch.Tensor,
        head_dim: int,
        value_width: int,
        grids: tuple[Grid, Grid],
        num_prefix_tokens: int,
        num_features: Optional[int] = None,
        feature_seed: int = 0,
    ) -> None:
        super().__init__()
        num_features = DEFAULT_FEATURES if num_features is None else num_features
        check_integer("num_features", num_features, 1)
        check_integer("feature_seed", feature_seed, 0, 2**63 - 1, "that a seed may be")
        self.feature_seed = feature_seed
        self.register_buffer("features", like.new_empty(num_features, head_dim))
        self.reset_parameters()

    def options(self) -> dict[str, Any]:
        return dict(num_features=len(self.features), feature_seed=self.feature_seed)

    def reset_parameters(self) -> None:
        self.features.copy_(orthogonal_features(self.features.shape[0], self.features.shape[1], self.feature_seed))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return favor_attention(q, k, v, self.features)


class ProjectedNystrom(ProjectedMixer):
    """Nyström attention, see ``mixers/nystrom.py``; at most as many landmarks as there are patches among the keys."""

    def __init__(
        self,
        like: torch.Tensor,
        head_dim: int,
        value_width: int,
        grids: tuple[Grid, Grid],
        num_prefix_tokens: int,
        num_landmarks: Optional[int] = None,
        pinv_iterations: int = 8,
        ridge: float = 0.01,
        conv_residual: bool = False,
    ) -> None:
        super().__init__()
        num_landmarks = DEFAULT_LANDMARKS if num_landmarks is None else num_landmarks
        check_integer("num_landmarks", num_landmarks, 1)
        check_integer("pinv_iterations", pinv_iterations, 1)
        check_number("ridge", ridge, 0)
        check_choice("conv_residual", conv_residual, (True, False))
        if conv_residual and grids[0] != grids[1]:
            queries, keys = ("x".join(map(str, grid)) for grid in grids)
            raise ValueError(
                f"conv_residual=True: values of a grid of {keys} can't be added to {queries} queries; allowed is "
                "conv_residual=False or, in a CvT, key_stride=1 or projection='linear'"
            )
        self.query_grid, self.key_grid = grids
        self.num_prefix_tokens = num_prefix_tokens
        self.cells = cell_grid(num_landmarks, self.key_grid)
        self.pinv_iterations = pinv_iterations
        self.ridge = float(ridge)
        self.conv: Optional[nn.Module] = None
        if conv_residual:
            dd = {"device": like.device, "dtype": like.dtype}
            self.conv = nn.Conv2d(
                value_width, value_width, KERNEL_SIZE, padding="same", groups=value_width, bias=False, **dd
            )

    def options(self) -> dict[str, Any]:
        return dict(
            num_landmarks=self.cells[0] * self.cells[1],
            pinv_iterations=self.pinv_iterations,
            ridge=self.ridge,
            conv_residual=self.conv is not None,
        )

    def pool(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        B, h, _, D = x.shape
        return pool_patches(x.flatten(0, 1), self.num_prefix_tokens, grid, self.cells).reshape(B, h, -1, D)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        P, patches = self.num_prefix_tokens, self.key_grid[0] * self.key_grid[1]
        if self.cells == self.key_grid:  # each key is a landmark, and the result that of softmax
            y = scaled_dot_product_attention(q, k, v)
        else:
            queries, keys = self.pool(q, self.query_grid), self.pool(k, self.key_grid)
            bias = count_bias(k, P, self.cells[0] * self.cells[1], patches)
            exact = attend(queries, k, v)
            values = self.pool(v, self.key_grid)
            values = landmark_values(queries, keys, values, exact, bias, self.ridge, self.pinv_iterations)
            y = attend(q, keys, values, bias)
        if self.conv is not None:
            B, h, _, E = v.shape
            image = v[:, :, P:].transpose(2, 3).reshape(B, h * E, self.key_grid[0], self.key_grid[1])
            local = self.conv(image).reshape(B, h, E, patches).transpose(2, 3)
            y = y + nn.functional.pad(local, (0, 0, P, 0))
        return y


PLACE_ARGUMENTS = {"self", "like", "head_dim", "value_width", "grids", "num_prefix_tokens"}
PROJECTED: dict[str, type[ProjectedMixer]] = {
    "softmax": ProjectedSoftmax,
    "nystrom": ProjectedNystrom,
    "performer": ProjectedPerformer,
}


def projected_options(mixer: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the mixer's keywords out of ``kwargs``.

    Raises:
        ValueError: for an unknown mixer, or a keyword of another one.
    """
    check_choice("mixer", mixer, tuple(PROJECTED))
    options = {
        name: [option for option in inspect.signature(one.__init__).parameters if option not in PLACE_ARGUMENTS]
        for name, one in PROJECTED.items()
    }
    mine = {name: kwargs.pop(name) for name in options[mixer] if name in kwargs}
    for name in {name for names in options.values() for name in names} & kwargs.keys():
        allowed = ", ".join(options[mixer]) or "no keywords"
        raise ValueError(f"{name}={kwargs[name]!r}: mixer={mixer!r} takes {allowed}")
    return mine
