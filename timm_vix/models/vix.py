"""Vision X-formers: ViT with another token mixer, linear patch embedding.

Jeevan & Sethi 2022, "Resource-efficient Hybrid X-formers for Vision" (arXiv 2107.02239). ``tiny``, ``small`` and
``base`` are ViT-Ti/S/B with patch 16; ``cifar`` is the paper's model, in which each pixel of a 32 px image is a token.
``_rope`` names have 2-D axial rotary positions instead of the learned embedding (``rope="1d"``: the paper's).

``cifar`` departs from the official code where that is defective. No value depends on other images of the batch,
position embedding and class token start at timm's scale, rotary positions leave the class token alone. Nyström:
landmarks are pooled over the image and not over rows of the raster, and turned by the centres of their cells; nothing
is padded; the residual convolution (``conv_residual``, off in other sizes) is a depthwise 5x5 over the image and not
over 33 tokens of the raster. Linformer: its matrices are resampled for another image size, values are not the keys
again, and keys are turned after they are projected. Performer: features can be drawn anew in training
(``redraw_interval``), for which the code has a class that it never uses; by default they are not here either.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from .vit import VisionXformer, create_vision_xformer, default_cfgs_for

default_cfgs = generate_default_cfgs(
    default_cfgs_for(
        [
            "vix_linformer_tiny",
            "vix_linformer_small",
            "vix_linformer_base",
            "vix_linformer_cifar",
            "vix_performer_tiny",
            "vix_performer_small",
            "vix_performer_base",
            "vix_performer_cifar",
            "vix_nystrom_tiny",
            "vix_nystrom_small",
            "vix_nystrom_base",
            "vix_nystrom_cifar",
            "vix_atrous_tiny",
            "vix_atrous_small",
            "vix_atrous_base",
            "vix_fnet_tiny",
            "vix_fnet_small",
            "vix_fnet_base",
            "vix_fnet_cifar",
            "vix_mixer_tiny",
            "vix_mixer_small",
            "vix_mixer_base",
            "vix_mixer_cifar",
            "vix_softmax_cifar",
            "vix_softmax_tiny_rope",
            "vix_softmax_small_rope",
            "vix_softmax_cifar_rope",
            "vix_linformer_tiny_rope",
            "vix_linformer_small_rope",
            "vix_linformer_cifar_rope",
            "vix_performer_tiny_rope",
            "vix_performer_small_rope",
            "vix_performer_cifar_rope",
            "vix_nystrom_tiny_rope",
            "vix_nystrom_small_rope",
            "vix_nystrom_cifar_rope",
        ]
    )
)


@register_model
def vix_linformer_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with Linformer attention (Wang et al. 2020, arXiv 2006.04768)."""
    return create_vision_xformer("vix_linformer_tiny", pretrained, kwargs, mixer="linformer")


@register_model
def vix_linformer_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with Linformer attention (Wang et al. 2020, arXiv 2006.04768)."""
    return create_vision_xformer("vix_linformer_small", pretrained, kwargs, mixer="linformer")


@register_model
def vix_linformer_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with Linformer attention (Wang et al. 2020, arXiv 2006.04768)."""
    return create_vision_xformer("vix_linformer_base", pretrained, kwargs, mixer="linformer")


@register_model
def vix_linformer_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): Linformer attention (Wang et al. 2020, arXiv 2006.04768)."""
    return create_vision_xformer("vix_linformer_cifar", pretrained, kwargs, mixer="linformer", num_proj_tokens=64)


@register_model
def vix_performer_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with Performer attention (Choromanski et al. 2021, arXiv 2009.14794)."""
    return create_vision_xformer("vix_performer_tiny", pretrained, kwargs, mixer="performer")


@register_model
def vix_performer_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with Performer attention (Choromanski et al. 2021, arXiv 2009.14794)."""
    return create_vision_xformer("vix_performer_small", pretrained, kwargs, mixer="performer")


@register_model
def vix_performer_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with Performer attention (Choromanski et al. 2021, arXiv 2009.14794)."""
    return create_vision_xformer("vix_performer_base", pretrained, kwargs, mixer="performer")


@register_model
def vix_performer_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): Performer attention (arXiv 2009.14794)."""
    return create_vision_xformer(
        "vix_performer_cifar", pretrained, kwargs, mixer="performer", num_features=110, qkv_bias=True
    )


@register_model
def vix_nystrom_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with Nyström attention (Xiong et al. 2021, arXiv 2102.03902)."""
    return create_vision_xformer("vix_nystrom_tiny", pretrained, kwargs, mixer="nystrom")


@register_model
def vix_nystrom_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with Nyström attention (Xiong et al. 2021, arXiv 2102.03902)."""
    return create_vision_xformer("vix_nystrom_small", pretrained, kwargs, mixer="nystrom")


@register_model
def vix_nystrom_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with Nyström attention (Xiong et al. 2021, arXiv 2102.03902)."""
    return create_vision_xformer("vix_nystrom_base", pretrained, kwargs, mixer="nystrom")


@register_model
def vix_nystrom_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): Nyström attention (Xiong et al. 2021, arXiv 2102.03902)."""
    return create_vision_xformer(
        "vix_nystrom_cifar", pretrained, kwargs, mixer="nystrom", num_landmarks=64, conv_residual=True
    )


@register_model
def vix_atrous_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with atrous attention (after ACC-ViT, Ibtehaz et al. 2024, arXiv 2403.04200)."""
    return create_vision_xformer("vix_atrous_tiny", pretrained, kwargs, mixer="atrous")


@register_model
def vix_atrous_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with atrous attention (after ACC-ViT, Ibtehaz et al. 2024, arXiv 2403.04200)."""
    return create_vision_xformer("vix_atrous_small", pretrained, kwargs, mixer="atrous")


@register_model
def vix_atrous_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with atrous attention (after ACC-ViT, Ibtehaz et al. 2024, arXiv 2403.04200)."""
    return create_vision_xformer("vix_atrous_base", pretrained, kwargs, mixer="atrous")


@register_model
def vix_fnet_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with Fourier mixing (FNet, Lee-Thorp et al. 2021, arXiv 2105.03824)."""
    return create_vision_xformer("vix_fnet_tiny", pretrained, kwargs, mixer="fnet")


@register_model
def vix_fnet_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with Fourier mixing (FNet, Lee-Thorp et al. 2021, arXiv 2105.03824)."""
    return create_vision_xformer("vix_fnet_small", pretrained, kwargs, mixer="fnet")


@register_model
def vix_fnet_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with Fourier mixing (FNet, Lee-Thorp et al. 2021, arXiv 2105.03824)."""
    return create_vision_xformer("vix_fnet_base", pretrained, kwargs, mixer="fnet")


@register_model
def vix_fnet_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): Fourier mixing (arXiv 2105.03824)."""
    return create_vision_xformer("vix_fnet_cifar", pretrained, kwargs, mixer="fnet")


@register_model
def vix_mixer_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with token MLPs (MLP-Mixer, Tolstikhin et al. 2021, arXiv 2105.01601)."""
    return create_vision_xformer("vix_mixer_tiny", pretrained, kwargs, mixer="mixer")


@register_model
def vix_mixer_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with token MLPs (MLP-Mixer, Tolstikhin et al. 2021, arXiv 2105.01601)."""
    return create_vision_xformer("vix_mixer_small", pretrained, kwargs, mixer="mixer")


@register_model
def vix_mixer_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with token MLPs (MLP-Mixer, Tolstikhin et al. 2021, arXiv 2105.01601)."""
    return create_vision_xformer("vix_mixer_base", pretrained, kwargs, mixer="mixer")


@register_model
def vix_mixer_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): token MLPs (arXiv 2105.01601)."""
    return create_vision_xformer("vix_mixer_cifar", pretrained, kwargs, mixer="mixer")


@register_model
def vix_softmax_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): softmax attention (the control, arXiv 2010.11929)."""
    return create_vision_xformer("vix_softmax_cifar", pretrained, kwargs, mixer="softmax")


@register_model
def vix_softmax_tiny_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with softmax attention and rotary positions (the control, arXiv 2010.11929)."""
    return create_vision_xformer("vix_softmax_tiny_rope", pretrained, kwargs, mixer="softmax", rope="axial")


@register_model
def vix_softmax_small_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with softmax attention and rotary positions (the control, arXiv 2010.11929)."""
    return create_vision_xformer("vix_softmax_small_rope", pretrained, kwargs, mixer="softmax", rope="axial")


@register_model
def vix_softmax_cifar_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): softmax attention, rotary positions (arXiv 2010.11929)."""
    return create_vision_xformer("vix_softmax_cifar_rope", pretrained, kwargs, mixer="softmax", rope="axial")


@register_model
def vix_linformer_tiny_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with Linformer attention and rotary positions (Wang et al. 2020, arXiv 2006.04768)."""
    return create_vision_xformer("vix_linformer_tiny_rope", pretrained, kwargs, mixer="linformer", rope="axial")


@register_model
def vix_linformer_small_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with Linformer attention and rotary positions (Wang et al. 2020, arXiv 2006.04768)."""
    return create_vision_xformer("vix_linformer_small_rope", pretrained, kwargs, mixer="linformer", rope="axial")


@register_model
def vix_linformer_cifar_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): Linformer attention, rotary positions (arXiv 2006.04768)."""
    return create_vision_xformer(
        "vix_linformer_cifar_rope", pretrained, kwargs, mixer="linformer", rope="axial", num_proj_tokens=64
    )


@register_model
def vix_performer_tiny_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with Performer attention and rotary positions (Choromanski et al. 2021, arXiv 2009.14794)."""
    return create_vision_xformer("vix_performer_tiny_rope", pretrained, kwargs, mixer="performer", rope="axial")


@register_model
def vix_performer_small_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with Performer attention and rotary positions (Choromanski et al. 2021, arXiv 2009.14794)."""
    return create_vision_xformer("vix_performer_small_rope", pretrained, kwargs, mixer="performer", rope="axial")


@register_model
def vix_performer_cifar_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): Performer attention, rotary positions (arXiv 2009.14794)."""
    return create_vision_xformer(
        "vix_performer_cifar_rope", pretrained, kwargs, mixer="performer", rope="axial", num_features=110, qkv_bias=True
    )


@register_model
def vix_nystrom_tiny_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with Nyström attention and rotary positions (Xiong et al. 2021, arXiv 2102.03902)."""
    return create_vision_xformer("vix_nystrom_tiny_rope", pretrained, kwargs, mixer="nystrom", rope="axial")


@register_model
def vix_nystrom_small_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with Nyström attention and rotary positions (Xiong et al. 2021, arXiv 2102.03902)."""
    return create_vision_xformer("vix_nystrom_small_rope", pretrained, kwargs, mixer="nystrom", rope="axial")


@register_model
def vix_nystrom_cifar_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): Nyström attention, rotary positions (arXiv 2102.03902)."""
    return create_vision_xformer(
        "vix_nystrom_cifar_rope",
        pretrained,
        kwargs,
        mixer="nystrom",
        rope="axial",
        num_landmarks=64,
        conv_residual=True,
    )
