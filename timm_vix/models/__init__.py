"""Registered models; importing this package registers their names in timm."""

from . import cct, cvt, hybrid, pin, vix

__all__ = ["cct", "cvt", "hybrid", "pin", "vix"]
