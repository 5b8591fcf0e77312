"""Slots: modules that take the place of attention modules in timm's ViT, Eva and PiT, and hold a token mixer.

A slot projects the tokens to heads, rotates them, calls the mixer and merges the heads, with the modules and parameters
of the attention that it replaces: the same objects under the same names, so a softmax model's state dict fits. What the
mixer adds is in its sub-module ``core``.

Shapes: B images, N = P + H·W tokens (P prefix tokens: class and registers, then an H x W grid of patches in raster
order), h heads of width D, A = h·D, C channels.
"""

from typing import Any, Optional

import torch
from timm.layers import register_notrace_module
from torch import nn

from ..mixers._layout import Grid, TokenLayout, check_sequence, grid_of_images
from ..mixers._masks import is_key_mask
from ..mixers._mechanism import MechanismHost, Mixer, TokenMixing


class GridModule(nn.Module):
    """A part of a block that sees the patch grid of its tokens.

    Args:
        layout: of the tokens, where the host doesn't say otherwise.
    """

    __jit_unused_properties__ = ("num_tokens",)

    def __init__(self, layout: TokenLayout) -> None:
        super().__init__()
        self.num_prefix_tokens = layout.num_prefix_tokens
        self.grid = layout.grid
        # dynamic: images come in several sizes, and each forward pass has its own grid
        self.dynamic = False
        # in a tuple, so that it is no sub-module: a patch embedding whose grid is followed
        self.patch_embed: tuple[nn.Module, ...] = ()

    @property
    def num_tokens(self) -> int:
        """N at the grid for which the slot was built."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    def set_grid(self, grid: Grid) -> None:
        """Take another patch grid permanently."""
        self.grid = grid

    def current_grid(self, num_tokens: int) -> Grid:
        """The patch grid of the tokens at hand."""
        if self.dynamic:
            grid = grid_of_images()
            if grid is not None and grid[0] * grid[1] + self.num_prefix_tokens == num_tokens:
                return grid
        elif self.patch_embed:
            return self.patch_embed[0].grid_size
        return self.grid

    def __prepare_scriptable__(self) -> nn.Module:
        self.grid = self.current_grid(-1)
        return self


# in this order: TorchScript reads the annotations, which hold constants, of the first base that has any
class MixerSlot(MechanismHost, GridModule):
    """What the slots share: the mixer, and the layout of the tokens.

    Args:
        core: the mixer.
        layout: of the tokens, where the host doesn't say otherwise.
    """

    def __init__(self, core: Mixer, layout: TokenLayout) -> None:
        super().__init__(layout)
        self.core = core
        # whether the patches are a sequence of any length, a grid of one row: a NaFlex model knows no other
        self.is_sequence = False
        # in a tuple, so that it is no sub-module
        self.replaced: tuple[nn.Module, ...] = ()

    def config(self) -> dict[str, Any]:
        """Every keyword of the mixer with the value in force."""
        return self.core.config()

    def set_grid(self, grid: Grid) -> None:
        """Take another patch grid permanently."""
        super().set_grid(grid)
        self.core.set_grid(grid)
        for module in self.replaced:  # which comes back with revert
            if isinstance(module, GridModule):
                module.set_grid(grid)

    def layout_of(self, x: torch.Tensor, attn_mask: Optional[torch.Tensor], is_causal: bool) -> TokenLayout:
        """The layout of x (B, N, C); raise ValueError for another number of tokens, or a mask that isn't supported."""
        grid = self.grid
        if self.is_sequence:
            grid = (1, x.shape[1] - self.num_prefix_tokens)
        elif not torch.jit.is_scripting():
            grid = self.current_grid(x.shape[1])
        layout = TokenLayout(self.num_prefix_tokens, grid)
        supported = self.supports_mask
        if attn_mask is not None and self.supports_key_mask and not is_causal:
            supported = supported or is_key_mask(attn_mask, x)
        check_sequence(x, layout, attn_mask, is_causal, supported, self.uses_grid)
        return layout

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        for attn in self.replaced:  # goes along to another device or dtype
            attn._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_core_keys(state_dict, prefix, self.core)
        super()._load_from_state_dict(state_dict, prefix, *args)


def rename_core_keys(state_dict: dict[str, Any], prefix: str, core: nn.Module) -> None:
    """Give the keys of a checkpoint from before mixers were sub-modules their present names, in place."""
    for key in core.state_dict():
        if f"{prefix}{key}" in state_dict:
            state_dict.setdefault(f"{prefix}core.{key}", state_dict.pop(f"{prefix}{key}"))


@register_notrace_module
class TokenSlot(MixerSlot):
    """A slot for a mixer without queries, keys and values. It keeps only the attention's output dropout."""

    supports_mask: torch.jit.Final[bool]
    supports_key_mask: torch.jit.Final[bool]
    uses_grid: torch.jit.Final[bool]

    def __init__(self, core: TokenMixing, attn: nn.Module, layout: TokenLayout) -> None:
        super().__init__(core, layout)
        self.supports_mask = False
        self.supports_key_mask = core.supports_key_mask
        self.uses_grid = core.uses_grid
        self.drop = attn.proj_drop

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
        rope: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        layout = self.layout_of(x, attn_mask, is_causal)
        return self.drop(self.core.enhance(self.core(x, layout), x, layout))
