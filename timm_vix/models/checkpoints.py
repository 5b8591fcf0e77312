"""Checkpoints of models whose attention was replaced: our own as they are, a softmax model's with what it lacks fresh.

Keys are those of the softmax model wherever a mixer took over its weights, so that both fit.
"""

import logging
import re
from typing import Any

import torch
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

from ..conversion.replace import resample_weights
from ..mixers._slot import TokenMixer
from ._projected import ProjectedNystrom, ProjectedPerformer

_logger = logging.getLogger(__name__)

MECHANISMS = (TokenMixer, ProjectedNystrom, ProjectedPerformer)
# what softmax attention has below its own name
SOFTMAX_KEY = re.compile(r"(qkv|q_norm|k_norm|norm|gate|proj)\.")


def own_keys(model: nn.Module) -> set[str]:
    """State-dict keys that a softmax ViT of the same size doesn't have: mixers' extras and convolutional stems."""
    keys = set()
    for prefix, module in model.named_modules():
        if isinstance(module, MECHANISMS):
            keys |= {f"{prefix}.{key}" for key in module.state_dict() if not SOFTMAX_KEY.match(key)}
    stem = getattr(model, "patch_embed", None)
    if isinstance(getattr(stem, "proj", None), nn.Sequential):
        keys |= {key for key in model.state_dict() if key.startswith("patch_embed.")}
    return keys


def absent_keys(state_dict: dict[str, torch.Tensor], model: nn.Module, own: set[str]) -> set[str]:
    """What a checkpoint of a softmax ViT has and the model doesn't, whose ``own_keys`` are given.

    That is a linear embedding, positions, and softmax attention where none is left: other keys there are another
    mixer's.
    """
    bare = [f"{prefix}." for prefix, m in model.named_modules() if isinstance(m, TokenMixer) and not hasattr(m, "qkv")]
    absent = {
        key for key in state_dict for prefix in bare if key.startswith(prefix) and SOFTMAX_KEY.match(key[len(prefix) :])
    }
    if any(key.startswith("patch_embed.") for key in own):
        absent |= {key for key in state_dict if key.startswith("patch_embed.")}
    if model.pos_embed is None:
        absent |= {"pos_embed"} & state_dict.keys()
    return absent - model.state_dict().keys()


def tensors_of(checkpoint: Any) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, which training scripts store under "model" or "state_dict".

    Raises:
        ValueError: for anything but a dictionary from text to tensors.
    """
    for name in ("model", "state_dict"):
        if isinstance(checkpoint, dict):
            checkpoint = checkpoint.get(name, checkpoint)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"the checkpoint is a {type(checkpoint).__name__}; expected a dictionary from text to tensors")
    for key, value in checkpoint.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"the checkpoint holds a {type(value).__name__} at {key!r}; expected a dictionary from text to tensors"
            )
    return checkpoint


def summary(keys: set[str]) -> str:
    """Keys for a log line, blocks and stems folded."""
    folded = {re.sub(r"^patch_embed\.proj\.\d.*", "patch_embed.proj.*", key) for key in keys}
    return ", ".join(sorted({re.sub(r"\bblocks\.\d+\.", "blocks.*.", key) for key in folded})) or "nothing"


def recognise(state_dict: dict[str, Any], model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pair the layers for parallel blocks, leave out what only softmax attention has, and tell ``adopt`` of both."""
    parallel = any(isinstance(module, ParallelThingsBlock) for module in model.modules())
    pairs = parallel and not any(".attns." in key for key in state_dict)
    if pairs:
        state_dict = paired(state_dict)
    own = own_keys(model)
    ours = bool(own & state_dict.keys())
    dropped = set() if ours else absent_keys(state_dict, model, own)
    state_dict = {key: value for key, value in state_dict.items() if key not in dropped}
    return state_dict, dict(ours=ours, dropped=dropped, changed=pairs)


def adopt(
    state_dict: dict[str, Any], model: nn.Module, ours: bool, dropped: set[str], changed: bool = False
) -> dict[str, Any]:
    """Complete a state dict whose keys are the model's: grids resampled, what softmax attention lacks fresh.

    Args:
        ours: it comes from such a model, so nothing is fresh.
        dropped: keys that were left out, for the log line.
        changed: the model is another function of the same parameters.

    Raises:
        ValueError: if keys or shapes don't fit.
    """
    target, own = model.state_dict(), own_keys(model)
    mixers = [module for module in model.modules() if isinstance(module, MECHANISMS)]
    resample_weights(state_dict, model)
    if not ours:
        fresh = {key: target[key] for key in own}
        # inherited weights know no local convolution: it starts as nothing and leaves their function alone
        local = ("attn.conv.weight", "core.conv.weight")
        fresh = {key: torch.zeros_like(t) if key.endswith(local) else t for key, t in fresh.items()}
        state_dict = {**state_dict, **fresh}
    check_keys(state_dict, model, target)
    cfg = model.pretrained_cfg
    # a mixer without parameters of its own can't tell whose weights these are; a saved model brings its configuration
    if not ours and (own or dropped or changed or (mixers and not cfg.get("source"))):
        _logger.warning(
            f"{cfg.get('architecture', 'model')}: weights of a softmax ViT loaded, the model needs fine-tuning. "
            f"Fresh: {summary(own)}. Left out: {summary(dropped)}."
        )
    return state_dict


def paired(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A sequential model's weights for parallel blocks: layers 2 i and 2 i + 1 side by side in block i, of each stage.

    Raises:
        ValueError: for a ViT with an odd number of layers.
    """
    branch = {"norm1": "attns.{}.norm", "attn": "attns.{}.attn", "ls1": "attns.{}.ls"}
    branch |= {"norm2": "ffns.{}.norm", "mlp": "ffns.{}.mlp", "ls2": "ffns.{}.ls"}
    found = {key: re.match(r"(.+\.)?blocks\.(\d+)\.(\w+)\.", key) for key in state_dict}
    layers = {int(match[2]) for match in found.values() if match and match[3] in branch and match[1] is None}
    if len(layers) % 2:
        raise ValueError(f"the checkpoint has {len(layers)} layers: block='parallel' pairs them, so they must be even")
    out = {}
    for key, value in state_dict.items():
        match = found[key]
        if match and match[3] in branch:
            stage, layer = match[1] or "", int(match[2])
            key = f"{stage}blocks.{layer // 2}.{branch[match[3]].format(layer % 2)}.{key[match.end() :]}"
        out[key] = value
    return out


def check_keys(state_dict: dict[str, Any], model: nn.Module, target: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless keys and shapes agree, the classifier of another label set and input channels apart."""
    cfg = model.pretrained_cfg
    # timm leaves out the head of another label set, and adapts the first convolution, after this
    other_head = model.num_classes != cfg["num_classes"]
    classifiers = cfg["classifier"] if isinstance(cfg["classifier"], (tuple, list)) else (cfg["classifier"],)
    apart = {f"{head}.{part}" for head in classifiers for part in ("weight", "bias")} if other_head else set()
    first_conv = getattr(model, "_traits", {}).get("first_conv", cfg["first_conv"])
    apart.add(f"{first_conv}.weight")
    missing = target.keys() - state_dict.keys() - apart
    unexpected = state_dict.keys() - target.keys() - apart
    reshaped = {
        key
        for key in (target.keys() & state_dict.keys()) - apart
        if tuple(getattr(state_dict[key], "shape", ())) != tuple(target[key].shape)
    }
    if missing or unexpected or reshaped:
        raise ValueError(
            f"the checkpoint doesn't fit {cfg.get('architecture', 'the model')}. Missing: {summary(missing)}. "
            f"Unexpected: {summary(unexpected)}. Of another shape: {summary(reshaped)}."
        )
