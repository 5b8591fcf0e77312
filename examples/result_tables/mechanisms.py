"""The tables of mechanisms, from the modules in timm_vix/mixers, and what their docstrings say of speed."""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from timm_vix.measure.flops import count_flops
from timm_vix.mixers import MIXERS
from timm_vix.models.vit import VisionXformer

from . import ROOT, markdown

COST = re.compile(r"[Cc]ost in N: (.+?)(?:\. |$)", re.MULTILINE)
PAPER = re.compile(r"((?:d')?[A-Z][^\W\d]+(?:-[A-Z]\w+)?(?: et al\.| & [A-Z]\w+) \d{4})[ ,(]+arXiv (\d{4}\.\d{4,5})")


def module_of(mixer: str) -> ModuleType:
    return sys.modules[MIXERS[mixer].__module__]


def found(pattern: re.Pattern[str], mixer: str) -> tuple[str, ...]:
    """The groups of a pattern in the docstring of a mechanism's module.

    Raises:
        ValueError: where the docstring doesn't say it.
    """
    match = pattern.search(" ".join((module_of(mixer).__doc__ or "").splitlines(keepends=True)))
    if match is None:
        raise ValueError(f"the docstring of {module_of(mixer).__name__} holds nothing like {pattern.pattern!r}")
    return match.groups()


def keywords(mixer: str) -> str:
    """The mechanism's own keywords, with their defaults where the constructor has them."""
    parameters = inspect.signature(MIXERS[mixer].__init__).parameters.values()
    own = [p for p in parameters if p.default is not p.empty and p.name != "rope"]
    return ", ".join(f"`{p.name}`" if p.default is None else f"`{p.name}={p.default!r}`" for p in own)


def mechanisms() -> str:
    """The table of softmax and of the mixers that a plan tries, which keep much of a trained ViT's accuracy."""
    return table_of([name for name in MIXERS if name == "softmax" or MIXERS[name].candidates])


def other_mechanisms() -> str:
    """The names of all other mixers with links to their files."""
    others = [name for name in MIXERS if name != "softmax" and not MIXERS[name].candidates]
    return ", ".join(f"[`{name}`]({file_of(name)})" for name in others)


def all_mechanisms() -> str:
    return table_of(list(MIXERS), "../../")


def file_of(mixer: str) -> str:
    """The path of a mechanism's file in the repository."""
    return Path(str(module_of(mixer).__file__)).relative_to(ROOT).as_posix()


def table_of(mixers: list[str], to_root: str = "") -> str:
    """Name, file, mechanism, paper, cost in N, rotary positions and keywords of mixers."""
    body = []
    for mixer in mixers:
        title = (module_of(mixer).__doc__ or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
        authors, number = found(PAPER, mixer)
        paper = f"[{authors}](https://arxiv.org/abs/{number})"
        rotary = "yes" if MIXERS[mixer].supports_rotary else "no"
        name = f"[`{mixer}`]({to_root}{file_of(mixer)})"
        body.append([name, title, paper, found(COST, mixer)[0], rotary, keywords(mixer)])
    return markdown(["name, file", "mechanism", "paper", "cost in N", "rotary", "keywords"], body)


def operations_of_a_stem() -> str:
    """The sentence of stems/hierarchical_mlp.py about its operations, beside those of ViT-B and of other stems."""
    flops = {name: operations(name) for name in ("linear", "conv", "hmlp")}
    model = flops["linear"]
    added = {name: flops[name] - model for name in ("conv", "hmlp")}
    return (
        f"*Cost:* it adds {100 * added['hmlp'] / model:.1f} % to the operations of a ViT-B with a linear stem; the "
        f"convolutional stem adds {100 * added['conv'] / model:.1f} %."
    )


def operations(stem: str) -> int:
    """Floating-point operations of ViT-B's forward pass with a stem, on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = VisionXformer("softmax", stem, embed_dim=768, num_heads=12).eval().requires_grad_(False)
        image = torch.zeros(1, 3, 224, 224)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        return count_flops(lambda: model(image))
