"""Blocks of a ViT that merge similar tokens between attention and MLP, and still return the whole patch grid.

Between blocks the value of each group of merged tokens is copied to all of its tokens, and the next block takes one
token of each group. So a host that returns features, pools or normalises sees the whole grid, and means over the grid
are weighted by the counts. Groups belong to one forward pass, which begins when the host iterates over the blocks. They
are not stored on modules. So calls from several threads don't interfere, and gradient checkpointing, which calls a
block again, gets the same groups. Blocks are called as modules, so their hooks run and see the whole grid.

Where a ViT calls all blocks at once, ``blocks(x)``, and no block has hooks, groups are passed on without being
copied. This isn't so in ``Eva``, which loops over its blocks itself, with a mask, or with gradient checkpointing.
"""

import inspect
from collections.abc import Iterator
from typing import Any, Optional

import torch
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .._checks import InputError
from .._modules import has_hooks
from ..mixers._merging import Groups, copy_back, take_one
from ..slots.attention_slot import AttentionSlot
from ..slots.slot import GridModule
from .merge_block import run_block
from .merge_steps import Merge, Step, first_merge


class MergingBlock(nn.Module):
    """A host's block in a model that merges tokens: with ``in_pass`` it runs as a part of that forward pass."""

    def forward(self, x: torch.Tensor, in_pass: Optional["BlockInPass"] = None, **kwargs: Any) -> torch.Tensor:
        return super().forward(x, **kwargs) if in_pass is None else in_pass.run(self, x, **kwargs)


class MergingVitBlock(MergingBlock, Block):
    """timm's ``Block``, see ``MergingBlock``."""


class MergingEvaBlock(MergingBlock, EvaBlock):
    """timm's ``EvaBlock``, see ``MergingBlock``."""


# blocks whose residual branches are attention, then an MLP
BLOCKS = {Block: MergingVitBlock, EvaBlock: MergingEvaBlock}
OWN_CLASS = {merging: own for own, merging in BLOCKS.items()}
HOOKS_OF_ALL = (
    _global_forward_pre_hooks,
    _global_forward_hooks,
    _global_backward_pre_hooks,
    _global_backward_hooks,
)


class MergingBlocks(nn.ModuleList):
    """The blocks of a host, which merge tokens.

    Args:
        blocks: timm ``Block`` or ``EvaBlock``.
        merge: as it was given, see ``timm_vix.convert``.
        steps: what each block merges.
        num_prefix_tokens: P; these never merge.
    """

    def __init__(self, blocks: list[nn.Module], merge: Merge, steps: list[Step], num_prefix_tokens: int) -> None:
        super().__init__(blocks)
        self.merge = merge
        self.steps = steps
        self.num_prefix_tokens = num_prefix_tokens

    def check_length(self) -> None:
        """Raise ValueError if blocks were added or removed, since each step belongs to one."""
        if len(self) != len(self.steps):
            raise InputError(
                f"the model has {len(self)} blocks, and tokens were to merge in {len(self.steps)}; timm_vix.convert "
                "with merge= sets this anew"
            )

    def __repr__(self) -> str:
        # that of a list iterates over it, which ``check_length`` may refuse
        return repr(nn.ModuleList(self.children())).replace("ModuleList", type(self).__name__, 1)

    def __iter__(self) -> Iterator[Any]:
        self.check_length()
        groups: list[Optional[Groups]] = [None] * (len(self) + 1)
        return iter([BlockInPass(self, layer, groups) for layer in range(len(self))])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            blocks, steps, merge = list(self.children())[index], self.steps[index], self.merge
            if isinstance(merge, (list, tuple)):
                merge = merge[index]
            elif isinstance(merge, float) and steps:
                merge = steps[-1]  # the share that is left after the last of them
            return type(self)(blocks, merge, steps, self.num_prefix_tokens)
        return super().__getitem__(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(HOOKS_OF_ALL) or any(is_watched(block) for block in self.children()):
            for block_in_pass in self:
                x = block_in_pass(x)
            return x
        self.check_length()
        groups: Optional[Groups] = None
        for block, step in zip(self.children(), self.steps):
            if groups is None and not step:
                x = block(x)
            else:
                x, groups = run_block(block, step, self.num_prefix_tokens, x, groups)
        return x if groups is None else copy_back(x, groups)

    def __prepare_scriptable__(self) -> nn.Module:
        raise InputError("a model that merges tokens can't be scripted; torch.export and torch.compile can take it")


def class_of(block: nn.Module) -> type:
    """The class of a host's block, whether it merges tokens or not."""
    return OWN_CLASS.get(type(block), type(block))


def is_watched(block: nn.Module) -> bool:
    """Whether a hook or a wrapper sees the input and output of a block."""
    return has_hooks(block) or not isinstance(block, (Block, EvaBlock))


def takes_pass(block: nn.Module) -> bool:
    """Whether a block, or what wraps it or its forward, takes the keyword argument ``in_pass``."""
    parameters = inspect.signature(block.forward).parameters
    return "in_pass" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


class BlockInPass:
    """A block in one forward pass, called as the host calls a block: the whole grid in, the whole grid out.

    Every other attribute is the block's own, and setting one sets it there. ``children()`` of the ``ModuleList`` gives
    the blocks themselves.

    Args:
        blocks: all of them.
        layer: which one this is.
        groups: before each layer of this pass, and after the last; None: nothing merged yet.
    """

    def __init__(self, blocks: MergingBlocks, layer: int, groups: list[Optional[Groups]]) -> None:
        self.blocks = blocks
        self.layer = layer
        self.groups = groups
        self.block = blocks[layer]

    def __getattr__(self, name: str) -> Any:
        if name == "block" or name.startswith("__"):  # asked for while it is being copied, before it has a block
            raise AttributeError(name)
        return getattr(self.block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("blocks", "layer", "groups", "block"):
            super().__setattr__(name, value)
        else:
            setattr(self.block, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.block, name)

    def __repr__(self) -> str:
        return repr(self.block)

    def __call__(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.groups[self.layer] is None and not self.blocks.steps[self.layer]:
            return self.block(x, **kwargs)
        if ("forward" in vars(self.block) or not isinstance(self.block, MergingBlock)) and not takes_pass(self.block):
            raise InputError(
                f"blocks.{self.layer} is called by a forward or a wrapper without keyword arguments, which its merging "
                "of tokens needs; expected forward(x, **kwargs) that hands them on, or merge=0"
            )
        return self.block(x, in_pass=self, **kwargs)

    def run(self, block: MergingBlock, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """What the block does in this pass, called by it; ``self.block`` may be what wraps it."""
        groups = self.groups[self.layer]
        if groups is not None:
            x = take_one(x, groups)
        step, num_prefix_tokens = self.blocks.steps[self.layer], self.blocks.num_prefix_tokens
        x, groups = run_block(block, step, num_prefix_tokens, x, groups, **kwargs)
        self.groups[self.layer + 1] = groups
        return x if groups is None else copy_back(x, groups)


def check_merging(blocks: list[nn.Module], attention: list[list[nn.Module]], steps: list[Step]) -> None:
    """Raise ValueError unless blocks with this attention can merge tokens.

    Args:
        attention: of each block, as it is to be.
    """
    first = first_merge(steps)
    if first is None:
        return
    for layer in range(first, len(blocks)):
        block, slot = blocks[layer], attention[layer][0]
        if class_of(block) not in BLOCKS or len(attention[layer]) != 1:
            raise InputError(
                f"merge: blocks.{layer} is a {type(block).__name__}; tokens can merge in "
                f"{' and '.join(allowed.__name__ for allowed in BLOCKS)}, whose attention is followed by an MLP"
            )
        title = type(slot.core).__name__
        adding = [name for name in ("conv_residual", "locality") if getattr(slot.core, name)]
        adding = adding if type(slot.core).supports_key_bias else []  # named only if it could merge without them
        title += f" with {' and '.join(adding)}" if adding else ""
        if not isinstance(slot, AttentionSlot):
            raise InputError(f"merge: blocks.{layer} has {title}, without keys by which tokens could merge")
        if isinstance(block.mlp, GridModule):
            raise InputError(f"merge: the MLP of blocks.{layer} works on the whole patch grid; allowed is mlp='mlp'")
        if layer > first and not slot.core.supports_key_bias:
            raise InputError(
                f"merge: blocks.{layer} has {title}, which needs the whole patch grid, and blocks.{first} merges "
                "tokens before it; allowed from there on are mixer='softmax' and mixer='performer' without "
                "conv_residual and locality, or a list of merge= with 0 up to the last layer that needs the grid"
            )


def keeps_container(model: nn.Module, merge: Merge, steps: list[Step]) -> bool:
    """Whether ``model.blocks`` is what ``set_merging`` needs, so that it stays the same module."""
    blocks = model.blocks
    if first_merge(steps) is None:
        return not isinstance(blocks, MergingBlocks)
    return isinstance(blocks, MergingBlocks) and (blocks.merge, blocks.steps) == (merge, steps)


def set_merging(model: nn.Module, merge: Merge, steps: list[Step]) -> None:
    """Give a host blocks that merge, or with ``merge=0`` blocks that don't."""
    blocks: list[nn.Module] = list(model.blocks.children())
    first = first_merge(steps)
    for layer, block in enumerate(blocks):
        own = class_of(block)
        block.__class__ = own if first is None or layer < first else BLOCKS[own]
    if keeps_container(model, merge, steps):
        return
    container: nn.Module
    if first is not None:
        container = MergingBlocks(blocks, merge, steps, model.num_prefix_tokens)
    else:
        container = nn.ModuleList(blocks) if isinstance(model, Eva) else nn.Sequential(*blocks)
    container.training = model.blocks.training
    model.blocks = container
