"""The registered models. Importing this package registers their names in timm; ``__all__`` holds the families."""

from . import cct, convix, cvt, fnet2d, hybrid, levin, pin, t2t, vix
from . import converted as _converted  # noqa: F401

__all__ = ["cct", "convix", "cvt", "fnet2d", "hybrid", "levin", "pin", "t2t", "vix"]
