"""Checkpoints of models whose attention was replaced: our own as they are, a softmax ViT's with new weights beside.

Keys are those of the softmax model wherever a slot took over its weights, so that both fit. What a model adds falls
into groups, its mixers and its stem; a group of which a checkpoint has no key at all keeps its initial weights.
"""

import logging
import math
import re
from typing import Any, Optional

import torch
from timm.layers import resample_abs_pos_embed
from timm.models._input import get_pretrained_grid_size
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

from .._checks import InputError
from ..mixers._mechanism import AttentionMechanism
from ..mixers.softmax import SoftmaxAttention
from ..slots.model import hosts_of, resample_weights
from ..slots.slot import TokenSlot, rename_core_keys
from ._daff import DepthwiseFeedForward

_logger = logging.getLogger(__name__)

# what softmax attention has below its own name
SOFTMAX_KEY = re.compile(r"(qkv|q_norm|k_norm|norm|gate|proj)\.")
# what ConViT has at its attention besides
CONVIT_POSITIONS = (".attn.core.gating_param", ".attn.core.pos_proj")


def mixer_keys(model: nn.Module) -> set[str]:
    """State-dict keys of the mixers of the trunk themselves, which softmax attention doesn't have."""
    keys = {f"{path}.core.{key}" for path, module in hosts_of(model).items() for key in module.core.state_dict()}
    return keys - stem_keys(model)


def feed_forward_keys(model: nn.Module, zeros: bool = False) -> set[str]:
    """State-dict keys of feed-forward layers that a plain MLP doesn't have, or only those that begin at zero."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, DepthwiseFeedForward)}
    return {
        f"{path}.{key}"
        for path, layer in layers.items()
        for key in layer.new_keys()
        if not zeros or key in layer.zero_init
    }


def stem_keys(model: nn.Module) -> set[str]:
    """State-dict keys of a stem of several layers, which a linear patch embedding doesn't have."""
    stem = getattr(model, "patch_embed", None)
    if not isinstance(getattr(stem, "proj", None), nn.Sequential):
        return set()
    return {key for key in model.state_dict() if key.startswith("patch_embed.")}


def absent_keys(state_dict: dict[str, torch.Tensor], model: nn.Module, new: set[str]) -> set[str]:
    """The keys of a softmax ViT's checkpoint for which the model has no place, see ``split_checkpoint``.

    They belong to a linear patch embedding, to the position embedding, and to softmax attention that the model doesn't
    have; keys of other mixers aren't among them. ``new`` are the keys of the groups that the checkpoint lacks.
    """
    bare = [f"{path}." for path, module in model.named_modules() if isinstance(module, TokenSlot)]
    absent = {
        key for key in state_dict for prefix in bare if key.startswith(prefix) and SOFTMAX_KEY.match(key[len(prefix) :])
    }
    if any(key.startswith("patch_embed.") for key in new):
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
        raise InputError(f"the checkpoint is a {type(checkpoint).__name__}; expected a dictionary from text to tensors")
    for key, value in checkpoint.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"the checkpoint holds a {type(value).__name__} at {key!r}; expected a dictionary from text to tensors"
            )
    return checkpoint


def summary(keys: set[str]) -> str:
    """Keys for a log line, blocks and stems folded."""
    folded = {re.sub(r"^patch_embed\.proj\.\d.*", "patch_embed.proj.*", key) for key in keys}
    return ", ".join(sorted({re.sub(r"\bblocks\.\d+\.", "blocks.*.", key) for key in folded})) or "nothing"


def new_keys(state_dict: dict[str, Any], model: nn.Module) -> set[str]:
    """The keys of those groups of which a checkpoint has none.

    They are mixers, stem, what an MLP doesn't have, and biases of queries, keys and values.
    """
    biases = {key for key in model.state_dict() if key.endswith("attn.qkv.bias")}
    groups = (mixer_keys(model), stem_keys(model), feed_forward_keys(model), biases)
    return {key for group in groups if not group & state_dict.keys() for key in group}


def split_checkpoint(state_dict: dict[str, Any], model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rename the keys of a checkpoint to those of the model, and drop those that only softmax attention has.

    Layers are paired for parallel blocks.

    Returns:
        The state dict, and further keyword arguments of ``complete_checkpoint``.
    """
    positions: set[str] = set()
    if any(key.endswith(".attn.qk.weight") for key in state_dict):
        state_dict = from_convit(state_dict)
        positions = {key for key in state_dict if key.endswith(CONVIT_POSITIONS)} - model.state_dict().keys()
    for path, module in hosts_of(model).items():
        rename_core_keys(state_dict, f"{path}.", module.core)
    parallel = any(isinstance(module, ParallelThingsBlock) for module in model.modules())
    pairs = parallel and not any(".attns." in key for key in state_dict)
    if pairs:
        state_dict = pair_layers(state_dict)
    new = new_keys(state_dict, model)
    # with weights of its mixers, or where they have none, of its stem or MLPs, a checkpoint is one of ours;
    # not if it has softmax attention where the model has none
    absent = absent_keys(state_dict, model, new)
    softmax = any(".attn." in key for key in absent)
    own = mixer_keys(model) or stem_keys(model) or feed_forward_keys(model)
    ours = bool(own & state_dict.keys()) and not (softmax or positions)
    dropped = set() if ours else absent | positions
    state_dict = {key: value for key, value in state_dict.items() if key not in dropped}
    return state_dict, dict(new=new, ours=ours, dropped=dropped, paired=pairs)


def complete_checkpoint(
    state_dict: dict[str, Any],
    model: nn.Module,
    new: set[str],
    ours: bool,
    dropped: set[str] = frozenset(),  # type: ignore[assignment]
    paired: bool = False,
) -> dict[str, Any]:
    """Complete a state dict whose keys are the model's: grids resampled, what it lacks as in a new model.

    Args:
        new: keys that keep their initial value.
        ours: it comes from a model with mixers, so that a missing key is an error and nothing is logged.
        dropped: keys that were left out, for the log line.
        paired: the model is another function of the same parameters.

    Raises:
        ValueError: if keys or shapes don't fit.
    """
    resample_weights(state_dict, model)
    target = model.state_dict()
    in_stem = stem_keys(model)
    # added parameters start at values with which they don't change, or hardly change, what the loaded weights compute
    values = {
        f"{path}.core.{name}": value
        for path, module in hosts_of(model).items()
        for name, value in module.core.added_init.items()
        if not ours and f"{path}.core.{name}" not in in_stem  # a new stem has no trained weights
    }
    zeros = {key for key in new if key.endswith("attn.qkv.bias")} | feed_forward_keys(model, zeros=True)
    values |= dict.fromkeys(zeros, 0.0)
    fresh = {key: torch.full_like(target[key], values[key]) if key in values else target[key] for key in new}
    state_dict = {**state_dict, **fresh}
    check_keys(state_dict, model, target)
    cfg = model.pretrained_cfg
    # attention without parameters has no keys that identify a checkpoint; a saved model brings its configuration
    cores = [host.core for host in hosts_of(model).values()]
    plain = any(isinstance(core, AttentionMechanism) and not isinstance(core, SoftmaxAttention) for core in cores)
    unknown = plain and not ours and not cfg.get("source")
    named = not cfg.get("file") and not cfg.get("state_dict")  # the weights that timm knows for the name
    # read by ``deploy``, where it is told beside what the model predicts
    model.has_softmax_weights = bool(new or (not ours and (dropped or paired)) or (unknown and named))
    architecture = cfg.get("architecture", "model")
    if model.has_softmax_weights:
        _logger.warning(
            f"{architecture}: loaded the weights of a softmax ViT, so the model needs fine-tuning. "
            f"Newly initialized: {summary(new)}. Unused: {summary(dropped)}."
        )
    elif unknown:
        _logger.warning(
            f"{architecture}: the weights have the same names as a softmax ViT's. If they are of one, the model needs "
            "fine-tuning."
        )
    return state_dict


def grid_of_positions(
    positions: torch.Tensor, model: nn.Module, num_prefix_tokens: int, kernel: Optional[torch.Tensor]
) -> Optional[tuple[int, int]]:
    """The patch grid of a checkpoint's position embedding (1, tokens, C), or None where it has none.

    It is that of the size in the configuration, or else the model's own, or else a square one.

    Args:
        kernel: the weights of a linear patch embedding, from which timm takes the patch size; None: that of the model.
    """
    patch = model.patch_embed.patch_size if kernel is None or kernel.ndim != 4 else kernel.shape[-2:]
    count, own = positions.shape[1] - num_prefix_tokens, tuple(model.patch_embed.grid_size)
    found = get_pretrained_grid_size(model, torch.empty(0, 0, *patch, device="meta"), count)
    if found is not None or count < 1:
        return found
    if count == own[0] * own[1]:
        return own
    side = math.isqrt(count)
    return (side, side) if side**2 == count else None


def positions_of(state_dict: dict[str, torch.Tensor], model: nn.Module) -> Optional[torch.Tensor]:
    """The position embedding of a checkpoint, (1, tokens, C); None where it or the model has none of that form."""
    positions = state_dict.get("pos_embed")
    return None if positions is None or positions.ndim != 3 or model.pos_embed is None else positions


def resample_positions(
    state_dict: dict[str, torch.Tensor],
    model: nn.Module,
    num_prefix_tokens: int,
    kernel: Optional[torch.Tensor] = None,
) -> None:
    """Move the position embedding of a checkpoint to the patch grid of the model, in place.

    timm's own function reads the grid of the checkpoint off the kernel of a linear patch embedding, and a stem of
    several layers has none. Arguments are those of ``grid_of_positions``.
    """
    positions = positions_of(state_dict, model)
    if positions is None:
        return
    old, new = grid_of_positions(positions, model, num_prefix_tokens, kernel), tuple(model.patch_embed.grid_size)
    if old is not None and old != new:
        state_dict["pos_embed"] = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens)


def check_positions(
    state_dict: dict[str, torch.Tensor], model: nn.Module, num_prefix_tokens: int, kernel: Optional[torch.Tensor]
) -> None:
    """Raise ValueError for a position embedding that isn't of a patch grid and the model's prefix tokens."""
    positions = positions_of(state_dict, model)
    if positions is not None and grid_of_positions(positions, model, num_prefix_tokens, kernel) is None:
        raise InputError(
            f"the checkpoint doesn't fit {model.pretrained_cfg.get('architecture', 'the model')}: it has "
            f"{positions.shape[1]} positions, which are no known patch grid beside {num_prefix_tokens} prefix tokens; "
            "expected class_token, reg_tokens and no_embed_class of the checkpoint's model"
        )


def from_convit(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's ConViT weights under our keys: queries, keys and values in one projection, positions in the mixer.

    The bias of the positional logits is left out, since it cancels in the softmax.
    """
    out = {}
    for key, value in state_dict.items():
        if key.endswith((".attn.qk.weight", ".attn.qk.bias")):
            value = torch.cat([value, state_dict[key.replace(".attn.qk.", ".attn.v.")]])
            key = key.replace(".attn.qk.", ".attn.qkv.")
        elif key.endswith((".attn.gating_param", ".attn.pos_proj.weight")):
            key = key.replace(".attn.", ".attn.core.").removesuffix(".weight")
        if not key.endswith((".attn.v.weight", ".attn.v.bias", ".attn.pos_proj.bias")):
            out[key] = value
    return out


def pair_layers(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A sequential model's weights for parallel blocks: layers 2 i and 2 i + 1 side by side in block i, of each stage.

    Raises:
        ValueError: for a ViT with an odd number of layers.
    """
    branch = {"norm1": "attns.{}.norm", "attn": "attns.{}.attn", "ls1": "attns.{}.ls"}
    branch |= {"norm2": "ffns.{}.norm", "mlp": "ffns.{}.mlp", "ls2": "ffns.{}.ls"}
    found = {key: re.match(r"(.+\.)?blocks\.(\d+)\.(\w+)\.", key) for key in state_dict}
    layers = {int(match[2]) for match in found.values() if match and match[3] in branch and match[1] is None}
    if len(layers) % 2:
        raise InputError(f"the checkpoint has {len(layers)} layers: block='parallel' pairs them, so they must be even")
    out = {}
    for key, value in state_dict.items():
        match = found[key]
        if match and match[3] in branch:
            stage, layer = match[1] or "", int(match[2])
            key = f"{stage}blocks.{layer // 2}.{branch[match[3]].format(layer % 2)}.{key[match.end() :]}"
        out[key] = value
    return out


def check_keys(state_dict: dict[str, Any], model: nn.Module, target: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless keys and shapes agree, the classifier of another label set and channels excepted."""
    cfg = model.pretrained_cfg
    # timm leaves out the head of another label set, and adapts the first convolution, after this
    other_head = model.num_classes != cfg["num_classes"]
    classifiers = cfg["classifier"] if isinstance(cfg["classifier"], (tuple, list)) else (cfg["classifier"],)
    excepted = {f"{head}.{part}" for head in classifiers for part in ("weight", "bias")} if other_head else set()
    for head in classifiers if other_head else ():
        own = {key for key in target.keys() | state_dict.keys() if key.startswith(f"{head.partition('.')[0]}.")}
        if not own & target.keys() or not own & state_dict.keys():  # one of the two has no classifier
            excepted |= own
    first_conv = getattr(model, "_traits", {}).get("first_conv", cfg.get("first_conv"))
    missing = target.keys() - state_dict.keys() - excepted
    unexpected = state_dict.keys() - target.keys() - excepted
    reshaped = {
        key
        for key in (target.keys() & state_dict.keys()) - excepted - {f"{first_conv}.weight"}
        if tuple(getattr(state_dict[key], "shape", ())) != tuple(target[key].shape)
    }
    if missing or unexpected or reshaped:
        pooled = {"fc_norm.weight"} & missing and {"norm.weight"} & unexpected
        raise InputError(
            f"the checkpoint doesn't fit {cfg.get('architecture', 'the model')}. Missing: {summary(missing)}. "
            f"Unexpected: {summary(unexpected)}. Of another shape: {summary(reshaped)}."
            + (" With global_pool='avg', fc_norm=False keeps the checkpoint's norm." if pooled else "")
        )
