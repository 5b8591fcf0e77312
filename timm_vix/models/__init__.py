"""Registered models; importing this package registers their names in timm."""

from . import hybrid, vix

__all__ = ["hybrid", "vix"]
