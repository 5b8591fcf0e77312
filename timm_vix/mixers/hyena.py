"""Hyena: a long convolution over the whole patch grid between two gates, in place of attention.

    U_i = K_i * V_i                                    queries, keys and values each after a 3x3 convolution
    Z_i = sum_j h(i - j) * U_j + d * U_i               over all patches j; cost in N: N log N
    Y_i = Q_i * Z_i
    h(p) = MLP(gamma(p)) * exp(-delta |p|)             a number for each channel

Products are elementwise. The filter h is implicit: a perceptron with sines gives its value at any offset p, a pair of
rows and columns, in units of a reference size. It covers the whole plane, from -(H - 1) to H - 1 rows and likewise
columns, so every patch sees every other. The convolution is a product of Fourier transforms of 2H x 2W numbers, which
is long enough that no offset meets another one; memory is linear in N. The filter is computed once for all images of a
batch, at 4·N offsets.

Zimerman & Wolf 2023 (arXiv 2309.13600), after Poli et al. 2023 (arXiv 2302.10866), with the plane of Spravil et al.
2024 (arXiv 2402.19305). It is their operator of order 2, which has one convolution and two gates.

*Names:* ``filter_order``, ``num_inner_mlps``: hidden units and inner layers of the MLP; ``emb_dim``: numbers in gamma
for each axis, the coordinate and pairs of cosine and sine of π, 2π, ... times it; ``w``: frequency of the MLP's sines;
``short_filter_order``: side of the short convolutions; ``skip`` = d. delta rises evenly over the channels from
ln(100) / 1.5 to ln(100) / 0.3, as published.

*Differs:* the published layer is causal in both axes, and the code rotates the image in every other block or mixes four
rotations; a filter over the whole plane costs the same transform. Its scale is that of a convolution, where the code's
transforms leave a factor of 1/(2L). A grid of another size has the same filter, at more or fewer offsets, where the
code needs the grid that it was built for. The code multiplies what every sine gets by w, and the filter starts as
noise; here weights start as those of Sitzmann et al. 2020 (arXiv 2006.09661, section 3.2), with w in the first layer
alone, and the filter starts as waves of up to about w radians a reference size. Prefix tokens lie on no grid: they keep
softmax attention to all tokens, and patches don't see them. Filter, products and transforms are computed in float32 at
least. Rotary positions raise an error: they would rotate the gates, so a patch's output would depend on its position.

*Speed:* a whole ViT-Ti is 0.46, 0.62, 0.89 and 1.55 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.57, 0.79, 1.00 and 2.46 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D head width, C = h·D channels.
"""

import math

import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from .._checks import InputError, check_integer, check_number
from ._layout import Grid, TokenLayout
from ._mechanism import AttentionMechanism, AttentionShape, with_prefix_rows
from ._precision import outside_autocast


def circular_offsets(length: int, like: torch.Tensor) -> torch.Tensor:
    """Offsets along an axis in the order of a Fourier transform of twice its length: 0, 1, ... and ..., -2, -1."""
    return (torch.arange(2 * length, device=like.device) + length) % (2 * length) - length


def describe_offsets(rows: torch.Tensor, columns: torch.Tensor, emb_dim: int) -> torch.Tensor:
    """gamma: offsets (n) and (m) along the axes, in units of the reference size -> (n·m, 2·emb_dim)."""
    rows, columns = rows.unsqueeze(1).expand(-1, len(columns)), columns.unsqueeze(0).expand(len(rows), -1)
    features = [rows, columns]
    for k in range(1, (emb_dim - 1) // 2 + 1):
        for axis in (rows, columns):
            features += [torch.cos(math.pi * k * axis), torch.sin(math.pi * k * axis)]
    return torch.stack(features, dim=2).flatten(0, 1)


def convolve(u: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """h * u for each channel: u (B, C, H, W), kernel (C, 2H, 2W) ordered by ``circular_offsets`` -> (B, C, H, W)."""
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling() and u.shape[0] == 0:
        return u  # libraries have no transform of an empty batch
    height, width = u.shape[2], u.shape[3]
    size = [2 * height, 2 * width]
    product = torch.fft.rfft2(u, s=size) * torch.fft.rfft2(kernel)
    return torch.fft.irfft2(product, s=size)[:, :, :height, :width]


class HyenaConvolution(AttentionMechanism):
    """Hyena's gated long convolution.

    Args:
        filter_order: hidden units of the filter's MLP.
        num_inner_mlps: its layers between the first and the last.
        emb_dim: numbers that describe an offset along an axis: 1, or 1 and a cosine and a sine for each frequency.
        w: frequency with which the sines of the first layer start, in radians a reference size.
        short_filter_order: odd side of the depthwise convolutions of queries, keys and values; 1: only scale and shift.
        reference_size: the unit of offsets, in patches. 14 is the side of a 224 px image in patches of 16.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    title = "a gated long convolution"
    source = "Zimerman & Wolf 2023, arXiv 2309.13600"
    exports_one_grid = True
    supports_dropout = False
    # gates aren't compared
    has_logits = False
    supports_rotary = False
    needs_self_attention = True

    def __init__(
        self,
        shape: AttentionShape,
        filter_order: int = 64,
        num_inner_mlps: int = 2,
        emb_dim: int = 3,
        w: float = 10.0,
        short_filter_order: int = 3,
        reference_size: int = 14,
    ) -> None:
        super().__init__(shape)
        check_integer("filter_order", filter_order, 1)
        check_integer("num_inner_mlps", num_inner_mlps, 1)
        check_integer("reference_size", reference_size, 1)
        check_number("w", w, 0.01)
        for name, value in (("emb_dim", emb_dim), ("short_filter_order", short_filter_order)):
            check_integer(name, value, 1)
            if value % 2 == 0:
                raise InputError(f"{name}={value}: expected an odd number")
        self.filter_order = filter_order
        self.num_inner_mlps = num_inner_mlps
        self.emb_dim = emb_dim
        self.w = float(w)
        self.short_filter_order = short_filter_order
        self.reference_size = reference_size
        channels, hidden = shape.num_heads * shape.head_dim, filter_order

        self.short_filter = shape.parameter(3 * channels, 1, short_filter_order, short_filter_order)
        self.short_filter_bias = shape.parameter(3 * channels)
        self.filter_in = shape.parameter(hidden, 2 * emb_dim)
        self.filter_in_bias = shape.parameter(hidden)
        self.filter_inner = shape.parameter(num_inner_mlps, hidden, hidden)
        self.filter_inner_bias = shape.parameter(num_inner_mlps, hidden)
        self.filter_out = shape.parameter(channels, hidden)
        self.skip = shape.parameter(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # convolutions and last layer as torch's own modules start, layers with sines as Sitzmann et al. have them
        bounds = {
            self.short_filter: 1 / self.short_filter_order,
            self.short_filter_bias: 1 / self.short_filter_order,
            self.filter_in: self.w / (2 * self.emb_dim),
            self.filter_in_bias: math.pi,
            self.filter_inner: (6 / self.filter_order) ** 0.5,
            self.filter_inner_bias: self.filter_order**-0.5,
            self.filter_out: self.filter_order**-0.5,
        }
        for parameter, bound in bounds.items():
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.normal_(self.skip)

    def kernel(self, grid: Grid) -> torch.Tensor:
        """The filter h of every channel, (C, 2H, 2W) in the order of ``circular_offsets``, in float32 at least."""
        dtype = torch.promote_types(self.filter_in.dtype, torch.float32)
        rows = circular_offsets(grid[0], self.filter_in).to(dtype) / self.reference_size
        columns = circular_offsets(grid[1], self.filter_in).to(dtype) / self.reference_size
        x = describe_offsets(rows, columns, self.emb_dim)
        x = torch.sin(linear(x, self.filter_in.to(dtype), self.filter_in_bias.to(dtype)))
        for i in range(self.num_inner_mlps):
            x = torch.sin(linear(x, self.filter_inner[i].to(dtype), self.filter_inner_bias[i].to(dtype)))
        values = torch.matmul(self.filter_out.to(dtype), x.transpose(0, 1)).unflatten(1, (len(rows), len(columns)))
        distance = torch.sqrt(rows.square().unsqueeze(1) + columns.square())
        # down to a hundredth after 1.5 reference sizes in the first channel, after 0.3 in the last
        slowest, fastest = math.log(100) / 1.5, math.log(100) / 0.3
        delta = torch.linspace(slowest, fastest, len(self.skip), device=rows.device, dtype=dtype)
        return values * torch.exp(-delta.unsqueeze(1).unsqueeze(2) * distance)

    def mix_patches(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Y from queries, keys and values on the grid, (B, C, H, W) each, in float32 at least."""
        u = k * v
        skip = self.skip.to(u.dtype).unsqueeze(1).unsqueeze(2)
        return q * (convolve(u, self.kernel((u.shape[2], u.shape[3]))) + skip * u)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: TokenLayout, keys: TokenLayout
    ) -> torch.Tensor:
        P, (height, width) = keys.num_prefix_tokens, keys.grid
        B, h, _, D = v.shape
        image = torch.cat([t[:, :, P:].transpose(2, 3).reshape(B, h * D, height, width) for t in (q, k, v)], dim=1)
        image = conv2d(
            image, self.short_filter, self.short_filter_bias, padding=self.short_filter_order // 2, groups=3 * h * D
        )
        gates = image.to(torch.promote_types(image.dtype, torch.float32)).chunk(3, dim=1)
        if torch.jit.is_scripting():
            y = self.mix_patches(gates[0], gates[1], gates[2])
        else:
            with outside_autocast(q.device):
                y = self.mix_patches(gates[0], gates[1], gates[2])
        y = y.to(v.dtype).reshape(B, h, D, height * width).transpose(2, 3)
        return with_prefix_rows(y, q, k, v, P)
