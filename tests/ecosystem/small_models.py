"""The models that the libraries of the ecosystem get: 16 patches, 2 blocks of 2 heads of width 16, 5 classes."""

import timm
import torch
from conftest import lively
from torch import nn

import timm_vix

SIZE = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
# fewer landmarks, regions and groups than patches: with as many of them attention would be softmax
KEYWORDS: dict[str, dict] = {
    "softmax": {},
    "nystrom": dict(num_landmarks=4),
    "linformer": dict(num_proj_tokens=4),
    "performer": dict(num_features=32),
    "axial": dict(strip_width=1),
    "latent": dict(group_size=4, latents_per_group=2),
}
CONVERTED = "converted"
KINDS = [*KEYWORDS, CONVERTED]


def build(kind: str, **kwargs) -> nn.Module:
    """A model in eval mode with the mixer of that name, or a ViT of timm with Nyström and Linformer layers.

    The same call gives the same weights.
    """
    torch.manual_seed(0)
    kwargs = {**SIZE, **kwargs}
    if kind != CONVERTED:
        name = "vix_softmax_cifar" if kind == "softmax" else f"vix_{kind}_tiny"
        return lively(timm.create_model(name, **kwargs, **KEYWORDS[kind]).eval())
    model = lively(timm.create_model("vit_tiny_patch16_224", **kwargs).eval())
    layers = {index: {"mixer": mixer, **KEYWORDS[mixer]} for index, mixer in enumerate(("nystrom", "linformer"))}
    timm_vix.convert(model, layers=layers)
    return lively(model)
