"""Legendre memory: a recurrence along rows and columns, whose state approximates the last tokens by polynomials.

    M_t = A M_(t-1) + B V_t                            for each channel, along a row or a column of the grid
    Y_i = sum over four directions of c^T M_i          cost in N: N^1.5, N·(H + W) for an H x W grid
    a_kl = (2k + 1) / theta · (-1 if k < l, else (-1)^(k - l + 1)),  b_k = (2k + 1) (-1)^k / theta
    A = exp(a),  B = a^-1 (A - 1) b                    zero-order hold

M are the first coefficients of the last theta tokens in Legendre polynomials (Voelker et al. 2019, "Legendre memory
units"); c reads them, another vector for each direction and channel. The recurrence is linear, so a direction is a
convolution with c^T A^t B, and both directions of an axis are a product with one Toeplitz matrix for each channel. For
the sides of patch grids that is several times as fast as Fourier transforms, and it needs no complex numbers. The
matrices hold H^2 + W^2 numbers for each channel, so memory is linear in N unless the grid is long and narrow.

Liu et al. 2024 (arXiv 2402.04882), with the parallel form of Chilkuri & Eliasmith 2021 (arXiv 2102.11417).

*Names:* ``order``: coefficients in M; ``theta``: tokens in the window; ``readout`` = c of rows, then of columns, in
each the direction of the raster and then the other.

*Differs:* the paper remembers one number a token, ReLU(w^T x), so its mixing has rank one; here every channel of the
values has a memory of its own, without ReLU, since the recurrence is linear in what it remembers and a MLP follows. The
input that the paper joins to M is in the token's residual connection. The paper runs through one sequence of fixed
length in one direction; four directions of the grid take any image. Its order is theta, 128: patches along a side are
fewer, and order 16 has more coefficients than a window of 14 tokens has tokens. Powers of A are taken in float64.
Prefix tokens lie on no grid: they keep softmax attention to all tokens, and patches don't see them.

*Speed:* a whole ViT-Ti is 0.84, 1.14, 1.65 and 3.23 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.76, 0.97, 1.59 and 3.86 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D head width, C = h·D channels, L the longer side.
"""

import torch
from torch import nn

from .._checks import check_integer, check_number
from ._layout import TokenLayout
from ._mechanism import AttentionMechanism, AttentionShape, with_prefix_rows


def discretise(order: int, theta: float) -> torch.Tensor:
    """A and B of the module's docstring, side by side in float64: (order, order + 1)."""
    k = torch.arange(order, dtype=torch.float64, device="cpu").unsqueeze(1)
    sign = (-1.0) ** k
    scale = (2 * k + 1) / theta
    a = scale * torch.where(k < k.T, -torch.ones_like(sign), -sign * sign.T)
    A = torch.matrix_exp(a)
    eye = torch.eye(order, dtype=torch.float64, device="cpu")
    return torch.cat([A, torch.linalg.solve(a, (A - eye) @ (scale * sign))], dim=1)


def impulse_response(step: torch.Tensor, length: int) -> torch.Tensor:
    """A^t B for t < length, from A and B side by side: (order, length)."""
    power, response = step[:, :-1], step[:, -1:]
    while response.shape[1] < length:
        response = torch.cat([response, power @ response], dim=1)
        power = power @ power
    return response[:, :length]


def toeplitz_basis(response: torch.Tensor) -> torch.Tensor:
    """What M_t holds of token s, forwards and backwards: (order, L) -> (2·order, L, L), at [:, t, s]."""
    t = torch.arange(response.shape[1], device=response.device)
    lag = t.unsqueeze(1) - t
    forwards = response[:, lag.clamp(min=0)] * (lag >= 0)
    return torch.cat([forwards, forwards.transpose(1, 2)])


class LegendreMemory(AttentionMechanism):
    """Legendre memory.

    Args:
        order: coefficients that the memory holds.
        theta: tokens that it looks back.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    title = "a Legendre memory"
    source = "Liu et al. 2024, arXiv 2402.04882"
    supports_dropout = False
    # only prefix tokens compare queries with keys
    has_logits = False
    needs_self_attention = True
    uses_values_only = True
    exports_one_grid = True

    def __init__(self, shape: AttentionShape, order: int = 16, theta: float = 14.0) -> None:
        super().__init__(shape)
        check_integer("order", order, 1)
        check_number("theta", theta, 1)
        self.order = order
        self.theta = float(theta)
        # numbers, which no change of dtype rounds
        self.step: list[list[float]] = discretise(order, theta).tolist()
        channels = shape.num_heads * shape.head_dim
        self.readout = shape.parameter(2, channels, 2 * order)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # with uncorrelated values the output has a quarter of their variance on 14x14 patches, and 0.4 on large grids
        nn.init.normal_(self.readout, std=0.5 * self.theta**0.5 / self.order)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: TokenLayout, keys: TokenLayout
    ) -> torch.Tensor:
        P, (height, width) = keys.num_prefix_tokens, keys.grid
        B, h, _, D = v.shape
        # products of many small matrices copy what isn't contiguous, each for itself
        image = v[:, :, P:].transpose(2, 3).reshape(B, h * D, height, width).contiguous()
        step = torch.tensor(self.step, dtype=torch.float64, device="cpu")
        basis = toeplitz_basis(impulse_response(step, max(height, width)).to(self.readout))
        rows, columns = basis[:, :width, :width].transpose(1, 2), basis[:, :height, :height]
        along_rows = torch.matmul(self.readout[0], rows.flatten(1)).unflatten(1, (width, width))
        along_columns = torch.matmul(self.readout[1], columns.flatten(1)).unflatten(1, (height, height))
        y = torch.matmul(image, along_rows) + torch.matmul(along_columns, image)
        y = y.reshape(B, h, D, height * width).transpose(2, 3)
        return with_prefix_rows(y, q, k, v, P)
