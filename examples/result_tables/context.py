"""Related work of which nothing is built here: where each idea stands, and what comes nearest."""

from typing import NamedTuple, Optional

import timm
import torch

from . import markdown


class Related(NamedTuple):
    """A paper: its name and arXiv number, where its idea stands, and our or timm's nearest."""

    name: str
    arxiv: Optional[str]
    stands: str
    nearest: str


RELATED = [
    Related(
        "wide attention",
        "2210.00640",
        "One wide layer in place of several gains 0.3 % on four language tasks; there is no evidence on images.",
        "the keywords `depth`, `embed_dim` and `num_heads` of any `vix_*` name",
    ),
    Related(
        "AsCAN",
        "2411.04967",
        "Convolution early, attention late, both in between, trained from scratch. Of a trained ViT the late "
        "layers are those that convert best.",
        "`stem='conv'` (`hybrid_*`), and `layers=` for which blocks are efficient",
    ),
    Related(
        "ViT-ResNAS",
        "2109.00642",
        "A searched ViT whose stages shrink by pooling with a skip connection; its code may not be used commercially.",
        "`pin_*` and `pip_*`, which shrink without the skip; timm's `pit_*`",
    ),
    Related(
        "Q-HyViT",
        "2303.12557",
        "Post-training quantisation that chooses range and granularity layer by layer.",
        "torch's own quantisation of any model here; quantised projections are called, not read",
    ),
    Related(
        "SimQ-NAS",
        "2312.13301",
        "Search for sub-networks and their bit widths in a trained super-network, which has to exist first.",
        "`timm-vix plan`, which searches mixers layer by layer in one trained ViT",
    ),
    Related(
        "ConvShareViT",
        "2504.11517",
        "Linear layers as shared depthwise convolutions for an optical computer; CIFAR-100 at about 63 %.",
        "none; a depthwise convolution of the values is `conv_residual=True`",
    ),
    Related(
        "B-cosification",
        "2411.00715",
        "Turns a trained model into one whose output is an input-dependent linear map, by full fine-tuning.",
        "none; `timm-vix transfer` is the fine-tuning of another replacement",
    ),
    Related(
        "T-TAME",
        "2403.04523",
        "Trains a head that explains a frozen model from its feature maps.",
        "works on any model here through timm's `forward_intermediates`",
    ),
    Related(
        "SpaRTAN", None, "A small convolutional network of several dilations.", "`mixer='atrous'`; timm's `convnext_*`"
    ),
    Related("FMViT", None, "A hybrid of convolution and attention for deployment.", "timm's `nextvit_*`"),
    Related("DuoFormer", None, "Attention across the scales of a convolutional pyramid.", "`cvt_*`"),
    Related("Astroformer", None, "A stack of convolution and relative attention.", "timm's `coatnet_*`"),
    Related(
        "Squeezeformer",
        None,
        "Half the tokens from a middle block on, and all of them again later.",
        "`merge=` of `timm_vix.convert`, which hands on the whole grid too",
    ),
    Related("RoI Tanh-polar", None, "A warp of face images before the network.", "none"),
    Related("Scan and Snap", None, "Theory: how a one-layer transformer learns.", "none"),
    Related(
        "universal approximation",
        "2506.23551",
        "Theory: attention that keeps tokens apart suffices, kernels and sparse attention included.",
        "all mixers with queries and keys",
    ),
]

# name, top-1 and the mechanism here that comes nearest
SHIPPED = [
    ("convit_tiny", "73.1", "`convix_gpsa_tiny`, which takes its weights; `mixer='gpsa'`"),
    ("crossvit_tiny_240", "73.4", "none"),
    ("tnt_s_patch16_224", "81.5", "none; pieces of patches attend in `stem='t2t'`"),
    ("swin_tiny_patch4_window7_224", "81.4", "`window_size=` of Nyström, Linformer and atrous attention"),
    ("convnext_atto", "75.7", "none, without attention"),
    ("nextvit_small", "82.6", "`cvt_*`"),
    ("poolformer_s12", "77.2", "`mixer='pool'`"),
]


def context() -> str:
    """Where each of ``RELATED`` stands."""
    body = []
    for paper in RELATED:
        name = f"[{paper.name}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.name
        body.append([name, paper.stands, paper.nearest])
    return markdown(["paper", "where it stands", "nearest here or in timm"], body)


def shipped_by_timm() -> str:
    """Size, parameters and accuracy of a small model of each family that timm ships."""
    body = []
    for name, top1, nearest in SHIPPED:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        side = timm.get_pretrained_cfg(name).input_size[-1]
        body.append([f"`{name}`", f"{side} px", f"{parameters / 1e6:.1f} M", f"{top1} %", nearest])
    return markdown(["timm's name", "made for", "parameters", "top-1", "nearest here"], body)
