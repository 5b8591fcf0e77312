"""The softmax model of the same trunk, stem and positions as one of ours, by name and keywords."""

from typing import Any, Optional

import timm

from ..conversion.record import RECORDED
from ..mixers._keywords import all_keywords

# keywords that the softmax model of the same trunk is not given: of what a conversion does, and those of the mixers
NOT_TRUNK = {"stem_mixer", "train_only"} | RECORDED | all_keywords()
# keywords of a trunk that timm's own ViT doesn't have
OURS_ONLY = {"stem", "rope", "block", "mlp"}

Model = tuple[str, dict[str, Any]]  # a name, and keywords for timm.create_model


def softmax_of(name: str) -> Optional[Model]:
    """The softmax model of the same trunk, stem and positions as one of ours; None for any other model.

    fnet2d mixes maps, so it has no such trunk; beside it stands the model of tokens with its stem and width.

    Example:
        >>> softmax_of("vix_nystrom_small"), softmax_of("hybrid_vin_tiny_rope"), softmax_of("vix_from_timm")
        (('vit_small_patch16_224', {}), ('hybrid_vit_tiny_rope', {}), None)
        >>> softmax_of("ccn_7"), softmax_of("pin_tiny"), softmax_of("fnet2d_cifar")
        (('cct_7', {}), ('pin_tiny', {'mixer': 'softmax'}), ('hybrid_vit_cifar', {}))
    """
    name = name.split(".")[0]
    family, _, rest = name.partition("_")
    size = rest.partition("_")[2]
    if family in ("ccn", "ccp", "cct", "cvn", "cvp", "cvt"):
        return f"{family[:2]}t_{rest}", {}
    if name.startswith(("levin_", "levip_", "pin_", "pip_", "hybrid_pin_", "hybrid_pip_", "convix_")):
        return name, {"mixer": "softmax"}
    if family == "t2t":
        return f"t2t_vit_{size}", {}
    if family == "hybrid":
        return f"hybrid_vit_{size}", {}
    if family == "fnet2d":
        return f"hybrid_vit_{rest}", {}
    if family == "vix":
        found = next((n for n in (f"vix_softmax_{size}", f"vit_{size}_patch16_224") if timm.is_model(n)), None)
        return (found, {}) if found else None
    return None


def softmax_counterpart(name: str, keywords: dict[str, Any]) -> Optional[Model]:
    """The softmax model beside a model of ours with these keywords; None where it is no model of ours.

    It has the keywords of the trunk. Its stem, if that mixes tokens, has softmax attention, too. The counterpart of a
    conversion is its source, with ``source_kwargs`` as well.
    """
    found = (keywords.get("source", "deit_tiny_patch16_224"), {}) if name == "vix_from_timm" else softmax_of(name)
    if found is None:
        return None
    softmax, added = found
    of_timm = softmax.startswith("vit_")
    if name.startswith("vix_") and name != "vix_from_timm" and of_timm and OURS_ONLY & keywords.keys():
        softmax, added = name.split(".")[0], {"mixer": "softmax"}
    trunk = {**added, **{key: value for key, value in keywords.items() if key not in NOT_TRUNK}}
    if name == "vix_from_timm":
        trunk |= keywords.get("source_kwargs") or {}
    stem = keywords.get("stem", "t2t" if name.startswith("t2t_") else None)
    if stem == "t2t" and not softmax.startswith("vit_"):
        trunk["stem_mixer"] = "softmax"
    return softmax, trunk
