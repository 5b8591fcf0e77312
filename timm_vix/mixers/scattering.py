"""Wavelet scattering: the bands of a dual-tree complex wavelet, each weighted or mixed on its own, and put together.

    X_ab = A_a X B_b^T,   a, b in {0, 1}                     low (0) and high (1) bands of rows and columns
    X_00 <- w * X_00                                         w: (C, H, W)
    z = z + W2 ReLU(W1 z + b1) + b2                          for z in the complex bands of X_01, X_10 and X_11
    Y = sum_ab G_a X_ab F_b^T                                the inverse: Y = X while w = 1 and z stays

A_a and G_a are H x H, B_b and F_b are W x W: filters h_a and g_a along an axis, with the signal mirrored at its ends
(half-sample symmetry). The first level of a dual tree (Kingsbury 2001, "Complex wavelets for shift invariant analysis
and filtering of signals") isn't decimated, so its filters are symmetric. These have 5 and 7 taps and are known as
near_sym_a. With t the cosine of the frequency, and h1(t) = g0(-t), g1(t) = h0(-t),

    h0 = (1 + t) (7 - 2 t) / 10,     g0 = (1 + t) (50 - 9 t - 6 t^2) / 70,     h0 g0 + h1 g1 = 1:

the last equation, and zeros of h0 and g0 at t = -1, determine g0. Each 2x2 quad ((p, q), (r, s)) of a high band holds
two complex coefficients of opposite orientations,

    z = (p - s + i (q + r)) / sqrt(2)     and     (p + s + i (q - r)) / sqrt(2),

so there are six of them for four patches. W1, W2 are complex, block-diagonal over channels and the same for all bands;
ReLU acts on real and imaginary parts (Patro & Agneeswaran 2023, arXiv 2311.01310, SVT, section 3).

With products of filter matrices, cost in N: N^1.5, N·C·(4·H + 8·W). The high bands take another 12·N·C^2/k. Of other
patches a patch sees those in six rows and columns to each side: it takes several layers to mix a whole image.

*Names:* ``num_blocks`` = k, blocks of channels.

*Differs:* the official code draws w, W1 and W2 with a standard deviation of 0.02, so that the signal is lost at first.
Here w begins at one and W2 at zero, beside a residual z: the mixer begins as the identity. That code uses filters of 13
and 19 taps and one fixed square size, and mixes the columns of each row by matrices of their own, which belong to that
size. Here w is resampled, a high band with an odd side is padded by its mirror image and cropped, and high bands are
mixed over channels only. The paper has no class token. Here prefix tokens add the patches' mean after the mixing, and
patches add the prefix tokens, both with a weight for each channel, which begins at one and at zero.

*Speed:* a whole ViT-Ti is 0.55, 0.75, 1.21 and 1.78 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.75, 1.09, 1.38 and 3.50 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, C channels, k blocks of n channels.
"""

import torch
from torch import nn

from .._checks import InputError, check_integer
from ._layout import TokenLayout
from ._mechanism import AttentionShape, TokenMixing
from ._resample import resample_output_weight


def filter_matrix(taps: list[float], length: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix of a symmetric filter on an axis that is mirrored at its ends, however short: (length, length)."""
    half = len(taps) // 2
    place = torch.arange(-half, length + half, device=like.device).remainder(2 * length)
    place = torch.minimum(place, 2 * length - 1 - place)
    mirrored = torch.eye(length, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))[place]
    matrix = torch.zeros_like(mirrored[:length])
    for i, tap in enumerate(taps):
        matrix = matrix + tap * mirrored[i : i + length]
    return matrix.to(like.dtype)


def analysis_matrix(length: int, like: torch.Tensor) -> torch.Tensor:
    """h0 above h1 along an axis: (2·length, length)."""
    low = filter_matrix([-1 / 20, 5 / 20, 12 / 20, 5 / 20, -1 / 20], length, like)
    high = filter_matrix([3 / 280, -15 / 280, -73 / 280, 170 / 280, -73 / 280, -15 / 280, 3 / 280], length, like)
    return torch.cat([low, high])


def synthesis_matrix(length: int, like: torch.Tensor) -> torch.Tensor:
    """g0 beside g1 along an axis, the inverse of ``analysis_matrix``: (length, 2·length)."""
    low = filter_matrix([-3 / 280, -15 / 280, 73 / 280, 170 / 280, 73 / 280, -15 / 280, -3 / 280], length, like)
    high = filter_matrix([-1 / 20, -5 / 20, 12 / 20, -5 / 20, -1 / 20], length, like)
    return torch.cat([low, high], dim=1)


def analyse(x: torch.Tensor) -> torch.Tensor:
    """The bands X_ab of an image: (B, H, W, C) -> (B, 2, H, 2, W, C)."""
    B, H, W, C = x.shape
    x = torch.matmul(analysis_matrix(H, x), x.reshape(B, H, W * C)).reshape(B, 2 * H, W, C)
    return torch.matmul(analysis_matrix(W, x), x).reshape(B, 2, H, 2, W, C)


def synthesise(bands: torch.Tensor) -> torch.Tensor:
    """The inverse of ``analyse``: (B, 2, H, 2, W, C) -> (B, H, W, C)."""
    B, _, H, _, W, C = bands.shape
    x = torch.matmul(synthesis_matrix(W, bands), bands.reshape(B, 2 * H, 2 * W, C))
    return torch.matmul(synthesis_matrix(H, bands), x.reshape(B, 2 * H, W * C)).reshape(B, H, W, C)


def to_complex(x: torch.Tensor) -> torch.Tensor:
    """Real and imaginary parts of the two coefficients of each quad: (A, H, W, C) -> (A, H/2, W/2, 2, 2, C).

    A band with an odd side goes on by one row or column of its mirror image.
    """
    A, H, W, C = x.shape
    if H % 2 > 0:
        x = torch.cat([x, x[:, -1:]], dim=1)
    if W % 2 > 0:
        x = torch.cat([x, x[:, :, -1:]], dim=2)
    x = x.reshape(A, (H + 1) // 2, 2, (W + 1) // 2, 2, C) * 0.5**0.5
    above, below = x.unbind(2)
    (p, q), (r, s) = above.unbind(3), below.unbind(3)
    return torch.stack([p - s, q + r, p + s, q - r], dim=3).reshape(A, p.shape[1], p.shape[2], 2, 2, C)


def from_complex(z: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of ``to_complex``, cropped: (A, ·, ·, 2, 2, C) -> (A, H, W, C)."""
    A, rows, columns, _, _, C = z.shape
    z = z * 0.5**0.5
    real, imaginary, other_real, other_imaginary = z.flatten(3, 4).unbind(3)
    x = torch.stack(
        [real + other_real, imaginary + other_imaginary, imaginary - other_imaginary, other_real - real], dim=3
    )
    x = x.reshape(A, rows, columns, 2, 2, C).transpose(2, 3).reshape(A, 2 * rows, 2 * columns, C)
    return x[:, :height, :width]


def complex_linear(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """W z + b by blocks: z (k, M, 2·n) with real parts first, weight (2, k, n, n), bias (2, k, n) -> (k, M, 2·n)."""
    real, imaginary = weight[0].transpose(1, 2), weight[1].transpose(1, 2)
    both = torch.cat([torch.cat([real, imaginary], dim=2), torch.cat([-imaginary, real], dim=2)], dim=1)
    return torch.baddbmm(torch.cat([bias[0], bias[1]], dim=1).unsqueeze(1), z, both)


class WaveletScattering(TokenMixing):
    """SVT's scattering.

    Args:
        num_blocks: blocks of channels within which the high bands are mixed.

    Raises:
        ValueError: for a number that doesn't divide the channels, or with rotary positions.
    """

    title = "wavelet scattering"
    source = "Patro & Agneeswaran 2023, arXiv 2311.01310"
    exports_one_grid = True
    grid_parameters = {"low_weight": resample_output_weight}

    def __init__(self, shape: AttentionShape, num_blocks: int = 4) -> None:
        super().__init__(shape)
        check_integer("num_blocks", num_blocks, 1)
        if shape.dim % num_blocks:
            raise InputError(f"num_blocks={num_blocks}: expected a divisor of the {shape.dim} channels")
        self.num_blocks = num_blocks
        P, k, n = shape.queries.num_prefix_tokens, num_blocks, shape.dim // num_blocks

        self.low_weight = shape.parameter(shape.dim, *shape.queries.grid)
        self.weight1, self.bias1 = shape.parameter(2, k, n, n), shape.parameter(2, k, n)
        self.weight2, self.bias2 = shape.parameter(2, k, n, n), shape.parameter(2, k, n)
        self.read_prefix = shape.parameter(P, shape.dim) if P else None
        self.write_prefix = shape.parameter(P, shape.dim) if P else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.low_weight)
        nn.init.normal_(self.weight1, std=(2 * self.weight1.shape[3]) ** -0.5)
        for parameter in (self.bias1, self.weight2, self.bias2):
            nn.init.zeros_(parameter)
        if self.read_prefix is not None and self.write_prefix is not None:
            nn.init.ones_(self.read_prefix)
            nn.init.zeros_(self.write_prefix)

    def mix_channels(self, z: torch.Tensor) -> torch.Tensor:
        """What is added to complex coefficients (..., 2, C): real and imaginary parts, then channels."""
        C, k = z.shape[-1], self.num_blocks
        blocks = z.reshape(-1, 2, k, C // k).permute(2, 0, 1, 3).reshape(k, -1, 2 * C // k)
        hidden = torch.relu(complex_linear(blocks, self.weight1, self.bias1))
        blocks = complex_linear(hidden, self.weight2, self.bias2)
        return blocks.reshape(k, -1, 2, C // k).permute(1, 2, 0, 3).reshape(z.shape)

    def forward(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        P, (H, W) = layout.num_prefix_tokens, layout.grid
        B, _, C = x.shape
        bands = analyse(x[:, P:].reshape(B, H, W, C))
        above, below = bands.unbind(1)
        (low, right), (left, corner) = above.unbind(2), below.unbind(2)
        low = low * resample_output_weight(self.low_weight, layout.grid).permute(1, 2, 0)
        high = torch.stack([right, left, corner], dim=1).flatten(0, 1)
        z = to_complex(high)
        high = from_complex(z + self.mix_channels(z), H, W).reshape(B, 3, H, W, C)
        top, bottom = torch.stack([low, high[:, 0]], dim=2), torch.stack([high[:, 1], high[:, 2]], dim=2)
        y = synthesise(torch.stack([top, bottom], dim=1)).reshape(B, H * W, C)
        if self.read_prefix is not None and self.write_prefix is not None:
            prefix = x[:, :P]
            read = prefix + self.read_prefix * y.mean(1, keepdim=True)
            y = torch.cat([read, y + (self.write_prefix * prefix).sum(1, keepdim=True)], dim=1)
        return y
