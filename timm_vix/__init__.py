"""Vision transformers with efficient attention, as timm models.

>>> import timm, timm_vix
>>> model = timm.create_model("vix_nystrom_tiny", pretrained=True)
"""

from . import models
from .convert import convert, revert
from .freeze import freeze_except, load_delta, save_delta
from .swap import swap_attention

__version__ = "0.1.0"
__all__ = ["convert", "freeze_except", "load_delta", "models", "revert", "save_delta", "swap_attention"]
