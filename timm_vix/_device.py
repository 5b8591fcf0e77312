"""What this machine has: devices, dtypes, memory and versions of what measures on it."""

import platform
from pathlib import Path
from typing import Optional

import timm
import torch

from ._checks import InputError

# instruction sets of a processor on which the speed of matrix products depends, as the kernel of Linux names them:
# x86's vectors and matrices, then ARM's
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")


def find_device(name: str) -> str:
    """Resolve "auto", and raise InputError for a device that this machine lacks."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = ["cuda"] * bool(count) + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    allowed = ["auto", *present, *(f"cuda:{i}" for i in range(count))]
    if name not in allowed:
        raise InputError(f"device={name!r} is not on this machine; allowed are {', '.join(allowed)}")
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
    """The name of an accelerator, e.g. "NVIDIA H200", or of a processor with its instruction sets.

    Processors of several generations may share a name, and a time in bfloat16 depends on whether there are bfloat16
    instructions. If the operating system doesn't list instruction sets, the result is the name alone.

    Example:
        >>> device_name("cpu")
        'AMD EPYC (avx2 avx512f avx512_bf16)'
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    fields = fields_of("/proc/cpuinfo")
    name = fields.get("model name") or platform.processor() or platform.machine()
    if device.startswith("mps"):
        return f"{name} GPU"
    present = (fields.get("flags") or fields.get("Features", "")).split()
    found = [one for one in INSTRUCTION_SETS if one in present]
    return f"{name} ({' '.join(found)})" if found else name


def fields_of(path: str) -> dict[str, str]:
    """The ``name: value`` lines of a file under /proc; none where there is no such file. The first of a name counts."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return {name.strip(): value.strip() for name, value in reversed(pairs)}


def kibibytes(path: str, field: str) -> Optional[int]:
    """A memory field of a file under /proc, in KiB; None where it is not."""
    value = fields_of(path).get(field)
    return int(value.split()[0]) if value else None


def versions() -> dict[str, str]:
    """Versions that a measurement depends on."""
    from . import __version__

    return dict(torch=str(torch.__version__), timm=timm.__version__, timm_vix=__version__)
