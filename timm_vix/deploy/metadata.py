"""What an exported file says of itself: how its images are prepared, its classes, and what there is to know besides.

Each entry is text in JSON. ONNX, OpenVINO and aoti hold them by name; pt2 holds all in one extra file.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from .._checks import InputError

PREPARATION = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")  # of timm's data configuration
NAMES = ("architecture", "parameters", *PREPARATION, "classes", "dtype", "note")
PT2_FILE = "metadata.json"


def metadata_of(
    model: nn.Module, config: Mapping[str, Any], classes: list[str], dtype: str, note: str
) -> dict[str, str]:
    """The entries of a model's file.

    Args:
        config: timm's data configuration of its images.
        classes: the name of each class.
        dtype: "float32", "bfloat16" or "int8".
        note: what there is to know about the weights, see ``note_of_weights``.

    Raises:
        ValueError: for a configuration that lacks a part.
    """
    missing = [name for name in PREPARATION if name not in config]
    if missing:
        raise InputError(
            f"config has no {missing[0]}; expected timm's resolve_data_config, with {', '.join(PREPARATION)}"
        )
    entries = dict(architecture=model.pretrained_cfg["architecture"], classes=classes, dtype=dtype, note=note)
    entries |= {name: config[name] for name in PREPARATION}
    entries["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return {name: json.dumps(entries[name]) for name in NAMES}


def config_of(entries: Mapping[str, str], path: Any) -> dict[str, Any]:
    """The values of the entries of a file.

    Raises:
        ValueError: for entries that ``metadata_of`` didn't write.
    """
    missing = [name for name in NAMES if name not in entries]
    if missing:
        raise InputError(f"{path} has no {missing[0]} in its metadata; expected a file of timm-vix export")
    try:
        return {name: json.loads(entries[name]) for name in NAMES}
    except ValueError as error:
        raise InputError(f"{path} has damaged metadata: {error}; expected a file of timm-vix export") from error
