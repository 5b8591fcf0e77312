"""The report of a conversion: what became of each place of attention."""

from dataclasses import dataclass
from typing import Any, Optional

from torch import nn

from ..mixers._keywords import ADDING_NOTHING
from ..mixers._layout import TokenLayout, num_patches, num_tokens
from ..slots.attention_slot import logit_factor
from ..slots.model import AttentionSite, mixer_name
from ..slots.slot import MixerSlot
from .merge_steps import Step, merged_in_layers
from .sites import class_name


@dataclass(frozen=True)
class ConvertedLayer:
    """A row of the report: an attention module's block and path, its class before and after, the mixer's keywords.

    ``mixer``: its name in ``MIXERS``; "softmax" for attention that has no slot.
    ``merged``: the number of patch tokens that merge after it, at the size for which the model is built; None: it
    depends on the image, since a threshold decides.
    """

    layer: int
    path: str
    before: str
    after: str
    mixer: str
    changed: bool
    config: dict[str, Any]
    new_parameters: int
    merged: Optional[int]


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did: a row for each place of attention in the model, kept ones included.

    ``trained_tokens``: those with which the model was trained, where its logits are scaled; 0: they aren't.
    """

    rows: list[ConvertedLayer]
    tokens: int
    trained_tokens: int = 0

    def table(self) -> str:
        """The rows as text, one line each."""
        width = max(len(row.path) for row in self.rows)
        lines = [f"layer  {'module':{width}}  what became of it, at {self.tokens} tokens"]
        for row in self.rows:
            acting = {name: value for name, value in row.config.items() if ADDING_NOTHING.get(name) != value}
            keywords = ", ".join(f"{name}={value}" for name, value in acting.items())
            became = f"-> {row.after}" if row.changed else "kept"
            fresh = f", {row.new_parameters} new parameters" if row.new_parameters else ""
            merges = (
                "" if row.merged == 0 else ", merges " + ("similar tokens" if row.merged is None else str(row.merged))
            )
            keywords = f" ({keywords})" if keywords else ""
            lines.append(f"{row.layer:5}  {row.path:{width}}  {row.before} {became}{keywords}{fresh}{merges}")
        if 0 < self.trained_tokens < self.tokens:
            factor = logit_factor(self.tokens, self.trained_tokens)
            lines.append(f"logits are multiplied by {factor:.3f}: the model was trained with {self.trained_tokens}")
        elif self.trained_tokens:
            lines.append(f"logits stay as they are: no more tokens than the {self.trained_tokens} of training")
        return "\n".join(lines)


def report_of(
    sites: list[list[AttentionSite]],
    former: dict[str, nn.Module],
    steps: list[Step],
    layout: TokenLayout,
    trained_tokens: int,
) -> Conversion:
    """The report of a conversion that was done; ``former``: the modules from before it, by path."""
    merged = merged_in_layers(steps, num_patches(layout))
    rows = [
        layer_row(index, site, former[site.path], merged[index]) for index, block in enumerate(sites) for site in block
    ]
    return Conversion(rows, num_tokens(layout), trained_tokens)


def layer_row(index: int, site: AttentionSite, former: nn.Module, merged: Optional[int]) -> ConvertedLayer:
    """The row of one place of attention, where ``former`` stood before the conversion."""
    module = getattr(site.parent, site.name)
    inherited = {id(p) for p in site.attn.parameters()}
    new_parameters = sum(p.numel() for p in module.parameters() if id(p) not in inherited)
    return ConvertedLayer(
        layer=index,
        path=site.path,
        before=class_name(former),
        after=class_name(module),
        mixer=mixer_name(module) if isinstance(module, MixerSlot) else "softmax",
        changed=module is not former,
        config={} if module is site.attn else module.config(),
        new_parameters=new_parameters,
        merged=merged,
    )
