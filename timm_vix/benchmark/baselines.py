"""The softmax baseline of a model, by name: the same trunk, stem and positions with softmax attention."""

from typing import Any, Optional

import timm
import torch
from timm.data import resolve_input_data_config
from timm.layers import set_fused_attn
from timm.models import resolve_model_input_args
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .._names import parse_model
from ..conversion.keywords import all_keywords
from ..conversion.record import RECORDED
from ..measure.job import JOB

# keywords that the softmax model of the same trunk is not given: of what a conversion does, and those of the mixers
NOT_TRUNK = {"stem_mixer", "train_only"} | RECORDED | all_keywords()
# keywords of a trunk that timm's own ViT doesn't have
OURS_ONLY = {"stem", "rope", "block", "mlp"}


def softmax_of(name: str) -> Optional[str]:
    """The softmax model of the same trunk, stem and positions as one of ours; None for any other model.

    fnet2d mixes maps, so it has no such trunk; beside it stands the model of tokens with its stem and width.

    Example:
        >>> softmax_of("vix_nystrom_small"), softmax_of("hybrid_vin_tiny_rope"), softmax_of("vix_from_timm")
        ('vit_small_patch16_224', 'hybrid_vit_tiny_rope', None)
        >>> softmax_of("ccn_7"), softmax_of("pin_tiny"), softmax_of("fnet2d_cifar")
        ('cct_7', 'pin_tiny mixer=softmax', 'hybrid_vit_cifar')
    """
    name = name.split(".")[0]
    family, _, rest = name.partition("_")
    size = rest.partition("_")[2]
    if family in ("ccn", "ccp", "cct", "cvn", "cvp", "cvt"):
        return f"{family[:2]}t_{rest}"
    if name.startswith(("levin_", "levip_", "pin_", "pip_", "hybrid_pin_", "hybrid_pip_", "convix_")):
        return f"{name} mixer=softmax"
    if family == "t2t":
        return f"t2t_vit_{size}"
    if family == "hybrid":
        return f"hybrid_vit_{size}"
    if family == "fnet2d":
        return f"hybrid_vit_{rest}"
    if family == "vix":
        twins = (f"vix_softmax_{size}", f"vit_{size}_patch16_224")
        return next((twin for twin in twins if timm.is_model(twin)), None)
    return None


def baseline_of(spec: str, given: Optional[str] = None) -> str:
    """The softmax model that a model is timed against, with the keywords of the trunk.

    Args:
        spec: "NAME key=value ...".
        given: The baseline that the user wants instead.

    Raises:
        InputError: for a name that timm does not know.
    """
    name, keywords = parse_model(spec)
    if given:
        parse_model(given)
        return given
    twin = keywords.get("source", "deit_tiny_patch16_224") if name == "vix_from_timm" else softmax_of(name)
    if twin is None:
        return JOB["baseline"]
    if name.startswith("vix_") and name != "vix_from_timm" and twin.startswith("vit_") and OURS_ONLY & keywords.keys():
        twin = f"{name.split('.')[0]} mixer=softmax"
    # as they were written: a tuple's own text has spaces
    parts = [twin, *(part for part in spec.split()[1:] if part.partition("=")[0] not in NOT_TRUNK)]
    stem = keywords.get("stem", "t2t" if name.startswith("t2t_") else None)
    if stem == "t2t" and not twin.startswith("vit_"):
        parts.append("stem_mixer=softmax")
    return " ".join(parts)


class CallsOfAttention(TorchFunctionMode):
    """Context that counts the calls of ``scaled_dot_product_attention``."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def can_run_fused(baseline: str) -> bool:
    """Whether a softmax model calls ``scaled_dot_product_attention``, without which no fused kernel can run.

    timm's LeViT doesn't, for one: it adds a learned bias to the logits of two matrix products of its own. Found out on
    the meta device, where nothing is computed. A model that can't be built there counts as one that does: what is wrong
    with it shows when it is measured.

    Example:
        >>> can_run_fused("vit_tiny_patch16_224"), can_run_fused("levit_128s")
        (True, False)
    """
    name, keywords = parse_model(baseline)
    keywords.pop("train_only", None)
    set_fused_attn(True)  # as where it is measured
    try:
        model = timm.create_model(**resolve_model_input_args(name, {}, **keywords), device="meta").eval()
        with torch.inference_mode(), CallsOfAttention() as calls:
            model(torch.zeros(1, *resolve_input_data_config(model, {})["input_size"], device="meta"))
    except Exception:  # timm's classes raise as they like
        return True
    return calls.count > 0


def attention_of(baseline: str, wanted: list[str]) -> list[str]:
    """How a softmax baseline is measured in rows of its own: as ``wanted``, a list of "fused" and "unfused".

    A baseline that never runs a fused kernel is measured as "unfused" only, unless ``wanted`` is empty.
    """
    return wanted if not wanted or can_run_fused(baseline) else ["unfused"]
