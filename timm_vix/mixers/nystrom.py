"""Nyström attention: softmax attention reconstructed from m landmarks.

    F = softmax(Q K~^T / sqrt(D) + c)        (N, m)
    A = softmax(Q~ K~^T / sqrt(D) + c)       (m, m)
    O = softmax(Q~ K^T / sqrt(D)) V          (m, D)  exact attention of the landmarks' queries
    X = V~ + (A^T A + r I)^-1 A^T (O - A V~)         values that give the landmarks their exact outputs
    Y = F X                                          cost in N: linear, N·m

Xiong et al. 2021 (arXiv 2102.03902), equation 13 and section 3.2: Y = F A^+ O, to which this tends as r goes to 0.

*Names:* ``num_landmarks`` = m without prefix tokens; ``ridge`` = r; ``pinv_iterations``: Newton steps for the inverse;
``conv_residual``: the paper's depthwise convolution of the values, added to Y; ``window_size``: see below.

*Differs:* A is close to singular, and an exact pseudo-inverse amplifies what A cannot see; the ridge draws X towards
the pooled values V~ instead, so the rows of the approximation still sum to one. Landmarks are means over cells of the
patch grid (not over pieces of the raster), each prefix token is a landmark of its own, and c is the log of the number
of patches in a cell. Nothing is padded. The inverse starts from a bound of its own matrix, so no image depends on its
batch mates; it takes matrix products only, so it exports. The two attentions are folded into the projections where
that is cheaper (``_folded.py``). The convolution runs over the grid. With as many landmarks as patches Y is softmax
attention, and is computed as that. With ``window_size`` w patches see the w x w tokens around them one by one and the
landmarks for the rest (``_windows.py``): it doubles the cost and keeps most of a pretrained softmax model's function
without training. With rotary positions landmarks are turned by the centres of their cells.

*Pays:* with default keywords on two CPU cores, 0.8 times as fast as softmax through SDPA at 197
tokens, 1.8 times at 577, 11 times at 4,097 (``examples/results/mixers.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D head width, m landmarks (P prefix tokens and the cells).
"""

from typing import Optional

import torch
from timm.layers import register_notrace_function
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from .._checks import check_choice, check_integer, check_number
from ._resample import pool_patches
from ._slot import AttentionMixer, Grid, admit, cell_grid, count_bias, outside_autocast

DEFAULT_LANDMARKS = 49
KERNEL_SIZE = 5


# A leaf for torch.fx: tensors are made here on the device of ``A``.
@torch.fx.wrap
@register_notrace_function
def ridge_inverse(A: torch.Tensor, ridge: float, iterations: int) -> torch.Tensor:
    """(A^T A + ridge I)^-1 by Newton's iteration Z <- a Z (2 I - a M Z): (B, h, m, m) -> (B, h, m, m).

    The eigenvalues of M Z lie in [low, 1]; a = 2 / (1 + low) is the scale that lifts the lowest one most (Pan &
    Schreiber 1991, "An improved Newton iteration for the generalized inverse of a matrix", section 4).
    """
    B, h, m, _ = A.shape
    A = A.reshape(B * h, m, m)
    eye = torch.eye(m, device=A.device, dtype=A.dtype)
    # rounding can make the lowest eigenvalue of A^T A negative, and the iteration would blow it up
    ridge = max(ridge, m * (2.2e-16 if A.dtype == torch.float64 else 1.2e-7))
    M = torch.baddbmm(ridge * eye, A.transpose(1, 2), A)
    with torch.no_grad():
        norm = M.abs().sum(2, keepdim=True).amax(1, keepdim=True)
        # with a ridge near zero the lowest eigenvalue is unknown, and this one is as good as any
        low = max(ridge, 1e-3) / norm
        Z = eye / norm
        for _ in range(iterations - 1):
            a = 2.0 / (1.0 + low)
            Z = a * Z
            Z = torch.bmm(Z, torch.baddbmm(2.0 * eye, M, Z, alpha=-1.0))
            low = low * a * (2.0 - a * low)
    # the last step alone has the inverse's gradient, -Z dM Z, so the others need not be kept
    Z = torch.bmm(Z, torch.baddbmm(2.0 * eye, M, Z, alpha=-1.0))
    return Z.reshape(B, h, m, m)


def fit_landmarks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor, ridge: float, steps: int
) -> torch.Tensor:
    """The work of ``landmark_values``, outside of autocast."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = torch.matmul(q.to(dtype), k.to(dtype).transpose(2, 3)) * q.shape[3] ** -0.5
    A = torch.softmax(logits + bias.to(dtype), dim=3)
    v = v.to(dtype)
    error = torch.matmul(A.transpose(2, 3), exact.to(dtype) - torch.matmul(A, v))
    return (v + torch.matmul(ridge_inverse(A, ridge, steps), error)).to(exact.dtype)


# A leaf for torch.fx: autocast is switched off here for a device that only the run knows.
@torch.fx.wrap
@register_notrace_function
def landmark_values(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor, ridge: float, steps: int
) -> torch.Tensor:
    """X of the module's docstring from Q~, K~, V~, O (B, h, m, D) and c (1, 1, 1, m); float32 at least."""
    if torch.jit.is_scripting():
        return fit_landmarks(q, k, v, exact, bias, ridge, steps)
    else:  # noqa: RET505  TorchScript leaves out this branch, but not what follows an if
        with outside_autocast(q.device):
            return fit_landmarks(q, k, v, exact, bias, ridge, steps)


class NystromAttention(AttentionMixer):
    """Nyström attention in the slot.

    Args:
        num_landmarks: cells over which landmarks are pooled; the largest number, at most this, that lies evenly over
            the patch grid is taken (``cell_grid``). None: 49, or the number of patches if smaller.
        pinv_iterations: Newton steps. Each lifts the weakest direction fourfold at first and squares the error in the
            end: 8 do for the default landmarks, a few hundred want 10 to 12.
        ridge: r.
        conv_residual: add a depthwise 5x5 convolution of the values.
        window_size: side of the windows of the patch grid within which attention is exact; 0: none.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    def __init__(
        self,
        attn: nn.Module,
        grid: Grid,
        num_prefix_tokens: int,
        rope: Optional[nn.Module] = None,
        num_landmarks: Optional[int] = None,
        pinv_iterations: int = 8,
        ridge: float = 0.01,
        conv_residual: bool = False,
        window_size: int = 0,
    ) -> None:
        super().__init__(attn, grid, num_prefix_tokens, rope)
        if num_landmarks is None:
            num_landmarks = min(DEFAULT_LANDMARKS, grid[0] * grid[1])
        check_integer("num_landmarks", num_landmarks, 1, grid[0] * grid[1], "patch tokens")
        check_integer("pinv_iterations", pinv_iterations, 1)
        check_number("ridge", ridge, 0)
        check_choice("conv_residual", conv_residual, (True, False))
        check_integer("window_size", window_size, 0)
        self.window_size = window_size
        self.num_landmarks = num_landmarks
        self.pinv_iterations = pinv_iterations
        self.ridge = float(ridge)
        self.cells = cell_grid(num_landmarks, grid)
        self.conv: Optional[nn.Module] = None
        if conv_residual:
            weight = self.proj.weight
            width = self.attn_dim
            self.conv = nn.Conv2d(
                width,
                width,
                KERNEL_SIZE,
                padding="same",
                groups=width,
                bias=False,
                device=weight.device,
                dtype=weight.dtype,
            )

    def before_forward(self, grid: Grid) -> None:
        # most images have the size of those before
        if grid != self.grid:
            self.cells = cell_grid(self.num_landmarks, grid)
        super().before_forward(grid)

    def options(self) -> dict:
        return {"num_landmarks": min(self.num_landmarks, self.grid[0] * self.grid[1])}

    def residual(self, v: torch.Tensor) -> torch.Tensor:
        """Depthwise convolution of the values over the grid: (B, h, N, D) -> (B, h, N, D), 0 for prefix tokens."""
        B, h, _, D = v.shape
        height, width = self.grid
        assert self.conv is not None
        patches = v[:, :, self.num_prefix_tokens :].transpose(2, 3).reshape(B, h * D, height, width)
        local = self.conv(patches).reshape(B, h, D, height * width).transpose(2, 3)
        return F.pad(local, (0, 0, self.num_prefix_tokens, 0))

    def ask_each(self, x: torch.Tensor, rope: Optional[torch.Tensor]) -> torch.Tensor:
        """The output where each patch is a landmark: O = A V, so X = V and Y = softmax(Q K^T / sqrt(D)) V exactly."""
        q, k, v = self.project(x, 0, 3)
        dropout = self.attn_drop.p if self.training else 0.0
        y = scaled_dot_product_attention(self.rotate(q, rope), self.rotate(k, rope), v, dropout_p=dropout)
        return self.merge(y if self.conv is None else y + self.residual(v), x)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
        rope: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        x = admit(x, attn_mask, is_causal, self.num_tokens)
        if self.cells == self.grid:
            return self.ask_each(x, rope)
        # the mean of a projection is the projection of the mean, for m instead of N tokens
        pooled = pool_patches(x, self.num_prefix_tokens, self.grid, self.cells)
        q, k, v = self.project(pooled, 0, 3)
        q, k = self.rotate(q, rope, self.cells), self.rotate(k, rope, self.cells)
        num_cells = self.cells[0] * self.cells[1]
        m = self.num_prefix_tokens + num_cells
        bias = count_bias(k, self.num_prefix_tokens, num_cells, self.grid[0] * self.grid[1])
        values = landmark_values(q, k, v, self.ask_all(x, q, m, rope), bias, self.ridge, self.pinv_iterations)
        local = None if self.conv is None else self.residual(self.project(x, 2, 3)[0])
        if self.window_size > 0:
            return self.ask_few_and_near(x, k, values, bias, self.cells, self.window_size, rope, local)
        return self.ask_few(x, k, values, bias, m, rope, local)
