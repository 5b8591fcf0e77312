"""Dynamic aggregation feed-forward (DAFF): an MLP with a depthwise convolution over the patch grid inside.

    patches:        H = GELU(BN(fc1(X))),   H + GELU(BN(DWConv3x3(H))),   Y = BN(fc2(that))
    prefix tokens:  p * W2 GELU(W1 mean(Y)), with the mean over the patches and W1 onto C/4 channels

Lu et al. 2022 (DHVT, arXiv 2210.05958), section 3.3.

*Names:* ``fc1`` and ``fc2`` are those of a ViT's MLP, the paper's 1x1 convolutions, so that trained weights fit.
``compress`` and ``excite`` are W1 and W2.

*Differs:* the grid need not be square, and there may be no prefix token, which leaves out W1 and W2, or several, which
are all multiplied. The depthwise convolution has no bias, which batch normalisation would take away. Where weights of a
plain MLP are loaded, what is added starts as nothing: the convolution's share and what prefix tokens get are zero, and
in evaluation patches have the MLP that was trained. In training, batch normalisation takes its statistics over patches
and images, as everywhere.

Shapes: B images, N = P + H·W tokens, C channels.
"""

from typing import Optional

import torch
from timm.layers import Mlp, register_notrace_module, trunc_normal_
from torch import nn

from .._checks import InputError, check_choice
from ..mixers._layout import TokenLayout, check_sequence
from ..slots.slot import GridModule
from ..stems.hierarchical_mlp import ChannelsLastBatchNorm

MLPS = ("mlp", "daff")
REDUCTION = 4


@register_notrace_module
class DepthwiseFeedForward(GridModule):
    """Where a block has an MLP: (B, N, C) -> (B, N, C).

    Args:
        mlp: whose layers are taken over, the same objects under the same names.
        layout: of the tokens.
    """

    # parameters that begin at zero where the weights around them are trained ones
    zero_init = ("bn2.bn.weight", "excite.weight", "excite.bias")

    def __init__(self, mlp: Mlp, layout: TokenLayout) -> None:
        super().__init__(layout)
        self.fc1, self.act, self.drop1 = mlp.fc1, mlp.act, mlp.drop1
        self.norm, self.fc2, self.drop2 = mlp.norm, mlp.fc2, mlp.drop2
        width, dim = mlp.fc1.out_features, mlp.fc2.out_features
        dd = {"device": mlp.fc1.weight.device, "dtype": mlp.fc1.weight.dtype}
        self.bn1 = ChannelsLastBatchNorm(width, **dd)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False, **dd)
        self.bn2 = ChannelsLastBatchNorm(width, **dd)
        self.bn3 = ChannelsLastBatchNorm(dim, **dd)
        self.compress: Optional[nn.Module] = None
        self.excite: Optional[nn.Module] = None
        if layout.num_prefix_tokens:
            hidden = max(1, dim // REDUCTION)
            self.compress = nn.Linear(dim, hidden, **dd)
            self.excite = nn.Linear(hidden, dim, **dd)
            for layer in (self.compress, self.excite):  # as a ViT's other linear layers
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def new_keys(self) -> set[str]:
        """The state-dict keys that the MLP didn't have."""
        return {key for key in self.state_dict() if not key.startswith(("fc1.", "fc2.", "norm."))}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        P, grid = self.num_prefix_tokens, self.grid
        if not torch.jit.is_scripting():
            grid = self.current_grid(x.shape[1])
        check_sequence(x, TokenLayout(P, grid), None, False, False, True)
        h = self.drop1(self.act(self.bn1(self.fc1(x[:, P:]))))
        image = h.transpose(1, 2).reshape(h.shape[0], h.shape[2], grid[0], grid[1])
        h = h + self.act(self.bn2(self.conv(image).flatten(2).transpose(1, 2)))
        y = self.bn3(self.fc2(self.norm(h)))
        if self.compress is not None and self.excite is not None:
            factor = self.excite(self.act(self.compress(y.mean(1, keepdim=True))))
            y = torch.cat([x[:, :P] * factor, y], dim=1)
        return self.drop2(y)


def replace_mlps(blocks: nn.Module, kind: str, layout: TokenLayout, patch_drop_rate: float) -> None:
    """Put another feed-forward layer in the place of every MLP of new blocks, in place.

    Args:
        kind: of ``MLPS``; "mlp" leaves them alone.

    Raises:
        ValueError: for another kind, blocks whose MLPs are of another class, or patches that are dropped.
    """
    check_choice("mlp", kind, MLPS)
    if kind == "mlp":
        return
    if patch_drop_rate > 0:
        raise InputError(
            f"patch_drop_rate={patch_drop_rate}: mlp={kind!r} works on the whole patch grid, so no patch can be "
            "dropped; allowed is 0"
        )
    places = [(parent, name) for parent in blocks.modules() for name, mlp in parent.named_children() if name == "mlp"]
    for parent, name in places:
        mlp = getattr(parent, name)
        if type(mlp) is not Mlp:
            raise InputError(f"mlp={kind!r}: a block has {type(mlp).__name__}; only timm's Mlp can be replaced")
        setattr(parent, name, DepthwiseFeedForward(mlp, layout))
