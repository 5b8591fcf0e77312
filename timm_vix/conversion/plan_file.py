"""Plans: which mixer each layer of a trained ViT gets and how its tokens merge, as ``timm-vix plan`` writes them."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch
from timm.layers import to_2tuple
from torch import nn

from .._checks import InputError, is_integer
from .._device import device_name
from .._files import one_line
from ..slots.model import layout_of
from .identity import architecture, fingerprint
from .layers import layer_mixers
from .merge_steps import Merge, merge_steps
from .sites import attention_sites

FORMAT = "timm_vix plan 2"
# the first one knew no merging, and nothing of time
FORMATS = ("timm_vix plan 1", FORMAT)

logger = logging.getLogger("timm_vix")


@dataclass(frozen=True)
class Plan:
    """How a model is to be converted.

    ``layers``: for each layer that is converted "mixer" and its keywords, as ``convert`` takes them. ``merge``: how
    tokens merge, as ``convert`` takes it; 0: they don't. ``scale_logits``: the tokens with which the model was trained,
    where its logits are scaled; 0: they aren't scaled; None: that stays as it is.
    """

    layers: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    merge: Merge = 0
    scale_logits: Optional[int] = None

    def converts(self) -> bool:
        """Whether any layer is converted or merges tokens."""
        return bool(self.layers or self.merge)

    def to_json(self) -> str:
        """The plan as JSON, the same for equal plans; what does nothing is left out."""
        others = {name: value for name in ("merge", "scale_logits") if (value := getattr(self, name))}
        return json.dumps({**{str(layer): self.layers[layer] for layer in sorted(self.layers)}, **others})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that ``to_json`` wrote."""
        content = json.loads(text)
        others = {name: content.pop(name) for name in ("merge", "scale_logits") if name in content}
        return cls({int(layer): mixer for layer, mixer in content.items()}, **others)


def circumstances(model: nn.Module) -> dict[str, Any]:
    """What times depend on besides the plan: the size, dtype and machine of a model; no machine for meta tensors."""
    weight = next(model.patch_embed.parameters())
    found = dict(
        img_size=max(to_2tuple(model.patch_embed.img_size)),
        grid=list(layout_of(model).grid),
        dtype=str(weight.dtype).removeprefix("torch."),
    )
    return found if weight.is_meta else {**found, "machine": device_name(str(weight.device))}


def load_plan(path: Union[str, Path], model: nn.Module) -> Plan:
    """The plan of a file, for ``timm_vix.convert``, which also takes the file itself.

    A plan that was made for other weights or another size, dtype, machine or number of threads is loaded, and a line of
    the log says so: what it keeps and saves there wasn't measured.

    Args:
        path: of the file.
        model: the softmax model that is to be converted; its architecture must be that of the plan.

    Raises:
        ValueError: for a file that is no plan, is damaged, was made for another model, or keeps every layer.

    Example:
        >>> timm_vix.convert(model, layers=load_plan("plan.json", model))
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a plan: {one_line(error)}") from error
    known = isinstance(content, dict) and content.get("format") in FORMATS
    if not known or not isinstance(content.get("layers"), dict):
        raise InputError(f"{path} is no plan; expected a file of timm-vix plan")
    depth = len(attention_sites(model))
    if (content.get("architecture"), content.get("depth")) != (architecture(model), depth):
        raise InputError(
            f"{path} is a plan for {content.get('architecture')} with {content.get('depth')} layers; "
            f"this model is {architecture(model)} with {depth}"
        )
    merge, scale_logits = content.get("merge", 0), content.get("scale_logits", 0)
    if not is_integer(scale_logits) or scale_logits < 0 or scale_logits == 1:
        raise InputError(f"{path} is damaged: scale_logits={scale_logits!r} is no number of tokens")
    if not content["layers"] and merge == 0 and not scale_logits:
        raise InputError(f"{path} keeps every layer as it is: nothing to convert")
    try:
        merge_steps(merge, depth)
        layers = layer_mixers(content["layers"], depth, "softmax", {}) if content["layers"] else {}
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    here = circumstances(model) | dict(threads=torch.get_num_threads())
    # in another dtype, at another size and on the meta device the same model has other weights
    if all(content.get(name) == here[name] for name in ("dtype", "grid")) and "machine" in here:
        here["weights"] = fingerprint(model.state_dict())
    tell_differences(path, content, here)
    entries = {layer: {"mixer": name, **keywords} for layer, (name, keywords) in layers.items()}
    return Plan(entries, merge, scale_logits)


def tell_differences(path: Union[str, Path], content: dict[str, Any], here: dict[str, Any]) -> None:
    """Log under which other circumstances a plan was made; a plan that says nothing of one is taken as it is."""
    differences = [
        f"{name}={content[name]} and not {value}" for name, value in here.items() if content.get(name, value) != value
    ]
    if differences:
        logger.warning("%s was made for %s: other times and agreement are to be expected", path, ", ".join(differences))
