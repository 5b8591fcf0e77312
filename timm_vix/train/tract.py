"""TrAct: train a first layer as if its activations were what is trained.

    G <- G (a^T a / R + strength·I)^-1               G: the gradient of the weight; a: (R, n) the layer's inputs

Petersen et al. 2024 (arXiv 2410.23970), section 3. Activations of the first layer are moved down their own gradient,
and the weight follows by least squares with a ridge: the gradient times the inverse of the inputs' second moments. So
images of high contrast no longer decide the weights. It is the input factor of K-FAC, so nothing of the gradient enters
the matrix, and the result is linear in the gradient: it may be accumulated, scaled, or averaged over processes, each of
which has the matrix of its own images.

*Names:* ``strength`` = lambda, 0.1 in the paper, for standardised images. *Differs:* the matrix is computed in float32
under autocast, too. As in the paper, the gradient of the bias is left as it is. Gradients grow by up to 1 / strength,
which counts where their norm is clipped, and Adam takes a part of it back. For training from scratch.

Shapes: R rows, patches of all images; n inputs of the layer, C·p^2 for patches of p x p pixels.
"""

import torch
from torch import nn
from torch.nn.functional import unfold

from .._checks import InputError, is_number
from .._names import weights_config
from ..mixers._precision import outside_autocast


class Tract:
    """The hooks of ``tract`` on a layer; ``remove`` takes them away. A copy of the layer trains without them."""

    def __init__(self, layer: nn.Module, strength: float) -> None:
        self.strength = strength
        self.products: torch.Tensor | None = None
        self.factor: torch.Tensor | None = None
        self.rows = 0
        self.handles = [layer.register_forward_pre_hook(self.see), layer.weight.register_hook(self.solve)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def see(self, layer: nn.Module, args: tuple[torch.Tensor]) -> None:
        """Add the products of a batch to those since the last gradient: one gradient may be of several passes."""
        if not (torch.is_grad_enabled() and layer.weight.requires_grad):
            return
        a = rows_of(layer, args[0].detach())
        with outside_autocast(a.device):
            products = a.T @ a
        self.products = products if self.products is None else self.products + products
        self.rows += len(a)
        self.factor = None

    def solve(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the weight, times the inverse; that of a second loss of the same images likewise."""
        if self.factor is None:
            if self.products is None:
                return gradient
            matrix = self.products / self.rows
            matrix.diagonal().add_(self.strength)
            # numbers that aren't finite come through, for a gradient scaler to see, and the device isn't waited for
            self.factor, _ = torch.linalg.cholesky_ex(matrix)
            self.products, self.rows = None, 0
        solved = torch.cholesky_solve(gradient.flatten(1).to(self.factor.dtype).T, self.factor).T
        return solved.reshape(gradient.shape).to(gradient.dtype)


def rows_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The inputs that a layer multiplies by its weight, (R, n), in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    (height, width), (top, left) = layer.kernel_size, layer.padding
    if layer.stride != layer.kernel_size or top or left:
        return unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2).flatten(0, 1)
    B, C, H, W = x.shape
    rows, columns = H // height, W // width  # the convolution doesn't see what is left over either
    x = x[:, :, : rows * height, : columns * width].reshape(B, C, rows, height, columns, width)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B * rows * columns, C * height * width)


def tract(layer: nn.Module, strength: float = 0.1) -> Tract:
    """Train a first layer by TrAct, from now on: hooks change the gradient of its weight.

    Args:
        layer: ``nn.Conv2d`` or ``nn.Linear`` on the images, such as ``model.patch_embed.proj``.
        strength: lambda, above 0; inputs are taken to be standardised.

    Returns:
        The hooks. Their method ``remove()`` takes them off the layer.

    Raises:
        ValueError: for another layer, a frozen one, or a convolution with groups, dilation or padding other than zeros.

    Example:
        >>> hooks = tract(model.patch_embed.proj)
    """
    if not is_number(strength) or not 0 < strength < float("inf"):
        raise InputError(f"strength={strength!r}: expected a finite number above 0")
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        raise InputError(f"layer is a {type(layer).__name__}; expected an nn.Conv2d or nn.Linear")
    if isinstance(layer, nn.Conv2d):
        for name, allowed in (("groups", 1), ("dilation", (1, 1)), ("padding_mode", "zeros")):
            if getattr(layer, name) != allowed:
                raise InputError(f"layer has {name}={getattr(layer, name)!r}; allowed is {allowed!r}")
        if isinstance(layer.padding, str):
            raise InputError(f"layer has padding={layer.padding!r}; allowed are numbers")
    if not layer.weight.requires_grad:
        raise InputError("layer is frozen; expected one whose weight trains")
    return Tract(layer, strength)


def first_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a timm model that see the images.

    Raises:
        ValueError: for a model that names none.
    """
    cfg = weights_config(model)
    names = getattr(model, "_traits", {}).get("first_conv") or cfg.get("first_conv") or ()
    names = (names,) if isinstance(names, str) else names
    if not names:
        raise InputError(f"tract: {type(model).__name__} names no first layer; allowed are models of timm that do")
    return [model.get_submodule(name) for name in names]
