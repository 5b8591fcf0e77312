"""Where sums and exponentials need float32, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch


def outside_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast; not for TorchScript, which knows autocast for constant devices only."""
    # the meta device has no autocast to switch off; asking torch which has one would break a compiled graph
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
