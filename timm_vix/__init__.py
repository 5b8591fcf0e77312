"""Vision transformers with efficient attention, as timm models.

>>> import timm, timm_vix
>>> model = timm.create_model("vix_nystrom_tiny", pretrained=True)
"""

from . import models
from .convert import convert, revert
from .swap import swap_attention

__version__ = "0.1.0"
__all__ = ["convert", "models", "revert", "swap_attention"]
