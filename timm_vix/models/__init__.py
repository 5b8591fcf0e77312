"""Registered models; importing this package registers their names in timm."""

from . import cct, cvt, fnet2d, hybrid, levin, pin, vix

__all__ = ["cct", "cvt", "fnet2d", "hybrid", "levin", "pin", "vix"]
