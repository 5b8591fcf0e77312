"""FNet: tokens mixed by a Fourier transform, without parameters.

    Y = Re(F_N X F_C)                                  cost in N: N log N

F_N and F_C are the discrete Fourier matrices over tokens and over channels (Lee-Thorp et al. 2021, arXiv 2105.03824,
section 3.2). X is real, so the transform at channel -c is the conjugate of that at (-n, c): half of the channels are
transformed over the tokens and the rest is read off their mirror image.

*Differs:* computed in float32 at least: half-precision transforms exist only for powers of two on some
devices and not at all on others. The sum over N·C entries grows with sqrt(N·C), as in the paper.

*Pays:* with default keywords on two CPU cores, 5 times as fast as softmax through SDPA at 197 tokens, 13
times at 4,097 (``examples/results/mixers.csv``).

Shapes: B images, N tokens (prefix tokens are tokens like all others), C channels.
"""

from typing import Optional

import torch
from timm.layers import register_notrace_function
from torch import nn

from ._slot import Grid, TokenMixer, admit, refuse_attention_dropout


def transform(x: torch.Tensor) -> torch.Tensor:
    """Re(F_N X F_C): (B, N, C) -> (B, N, C), in the dtype of x."""
    C = x.shape[2]
    half = torch.fft.rfft2(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(1, 2)).real
    # channels 1 to (C - 1) / 2, mirrored: Y[n, C - c] = Y[-n mod N, c]
    mirrored = half[:, :, 1 : (C + 1) // 2].flip(1, 2).roll(1, 1)
    return torch.cat([half, mirrored], dim=2).to(x.dtype)


class SymmetricTransform(torch.autograd.Function):
    """The transform is a symmetric matrix, so its gradient is the gradient's transform: half of autograd's cost."""

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


@torch.fx.wrap
@register_notrace_function
def fourier_mix(x: torch.Tensor) -> torch.Tensor:
    """Re(F_N X F_C): (B, N, C) -> (B, N, C), in the dtype of x."""
    if torch.jit.is_scripting():
        return transform(x)
    else:  # noqa: RET505  TorchScript leaves out this branch, but not what follows an if
        return SymmetricTransform.apply(x)


class FourierMixing(TokenMixer):
    """FNet's mixing sub-layer; the attention that it replaces leaves nothing behind."""

    uses_grid = False

    def __init__(self, attn: nn.Module, grid: Grid, num_prefix_tokens: int, rope: Optional[nn.Module] = None) -> None:
        if rope is not None:
            raise ValueError("rope: Fourier mixing has no queries and keys to rotate")
        refuse_attention_dropout(attn, "Fourier mixing")
        super().__init__(grid, num_prefix_tokens)
        self.drop = attn.proj_drop

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
        rope: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        return self.drop(fourier_mix(admit(x, attn_mask, is_causal, -1)))
