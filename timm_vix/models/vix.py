"""Vision X-formers: ViT with another token mixer, linear patch embedding.

Jeevan & Sethi 2022, "Resource-efficient Hybrid X-formers for Vision" (arXiv 2107.02239). ``tiny``, ``small`` and
``base`` are ViT-Ti/S/B with patch 16; ``cifar`` is the paper's model, in which each pixel of a 32 px image is a token.
``_rope`` names have 2-D axial rotary positions instead of the learned embedding (``rope="1d"``: the paper's).

*Differs:* ``vit.py`` lists what ``cifar`` corrects in the official code.
"""

from timm.models import generate_default_cfgs

from ._register import ModelName, register_names
from .vit import LINFORMER, NYSTROM, PERFORMER, create_vision_xformer, default_cfgs_for, describe_vit

# Without token mixing the class token is the same for every image, so the patches are pooled. The rest is as in a ViT.
PATCHES = dict(global_pool="avg", fc_norm=False)

# name, mixer, stem, size, rotary positions, keywords
NAMES = [
    ModelName("vix_linformer_tiny", "linformer", "linear", "tiny"),
    ModelName("vix_linformer_small", "linformer", "linear", "small"),
    ModelName("vix_linformer_base", "linformer", "linear", "base"),
    ModelName("vix_linformer_cifar", "linformer", "linear", "cifar", None, LINFORMER),
    ModelName("vix_performer_tiny", "performer", "linear", "tiny"),
    ModelName("vix_performer_small", "performer", "linear", "small"),
    ModelName("vix_performer_base", "performer", "linear", "base"),
    ModelName("vix_performer_cifar", "performer", "linear", "cifar", None, PERFORMER),
    ModelName("vix_nystrom_tiny", "nystrom", "linear", "tiny"),
    ModelName("vix_nystrom_small", "nystrom", "linear", "small"),
    ModelName("vix_nystrom_base", "nystrom", "linear", "base"),
    ModelName("vix_nystrom_cifar", "nystrom", "linear", "cifar", None, NYSTROM),
    ModelName("vix_atrous_tiny", "atrous", "linear", "tiny"),
    ModelName("vix_atrous_small", "atrous", "linear", "small"),
    ModelName("vix_atrous_base", "atrous", "linear", "base"),
    ModelName("vix_axial_tiny", "axial", "linear", "tiny"),
    ModelName("vix_axial_small", "axial", "linear", "small"),
    ModelName("vix_axial_base", "axial", "linear", "base"),
    ModelName("vix_axial_cifar", "axial", "linear", "cifar"),
    ModelName("vix_fnet_tiny", "fnet", "linear", "tiny"),
    ModelName("vix_fnet_small", "fnet", "linear", "small"),
    ModelName("vix_fnet_base", "fnet", "linear", "base"),
    ModelName("vix_fnet_cifar", "fnet", "linear", "cifar"),
    ModelName("vix_mixer_tiny", "mixer", "linear", "tiny"),
    ModelName("vix_mixer_small", "mixer", "linear", "small"),
    ModelName("vix_mixer_base", "mixer", "linear", "base"),
    ModelName("vix_mixer_cifar", "mixer", "linear", "cifar"),
    ModelName("vix_pool_tiny", "pool", "linear", "tiny"),
    ModelName("vix_pool_cifar", "pool", "linear", "cifar"),
    ModelName("vix_retention_tiny", "retention", "linear", "tiny"),
    ModelName("vix_retention_cifar", "retention", "linear", "cifar"),
    ModelName("vix_gpsa_tiny", "gpsa", "linear", "tiny"),
    ModelName("vix_gpsa_cifar", "gpsa", "linear", "cifar"),
    ModelName("vix_glu_tiny", "glu", "linear", "tiny", None, PATCHES),
    ModelName("vix_glu_cifar", "glu", "linear", "cifar", None, PATCHES),
    ModelName("vix_latent_tiny", "latent", "linear", "tiny"),
    ModelName("vix_latent_cifar", "latent", "linear", "cifar"),
    ModelName("vix_scattering_tiny", "scattering", "linear", "tiny"),
    ModelName("vix_scattering_cifar", "scattering", "linear", "cifar"),
    ModelName("vix_hyena_tiny", "hyena", "linear", "tiny"),
    ModelName("vix_hyena_cifar", "hyena", "linear", "cifar", None, dict(reference_size=32)),
    ModelName("vix_legendre_tiny", "legendre", "linear", "tiny"),
    ModelName("vix_legendre_cifar", "legendre", "linear", "cifar", None, dict(theta=32.0)),
    ModelName("vix_relu_tiny", "relu", "linear", "tiny"),
    ModelName("vix_relu_cifar", "relu", "linear", "cifar"),
    ModelName("vix_softmax_cifar", "softmax", "linear", "cifar"),
    ModelName("vix_softmax_tiny_rope", "softmax", "linear", "tiny", "axial"),
    ModelName("vix_softmax_small_rope", "softmax", "linear", "small", "axial"),
    ModelName("vix_softmax_cifar_rope", "softmax", "linear", "cifar", "axial"),
    ModelName("vix_linformer_tiny_rope", "linformer", "linear", "tiny", "axial"),
    ModelName("vix_linformer_small_rope", "linformer", "linear", "small", "axial"),
    ModelName("vix_linformer_cifar_rope", "linformer", "linear", "cifar", "axial", LINFORMER),
    ModelName("vix_performer_tiny_rope", "performer", "linear", "tiny", "axial"),
    ModelName("vix_performer_small_rope", "performer", "linear", "small", "axial"),
    ModelName("vix_performer_cifar_rope", "performer", "linear", "cifar", "axial", PERFORMER),
    ModelName("vix_nystrom_tiny_rope", "nystrom", "linear", "tiny", "axial"),
    ModelName("vix_nystrom_small_rope", "nystrom", "linear", "small", "axial"),
    ModelName("vix_nystrom_cifar_rope", "nystrom", "linear", "cifar", "axial", NYSTROM),
    ModelName("vix_axial_tiny_rope", "axial", "linear", "tiny", "axial"),
    ModelName("vix_axial_small_rope", "axial", "linear", "small", "axial"),
    ModelName("vix_axial_cifar_rope", "axial", "linear", "cifar", "axial"),
    ModelName("vix_retention_tiny_rope", "retention", "linear", "tiny", "axial"),
    ModelName("vix_retention_cifar_rope", "retention", "linear", "cifar", "axial"),
    ModelName("vix_gpsa_tiny_rope", "gpsa", "linear", "tiny", "axial"),
    ModelName("vix_gpsa_cifar_rope", "gpsa", "linear", "cifar", "axial"),
    ModelName("vix_latent_tiny_rope", "latent", "linear", "tiny", "axial"),
    ModelName("vix_latent_cifar_rope", "latent", "linear", "cifar", "axial"),
    ModelName("vix_relu_tiny_rope", "relu", "linear", "tiny", "axial"),
    ModelName("vix_relu_cifar_rope", "relu", "linear", "cifar", "axial"),
]

default_cfgs = generate_default_cfgs(default_cfgs_for(NAMES))

register_names(__name__, NAMES, create_vision_xformer, describe_vit)
