"""What every token mixer shares: the slot it fills in a block, the token layout, head split and merge, checks.

Shapes: B images, N = P + H·W tokens (P prefix tokens: class and registers, then an H x W grid of patches in raster
order), h heads of width D, C = h·D.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

import torch
from timm.layers import apply_rot_embed_cat, register_notrace_function
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ._folded import all_ask_few, few_ask_all
from ._resample import Grid, table_of_cells
from ._windows import landmarks_and_windows, window_biases

# Leaves for torch.fx, since what they do depends on the number of tokens; it replaces them where they are called.
for leaf in (all_ask_few, few_ask_all, landmarks_and_windows):
    torch.fx.wrap(leaf.__name__)


def outside_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast; not for TorchScript, which knows autocast for constant devices only."""
    # the meta device has none to switch off
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


# A leaf for torch.fx: timm's forward hands attn_mask on as a proxy there, and only the run can say whether it is None.
# The tokens pass through, so that the check is not removed as dead code.
@torch.fx.wrap
@register_notrace_function
def admit(
    x: torch.Tensor,
    attn_mask: Optional[torch.Tensor],
    is_causal: bool,
    num_tokens: int,
) -> torch.Tensor:
    """Return x (B, N, C), or raise ValueError for a mask, a causal flag or a sequence of another length.

    A negative ``num_tokens`` admits any length.
    """
    if attn_mask is not None or is_causal:
        raise ValueError("this token mixer honours neither attn_mask nor is_causal; only softmax attention does")
    if num_tokens >= 0 and x.shape[1] != num_tokens:
        raise ValueError(f"a sequence of {x.shape[1]} tokens doesn't match the layout, which has {num_tokens} tokens")
    return x


def cell_grid(num_cells: int, grid: Grid) -> Grid:
    """Return (rows, columns) of the largest number of cells, at most ``num_cells``, that lie evenly over ``grid``.

    Evenly: on a square grid a cell is at most 2.5 times as long as wide. There 49 gives 7x7, 50 and 53 give 10x5.
    """
    height, width = grid
    limit = 2.5 * max(height, width) / min(height, width)
    if num_cells >= height * width:
        return grid
    for cells in range(num_cells, 0, -1):
        best, stretch = grid, limit
        for rows in range(1, min(cells, height) + 1):
            columns = cells // rows
            if rows * columns == cells and columns <= width:
                ratio = (height * columns) / (width * rows)
                if max(ratio, 1 / ratio) <= stretch:
                    best, stretch = (rows, columns), max(ratio, 1 / ratio)
        if best != grid:
            return best
    return 1, 1


# A leaf for torch.fx: a tensor is made here on the device of ``like``.
@torch.fx.wrap
@register_notrace_function
def count_bias(like: torch.Tensor, num_prefix_tokens: int, num_cells: int, num_patches: int) -> torch.Tensor:
    """Log of the number of tokens behind each key, (1, 1, 1, P + m): 0 for a prefix token, log(patches / m) for a cell.

    Added to logits, it lets a pooled key weigh as much as the tokens that it stands for.
    """
    bias = torch.full([1, 1, 1, num_prefix_tokens + num_cells], 0.0, device=like.device, dtype=like.dtype)
    bias[..., num_prefix_tokens:] = math.log(num_patches / num_cells)
    return bias


def refuse_attention_dropout(attn: nn.Module, mechanism: str) -> None:
    """Raise ValueError if ``attn`` drops attention weights, for a mechanism that has none."""
    if attn.attn_drop.p > 0:
        raise ValueError(
            f"attn_drop_rate={attn.attn_drop.p}: {mechanism} has no attention weights to drop; allowed is 0"
        )


class TokenMixer(nn.Module):
    """The slot: takes and returns (B, N, C) where timm's attention stood.

    ``uses_grid`` tells whether the mechanism needs to know where a token lies; if not, it takes any sequence.
    """

    uses_grid = True
    # parameters whose last two axes are the patch grid, with the function that moves them to another grid
    grid_parameters: dict[str, Callable[[torch.Tensor, Grid], torch.Tensor]] = {}
    # parameters that live on another scale than weights do, with the factor of their learning rate in a transfer
    learning_rates: dict[str, float] = {}

    def __init__(self, grid: Grid, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = grid
        self.num_tokens = num_prefix_tokens + grid[0] * grid[1] if self.uses_grid else -1

    def before_forward(self, grid: Grid) -> None:
        """Take the patch grid of the next images; parameters keep their size and are resampled where they are used."""
        self.grid = grid
        if self.uses_grid:
            self.num_tokens = self.num_prefix_tokens + grid[0] * grid[1]

    def set_grid(self, grid: Grid) -> None:
        """Take a new patch grid for good: parameters that live on it are resampled, frozen ones stay frozen."""
        self.before_forward(grid)
        for name, resample in self.grid_parameters.items():
            old = getattr(self, name)
            new = resample(old.detach(), grid).clone()
            setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))

    def start_from(self, x: torch.Tensor, rope: Optional[torch.Tensor] = None) -> None:
        """Look at input of a trained model (B, N, C) before training: for a mixer whose weights can start from it."""

    def options(self) -> dict:
        """The keywords that rebuild this mixer at its grid, where a default or another grid would change them."""
        return {}


def watched(module: nn.Module) -> bool:
    """Whether somebody wants to know when ``module`` is called: by a hook, as for pruning, or another forward."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in module.__dict__


class AttentionMixer(TokenMixer):
    """A mixer with queries, keys and values, built from the timm attention that it replaces.

    It takes over that attention's sub-modules and parameters (``qkv`` or ``q_proj``, ``k_proj`` and ``v_proj``,
    ``q_norm``, ``k_norm``, ``norm``, ``gate``, ``proj``, the dropouts: the same objects under the same names), so a
    softmax model's state dict fits.

    Args:
        attn: timm ``Attention``, ``AttentionRope`` or ``EvaAttention``.
        grid: (H, W) of the patch tokens.
        num_prefix_tokens: P.
        rope: rotary positions shared by the blocks of a model, or None.
    """

    def __init__(self, attn: nn.Module, grid: Grid, num_prefix_tokens: int, rope: Optional[nn.Module] = None) -> None:
        # rotary positions belong to the grid, so a rotated sequence must have its length
        self.uses_grid = self.uses_grid or rope is not None
        super().__init__(grid, num_prefix_tokens)
        self.num_heads = attn.num_heads
        self.head_dim = attn.head_dim
        self.attn_dim = attn.num_heads * attn.head_dim
        self.qkv = attn.qkv
        self.q_proj: Any = getattr(attn, "q_proj", None)
        self.k_proj: Any = getattr(attn, "k_proj", None)
        self.v_proj: Any = getattr(attn, "v_proj", None)
        # EVA's biases of the joint projection; its keys have none
        self.q_bias = getattr(attn, "q_bias", None)
        self.v_bias = getattr(attn, "v_bias", None)
        self.q_norm = attn.q_norm
        self.k_norm = attn.k_norm
        self.attn_drop = attn.attn_drop
        self.norm = attn.norm
        self.gate = getattr(attn, "gate", None)
        self.proj = attn.proj
        self.proj_drop = attn.proj_drop
        self.rope = rope
        self.rotate_half = getattr(attn, "rotate_half", False)
        # nothing acts on heads between the projections and the attention, so they can be multiplied together
        bare = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        self.foldable = bare and isinstance(self.norm, nn.Identity) and self.gate is None and rope is None

    def plain(self) -> bool:
        """Whether the projections are mere weights: no adapter, parametrisation or hook of somebody wants a call."""
        if torch.jit.is_scripting():
            return True
        else:  # noqa: RET505  TorchScript leaves out this branch, but not what follows an if
            return all(type(m) is nn.Linear and not watched(m) for m in (self.qkv, self.proj))

    def folds(self, num_few: int, rope: Optional[torch.Tensor]) -> bool:
        """Whether attention with ``num_few`` tokens on one side is to be folded into its projections."""
        return self.foldable and rope is None and self.num_heads * num_few < self.attn_dim + num_few and self.plain()

    def bias_of_qkv(self) -> Optional[torch.Tensor]:
        """The bias of the joint projection, (3·A)."""
        if self.q_bias is not None and self.v_bias is not None:
            return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.qkv.bias

    def project(self, x: torch.Tensor, first: int, last: int) -> list[torch.Tensor]:
        """Some of queries (0), keys (1), values (2), from ``first`` up to ``last``: (B, N, C) -> list of (B, h, N, D).

        Only the wanted rows of the joint weight are multiplied; queries and keys come normalised.
        """
        B, N, _ = x.shape
        start, stop = first * self.attn_dim, last * self.attn_dim
        if self.qkv is None:
            apart: list[torch.Tensor] = []
            if first == 0:
                apart.append(self.q_proj(x))
            if first <= 1 < last:
                apart.append(self.k_proj(x))
            if last == 3:
                apart.append(self.v_proj(x))
            y = torch.cat(apart, dim=2)
        elif last - first < 3 and self.plain():
            bias = self.bias_of_qkv()
            y = nn.functional.linear(x, self.qkv.weight[start:stop], None if bias is None else bias[start:stop])
        else:
            y = self.qkv(x)
            if self.q_bias is not None:
                y = y + self.bias_of_qkv()
            y = y[..., start:stop]
        heads = y.reshape(B, N, last - first, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out: list[torch.Tensor] = []
        for i in range(first, last):
            part = heads[i - first]
            out.append(self.q_norm(part) if i == 0 else self.k_norm(part) if i == 1 else part)
        return out

    def merge(self, heads: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Join the heads as timm's attention does: (B, h, N, D) and the slot's input (B, N, C) -> (B, N, C)."""
        B, N, _ = x.shape
        y = self.norm(heads.transpose(1, 2).reshape(B, N, self.attn_dim))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))

    def ask_all(self, x: torch.Tensor, q: torch.Tensor, m: int, rope: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Attention of m queries (B, h, m, D), already turned, to all tokens: (B, h, m, D)."""
        # m is an argument since a shape is no number while torch.fx traces
        if not self.folds(m, rope):
            k, v = self.project(x, 1, 3)
            return scaled_dot_product_attention(q, self.rotate(k, rope), v)
        A = self.attn_dim
        bias = self.bias_of_qkv()
        bias_v = None if bias is None else bias[2 * A :]
        return few_ask_all(x, q, self.qkv.weight[A : 2 * A], self.qkv.weight[2 * A :], bias_v)

    def ask_few(
        self,
        x: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor,
        m: int,
        rope: Optional[torch.Tensor] = None,
        local: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The slot's output (B, N, C): attention of all tokens to m keys and values (B, h, m, D).

        ``bias`` (1, 1, 1, m) is added to the logits, ``local`` (B, h, N, D) to the heads before the output projection.
        """
        dropout = self.attn_drop.p if self.training else 0.0
        if local is not None or not self.folds(m, rope):
            q = self.rotate(self.project(x, 0, 1)[0], rope)
            y = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
            return self.merge(y if local is None else y + local, x)
        A = self.attn_dim
        qkv_bias = self.bias_of_qkv()
        bias_q = None if qkv_bias is None else qkv_bias[:A]
        y = all_ask_few(x, k, v, bias, self.qkv.weight[:A], bias_q, self.proj.weight, self.proj.bias, dropout)
        return self.proj_drop(y)

    def ask_few_and_near(
        self,
        x: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor,
        cells: Grid,
        window_size: int,
        rope: Optional[torch.Tensor] = None,
        local: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """As ``ask_few``, where patches also see the tokens of their own window of the grid one by one.

        The m keys are the prefix tokens and one for each of ``cells``; ``bias`` is that of the prefix tokens' logits.
        """
        dropout = self.attn_drop.p if self.training else 0.0
        P = self.num_prefix_tokens
        window_size = min(window_size, max(self.grid[0], self.grid[1]))  # more would be padding
        q, k_all, v_all = self.project(x, 0, 3)
        q, k_all = self.rotate(q, rope), self.rotate(k_all, rope)
        biases = window_biases(q, P, self.grid, cells, window_size)
        y = landmarks_and_windows(
            q[:, :, P:], k_all[:, :, P:], v_all[:, :, P:], k, v, biases, self.grid, window_size, dropout
        )
        if P > 0:
            first = scaled_dot_product_attention(q[:, :, :P], k, v, attn_mask=bias, dropout_p=dropout)
            y = torch.cat([first, y], dim=2)
        return self.merge(y if local is None else y + local, x)

    def rotate(
        self, x: torch.Tensor, rope: Optional[torch.Tensor] = None, cells: Optional[Grid] = None
    ) -> torch.Tensor:
        """Rotate queries or keys (B, h, P + n, D) by their positions, or by the centres of ``cells`` of the grid.

        ``rope`` is the table that the host hands on for its patches, (H·W, 2·D) or one for each head, if it has one.
        """
        if self.rope is not None:
            table = self.rope(self.grid if cells is None else cells)
        elif rope is not None:
            table = table_of_cells(rope, self.num_prefix_tokens, self.grid, cells)
        else:
            return x
        return apply_rot_embed_cat(x, table, half=self.rotate_half).type_as(x)
