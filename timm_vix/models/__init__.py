"""Registered models; importing this package registers their names in timm. ``__all__`` holds the families."""

from . import from_timm as _from_timm  # noqa: F401
from . import hybrid, vix

__all__ = ["hybrid", "vix"]
