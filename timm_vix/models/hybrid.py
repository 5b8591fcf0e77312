"""Hybrid X-formers: ViT with another token mixer and a convolutional stem instead of the linear patch embedding.

Jeevan & Sethi 2022, "Resource-efficient Hybrid X-formers for Vision" (arXiv 2107.02239): ViL, ViP, ViN are its
Linformer, Performer and Nyströmformer, ViT the softmax control. Sizes and ``_rope`` as in ``vix.py``. The stem at patch
16 is that of Xiao et al. 2021 (arXiv 2106.14881).

*Differs:* the stem of ``cifar`` is the paper's three 3x3 convolutions with normalisation and GELU between them. The
official code lacks these, so its stem is one linear convolution (``stem="conv_linear"``). ``vit.py`` lists what else
``cifar`` corrects in that code.
"""

from timm.models import generate_default_cfgs

from ._register import ModelName, register_names
from .vit import LINFORMER, NYSTROM, PERFORMER, create_vision_xformer, default_cfgs_for, describe_vit

# name, mixer, stem, size, rotary positions, keywords
NAMES = [
    ModelName("hybrid_vit_tiny", "softmax", "conv", "tiny"),
    ModelName("hybrid_vit_small", "softmax", "conv", "small"),
    ModelName("hybrid_vit_base", "softmax", "conv", "base"),
    ModelName("hybrid_vit_cifar", "softmax", "conv", "cifar"),
    ModelName("hybrid_vil_tiny", "linformer", "conv", "tiny"),
    ModelName("hybrid_vil_small", "linformer", "conv", "small"),
    ModelName("hybrid_vil_base", "linformer", "conv", "base"),
    ModelName("hybrid_vil_cifar", "linformer", "conv", "cifar", None, LINFORMER),
    ModelName("hybrid_vip_tiny", "performer", "conv", "tiny"),
    ModelName("hybrid_vip_small", "performer", "conv", "small"),
    ModelName("hybrid_vip_base", "performer", "conv", "base"),
    ModelName("hybrid_vip_cifar", "performer", "conv", "cifar", None, PERFORMER),
    ModelName("hybrid_vin_tiny", "nystrom", "conv", "tiny"),
    ModelName("hybrid_vin_small", "nystrom", "conv", "small"),
    ModelName("hybrid_vin_base", "nystrom", "conv", "base"),
    ModelName("hybrid_vin_cifar", "nystrom", "conv", "cifar", None, NYSTROM),
    ModelName("hybrid_via_tiny", "atrous", "conv", "tiny"),
    ModelName("hybrid_via_small", "atrous", "conv", "small"),
    ModelName("hybrid_via_base", "atrous", "conv", "base"),
    ModelName("hybrid_fnet_tiny", "fnet", "conv", "tiny"),
    ModelName("hybrid_fnet_cifar", "fnet", "conv", "cifar"),
    ModelName("hybrid_mixer_tiny", "mixer", "conv", "tiny"),
    ModelName("hybrid_mixer_cifar", "mixer", "conv", "cifar"),
    ModelName("hybrid_vit_tiny_rope", "softmax", "conv", "tiny", "axial"),
    ModelName("hybrid_vit_small_rope", "softmax", "conv", "small", "axial"),
    ModelName("hybrid_vit_cifar_rope", "softmax", "conv", "cifar", "axial"),
    ModelName("hybrid_vil_tiny_rope", "linformer", "conv", "tiny", "axial"),
    ModelName("hybrid_vil_small_rope", "linformer", "conv", "small", "axial"),
    ModelName("hybrid_vil_cifar_rope", "linformer", "conv", "cifar", "axial", LINFORMER),
    ModelName("hybrid_vip_tiny_rope", "performer", "conv", "tiny", "axial"),
    ModelName("hybrid_vip_small_rope", "performer", "conv", "small", "axial"),
    ModelName("hybrid_vip_cifar_rope", "performer", "conv", "cifar", "axial", PERFORMER),
    ModelName("hybrid_vin_tiny_rope", "nystrom", "conv", "tiny", "axial"),
    ModelName("hybrid_vin_small_rope", "nystrom", "conv", "small", "axial"),
    ModelName("hybrid_vin_cifar_rope", "nystrom", "conv", "cifar", "axial", NYSTROM),
]

default_cfgs = generate_default_cfgs(default_cfgs_for(NAMES, first_conv="patch_embed.proj.0.conv"))

register_names(__name__, NAMES, create_vision_xformer, describe_vit)
