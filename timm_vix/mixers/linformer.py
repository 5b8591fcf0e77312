"""Linformer: attention to k learned projections of the tokens.

    Y = softmax(Q (E K)^T / sqrt(D)) (F V)             E, F: (k, N) learned; cost in N: linear, N·k

Wang et al. 2020 (arXiv 2006.04768), equation 7 and "parameter sharing" in section 4.

*Names:* ``num_proj_tokens`` = k; ``sharing``: "none" = an E and an F for each head, "headwise" = one E and one F for
all heads, "kv" = one matrix for both (the paper's key-value sharing).

*Differs:* with an E shared by the heads the tokens are projected before keys and values are computed, (E X) W + b for
E (X W + b): the same up to the bias, for k instead of N tokens. E and F live on the patch grid, so they can be
resampled to any resolution, and start as averages over k equal regions, so that a pretrained model survives; prefix
tokens are attended to as they are. A region stands for N/k patches, so its logit carries log(N/k): without it a prefix
token would weigh N/k times too much. With ``window_size`` w patches see the w x w tokens around them one by one and
the projected ones for the rest (``_windows.py``): it doubles the cost and keeps most of a pretrained softmax model's
function without training. With rotary positions the projected keys are turned by the centres of their regions: turning
before the projection would mix keys of different angles, after which no product depends on relative position.

*Pays:* with default keywords on two CPU cores, 1.7 times as fast as softmax through SDPA at 197
tokens, 3 times at 577, 19 times at 4,097 (``examples/results/mixers.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D head width, C = h·D, k projected tokens.
"""

from typing import Optional, Union

import torch
from torch import nn

from .._checks import check_choice, check_integer
from ._resample import averages, resample_reading
from ._slot import AttentionMixer, Grid, admit, cell_grid, count_bias

DEFAULT_PROJ_TOKENS = 49


def region_averages(cells: Grid, grid: Grid) -> torch.Tensor:
    """The (k, H, W) weights that average the patches of ``grid`` over each of ``cells`` regions."""
    here = torch.empty(0, device="cpu")  # the weights may be built on the meta device
    rows, columns = averages(grid[0], cells[0], here), averages(grid[1], cells[1], here)
    return torch.einsum("ih,jw->ijhw", rows, columns).flatten(0, 1)


def project_tokens(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sums of patch tokens by the rows of weight (k, H·W): (B, H·W, C) -> (B, k, C)."""
    # a batched product reads x where it lies; a plain one keeps a transposed copy of it for the gradient
    return torch.bmm(weight.expand(x.shape[0], -1, -1), x)


class LinformerAttention(AttentionMixer):
    """Linformer attention in the slot.

    Args:
        num_proj_tokens: k; the largest number, at most this, that lies evenly over the patch grid is taken
            (``cell_grid``). None: 49, or the number of patches if smaller. A pair: rows and columns of regions, which
            is how a saved model keeps its regions at another grid.
        sharing: "kv", "headwise" or "none".
        window_size: side of the windows of the patch grid within which attention is exact; 0: none.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    grid_parameters = {"token_proj": resample_reading}

    def __init__(
        self,
        attn: nn.Module,
        grid: Grid,
        num_prefix_tokens: int,
        rope: Optional[nn.Module] = None,
        num_proj_tokens: Union[int, tuple[int, int], None] = None,
        sharing: str = "kv",
        window_size: int = 0,
    ) -> None:
        super().__init__(attn, grid, num_prefix_tokens, rope)
        check_integer("window_size", window_size, 0)
        self.window_size = window_size
        check_choice("sharing", sharing, ("none", "headwise", "kv"))
        if isinstance(num_proj_tokens, (tuple, list)) and len(num_proj_tokens) == 2:
            for side in num_proj_tokens:
                check_integer("num_proj_tokens", side, 1)
            self.cells = (num_proj_tokens[0], num_proj_tokens[1])
        else:
            if num_proj_tokens is None:
                num_proj_tokens = min(DEFAULT_PROJ_TOKENS, grid[0] * grid[1])
            check_integer("num_proj_tokens", num_proj_tokens, 1, grid[0] * grid[1], "patch tokens")
            self.cells = cell_grid(num_proj_tokens, grid)
        self.sharing = sharing
        self.num_proj_tokens = self.cells[0] * self.cells[1]
        groups = {"none": 2 * self.num_heads, "headwise": 2, "kv": 1}[sharing]
        weight = self.proj.weight
        self.token_proj = nn.Parameter(weight.new_empty(groups, self.num_proj_tokens, *grid))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            height, width = self.token_proj.shape[-2:]
            self.token_proj.copy_(region_averages(self.cells, (height, width)).expand_as(self.token_proj))

    def options(self) -> dict:
        return {"num_proj_tokens": list(self.cells)}

    def keys_values(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Prefix and projected tokens as keys and values: (B, N, C) -> two of (B, h, P + k, D)."""
        P = self.num_prefix_tokens
        weight = resample_reading(self.token_proj, self.grid).flatten(2)
        if self.sharing == "kv":
            projected = torch.cat([x[:, :P], project_tokens(weight[0], x[:, P:])], dim=1)
            return self.project(projected, 1, 3)
        if self.sharing == "headwise":
            for_keys = torch.cat([x[:, :P], project_tokens(weight[0], x[:, P:])], dim=1)
            for_values = torch.cat([x[:, :P], project_tokens(weight[1], x[:, P:])], dim=1)
            return [self.project(for_keys, 1, 2)[0], self.project(for_values, 2, 3)[0]]
        k, v = self.project(x, 1, 3)
        keys, values = weight.chunk(2)
        return [
            torch.cat([k[:, :, :P], torch.matmul(keys, k[:, :, P:])], dim=2),
            torch.cat([v[:, :, :P], torch.matmul(values, v[:, :, P:])], dim=2),
        ]

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
        rope: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        x = admit(x, attn_mask, is_causal, self.num_tokens)
        k, v = self.keys_values(x)
        bias = count_bias(k, self.num_prefix_tokens, self.num_proj_tokens, self.grid[0] * self.grid[1])
        m = self.num_prefix_tokens + self.num_proj_tokens
        k = self.rotate(k, rope, self.cells)
        if self.window_size > 0:
            return self.ask_few_and_near(x, k, v, bias, self.cells, self.window_size, rope)
        return self.ask_few(x, k, v, bias, m, rope)
