"""What this machine and timm have: devices, dtypes, memory, names of models and versions."""

import ast
import difflib
import platform
from pathlib import Path
from typing import Any, Optional

import timm
import torch


def find_device(name: str) -> str:
    """Resolve "auto", and raise ValueError for a device that this machine lacks."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = ["cuda"] * bool(count) + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    allowed = ["auto", *present, *(f"cuda:{i}" for i in range(count))]
    if name not in allowed:
        raise ValueError(f"device={name!r} is not on this machine; allowed are {', '.join(allowed)}")
    return present[0] if name == "auto" else name


def find_dtype(amp: str, device: str) -> torch.dtype:
    """The dtype of matrix products; where bfloat16 is emulated, it is slower than float32."""
    if device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if amp == "bfloat16" or (amp == "auto" and native) else torch.float32


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in ``dtype``; float32 leaves them as they are."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def device_name(device: str) -> str:
    """The name of a processor or accelerator, e.g. "AMD EPYC" or "NVIDIA H200"."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    fields = process_fields("/proc/cpuinfo")
    return fields.get("model name") or platform.processor() or platform.machine()


def process_fields(path: str) -> dict[str, str]:
    """The ``name: value`` lines of a file under /proc; none where there is no such file. The first of a name counts."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return {name.strip(): value.strip() for name, value in reversed(pairs)}


def kibibytes(path: str, field: str) -> Optional[int]:
    """A memory field of a file under /proc, in KiB; None where it is not."""
    value = process_fields(path).get(field)
    return int(value.split()[0]) if value else None


def versions() -> dict[str, str]:
    """Versions that a measurement depends on."""
    from . import __version__

    return dict(torch=str(torch.__version__), timm=timm.__version__, timm_vix=__version__)


def check_model(name: str) -> None:
    """Raise ValueError, with near names, for a name that timm does not know."""
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5))
        raise ValueError(f"model={name!r} is not registered in timm; near names: {near or 'none'}")


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``"NAME key=value ..."`` into a name and its keywords.

    Raises:
        ValueError: for a name that timm does not know, or a part without "=".

    Example:
        >>> parse_model("vix_nystrom_tiny num_landmarks=64")
        ('vix_nystrom_tiny', {'num_landmarks': 64})
    """
    name, *parts = text.split() or [""]
    check_model(name)
    keywords: dict[str, Any] = {}
    for part in parts:
        key, found, value = part.partition("=")
        if not found or not key:
            raise ValueError(f"model={text!r}: {part!r} is no key=value")
        try:
            keywords[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            keywords[key] = value
    return name, keywords


def softmax_of(name: str) -> Optional[str]:
    """The softmax model of the same trunk, stem and positions as one of ours; None for any other model.

    Example:
        >>> softmax_of("vix_nystrom_small"), softmax_of("hybrid_vin_tiny_rope"), softmax_of("resnet50")
        ('vit_small_patch16_224', 'hybrid_vit_tiny_rope', None)
        >>> softmax_of("ccn_7"), softmax_of("pin_tiny")
        ('cct_7', 'pin_tiny mixer=softmax')
    """
    name = name.split(".")[0]
    family, _, rest = name.partition("_")
    size = rest.partition("_")[2]
    if family in ("ccn", "ccp", "cct", "cvn", "cvp", "cvt"):
        return f"{family[:2]}t_{rest}"
    if name.startswith(("levin_", "levip_", "pin_", "pip_", "hybrid_pin_", "hybrid_pip_")):
        return f"{name} mixer=softmax"
    if family == "hybrid":
        return f"hybrid_vit_{size}"
    if family == "vix":
        return f"vix_softmax_{size}" if timm.is_model(f"vix_softmax_{size}") else f"vit_{size}_patch16_224"
    return None
