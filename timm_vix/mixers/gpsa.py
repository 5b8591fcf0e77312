"""Gated positional self-attention: each head is part softmax attention, part a learned distribution of places.

    A = (1 - s(g)) softmax(Q K^T / sqrt(D)) + s(g) softmax(w_0 dx + w_1 dy + w_2 (dx^2 + dy^2))
    s(g) = 1 / (1 + e^-g),     (dx, dy) = columns and rows from the query to the key

d'Ascoli et al. 2021 (arXiv 2103.10697), section 3. Cost in N: quadratic, N^2 + N·(H + W) for an H x W grid. The
positional logits are a sum of one for the column and one for the row, so the softmax over the grid is the product of
two softmaxes over one axis each, and A_pos V = A_y V A_x^T is exact without an N x N matrix.

*Names:* ``gating_param`` = g, lambda in the paper; ``pos_proj`` = (w_0, w_1, w_2) of each head, v_pos in the paper;
``locality_strength`` = alpha, the scale at which w starts.

Without trained weights g starts at 1, so that 73 % of the attention is positional, and the first k^2 heads, k =
floor(sqrt(h)), start at w = alpha (2 c_x, 2 c_y, -1) with their centres c on a k x k grid around the query, as
published. With trained weights g starts at -3, so that 5 % of the attention is positional, and little accuracy is lost.

*Differs:* there is no bias of the positional logits, as it cancels. Further heads start at w = 0, not at small random
numbers. Values start as the host has them; the paper's start as the tokens themselves. The paper's class token joins
after the layers with positions, as in ``models/convix.py``. Here prefix tokens may be there: the positional part is
among patches only, patches read prefix tokens in the content part, and prefix queries have the content part alone.
Dropout acts on the content part. With a mask of keys the positional part is among the unmasked patches.

*Speed:* a whole ViT-Ti is 0.84, 0.91, 0.95 and 0.96 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 0.84, 0.93, 0.93 and 0.99 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D head width, E width of a head's values.
"""

import math
from typing import Optional

import torch
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from .._checks import check_number
from ._layout import TokenLayout
from ._masks import added_to_logits, tokens_read
from ._mechanism import AttentionMechanism, AttentionShape
from ._precision import outside_autocast


def place_weights(linear: torch.Tensor, square: torch.Tensor, length: int) -> torch.Tensor:
    """softmax of linear d + square d^2 over the offsets d of n = ``length`` places: (h), (h) -> (h, n, n)."""
    place = torch.arange(length, device=linear.device, dtype=linear.dtype)
    offset = place - place.unsqueeze(1)
    return (linear.reshape(-1, 1, 1) * offset + square.reshape(-1, 1, 1) * offset.square()).softmax(2)


class GatedPositionalAttention(AttentionMechanism):
    """Gated positional self-attention.

    Args:
        locality_strength: alpha, how narrow the heads' distributions of places are at the start, at least 0.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    title = "gated positional self-attention"
    source = "d'Ascoli et al. 2021, arXiv 2103.10697"
    needs_self_attention = True
    supports_key_mask = True
    added_init = {"conv.weight": 0.0, "gating_param": -3.0}

    def __init__(self, shape: AttentionShape, locality_strength: float = 1.0) -> None:
        super().__init__(shape)
        check_number("locality_strength", locality_strength, 0)
        self.locality_strength = float(locality_strength)
        self.gating_param = shape.parameter(shape.num_heads)
        self.pos_proj = shape.parameter(shape.num_heads, 3)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.gating_param.fill_(1.0)
        self.pos_proj.zero_()
        side = math.isqrt(len(self.pos_proj))
        for head in range(side**2):
            column, row = divmod(head, side)
            centre = torch.tensor([2.0 * column - side + 1, 2.0 * row - side + 1, -1.0], device="cpu")
            self.pos_proj[head] = self.locality_strength * centre.to(self.pos_proj)

    def attend_to_places(self, v: torch.Tensor) -> torch.Tensor:
        """Positional attention to values on the grid: (B, h, H, W, E) -> (B, h, H·W, E)."""
        across, down, square = self.pos_proj.to(torch.promote_types(v.dtype, torch.float32)).unbind(1)
        columns = place_weights(across, square, v.shape[3]).to(v.dtype)
        rows = place_weights(down, square, v.shape[2]).to(v.dtype)
        y = torch.matmul(columns.unsqueeze(1), v)
        return torch.matmul(rows, y.flatten(3)).reshape(v.shape).flatten(2, 3)

    def attend_to_unmasked_places(self, v: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """The same among the patches that ``read`` (B, H·W) keeps, in float32 at least.

        Unmasked patches may be so far away that their weights among all patches would underflow, so this is one softmax
        over logits of the unmasked ones: products of three channels, without what is the same for all keys.
        """
        B, h, H, W, E = v.shape
        dtype = torch.promote_types(v.dtype, torch.float32)
        across, down, square = self.pos_proj.to(dtype).unsqueeze(2).unbind(1)
        row = torch.arange(H, device=v.device, dtype=dtype).repeat_interleave(W) - (H - 1) / 2
        column = torch.arange(W, device=v.device, dtype=dtype).repeat(H) - (W - 1) / 2
        parts = [across - 2.0 * square * column, down - 2.0 * square * row, square.expand(-1, H * W)]
        # as wide as the values, as fused kernels want them
        pad = [0, max(0, E - 3)]
        queries = F.pad(torch.stack(parts, dim=2), pad).expand(B, -1, -1, -1)
        keys = F.pad(torch.stack([column, row, row.square() + column.square()], dim=1), pad).expand(B, h, -1, -1)
        mask = added_to_logits(read[:, None, None, :], dtype)
        y = scaled_dot_product_attention(queries, keys, v.flatten(2, 3).to(dtype), attn_mask=mask, scale=1.0)
        return y.to(v.dtype)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: TokenLayout,
        keys: TokenLayout,
        attn_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        P = keys.num_prefix_tokens
        patches = v[:, :, P:].unflatten(2, keys.grid)
        if attn_mask is None:
            places = self.attend_to_places(patches)
        else:
            read = tokens_read(attn_mask, v.shape[0])[:, P:]
            if torch.jit.is_scripting():
                places = self.attend_to_unmasked_places(patches, read)
            else:
                with outside_autocast(v.device):
                    places = self.attend_to_unmasked_places(patches, read)
            attn_mask = added_to_logits(attn_mask, q.dtype)
        rate = self.dropout if self.training else 0.0
        content = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=rate)
        gate = self.gating_param.sigmoid().to(v.dtype).reshape(-1, 1, 1)
        return torch.cat([content[:, :, :P], torch.lerp(content[:, :, P:], places, gate)], dim=2)
