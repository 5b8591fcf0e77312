"""Build a registered model through timm: its row under the user's keywords, one clear error for a bad checkpoint."""

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg
from torch import nn

from .._checks import InputError
from ..conversion.saved_arguments import mixers_of
from ..mixers import MIXERS
from ..mixers._keywords import all_keywords, mixer_keywords
from ._register import ModelName


def overridden(row: ModelName, sizes: dict[str, dict[str, Any]], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A row's arguments, overridden by the user's; another mixer doesn't get the keywords of the row's mixer."""
    kwargs = without_saved_keywords(row, kwargs)
    chosen = {name: value for name, value in row._asdict().items() if name in ("mixer", "stem", "rope") and value}
    used = mixers_of(kwargs.get("layers"), kwargs.get("mixer", row.mixer))
    left_out = [] if row.mixer in used else mixer_keywords(row.mixer)
    own = {name: value for name, value in row.keywords.items() if name not in left_out}
    return {**sizes.get(row.size, {}), **chosen, **own, **kwargs}


def without_saved_keywords(row: ModelName, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords, without those that were saved with a model and are of none of the mixers that it is to have.

    timm records them again when a model is saved that was loaded with another mixer.
    """
    saved, layers = kwargs.get("pretrained_model_args") or {}, kwargs.get("layers")
    used = mixers_of(layers, kwargs.get("mixer", row.mixer))
    if not saved or not all(isinstance(mixer, str) and mixer in MIXERS for mixer in used):
        return kwargs
    stale = all_keywords().difference(*map(mixer_keywords, used))
    return {k: v for k, v in kwargs.items() if not (k in stale and k in saved and saved[k] == v)}


def build_xformer(
    model_class: type[nn.Module],
    name: str,
    pretrained: bool,
    arguments: dict[str, Any],
    filter_fn: Callable,
    feature_cfg: dict[str, Any],
) -> Any:
    """timm's ``build_model_with_cfg``, with one clear error for weights that can't be fetched or read.

    Raises:
        ValueError: for these, and for a checkpoint that doesn't fit.
    """
    overlay, cfg = arguments.get("pretrained_cfg_overlay") or {}, arguments.get("pretrained_cfg")
    reading = False

    # neither torch nor timm has an exception of its own for a damaged file: between these two calls, any means one
    def build(**kwargs: Any) -> nn.Module:
        nonlocal reading
        model = model_class(**kwargs)
        reading = pretrained
        return model

    def fit(state_dict: Any, model: nn.Module) -> dict[str, Any]:
        nonlocal reading
        reading = False
        try:
            return filter_fn(state_dict, model)
        except ValueError:
            raise
        except Exception as error:
            # timm's functions know no other checkpoints than those which they convert
            raise InputError(f"the checkpoint doesn't fit {name}: {error}") from error

    try:
        return build_model_with_cfg(
            build, name, pretrained, pretrained_filter_fn=fit, feature_cfg=feature_cfg, **arguments
        )
    except Exception as error:
        if not reading or "No pretrained weights exist" in str(error):
            raise
        file = overlay.get("file") or (cfg.get("file") if isinstance(cfg, dict) else None)
        problem = f"{file} is no readable checkpoint" if file else f"the weights of {name} can't be fetched or read"
        raise InputError(f"{problem}: {type(error).__name__}: {error}") from error
