"""Registered models; importing this package registers their names in timm."""

from . import cct, cvt, hybrid, levin, pin, vix

__all__ = ["cct", "cvt", "hybrid", "levin", "pin", "vix"]
