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
output depends on the other images of the batch; it takes matrix products only, so it exports. On a CPU, where LAPACK
takes a fifth of the time of these steps, the linear system is solved instead (``_ridge.py``). In a ViT the two
attentions are fused with the projections where that is cheaper (``_fused.py``). The convolution runs over the grid.
With as many landmarks as patches Y is softmax attention, and is computed as that. With ``window_size`` w each patch
attends to the tokens of its w x w window and to the landmarks for the rest (``_windows.py``), which takes more time and
keeps more of a pretrained model's accuracy without training. With rotary positions landmarks are rotated by the mean
positions of their patches.

Tokens that a mask of keys masks enter neither the means nor the exact attention of the landmarks, and c counts only the
others. On a grid of several rows the cells stay where they are. A sequence, which is a grid of one row, is pooled over
equal pieces of its unmasked tokens, in their order. So its result is that of the sequence without the masked tokens,
and so is that of any grid with as many landmarks as patches. NaFlex models have sequences.

*Speed:* a whole ViT-Ti is 0.63, 1.08, 1.68 and 4.33 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.75, 1.27, 1.68 and 5.33 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D head width, m landmarks (P prefix tokens and the cells).
"""

from typing import Optional

import torch

from .._checks import check_integer, check_number
from ._landmarks import LandmarkAttention
from ._layout import Grid, TokenLayout, cell_grid, num_patches
from ._masks import MaskedPooling, cell_averages, is_read
from ._mechanism import AttentionShape
from ._precision import outside_autocast
from ._resample import pool_patches
from ._ridge import ridge_solve

DEFAULT_LANDMARKS = 49


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
    if masked:  # the queries of masked landmarks are left out too, so they don't change the fit of the others
        A = A * is_read(bias).to(dtype).transpose(2, 3)
    v = v.to(dtype)
    error = torch.matmul(A.transpose(2, 3), exact.to(dtype) - torch.matmul(A, v))
    return (v + ridge_solve(A, error, ridge, steps)).to(exact.dtype)


class NystromAttention(LandmarkAttention):
    """Nyström attention.

    Args:
        num_landmarks: cells over which landmarks are pooled; the largest number, at most this and the number of
            patches, that lies evenly over the patch grid is taken (``cell_grid``). None: 49.
        pinv_iterations: Newton steps, on accelerators and in compiled or exported models; a CPU solves the system. At
            first a step multiplies the smallest eigenvalue of M Z (``_ridge.py``) by up to 4, in the end it squares the
            error. 8 steps suffice for the default landmarks, a few hundred landmarks need 10 to 12. With fewer, an
            exported model differs from the one on a CPU.
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
        return self.num_landmarks >= num_patches(layout)

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
        else:
            with outside_autocast(q.device):
                return fit_landmarks(q, k, v, exact, bias, self.ridge, self.pinv_iterations, masked)
