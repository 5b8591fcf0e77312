"""Nyström attention: softmax attention reconstructed from m landmarks.

    F = softmax(Q K~^T / sqrt(D) + c)        (N, m)
    A = softmax(Q~ K~^T / sqrt(D) + c)       (m, m)
    O = softmax(Q~ K^T / sqrt(D)) V          (m, D)  exact attention of the landmarks' queries
    X = V~ + (A^T A + r I)^-1 A^T (O - A V~)         values that give the landmarks their exact outputs
    Y = F X                                          cost in N: linear, N·m

Xiong et al. 2021 (arXiv 2102.03902), equation 13 and section 3.2: Y = F A^+ O, to which this tends as r goes to 0.

*Names:* ``num_landmarks`` = m without prefix tokens; ``ridge`` = r; ``pinv_iterations``: Newton steps for the inverse;
``conv_residual``, which every mixer takes: the paper's depthwise convolution of the values, added to Y;
``window_size``: see below.

*Differs:* A is close to singular, and a pseudo-inverse amplifies errors in directions in which A is near zero; the
ridge draws X towards the pooled values V~ instead, so the rows of the approximation still sum to one. Landmarks are
means over cells of the patch grid (not over pieces of the raster), each prefix token is a landmark of its own, and c is
the log of the number of patches in a cell. Nothing is padded. The inverse starts from a bound of its own matrix, so no
output depends on the other images of the batch; it takes matrix products only, so it exports. In a ViT the two
attentions are fused with the projections where that is cheaper (``_fused.py``). The convolution runs over the grid.
With as many landmarks as patches Y is softmax attention, and is computed as that. With ``window_size`` w each patch
attends to the tokens of its w x w window and to the landmarks for the rest (``_windows.py``): it doubles the cost and
keeps most of a pretrained softmax model's accuracy without training. With rotary positions landmarks are rotated by the
centres of their cells.

Tokens that a mask of keys masks enter neither the means nor the exact attention of the landmarks, and c counts only the
others. On a grid of several rows the cells stay where they are. A sequence, which is a grid of one row, is pooled over
equal pieces of its unmasked tokens, in their order. So its result is that of the sequence without the masked tokens,
and so is that of any grid with as many landmarks as patches. NaFlex models have sequences.

*Pays:* one attention layer of ViT-Ti is 0.76, 1.76, 2.4 and 11 times as fast as with softmax through SDPA at 197, 577,
1,025 and 4,097 tokens, in inference with default keywords in float32 on 2 CPU threads
(``examples/results/mixers.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D head width, m landmarks (P prefix tokens and the cells).
"""

from typing import Any, Optional

import torch

from .._checks import check_integer, check_number
from ._landmarks import LandmarkAttention
from ._layout import Grid, TokenLayout, cell_grid
from ._masks import MaskedPooling, cell_averages, is_read
from ._mechanism import AttentionShape
from ._precision import outside_autocast
from ._resample import pool_patches

DEFAULT_LANDMARKS = 49


def newton_step(M: torch.Tensor, Z: torch.Tensor, eye: torch.Tensor) -> torch.Tensor:
    """Z (2 I - M Z), whose distance to the inverse is the square of that of Z."""
    return torch.bmm(Z, torch.baddbmm(2.0 * eye, M, Z, alpha=-1.0))


def newton_inverse(M: torch.Tensor, lowest: float, iterations: int) -> torch.Tensor:
    """M^-1 by Newton's iteration Z <- a Z (2 I - a M Z): (n, m, m), symmetric with eigenvalues from ``lowest`` on.

    The eigenvalues of M Z lie in [low, 1]; a = 2 / (1 + low) is the scale that lifts the lowest one most (Pan &
    Schreiber 1991, "An improved Newton iteration for the generalized inverse of a matrix", section 4).
    """
    eye = torch.eye(M.shape[1], device=M.device, dtype=M.dtype)
    with torch.no_grad():
        norm = M.abs().sum(2, keepdim=True).amax(1, keepdim=True)
        # with a ridge near zero the lowest eigenvalue is unknown, and this one is as good as any
        low = max(lowest, 1e-3) / norm
        Z = eye / norm
        a = torch.ones_like(low)
        for i in range(iterations - 1):
            if i > 0:
                Z = newton_step(M, Z, eye)
            a = 2.0 / (1.0 + low)
            Z = a * Z
            low = low * a * (2.0 - a * low)
    # The inverse is a fixed point of a step: the last two steps have its derivatives up to the third order, and earlier
    # ones need not be kept for the gradient.
    if iterations > 1:
        Z = newton_step(M, Z, eye)
    return newton_step(M, Z, eye)


class Inverse(torch.autograd.Function):
    """``newton_inverse`` with the derivative of an inverse, -Z dM Z, to any order; no step of the iteration is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(M: torch.Tensor, lowest: float, iterations: int) -> torch.Tensor:
        return newton_inverse(M, lowest, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        # Z is this function's own output, so that a gradient of the gradient comes back here
        (Z,) = ctx.saved_tensors
        transposed = Z.transpose(1, 2)
        return -torch.bmm(torch.bmm(transposed, gradient), transposed), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *rest: Any) -> torch.Tensor:
        (Z,) = ctx.saved_tensors
        return -torch.bmm(torch.bmm(Z, tangent), Z)


def ridge_inverse(A: torch.Tensor, ridge: float, iterations: int) -> torch.Tensor:
    """(A^T A + ridge I)^-1: (B, h, m, m) -> (B, h, m, m)."""
    B, h, m, _ = A.shape
    A = A.reshape(B * h, m, m)
    eye = torch.eye(m, device=A.device, dtype=A.dtype)
    # rounding can make the lowest eigenvalue of A^T A negative, and the iteration would blow it up
    ridge = max(ridge, m * (2.2e-16 if A.dtype == torch.float64 else 1.2e-7))
    M = torch.baddbmm(ridge * eye, A.transpose(1, 2), A)
    # TorchScript and torch.compile don't take the function below, and without a gradient its bookkeeping is lost time
    if torch.jit.is_scripting() or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return newton_inverse(M, ridge, iterations).reshape(B, h, m, m)
    else:  # noqa: RET505  TorchScript leaves out this branch, but not what follows an if
        return Inverse.apply(M, ridge, iterations).reshape(B, h, m, m)


def fit_landmarks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    exact: torch.Tensor,
    bias: torch.Tensor,
    ridge: float,
    steps: int,
    masked: bool = False,
) -> torch.Tensor:
    """X of the module's docstring from Q~, K~, V~, O (B, h, m, ·) and c (1, 1, 1, m), in float32 at least.

    ``masked``: c (B, 1, 1, m) masks landmarks of which nothing is read.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = torch.matmul(q.to(dtype), k.to(dtype).transpose(2, 3)) * q.shape[3] ** -0.5
    A = torch.softmax(logits + bias.to(dtype), dim=3)
    if masked:  # such landmarks ask nothing either, so the others are fitted as if they weren't there
        A = A * is_read(bias).to(dtype).transpose(2, 3)
    v = v.to(dtype)
    error = torch.matmul(A.transpose(2, 3), exact.to(dtype) - torch.matmul(A, v))
    return (v + torch.matmul(ridge_inverse(A, ridge, steps), error)).to(exact.dtype)


class NystromAttention(LandmarkAttention):
    """Nyström attention.

    Args:
        num_landmarks: cells over which landmarks are pooled; the largest number, at most this and the number of
            patches, that lies evenly over the patch grid is taken (``cell_grid``). None: 49.
        pinv_iterations: Newton steps. Each lifts the weakest direction fourfold at first and squares the error in the
            end: 8 do for the default landmarks, a few hundred want 10 to 12, fewer than 8 are for inference alone.
        ridge: r.
        window_size: side of the windows of the patch grid within which attention is exact; 0: none.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    title = "Nyström attention"
    source = "Xiong et al. 2021, arXiv 2102.03902"
    token_counts = ("num_landmarks",)
    candidates = tuple(dict(num_landmarks=m, window_size=w) for m in (16, 25, 49, 64) for w in (0, 4))
    needs_queries: torch.jit.Final[bool] = True

    def __init__(
        self,
        shape: AttentionShape,
        num_landmarks: Optional[int] = None,
        pinv_iterations: int = 8,
        ridge: float = 0.01,
        window_size: int = 0,
    ) -> None:
        super().__init__(shape, window_size)
        num_landmarks = DEFAULT_LANDMARKS if num_landmarks is None else num_landmarks
        check_integer("num_landmarks", num_landmarks, 1)
        check_integer("pinv_iterations", pinv_iterations, 1)
        check_number("ridge", ridge, 0)
        self.num_landmarks = num_landmarks
        self.pinv_iterations = pinv_iterations
        self.ridge = float(ridge)

    def cells(self, grid: Grid) -> Grid:
        return cell_grid(self.num_landmarks, grid)

    def is_exact(self, layout: TokenLayout) -> bool:
        # then O = A V, so X = V and Y = softmax(Q K^T / sqrt(D)) V
        return self.num_landmarks >= layout.grid[0] * layout.grid[1]

    def pool_masked(self, read: torch.Tensor, layout: TokenLayout, cells: Grid, like: torch.Tensor) -> MaskedPooling:
        weight, counts = cell_averages(read[:, layout.num_prefix_tokens :], layout.grid, cells, True, like)
        weight = weight.unsqueeze(1)
        return MaskedPooling(read, weight, weight, weight, counts.unsqueeze(1))

    def pool_all(self, x: torch.Tensor, layout: TokenLayout, cells: Grid, values: bool) -> torch.Tensor:
        if x.dim() == 3:
            return pool_patches(x, layout.num_prefix_tokens, layout.grid, cells)
        B, h, _, _ = x.shape
        return pool_patches(x.flatten(0, 1), layout.num_prefix_tokens, layout.grid, cells).unflatten(0, (B, h))

    def fit(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        exact: torch.Tensor,
        bias: torch.Tensor,
        masked: bool = False,
    ) -> torch.Tensor:
        if torch.jit.is_scripting():
            return fit_landmarks(q, k, v, exact, bias, self.ridge, self.pinv_iterations, masked)
        else:  # noqa: RET505  TorchScript leaves out this branch, but not what follows an if
            with outside_autocast(q.device):
                return fit_landmarks(q, k, v, exact, bias, self.ridge, self.pinv_iterations, masked)
