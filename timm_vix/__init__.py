"""Vision transformers with efficient attention, as timm models.

>>> import timm, timm_vix
>>> model = timm.create_model("vix_nystrom_tiny", pretrained=True)
"""

from . import models
from .conversion.convert import convert, revert
from .conversion.delta import load_delta, save_delta
from .conversion.freeze import freeze_except
from .conversion.replace import swap_attention

__version__ = "0.1.0"
__all__ = ["convert", "freeze_except", "load_delta", "models", "revert", "save_delta", "swap_attention"]
