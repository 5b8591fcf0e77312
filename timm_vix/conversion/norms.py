"""Batch norms in the place of a trained ViT's layer norms, so that they can be folded away (``folding.py``).

    RepBN(x) = BN(x) + alpha·x      in evaluation s·x + t: s = weight / sqrt(variance + eps) + alpha,
                                                           t = bias - weight·mean / sqrt(variance + eps)
    y = a·LN(x) + (1 - a)·RepBN(x)  a goes from 1 to 0 while the model trains, see ``handover.py``

Guo et al. 2024 (SLAB, arXiv 2405.11582), section 3.1: PRepBN; a is the lambda of the paper.

*Differs:* the paper trains from scratch and begins at alpha = 1. Here the batch norm begins as the best approximation
of a trained layer norm by one scale and one shift a channel, in the sense of least squares over some images, and at
alpha = 0. Each prefix token has constants and statistics of its own, since a class token lies elsewhere than patches
do. The share a belongs to a schedule object; the paper's counter in ``forward`` counts twice under gradient
checkpointing.

Shapes: B images, N = P + n tokens (P prefix tokens, n patches), C channels.
"""

from functools import partial
from typing import NamedTuple, Optional

import torch
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

from .._checks import InputError
from .._modules import has_hooks
from ..slots.hooks import HOOKS
from ._fitting import LayerFit, fit_in_one_pass
from .handover import Handover, HandoverSchedule
from .merging import class_of
from .record import record_norms

BLOCKS = (Block, EvaBlock, ParallelThingsBlock, ParallelScalingBlock)
# the share of a layer's mean variance that draws a slope to that of the layer norm; it decides where a channel is
# constant, as those of the class token are in the first layer
RIDGE = 1e-6


class NormSite(NamedTuple):
    """A norm whose output goes to one reader only: ``parent.name`` in the model, at ``path``.

    ``reader`` is the module that reads it, None for the last norm, which pooling and classifier read.
    ``num_prefix_tokens`` is P of its input, 0 where tokens are pooled before.
    """

    path: str
    parent: nn.Module
    name: str
    reader: Optional[nn.Module]
    num_prefix_tokens: int

    @property
    def norm(self) -> nn.Module:
        return getattr(self.parent, self.name)


class TokenBatchNorm(nn.Module):
    """Re-parameterised batch normalisation of tokens, each prefix token with constants of its own.

    (B, N, C) -> (B, N, C). In training a channel's statistics are those of the batch, over images and patches, or for
    a prefix token over images, which must be more than one then; in evaluation they are the running ones. Gradient
    checkpointing, which calls the module twice, takes a batch into the running ones twice.

    Args:
        dim: C.
        num_prefix_tokens: P.
    """

    num_prefix_tokens: torch.jit.Final[int]

    def __init__(
        self,
        dim: int,
        num_prefix_tokens: int = 0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_prefix_tokens = num_prefix_tokens
        self.alpha = nn.Parameter(torch.zeros(1, **dd))
        self.patch = nn.BatchNorm1d(dim, **dd)
        self.prefix = nn.BatchNorm1d(num_prefix_tokens * dim, **dd) if num_prefix_tokens > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        P, C = self.num_prefix_tokens, x.shape[-1]
        patches = x[:, P:] if P > 0 else x
        y = self.patch(patches.reshape(-1, C)).reshape(patches.shape)
        if P > 0:
            y = torch.cat([self.prefix(x[:, :P].flatten(1)).reshape(x.shape[0], P, C), y], dim=1)
        return y + self.alpha * x

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """s and t in evaluation, (P + 1, C) each in float64, the patches' last."""
        C = self.patch.num_features
        parts = [self.prefix, self.patch] if self.num_prefix_tokens else [self.patch]
        scales, shifts = [], []
        for norm in parts:
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            scales.append((factor + self.alpha.double()).reshape(-1, C))
            shifts.append((norm.bias.double() - factor * norm.running_mean.double()).reshape(-1, C))
        return torch.cat(scales), torch.cat(shifts)

    @torch.no_grad()
    def fit(self, norm: nn.LayerNorm, x: torch.Tensor, y: torch.Tensor) -> float:
        """Take the constants that bring x nearest to y, its layer norm, in the sense of least squares, and alpha = 0.

        Returns:
            The share of the variance of y that is left, for all channels and kinds of tokens together.
        """
        weight = torch.ones(x.shape[-1], dtype=torch.float64) if norm.weight is None else norm.weight.cpu().double()
        P = self.num_prefix_tokens
        inputs, outputs = (kinds(tensor.cpu().double(), P) for tensor in (x, y))
        patch_variance = inputs[-1].var(0, correction=0).mean()
        constants, rest, total = [], 0.0, 0.0
        for u, v in zip(inputs, outputs):
            mean, target = u.mean(0), v.mean(0)
            variance, covariance = (u - mean).square().mean(0), ((u - mean) * (v - target)).mean(0)
            # what a layer norm of constant deviation has for slope, where a channel is constant
            prior = weight * (u.var(1, correction=0) + norm.eps).rsqrt().mean()
            ridge = RIDGE * patch_variance + torch.finfo(torch.float64).tiny
            slope = (covariance + ridge * prior) / (variance + ridge)
            constants.append(torch.stack([mean, variance, slope, target]))
            rest += float((v - target - slope * (u - mean)).square().sum())
            total += float((v - target).square().sum())
        self.alpha.zero_()
        parts = [(self.prefix, constants[:P])] * (P > 0) + [(self.patch, constants[P:])]
        for part, rows in parts:
            mean, variance, slope, target = torch.cat(rows, dim=1)
            part.running_mean.copy_(mean)
            part.running_var.copy_(variance)
            part.weight.copy_(slope * (variance + part.eps).sqrt())
            part.bias.copy_(target)
        return rest / total if total else 0.0


def kinds(x: torch.Tensor, num_prefix_tokens: int) -> list[torch.Tensor]:
    """Each prefix token of x (B, N, C), and then its patches: (B, C) and (B·n, C)."""
    P, C = num_prefix_tokens, x.shape[-1]
    return [*(x[:, p] for p in range(P)), (x[:, P:] if P > 0 else x).reshape(-1, C)]


def norm_sites(model: nn.Module) -> list[NormSite]:
    """The norms of a ViT or Eva whose output goes to one module each; norms inside attention and MLPs are left out.

    Raises:
        ValueError: for another model, and for blocks whose norms feed the residual stream, into which nothing folds.
    """
    if not isinstance(model, (VisionTransformer, Eva)):
        raise InputError(
            f"{type(model).__name__} has no norms that are known to fold; expected timm's VisionTransformer or Eva"
        )
    P, sites = model.num_prefix_tokens, []
    for index, block in enumerate(model.blocks.children()):
        path = f"blocks.{index}"
        if class_of(block) not in BLOCKS:
            raise InputError(
                f"{path} is a {type(block).__name__}, whose norms aren't read by linear layers alone; allowed are "
                f"{', '.join(allowed.__name__ for allowed in BLOCKS)}"
            )
        if isinstance(block, ParallelThingsBlock):
            for branches, name in (("attns", "attn"), ("ffns", "mlp")):
                for i, branch in enumerate(getattr(block, branches)):
                    sites.append(NormSite(f"{path}.{branches}.{i}.norm", branch, "norm", getattr(branch, name), P))
        elif isinstance(block, ParallelScalingBlock):
            sites.append(NormSite(f"{path}.in_norm", block, "in_norm", block.in_proj, P))
        else:
            sites.append(NormSite(f"{path}.norm1", block, "norm1", block.attn, P))
            sites.append(NormSite(f"{path}.norm2", block, "norm2", block.mlp, P))
    if not isinstance(model.fc_norm, nn.Identity):  # after pooling, so that all inputs are of one kind
        sites.append(NormSite("fc_norm", model, "fc_norm", None, 0))
    elif not isinstance(model.norm, nn.Identity):
        sites.append(NormSite("norm", model, "norm", None, P))
    return sites


def replace_norms(
    model: nn.Module, images: Optional[torch.Tensor], schedule: Optional[HandoverSchedule] = None
) -> dict[str, float]:
    """Replace the layer norms of a trained timm ViT by batch norms that approximate them, in place.

    What is replaced is what ``fold_norms`` can fold: the norms before attention and MLPs, and the last one. The images
    pass through the model once, and each batch norm is fitted to the inputs that it has after the fitted ones before
    it. This loses accuracy: of DeiT-Tiny's 85.4 % top-1 on 1,000 photographs 71.3 % are left, and 79.9 % after 250
    steps of training (``examples/results/fold_norms.csv``). Train afterwards with the model in eval mode, so that the
    fitted statistics stay, or for many steps with a ``schedule``, which fades the layer norms out.

    Args:
        model: timm ``VisionTransformer`` or ``Eva``, converted or not, or one of ours.
        images: (B, 3, H, W) as the model takes them, some dozens, which pass as one batch. None: constants of no
            meaning, for a model whose weights are loaded afterwards.
        schedule: of a hand-over from the layer norms, which are then kept until ``finish_handover``; None: they go at
            once. A model can be built again by name only if it was saved after ``finish_handover``.

    Returns:
        For each norm the share of the layer norm's variance that the batch norm doesn't explain; 0 without images.

    Raises:
        ValueError: for a model whose norms can't be replaced, and for images that aren't finite, an empty batch, and
            anything but a tensor (B, C, H, W); the model is then as it was.

    Example:
        >>> schedule = timm_vix.HandoverSchedule(steps=1000)
        >>> timm_vix.replace_norms(model, images, schedule)
        >>> train(model, schedule)  # schedule.step() after each step of the optimizer
        >>> timm_vix.finish_handover(model)
        >>> timm_vix.fold_norms(model)
    """
    sites = [site for site in norm_sites(model) if isinstance(site.norm, nn.LayerNorm)]
    if not sites:
        raise InputError(f"{type(model).__name__} has no layer norms to replace")
    for site in sites:
        if has_hooks(site.norm, HOOKS):
            raise InputError(f"{site.path} has hooks, which would be lost; expected none, or hooks on the blocks")
    new = {site.path: new_norm(site) for site in sites}
    residuals = {site.path: 0.0 for site in sites}

    def fit(site: NormSite, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        residuals[site.path] = new[site.path].fit(site.norm, x, y)
        return new[site.path](x)

    if images is not None:
        fit_in_one_pass(model, [LayerFit(site.path, site.norm, partial(fit, site)) for site in sites], images)
    for site in sites:
        old = site.norm
        put = new[site.path].train(old.training)
        setattr(site.parent, site.name, put if schedule is None else Handover(old, put, schedule))
    record_norms(model, "batch")
    return residuals


def new_norm(site: NormSite) -> TokenBatchNorm:
    """A batch norm for the place of a layer norm, in eval mode."""
    parameter = next(site.parent.parameters())
    (C,) = site.norm.normalized_shape
    new = TokenBatchNorm(C, site.num_prefix_tokens, parameter.device, parameter.dtype)
    own = list(site.norm.parameters())
    return new.requires_grad_(not own or any(weight.requires_grad for weight in own)).eval()
