"""Tokens-to-token vision transformers: ViT with another token mixer behind the stem of T2T-ViT.

Yuan et al. 2021 (arXiv 2101.11986). The trunk is that of ``vix.py``, so that weights of a ViT or DeiT fit all but the
stem: its width is ViT-Ti's and not one of the paper's. Stem: ``timm_vix/stems/tokens_to_token.py``, with Nyström
attention inside (``stem_mixer``). ``t2t_vin`` has Nyström attention in the trunk too, ``t2t_vit`` is the softmax
control; ``mixer`` takes any other.
"""

from timm.models import generate_default_cfgs

from ._register import ModelName, register_names
from .vit import create_vision_xformer, default_cfgs_for, describe_vit

# name, mixer, stem, size
NAMES = [
    ModelName("t2t_vit_tiny", "softmax", "t2t", "tiny"),
    ModelName("t2t_vin_tiny", "nystrom", "t2t", "tiny"),
]

default_cfgs = generate_default_cfgs(default_cfgs_for(NAMES, first_conv=None))

register_names(__name__, NAMES, create_vision_xformer, describe_vit)
