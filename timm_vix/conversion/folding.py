"""Multiply the batch norms of a ViT into the linear layers that read them (``norms.py``).

    W (s·x + t) + b = (W diag(s)) x + (b + W t)

s and t are scale and shift of the patches. A prefix token has its own s_p and t_p, so it enters the folded layer as
(s_p/s)·x + (t_p - t)/s. For this a folded norm keeps a weight and a bias for each channel of each prefix token, 2·P·C
parameters; without prefix tokens it keeps none. The residual connection bypasses the norm and doesn't change.
"""

from collections import Counter
from typing import NamedTuple, Optional

import torch
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .._checks import InputError
from .._modules import has_hooks, is_plain_linear
from ..mixers._layout import TokenLayout
from ..slots.attention_slot import AttentionSlot
from ..slots.hooks import HOOKS
from ..slots.landmark_slot import LandmarkSlot
from .handover import Handover
from .norms import NormSite, TokenBatchNorm, norm_sites
from .record import record_norms

ATTENTION = (Attention, AttentionRope, EvaAttention, AttentionSlot, LandmarkSlot)
PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "gate")
# the layers of an MLP that read its input
MLP_READERS = {Mlp: ("fc1",), GluMlp: ("fc1",), SwiGLU: ("fc1_g", "fc1_x")}
HEADS = (VisionTransformer.forward_head, Eva.forward_head, VisionTransformerDistilled.forward_head)
# Of the largest scale in a layer: a scale below that is taken for this one. Its product vanishes beside the others in
# float64, and prefix tokens can be divided by it.
LOWEST_SCALE = 1e-12


class PrefixAffine(nn.Module):
    """A scale and a shift for each channel of each prefix token; patches pass. (B, N, C) -> (B, N, C)."""

    num_prefix_tokens: torch.jit.Final[int]

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        super().__init__()
        self.num_prefix_tokens = len(scale)
        self.weight = nn.Parameter(scale)
        self.bias = nn.Parameter(shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        P = self.num_prefix_tokens
        return torch.cat([x[:, :P] * self.weight + self.bias, x[:, P:]], dim=1)


class Folding(NamedTuple):
    """A batch norm, the linear layers, which alone read it, and the attention module that they belong to, if any."""

    site: NormSite
    norm: TokenBatchNorm
    readers: list[nn.Linear]
    attention: Optional[nn.Module]


def fold_norms(model: nn.Module, last: bool = True) -> None:
    """Multiply the batch norms of ``replace_norms`` into the linear layers after them, in place and exactly.

    The model computes what it computed in evaluation. Fold after training: further training would be without norms.

    Args:
        model: after ``replace_norms``, and after ``finish_handover`` where that had a schedule.
        last: fold the last norm too, into the classifier. False keeps it a batch norm. It is for models whose features
            are used, since folding the last norm would change them.

    Raises:
        ValueError: where what reads a norm isn't linear in its channels, or is changed or observed by a hook, an
            adapter or shared weights; the model is then as it was.
    """
    foldings = [folding_at(model, site) for site in norm_sites(model) if last or site.reader is not None]
    found = [folding for folding in foldings if folding is not None]
    if not found:
        raise InputError(f"{type(model).__name__} has no batch norms to fold; replace_norms(model, images) comes first")
    uses = Counter(id(reader) for folding in found for reader in folding.readers)
    uses.update(id(weight) for module in model.modules() for weight in module._parameters.values())
    for folding in found:
        for reader in folding.readers:
            if any(uses[id(used)] > 1 for used in (reader, *reader.parameters())):
                raise InputError(f"{folding.site.path} can't be folded: weights that read it are used elsewhere, too")
    for folding in found:
        fold(folding)
    record_norms(model, "folded" if any(folding.site.reader is None for folding in found) else "folded_blocks")


def folding_at(model: nn.Module, site: NormSite) -> Optional[Folding]:
    """What is to be folded at a site; None where there is no batch norm.

    Raises:
        ValueError: where that isn't exact.
    """
    norm = site.norm
    if isinstance(norm, Handover) and isinstance(norm.new, TokenBatchNorm):
        raise InputError(
            f"{site.path} is a Handover at step {norm.schedule.taken} of {norm.schedule.steps}; expected "
            "finish_handover(model) "
            "after the last step, before fold_norms(model)"
        )
    if not isinstance(norm, TokenBatchNorm):
        return None
    readers, attention = readers_of(model, site)
    between = [norm, *([] if site.reader is None else [site.reader])]
    for module in between:
        if has_hooks(module, HOOKS):
            raise InputError(
                f"{site.path} can't be folded: its {type(module).__name__} has hooks, which would see other values"
            )
    for name, reader in readers:
        if not is_plain_linear(reader):
            raise InputError(
                f"{site.path} can't be folded: {name} reads it and is a {type(reader).__name__}; allowed is an "
                "nn.Linear without adapter, parametrisation, quantisation or hook"
            )
    return Folding(site, norm, [reader for _, reader in readers], attention)


def readers_of(model: nn.Module, site: NormSite) -> tuple[list[tuple[str, nn.Module]], Optional[nn.Module]]:
    """What multiplies the channels of a norm, by name, and the attention that this belongs to, if any.

    Raises:
        ValueError: where something else reads it.
    """
    reader, parent = site.reader, site.path.rpartition(".")[0]
    if reader is None:
        return heads_of(model, site), None
    if type(reader) in ATTENTION:
        if isinstance(reader, LandmarkSlot):
            check_pooling(site, reader)
        core = getattr(reader, "core", None)
        if getattr(core, "gate_weight", None) is not None:  # of atrous attention, which is read from the tokens too
            raise InputError(
                f"{site.path} can't be folded: the gates of {type(core).__name__} read it as well; allowed is one "
                "dilation, which has no gates"
            )
        found = {name: getattr(reader, name, None) for name in PROJECTIONS}
        return [(f"{parent}.attn.{name}", module) for name, module in found.items() if module is not None], reader
    if type(reader) in MLP_READERS:
        return [(f"{parent}.mlp.{name}", getattr(reader, name)) for name in MLP_READERS[type(reader)]], None
    if type(reader) is nn.Linear:
        return [(f"{parent}.in_proj", reader)], None
    core = getattr(reader, "core", reader)
    raise InputError(
        f"{site.path} can't be folded: {type(core).__name__} reads it, which doesn't begin with a linear layer over "
        "channels; allowed are attention with queries, keys and values, and timm's Mlp, GluMlp and SwiGLU"
    )


def check_pooling(site: NormSite, slot: LandmarkSlot) -> None:
    """Raise ValueError where tokens are pooled before they are projected by weights that don't sum to one.

    Means of s·x + t are s times means of x, plus t; other sums aren't.
    """
    core, layout = slot.core, TokenLayout(slot.num_prefix_tokens, slot.grid)
    if not core.pools_tokens or slot.proj.weight.is_meta:
        return
    parameter = slot.proj.weight
    ones = torch.ones(1, slot.num_tokens, 1, dtype=parameter.dtype, device=parameter.device)
    with torch.no_grad():
        sums = [core.pool(ones, layout, core.cells(layout.grid), values) for values in (False, True)]
    if any((total - 1).abs().max() > max(1e-6, 10 * torch.finfo(parameter.dtype).eps) for total in sums):
        raise InputError(
            f"{site.path} can't be folded: {type(core).__name__} pools tokens by weights that don't sum to one; "
            "allowed are means, as those of Nyström's landmarks"
        )


def heads_of(model: nn.Module, site: NormSite) -> list[tuple[str, nn.Module]]:
    """The classifiers that read the last norm.

    Raises:
        ValueError: where its features are read, or what comes between isn't linear.
    """
    allowed = "allowed is last=False, which leaves it a batch norm"
    if type(model).forward_head not in HEADS:
        raise InputError(f"{site.path} can't be folded: {type(model).__name__} has a head of its own; {allowed}")
    heads = {name: head for name in ("head", "head_dist") if (head := getattr(model, name, None)) is not None}
    if any(isinstance(head, nn.Identity) for head in heads.values()):
        raise InputError(f"{site.path} can't be folded: there is no classifier, and its features are read; {allowed}")
    pooled = "attention" if model.attn_pool is not None else model.global_pool
    if site.name == "norm" and pooled not in ("", "token", "avg"):
        raise InputError(f"{site.path} can't be folded: pooling by {pooled!r} isn't linear; {allowed}")
    return list(heads.items())


@torch.no_grad()
def fold(folding: Folding) -> None:
    """Fold one norm: weights are changed in place, a bias is created where there is none."""
    norm, attention = folding.norm, folding.attention
    scales, shifts = norm.affine()
    largest = scales[-1].abs().max()
    s = torch.where(scales[-1].abs() < LOWEST_SCALE * largest, LOWEST_SCALE * largest, scales[-1])
    t = shifts[-1]
    if attention is not None and getattr(attention, "q_bias", None) is not None:
        join_biases(attention)
    for reader in folding.readers:
        weight, bias = reader.weight, reader.bias
        shift = weight.double() @ t
        if bias is None:
            reader.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
        else:
            bias.copy_(bias.double() + shift)
        weight.copy_(weight.double() * s)
    P = norm.num_prefix_tokens
    rest: nn.Module = nn.Identity()
    if P > 0:
        scale, shift = scales[:P] / s, (shifts[:P] - t) / s
        dtype = norm.patch.weight.dtype
        rest = PrefixAffine(scale.to(dtype), shift.to(dtype)).requires_grad_(norm.patch.weight.requires_grad)
    setattr(folding.site.parent, folding.site.name, rest.train(norm.training))


def join_biases(attention: nn.Module) -> None:
    """Give a joint projection the biases that EVA's attention keeps apart from it, and keys one of zero."""
    q, v = attention.q_bias, attention.v_bias
    attention.qkv.bias = nn.Parameter(torch.cat([q, torch.zeros_like(q), v]), requires_grad=q.requires_grad)
    attention.q_bias = attention.v_bias = None
    if "k_bias" in attention._buffers:
        attention.k_bias = None
