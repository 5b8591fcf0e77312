"""Hybrid X-formers: ViT with another token mixer and a convolutional stem instead of the linear patch embedding.

Jeevan & Sethi 2022, "Resource-efficient Hybrid X-formers for Vision" (arXiv 2107.02239): ViL, ViP, ViN are its
Linformer, Performer and Nyströmformer, ViT the softmax control. Sizes and ``_rope`` as in ``vix.py``. The stem at patch
16 is that of Xiao et al. 2021 (arXiv 2106.14881); at ``cifar`` it is the paper's three 3x3 convolutions, with
normalisation and GELU between them, which the official code lacks, so that its stem is one linear convolution
(``stem="conv_linear"``: without). Behind the stem ``cifar`` departs from that code as in ``vix.py``: Nyström's
landmarks are pooled over the image, and its residual convolution is a depthwise 5x5 there and not over 33 tokens of the
raster; nothing is padded; Linformer's keys are turned after they are projected, and its matrices are resampled for
another image size; position embedding and class token start at timm's scale; and but for the stem's normalisation in
training no value depends on other images of the batch.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from .vit import VisionXformer, create_vision_xformer, default_cfgs_for

default_cfgs = generate_default_cfgs(
    default_cfgs_for(
        [
            "hybrid_vit_tiny",
            "hybrid_vit_small",
            "hybrid_vit_base",
            "hybrid_vit_cifar",
            "hybrid_vil_tiny",
            "hybrid_vil_small",
            "hybrid_vil_base",
            "hybrid_vil_cifar",
            "hybrid_vip_tiny",
            "hybrid_vip_small",
            "hybrid_vip_base",
            "hybrid_vip_cifar",
            "hybrid_vin_tiny",
            "hybrid_vin_small",
            "hybrid_vin_base",
            "hybrid_vin_cifar",
            "hybrid_via_tiny",
            "hybrid_via_small",
            "hybrid_via_base",
            "hybrid_fnet_tiny",
            "hybrid_fnet_cifar",
            "hybrid_mixer_tiny",
            "hybrid_mixer_cifar",
            "hybrid_vit_tiny_rope",
            "hybrid_vit_small_rope",
            "hybrid_vit_cifar_rope",
            "hybrid_vil_tiny_rope",
            "hybrid_vil_small_rope",
            "hybrid_vil_cifar_rope",
            "hybrid_vip_tiny_rope",
            "hybrid_vip_small_rope",
            "hybrid_vip_cifar_rope",
            "hybrid_vin_tiny_rope",
            "hybrid_vin_small_rope",
            "hybrid_vin_cifar_rope",
        ],
        first_conv="patch_embed.proj.0.conv",
    )
)


@register_model
def hybrid_vit_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, softmax attention (the control, arXiv 2010.11929)."""
    return create_vision_xformer("hybrid_vit_tiny", pretrained, kwargs, mixer="softmax", stem="conv")


@register_model
def hybrid_vit_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with convolutional stem, softmax attention (the control, arXiv 2010.11929)."""
    return create_vision_xformer("hybrid_vit_small", pretrained, kwargs, mixer="softmax", stem="conv")


@register_model
def hybrid_vit_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with convolutional stem, softmax attention (the control, arXiv 2010.11929)."""
    return create_vision_xformer("hybrid_vit_base", pretrained, kwargs, mixer="softmax", stem="conv")


@register_model
def hybrid_vit_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): convolutional stem, softmax attention (arXiv 2010.11929)."""
    return create_vision_xformer("hybrid_vit_cifar", pretrained, kwargs, mixer="softmax", stem="conv")


@register_model
def hybrid_vil_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, Linformer attention (Wang et al. 2020, arXiv 2006.04768)."""
    return create_vision_xformer("hybrid_vil_tiny", pretrained, kwargs, mixer="linformer", stem="conv")


@register_model
def hybrid_vil_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with convolutional stem, Linformer attention (Wang et al. 2020, arXiv 2006.04768)."""
    return create_vision_xformer("hybrid_vil_small", pretrained, kwargs, mixer="linformer", stem="conv")


@register_model
def hybrid_vil_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with convolutional stem, Linformer attention (Wang et al. 2020, arXiv 2006.04768)."""
    return create_vision_xformer("hybrid_vil_base", pretrained, kwargs, mixer="linformer", stem="conv")


@register_model
def hybrid_vil_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): convolutional stem, Linformer attention (arXiv 2006.04768)."""
    return create_vision_xformer(
        "hybrid_vil_cifar", pretrained, kwargs, mixer="linformer", stem="conv", num_proj_tokens=64
    )


@register_model
def hybrid_vip_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, Performer attention (Choromanski et al. 2021, arXiv 2009.14794)."""
    return create_vision_xformer("hybrid_vip_tiny", pretrained, kwargs, mixer="performer", stem="conv")


@register_model
def hybrid_vip_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with convolutional stem, Performer attention (Choromanski et al. 2021, arXiv 2009.14794)."""
    return create_vision_xformer("hybrid_vip_small", pretrained, kwargs, mixer="performer", stem="conv")


@register_model
def hybrid_vip_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with convolutional stem, Performer attention (Choromanski et al. 2021, arXiv 2009.14794)."""
    return create_vision_xformer("hybrid_vip_base", pretrained, kwargs, mixer="performer", stem="conv")


@register_model
def hybrid_vip_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): convolutional stem, Performer attention (arXiv 2009.14794)."""
    return create_vision_xformer(
        "hybrid_vip_cifar", pretrained, kwargs, mixer="performer", stem="conv", num_features=110, qkv_bias=True
    )


@register_model
def hybrid_vin_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, Nyström attention (Xiong et al. 2021, arXiv 2102.03902)."""
    return create_vision_xformer("hybrid_vin_tiny", pretrained, kwargs, mixer="nystrom", stem="conv")


@register_model
def hybrid_vin_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with convolutional stem, Nyström attention (Xiong et al. 2021, arXiv 2102.03902)."""
    return create_vision_xformer("hybrid_vin_small", pretrained, kwargs, mixer="nystrom", stem="conv")


@register_model
def hybrid_vin_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with convolutional stem, Nyström attention (Xiong et al. 2021, arXiv 2102.03902)."""
    return create_vision_xformer("hybrid_vin_base", pretrained, kwargs, mixer="nystrom", stem="conv")


@register_model
def hybrid_vin_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): convolutional stem, Nyström attention (arXiv 2102.03902)."""
    return create_vision_xformer(
        "hybrid_vin_cifar", pretrained, kwargs, mixer="nystrom", stem="conv", num_landmarks=64, conv_residual=True
    )


@register_model
def hybrid_via_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, atrous attention (after ACC-ViT, arXiv 2403.04200)."""
    return create_vision_xformer("hybrid_via_tiny", pretrained, kwargs, mixer="atrous", stem="conv")


@register_model
def hybrid_via_small(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with convolutional stem, atrous attention (after ACC-ViT, arXiv 2403.04200)."""
    return create_vision_xformer("hybrid_via_small", pretrained, kwargs, mixer="atrous", stem="conv")


@register_model
def hybrid_via_base(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-B/16 with convolutional stem, atrous attention (after ACC-ViT, arXiv 2403.04200)."""
    return create_vision_xformer("hybrid_via_base", pretrained, kwargs, mixer="atrous", stem="conv")


@register_model
def hybrid_fnet_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, Fourier mixing (FNet, Lee-Thorp et al. 2021, arXiv 2105.03824)."""
    return create_vision_xformer("hybrid_fnet_tiny", pretrained, kwargs, mixer="fnet", stem="conv")


@register_model
def hybrid_fnet_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): convolutional stem, Fourier mixing (arXiv 2105.03824)."""
    return create_vision_xformer("hybrid_fnet_cifar", pretrained, kwargs, mixer="fnet", stem="conv")


@register_model
def hybrid_mixer_tiny(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, token MLPs (MLP-Mixer, Tolstikhin et al. 2021, arXiv 2105.01601)."""
    return create_vision_xformer("hybrid_mixer_tiny", pretrained, kwargs, mixer="mixer", stem="conv")


@register_model
def hybrid_mixer_cifar(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): convolutional stem, token MLPs (arXiv 2105.01601)."""
    return create_vision_xformer("hybrid_mixer_cifar", pretrained, kwargs, mixer="mixer", stem="conv")


@register_model
def hybrid_vit_tiny_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, softmax attention and rotary positions (the control, arXiv 2010.11929)."""
    return create_vision_xformer("hybrid_vit_tiny_rope", pretrained, kwargs, mixer="softmax", stem="conv", rope="axial")


@register_model
def hybrid_vit_small_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with convolutional stem, softmax attention and rotary positions (the control, arXiv 2010.11929)."""
    return create_vision_xformer(
        "hybrid_vit_small_rope", pretrained, kwargs, mixer="softmax", stem="conv", rope="axial"
    )


@register_model
def hybrid_vit_cifar_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): conv stem, softmax attention, RoPE (arXiv 2010.11929)."""
    return create_vision_xformer(
        "hybrid_vit_cifar_rope", pretrained, kwargs, mixer="softmax", stem="conv", rope="axial"
    )


@register_model
def hybrid_vil_tiny_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, Linformer attention and rotary positions (arXiv 2006.04768)."""
    return create_vision_xformer(
        "hybrid_vil_tiny_rope", pretrained, kwargs, mixer="linformer", stem="conv", rope="axial"
    )


@register_model
def hybrid_vil_small_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with convolutional stem, Linformer attention and rotary positions (arXiv 2006.04768)."""
    return create_vision_xformer(
        "hybrid_vil_small_rope", pretrained, kwargs, mixer="linformer", stem="conv", rope="axial"
    )


@register_model
def hybrid_vil_cifar_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): conv stem, Linformer attention, RoPE (arXiv 2006.04768)."""
    return create_vision_xformer(
        "hybrid_vil_cifar_rope", pretrained, kwargs, mixer="linformer", stem="conv", rope="axial", num_proj_tokens=64
    )


@register_model
def hybrid_vip_tiny_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, Performer attention and rotary positions (arXiv 2009.14794)."""
    return create_vision_xformer(
        "hybrid_vip_tiny_rope", pretrained, kwargs, mixer="performer", stem="conv", rope="axial"
    )


@register_model
def hybrid_vip_small_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with convolutional stem, Performer attention and rotary positions (arXiv 2009.14794)."""
    return create_vision_xformer(
        "hybrid_vip_small_rope", pretrained, kwargs, mixer="performer", stem="conv", rope="axial"
    )


@register_model
def hybrid_vip_cifar_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): conv stem, Performer attention, RoPE (arXiv 2009.14794)."""
    return create_vision_xformer(
        "hybrid_vip_cifar_rope",
        pretrained,
        kwargs,
        mixer="performer",
        stem="conv",
        rope="axial",
        num_features=110,
        qkv_bias=True,
    )


@register_model
def hybrid_vin_tiny_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-Ti/16 with convolutional stem, Nyström attention and rotary positions (arXiv 2102.03902)."""
    return create_vision_xformer("hybrid_vin_tiny_rope", pretrained, kwargs, mixer="nystrom", stem="conv", rope="axial")


@register_model
def hybrid_vin_small_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """ViT-S/16 with convolutional stem, Nyström attention and rotary positions (arXiv 2102.03902)."""
    return create_vision_xformer(
        "hybrid_vin_small_rope", pretrained, kwargs, mixer="nystrom", stem="conv", rope="axial"
    )


@register_model
def hybrid_vin_cifar_rope(pretrained: bool = False, **kwargs: Any) -> VisionXformer:
    """The paper's 32 px model, corrected (see module): conv stem, Nyström attention, RoPE (arXiv 2102.03902)."""
    return create_vision_xformer(
        "hybrid_vin_cifar_rope",
        pretrained,
        kwargs,
        mixer="nystrom",
        stem="conv",
        rope="axial",
        num_landmarks=64,
        conv_residual=True,
    )
