"""Hooks of a model with mixers: the present patch grid, forward passes in training, and masks of padding."""

from typing import Any

import torch
from timm.models.naflexvit import NaFlexVit
from torch import nn

from ..mixers._layout import CarryGrid, RecordGrid
from ..mixers._mechanism import Mixer
from .model import slots_of
from .slot import GridModule

HOOKS = (RecordGrid, CarryGrid)


class CountPasses:
    """Forward hook of a patch embedding: random features are drawn anew after some passes in training.

    It runs once for each forward pass, and not again when gradient checkpointing repeats the blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mixers = [module for module in model.modules() if isinstance(module, Mixer)]

    def __call__(self, patch_embed: nn.Module, args: Any, output: torch.Tensor) -> None:
        for mixer in self.mixers:
            mixer.count_pass()


def embedding_of(model: nn.Module) -> nn.Module:
    """The patch embedding of a host, the first stage's where it has several."""
    names = ("patch_embed", "embeds", "stem", "stage0.patch_embed")  # the last are of NaFlexVit, LeViT and CvT
    return next(model.get_submodule(name) for name in names if hasattr(model, name.partition(".")[0]))


def update_hooks(model: nn.Module) -> None:
    """Give a model the hooks that the parts of its blocks need, and take away those that they no longer need."""
    remove_hooks(model)
    parts = [module for module in model.modules() if isinstance(module, GridModule)]
    if parts and getattr(model, "dynamic_img_size", False):
        model.patch_embed.register_forward_hook(RecordGrid())
        for module in (*model.blocks.children(), *parts):  # any may be what is checkpointed
            module.register_forward_pre_hook(CarryGrid())
        for part in parts:
            part.dynamic = True
    if any(isinstance(module, Mixer) and module.counts_passes for module in model.modules()):
        embedding_of(model).register_forward_hook(CountPasses(model))
    make_key_masks(model)


def remove_hooks(model: nn.Module) -> None:
    """Take the hooks of ``update_hooks`` away."""
    modules = [embedding_of(model), *getattr(model, "blocks", nn.Sequential()).children()]
    modules += [module for module in model.modules() if isinstance(module, GridModule)]
    for hooks in (hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)):
        for key in [key for key, hook in hooks.items() if isinstance(hook, (*HOOKS, CountPasses))]:
            del hooks[key]


def make_key_masks(model: nn.Module) -> None:
    """Make a ``NaFlexVit`` mask padding by masks of keys while it has slots, and restore its own setting afterwards.

    Its own masks may be N x N, and mask the queries of padding too. That isn't needed: no output of padding is used.
    """
    if not isinstance(model, NaFlexVit):
        return
    if slots_of(model):
        model.__dict__.setdefault("own_key_only_attn_mask", model.use_key_only_attn_mask)
        model.use_key_only_attn_mask = True
    else:
        model.use_key_only_attn_mask = model.__dict__.pop("own_key_only_attn_mask", model.use_key_only_attn_mask)
