"""FNet: tokens mixed by a Fourier transform, without parameters.

    Y = Re(F_N X F_C)                                  cost in N: N log N

F_N and F_C are the discrete Fourier matrices over tokens and over channels (Lee-Thorp et al. 2021, arXiv 2105.03824,
section 3.2). X is real, so the transform at channel -c is the conjugate of that at (-n, c): half of the channels are
transformed over the tokens and the rest is read off their mirror image.

*Differs:* computed in float32 at least: half-precision transforms exist only for powers of two on some devices and not
at all on others. The sum over N·C entries grows with sqrt(N·C), as in the paper, and with N·C for what all tokens
share. So a model in float16 overflows at many tokens; autocast and bfloat16 don't.

*Speed:* a whole ViT-Ti is 1.29, 1.77, 2.27 and 4.71 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 1.44, 2.08, 2.53 and 6.50 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N tokens (prefix tokens are tokens like all others), C channels.
"""

import torch

from ._layout import TokenLayout
from ._mechanism import TokenMixing


def transform(x: torch.Tensor) -> torch.Tensor:
    """Re(F_N X F_C): (B, N, C) -> (B, N, C), in the dtype of x."""
    C = x.shape[2]
    half = torch.fft.rfft2(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(1, 2)).real
    # channels 1 to (C - 1) / 2, mirrored: Y[n, C - c] = Y[-n mod N, c]
    mirrored = half[:, :, 1 : (C + 1) // 2].flip(1, 2).roll(1, 1)
    return torch.cat([half, mirrored], dim=2).to(x.dtype)


class SymmetricTransform(torch.autograd.Function):
    """The transform is a symmetric matrix, so its gradient is the gradient's transform: half of autograd's cost."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return transform(x)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        # applied, not called, so that a gradient of the gradient exists
        return SymmetricTransform.apply(gradient)

    @staticmethod
    def jvp(ctx: torch.autograd.function.FunctionCtx, tangent: torch.Tensor) -> torch.Tensor:
        return SymmetricTransform.apply(tangent)


def fourier_mix(x: torch.Tensor) -> torch.Tensor:
    """Re(F_N X F_C): (B, N, C) -> (B, N, C), in the dtype of x."""
    if torch.jit.is_scripting():
        return transform(x)
    else:
        if torch.compiler.is_compiling():
            return transform(x)  # torch 2.11 compiles the function's gradient to zero
        if x.shape[0] == 0:
            return x  # libraries have no transform of an empty batch
        return SymmetricTransform.apply(x)


class FourierMixing(TokenMixing):
    """FNet's mixing sub-layer."""

    title = "Fourier mixing"
    source = "Lee-Thorp et al. 2021, arXiv 2105.03824"
    uses_grid = False

    def forward(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        return fourier_mix(x)
