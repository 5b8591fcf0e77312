"""A timm ViT with a head for segmentation: how it is built, its learning rates, its loss, and what it costs."""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from road_scenes import CLASSES, IGNORED
from timm.data import resolve_model_data_config
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

import timm_vix
from timm_vix._checks import InputError, check_integer
from timm_vix._device import autocast
from timm_vix._files import one_line
from timm_vix.data.images import normaliser
from timm_vix.measure.job import time_interleaved, warm_up
from timm_vix.measure.memory import PeakMemory, set_malloc
from timm_vix.measure.process import explain
from timm_vix.measure.statistics import compare_times
from timm_vix.train.build import keys_that_differ

try:
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch.encoders import TimmViTEncoder
except ImportError as error:
    raise SystemExit(
        "error: segmentation_models_pytorch is not installed; pip install 'timm-vix[segmentation]' brings it"
    ) from error

# mixers with their keywords, and softmax with merged tokens
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "merged": dict(merge=0.3),
    "nystrom": dict(window_size=4),
    "linformer": dict(window_size=4),
    "axial": {},
    "performer": {},
    "latent": {},
}
DPT = dict(decoder_intermediate_channels=(48, 96, 192, 192), decoder_fusion_channels=64)  # a quarter of its own widths


class LinearHead(nn.Module):
    """Features of four layers, normalised, to the logits of each patch, which are enlarged to the image's size."""

    def __init__(self, encoder: TimmViTEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        width = sum(encoder.out_channels)
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, len(CLASSES), 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features, _ = self.encoder(x)  # four of (B, C, h, w)
        return F.interpolate(self.head(torch.cat(features, 1)), x.shape[-2:], mode="bilinear", align_corners=False)


def check_whole(differing: dict[str, str]) -> None:
    """Raise InputError for weights that lack some of the model's, or have others.

    timm leaves out the classifier of a backbone, and is not strict with the rest then.
    """
    if differing:
        found = "; ".join(f"{kind.lower()} are {one_line(names, 80)}" for kind, names in differing.items())
        raise InputError(f"expected all weights of the model, its classifier aside, and no others: {found}")


def check_size(run: argparse.Namespace) -> None:
    """Raise InputError for a size of image or patch that the head doesn't take."""
    height, width = run.img_size
    if height % run.patch_size or width % run.patch_size:
        raise InputError(f"img_size={height} {width}: expected multiples of patch_size={run.patch_size}")
    if run.head == "dpt" and (run.patch_size not in (4, 8, 16, 32) or height % 32 or width % 32):
        raise InputError(
            f"head=dpt takes patches of 4, 8, 16 or 32 px and sizes that are multiples of 32, not {run.patch_size} px "
            f"and {height} {width}; head=linear takes any"
        )


def build(run: argparse.Namespace, mixer: str) -> nn.Module:
    """A segmentation model whose ``encoder.model`` is timm's ViT, converted unless ``mixer`` is softmax."""
    height, width = run.img_size
    keywords: dict[str, Any] = dict(img_size=(height, width), patch_size=run.patch_size, num_classes=0)
    if run.weights:
        keywords["pretrained_cfg_overlay"] = dict(file=str(run.weights), source=None)
    torch.manual_seed(run.seed)
    try:
        with keys_that_differ() as differing:
            if run.head == "dpt":
                weights = "local" if run.weights else None  # any name: the file is in the overlay
                net = smp.DPT(f"tu-{run.model}", encoder_weights=weights, classes=len(CLASSES), **DPT, **keywords)
            else:
                net = LinearHead(TimmViTEncoder(run.model, pretrained=bool(run.weights), **keywords))
        check_whole(differing)
    except Exception as error:  # timm, torch and safetensors raise by kind of damage
        raise InputError(f"model={run.model} with weights={run.weights} cannot be built: {one_line(error)}") from error
    backbone = net.encoder.model
    if not isinstance(backbone, (VisionTransformer, Eva)):
        raise InputError(f"model={run.model} is a {type(backbone).__name__}; expected a ViT of timm, or an Eva")
    if mixer != "softmax":
        timm_vix.convert(backbone, "softmax" if mixer == "merged" else mixer, **MIXERS[mixer])
    if run.trained_blocks is not None:
        check_integer("trained_blocks", run.trained_blocks, 0, len(backbone.blocks))
        backbone.requires_grad_(False)
        for block in backbone.blocks[len(backbone.blocks) - run.trained_blocks :]:
            block.requires_grad_(True)
    return net.to(run.device)


def optimizer_of(net: nn.Module, run: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; the learning rate is that of the head, and falls from the last block of the backbone to the first."""
    backbone = net.encoder.model
    groups = param_groups_layer_decay(
        backbone, run.weight_decay, backbone.no_weight_decay(), layer_decay=run.layer_decay
    )
    head = [parameter for name, parameter in net.named_parameters() if not name.startswith("encoder.")]
    return torch.optim.AdamW([*groups, dict(params=head, lr_scale=1.0)], lr=run.lr, weight_decay=run.weight_decay)


class Objective:
    """Cross-entropy and Dice loss of a batch, over the pixels that have a class.

    Dice counts a rare class as much as a frequent one, as mIoU does.
    """

    def __init__(self, net: nn.Module, run: argparse.Namespace) -> None:
        self.net, self.run = net, run
        self.normalise = normaliser(resolve_model_data_config(net.encoder.model), run.device)
        self.dice = smp.losses.DiceLoss("multiclass", ignore_index=IGNORED)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 logits (B, classes, h, w) of uint8 pixels."""
        with autocast(self.run.device, self.run.dtype):
            return self.net(self.normalise(pixels)).float()

    def loss(self, pixels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        logits, classes = self.logits(pixels), classes.long().to(self.run.device)
        # a batch without any class has no loss
        entropy = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="sum")
        return entropy / (classes != IGNORED).sum().clamp(min=1) + self.dice(logits, classes)


def calls(run: argparse.Namespace, mixer: str) -> list[Callable[[], None]]:
    """A step of training a fresh model with a batch of random pixels, and the inference of one image."""
    net = build(run, mixer)
    optimizer, objective = optimizer_of(net, run), Objective(net, run)
    pixels = torch.randint(256, (run.batch_size, 3, *run.img_size), dtype=torch.uint8)
    classes = torch.randint(len(CLASSES), (run.batch_size, *run.img_size))

    def step() -> None:
        net.train()
        objective.loss(pixels, classes).backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        net.eval()
        with torch.inference_mode():
            objective.logits(pixels[:1])

    return [step, infer]


def costs(run: argparse.Namespace, mixer: str) -> dict[str, Any]:
    """The result of ``costs_here`` in a process of its own, since peak memory is that of all that a process did.

    The result is empty if the measurement fails, for example for lack of memory, so that the training isn't lost.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(costs_here, run, mixer).result()
    except Exception as error:  # models and devices may raise anything; a process that was killed raises, too
        print(
            f"the costs of {mixer} could not be measured: {explain(error)}; its row has none. If that row is removed, "
            "the same command measures them again",
            flush=True,
        )
        return {}


def costs_here(run: argparse.Namespace, mixer: str) -> dict[str, Any]:
    """Time of a training step and of inference, in turn with softmax; and the memory of a training step."""
    if run.threads:
        torch.set_num_threads(run.threads)
    set_malloc(2**17)
    warm_up(run.device)
    memory = PeakMemory(run.device)
    step, infer = calls(run, mixer)
    step()
    memory.restart()  # building is not what a step needs; the second one is the first with the optimizer's state
    step()
    peak = memory.read()
    set_malloc(2**25)
    baseline = calls(run, "softmax") if mixer != "softmax" else [None, None]
    job = dict(device=run.device, rounds=run.rounds, seconds=0.0)
    found = []
    for mine, theirs in zip((step, infer), baseline):
        times = time_interleaved([mine, theirs] if theirs else [mine], job)
        found.append(compare_times(times[:, 0], times[:, 1] if theirs else None))
    return dict(
        step_ms=round(found[0]["latency_p50_ms"], 1),
        faster_training=round(found[0].get("speedup", 1.0), 3),
        peak_memory_mib=None if peak is None else round(peak, 1),
        infer_ms=round(found[1]["latency_p50_ms"], 1),
        faster_inference=round(found[1].get("speedup", 1.0), 3),
        rounds=run.rounds,
    )
