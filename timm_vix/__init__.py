"""Vision transformers with efficient attention, as timm models.

>>> import timm, timm_vix
>>> model = timm.create_model("vix_nystrom_tiny", pretrained=True)
"""

from . import models
from .swap import swap_attention

__version__ = "0.1.0"
__all__ = ["models", "swap_attention"]
