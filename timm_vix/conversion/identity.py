"""What identifies a model: the mechanisms of its attention, and fingerprints of its weights."""

import hashlib
import json
import math
from typing import Any, Optional

import torch
from torch import nn

from .._names import weights_config
from ..slots.model import hosts_of, mixer_name
from ..slots.slot import GridModule
from .freeze import unwrapped_name
from .merging import MergingBlocks
from .record import source_of
from .scaling import scaled_for

# from the finest to the coarsest
DTYPES = dict(float64=torch.float64, float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16)


def mechanisms_of(model: nn.Module) -> dict[str, list[Any]]:
    """By the path of each attention that was replaced: name of the mechanism there, and all its keywords.

    Two models may have the same weights and another function. Blocks that merge tokens count as a mechanism.
    """
    found = {
        unwrapped_name(path): [mixer_name(module), json.loads(json.dumps(config_of(module)))]
        for path, module in hosts_of(model).items()
    }
    if isinstance(blocks := getattr(model, "blocks", None), MergingBlocks):
        found["blocks"] = ["merging", {"merge": json.loads(json.dumps(blocks.merge))}]
    if number := scaled_for(model):
        found["logits"] = ["scaling", {"scale_logits": number}]
    return found


def architecture(model: nn.Module) -> str:
    """timm's name of a model without a tag, of the source where it is converted; the class where it has none."""
    name = source_of(model) or weights_config(model).get("architecture")
    return name.partition(".")[0] if name else type(model).__name__


def config_of(module: nn.Module) -> dict[str, Any]:
    """All keywords of the mechanism in a module with the values that it uses, and the kind of its rotary positions."""
    rope = getattr(module, "rope", None)
    config = {**module.core.config(), "rope": rope and ("1d" if rope.raster else "axial")}
    if getattr(module, "dynamic", False):
        return config
    # as many as there are patches is as good as more
    own = module.current_grid(-1) if isinstance(module, GridModule) else module.grid
    patches = math.prod(getattr(module, "key_grid", None) or own)
    counts = {name: min(config[name], patches) for name in module.core.token_counts if isinstance(config[name], int)}
    return {**config, **counts}


def fingerprint(tensors: dict[str, torch.Tensor], dtype: Optional[torch.dtype] = None) -> str:
    """Sixteen hexadecimal digits that stand for names, shapes, dtypes and every bit of some tensors.

    Args:
        dtype: that of floating-point tensors; None: their own.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        # a single number may be called contiguous at any stride
        digest.update(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def checksums(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Fingerprints of weights by dtype: first their own, then the coarser ones to which they could be moved."""
    names = list(DTYPES)
    return {name: fingerprint(tensors, DTYPES[name]) for name in names[names.index(dtype_of(tensors)) :]}


def dtype_of(tensors: dict[str, torch.Tensor]) -> str:
    """The coarsest floating-point dtype among some tensors, by its name in ``DTYPES``."""
    own = {tensor.dtype for tensor in tensors.values()}
    return max((name for name, dtype in DTYPES.items() if dtype in own), key=list(DTYPES).index, default="float32")
