"""What this machine has: devices, dtypes, memory and versions of what measures on it."""

import platform
from pathlib import Path
from typing import Optional

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
