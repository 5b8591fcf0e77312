"""Layers of the convolutional vision transformer (Wu et al. 2021, arXiv 2103.15808), the token mixer by name.

Their parameters have the names of the published weights.

Shapes: B images, maps (B, C, H, W), tokens (B, P + H·W, C) with P prefix tokens.
"""

from typing import Any

import torch
from einops.layers.torch import Rearrange
from timm.layers import DropPath, Mlp, QuickGELU, register_notrace_module
from timm.models import checkpoint_seq
from torch import _assert, nn

from ..mixers import MIXERS
from ..mixers._layout import Grid, TokenLayout
from ..mixers._mechanism import AttentionShape, MechanismHost


def check_image(x: torch.Tensor, img_size: tuple[int, int]) -> None:
    """Refuse another image size: one with as many tokens would go through, its rows cut at the wrong places."""
    height, width = img_size
    _assert(x.shape[2] == height, f"Input height ({x.shape[2]}) doesn't match model ({height}).")
    _assert(x.shape[3] == width, f"Input width ({x.shape[3]}) doesn't match model ({width}).")


def to_image(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(B, H·W, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], grid[0], grid[1])


class ConvolutionalProjection(nn.Module):
    """Depthwise 3x3 convolution and batch normalisation: (B, C, H, W) -> (B, H/stride·W/stride, C)."""

    def __init__(self, dim: int, stride: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False, **dd)
        self.bn = nn.BatchNorm1d(dim, **dd)
        self.to_tokens = Rearrange("b c h w -> b (h w) c")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.to_tokens(self.conv(image))
        return self.bn(tokens.flatten(0, 1)).reshape(tokens.shape)


@register_notrace_module
class ConvolutionalAttention(MechanismHost):
    """Attention with CvT's projections of queries, keys and values.

    Args:
        projection: "conv": logits are scaled by the root of all channels, as in CvT, and not by the root of a head's;
            or "linear": no convolution, keys and values on the whole grid, logits scaled as in a ViT.
        key_stride: stride of the convolutions of keys and values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        num_prefix_tokens: int,
        mixer: str,
        keywords: dict[str, Any],
        projection: str = "conv",
        key_stride: int = 2,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        convolves = projection == "conv"
        key_stride = key_stride if convolves else 1
        self.conv_proj_q = ConvolutionalProjection(dim, 1, **dd) if convolves else None
        self.conv_proj_k = ConvolutionalProjection(dim, key_stride, **dd) if convolves else None
        self.conv_proj_v = ConvolutionalProjection(dim, key_stride, **dd) if convolves else None
        self.num_heads = num_heads
        self.rescale = num_heads**-0.5 if convolves else 1.0
        self.proj_q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.proj_k = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.proj_v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = grid
        self.key_grid = ((grid[0] - 1) // key_stride + 1, (grid[1] - 1) // key_stride + 1)
        queries, keys = TokenLayout(num_prefix_tokens, grid), TokenLayout(num_prefix_tokens, self.key_grid)
        head_dim = dim // num_heads
        shape = AttentionShape(dim, num_heads, head_dim, head_dim, queries, keys, **dd)
        self.set_core(MIXERS[mixer].build(shape, **keywords))
        self.proj = nn.Linear(dim, dim, **dd)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.num_heads, x.shape[2] // self.num_heads)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = x, x, x
        if self.conv_proj_q is not None and self.conv_proj_k is not None and self.conv_proj_v is not None:
            prefix, image = x[:, : self.num_prefix_tokens], to_image(x[:, self.num_prefix_tokens :], self.grid)
            q = torch.cat([prefix, self.conv_proj_q(image)], dim=1)
            k = torch.cat([prefix, self.conv_proj_k(image)], dim=1)
            v = torch.cat([prefix, self.conv_proj_v(image)], dim=1)
        q = self.proj_q(q) * self.rescale
        k, v = self.proj_k(k), self.proj_v(v)
        queries = TokenLayout(self.num_prefix_tokens, self.grid)
        keys = TokenLayout(self.num_prefix_tokens, self.key_grid)
        y = self.mix(self.heads(q), self.heads(k), self.heads(v), queries, keys, x)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Pre-norm transformer block with ``ConvolutionalAttention``."""

    def __init__(self, dim: int, mlp_ratio: float, drop: float, drop_path: float, device=None, dtype=None, **kwargs):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = ConvolutionalAttention(dim, **kwargs, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=QuickGELU, drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvEmbed(nn.Module):
    """Overlapping convolutional token embedding: (B, C, H, W) -> (B, N, C')."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding=embed_padding(kernel), device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(image).flatten(2).transpose(1, 2))


def embed_padding(kernel: int) -> int:
    """2 for CvT's 7x7, 1 for 3x3."""
    return 2 if kernel == 7 else kernel // 2


class Stage(nn.Module):
    """Embedding, class token if any, and blocks: (B, C, H, W) -> (B, P + N, C')."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel: int,
        stride: int,
        depth: int,
        class_token: bool,
        drop_path: list[float],
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_embed = ConvEmbed(in_chans, dim, kernel, stride, **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, **dd)) if class_token else None
        prefix = int(class_token)
        self.blocks = nn.Sequential(
            *(Block(dim, num_prefix_tokens=prefix, drop_path=drop_path[i], **kwargs, **dd) for i in range(depth))
        )
        self.grad_checkpointing = False

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(image)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
