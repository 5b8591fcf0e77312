"""``python -m timm_vix`` is the command ``timm-vix``."""

from .cli import main

main()
