"""Registered models; importing this package registers their names in timm."""

from . import cct, hybrid, pin, vix

__all__ = ["cct", "hybrid", "pin", "vix"]
