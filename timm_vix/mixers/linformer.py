"""Linformer: attention to k learned projections of the tokens.

    Y = softmax(Q (E K)^T / sqrt(D)) (F V)             E, F: (k, N) learned; cost in N: linear, N·k

Wang et al. 2020 (arXiv 2006.04768), equation 7 and "parameter sharing" in section 4.

*Names:* ``num_proj_tokens`` = k; ``sharing``: "none" = an E and an F for each head, "headwise" = one E and one F for
all heads, "kv" = one matrix for both (the paper's key-value sharing).

*Differs:* with an E shared by the heads a ViT projects the tokens before keys and values are computed, (E X) W + b for
E (X W + b), which CvT and LeViT compute: the same up to the bias, for k instead of N tokens. E and F live on the patch
grid, so they can be resampled to any resolution, and start as averages over k equal regions, so that a pretrained model
keeps part of its accuracy; prefix tokens are attended to as they are. A region stands for N/k patches, so its logit
carries log(N/k): without it a prefix token would weigh N/k times too much. With ``window_size`` w each patch attends to
the tokens of its w x w window and to the projected ones for the rest (``_windows.py``), which takes more time and keeps
more of a pretrained model's accuracy without training. With rotary positions the projected keys are rotated by the mean
positions of their patches. Rotating before the projection would mix keys of different angles, and no product would
depend on relative position.

Tokens that a mask of keys hides enter no projection. On a grid of several rows the weights of the others are scaled up
to the absolute sum that E and F had, and the logit carries the log of N/k times the share that is left. In a sequence,
which is a grid of one row, masked tokens are removed, and E and F are resampled to the number of the others. So the
result is that of the sequence without the masked tokens. NaFlex models have sequences.

*Speed:* a whole ViT-Ti is 0.98, 1.55, 1.93 and 5.14 times as fast as with softmax through SDPA at 197, 577, 1,025 and
4,097 tokens in inference, and 1.03, 1.56, 2.37 and 6.40 times in training, in float32 on 2 CPU threads
(``examples/results/cost_cpu.csv``).

Shapes: B images, N = P + H·W tokens, h heads, D head width, C = h·D, k projected tokens.
"""

from typing import Union

import torch
from torch import nn

from .._checks import check_choice, check_integer
from ._landmarks import LandmarkAttention
from ._layout import Grid, TokenLayout, cell_grid, num_patches
from ._masks import MaskedPooling, cell_averages, pieces, share_read
from ._mechanism import AttentionShape
from ._resample import region_averages, resample_input_weight

DEFAULT_PROJ_TOKENS = 49


def project_tokens(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sums of patch tokens by the rows of weight (k, H·W): (B, H·W, C) -> (B, k, C)."""
    # a batched product reads x where it lies; a plain one keeps a transposed copy of it for the gradient
    return torch.bmm(weight.expand(x.shape[0], -1, -1), x)


class LinformerAttention(LandmarkAttention):
    """Linformer attention.

    Args:
        num_proj_tokens: k; the largest number, at most this and the number of patches, that lies evenly over the patch
            grid is taken (``cell_grid``). None: 49. A pair: rows and columns of regions, which is how a saved model
            keeps its regions at another grid.
        sharing: "kv", "headwise" or "none".
        window_size: side of the windows of the patch grid within which attention is exact; 0: none.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    title = "Linformer attention"
    source = "Wang et al. 2020, arXiv 2006.04768"
    candidates = tuple(dict(num_proj_tokens=k, window_size=w) for k in (16, 25, 49, 64) for w in (0, 4))
    grid_parameters = {"token_proj": resample_input_weight}
    __jit_unused_properties__ = ("counts_passes", "num_proj_tokens")

    def __init__(
        self,
        shape: AttentionShape,
        num_proj_tokens: Union[int, tuple[int, int], None] = None,
        sharing: str = "kv",
        window_size: int = 0,
    ) -> None:
        super().__init__(shape, window_size)
        check_choice("sharing", sharing, ("none", "headwise", "kv"))
        grid = shape.keys.grid
        if isinstance(num_proj_tokens, (tuple, list)) and len(num_proj_tokens) == 2:
            for side in num_proj_tokens:
                check_integer("num_proj_tokens", side, 1)
            self.regions = (num_proj_tokens[0], num_proj_tokens[1])
            self.asked_for = 0
        else:
            num_proj_tokens = DEFAULT_PROJ_TOKENS if num_proj_tokens is None else num_proj_tokens
            check_integer("num_proj_tokens", num_proj_tokens, 1)
            self.regions = cell_grid(num_proj_tokens, grid)
            self.asked_for = num_proj_tokens
        self.sharing = sharing
        self.pools_tokens = sharing != "none"
        self.pools_once = sharing == "kv"
        groups = {"none": 2 * shape.num_heads, "headwise": 2, "kv": 1}[sharing]
        size = (groups, self.regions[0] * self.regions[1], *grid)
        self.token_proj = shape.parameter(*size)
        self.reset_parameters()

    def before_resampling(self, name: str, weight: torch.Tensor) -> None:
        """Take the regions that a checkpoint's weights (n, k, H, W) have on their own grid, if a number was asked for.

        The same number may lie otherwise over the grid of this model.
        """
        if not self.asked_for:
            return
        regions = cell_grid(self.asked_for, (weight.shape[2], weight.shape[3]))
        if regions != self.regions and regions[0] * regions[1] == weight.shape[1]:
            self.regions, old = regions, self.token_proj
            size = (old.shape[0], weight.shape[1], *old.shape[2:])
            self.token_proj = nn.Parameter(old.new_empty(size), old.requires_grad)
            self.reset_parameters()

    @property
    def num_proj_tokens(self) -> list[int]:
        return list(self.regions)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            height, width = self.token_proj.shape[-2:]
            here = torch.empty(0, device="cpu")  # the weights may be built on the meta device
            weight = region_averages(self.regions, (height, width), here).unflatten(1, (height, width))
            self.token_proj.copy_(weight.expand_as(self.token_proj))

    def cells(self, grid: Grid) -> Grid:
        return self.regions

    def pool_masked(self, read: torch.Tensor, layout: TokenLayout, cells: Grid, like: torch.Tensor) -> MaskedPooling:
        patches = read[:, layout.num_prefix_tokens :]
        averages, counts = cell_averages(patches, layout.grid, cells, False, like)
        counts = counts.unsqueeze(1)
        if layout.grid[0] == 1:  # the matrices are resampled for as many tokens as each image has
            weight = resample_input_weight(self.token_proj, (1, self.token_proj.shape[3])).flatten(2)
            weight = torch.matmul(weight, pieces(patches, weight.shape[2], False, weight).unsqueeze(1))
        else:
            weight = resample_input_weight(self.token_proj, layout.grid).flatten(2)
            weight, share = share_read(weight, patches.unsqueeze(1).unsqueeze(1))
            counts = share * (float(num_patches(layout)) / float(cells[0] * cells[1]))
            if self.sharing != "kv":
                counts = counts.chunk(2, dim=1)[0]
        keys, values = weight, weight
        if self.sharing != "kv":
            keys, values = weight.chunk(2, dim=1)
        return MaskedPooling(read, keys, values, averages.unsqueeze(1), counts)

    def pool_all(self, x: torch.Tensor, layout: TokenLayout, cells: Grid, values: bool) -> torch.Tensor:
        P = layout.num_prefix_tokens
        weight = resample_input_weight(self.token_proj, layout.grid).flatten(2)
        if self.sharing != "kv":  # the first half of the matrices is E, the second F
            weight = weight.chunk(2)[1 if values else 0]
        if x.dim() == 3:
            return torch.cat([x[:, :P], project_tokens(weight[0], x[:, P:])], dim=1)
        pooled = torch.matmul(weight, x[:, :, P:])  # each head may have its own, of an x for all heads
        return torch.cat([x[:, :, :P].expand(-1, pooled.shape[1], -1, -1), pooled], dim=2)
