"""Performer: softmax attention through positive orthogonal random features (FAVOR+).

    phi(x) = exp(w_i^T x - |x|^2 / 2) / sqrt(m), i = 1..m      E[phi(q)^T phi(k)] = exp(q^T k)
    Y = phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1)              cost in N: linear, N·m

What depends on a query alone cancels, so this is attention to m keys, the features, and is computed as such:

    Y = softmax(Q W^T + b) X,   b_i = log sum_n phi_i(k_n),   X_i = sum_n phi_i(k_n) v_n / sum_n phi_i(k_n)

Choromanski et al. 2021 (arXiv 2009.14794), section 2.3 (positive features), 2.4 (orthogonal features) and appendix B.

*Names:* ``num_features`` = m (the paper's Theta(D log D) is 266 at D = 64); ``features`` = the rows w_i, a saved
buffer.

*Differs:* nothing is added to the features, since no sum can vanish: the largest exponent of the keys is taken per
image, head and feature, and that of the queries per token, so no image depends on its batch mates either. The features
are drawn from a seed and are the same for all heads. Sums run over blocks of tokens with a running maximum, as in
online softmax, so that N x m features never exist at once; for long sequences, training computes the features of a
block again for its gradient. All of it in float32 at least.

Queries and keys are centred, which changes nothing in expectation and makes the estimate much less noisy: with c the
mean query and u a vector taken from all keys,

    q^T k = (q - c)^T (k - u) + c^T k + q^T u

whose last term is the same for all keys, so it cancels, and c^T k is known: the features estimate the first term only.
u is the mean of the keys under the weights exp(c^T k), what the mean query sees.

*Pays:* with default keywords on two CPU cores, as fast as softmax through SDPA at 197
tokens, 1.5 times as fast at 577, 6 times at 4,097 (``examples/results/mixers.csv``).

Shapes: B images, N tokens, h heads, D head width, m features.
"""

from typing import Optional

import torch
from timm.layers import register_notrace_function
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ._slot import AttentionMixer, Grid, admit, check_integer, refuse_attention_dropout

DEFAULT_FEATURES = 64
# Few enough that N x m features never exist at once; larger blocks are hardly faster, smaller ones slower.
BLOCK = 256
# From so many tokens on, training computes features twice rather than keep them all for the gradient.
LONG = 8192


def orthogonal_features(num_features: int, head_dim: int, seed: int) -> torch.Tensor:
    """Rows that are Gaussian each and orthogonal within each block of D: (m, D), the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    blocks = []
    for _ in range(-(-num_features // head_dim)):
        gaussian = torch.randn(head_dim, head_dim, generator=generator, device="cpu")
        orthogonal, triangular = torch.linalg.qr(gaussian)
        blocks.append(orthogonal * triangular.diagonal().sign())
    lengths = torch.randn(num_features, head_dim, generator=generator, device="cpu").norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:num_features] * lengths


def add_keys(
    k: torch.Tensor,
    v: torch.Tensor,
    features: torch.Tensor,
    centre: torch.Tensor,
    top: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a block of keys and values to the running sums, each relative to its feature's exp(top).

    k (B, h, n, D) unscaled; v (B, h, n, D + 1), the values and a column of ones; features (m, D) scaled by D^-1/4;
    centre = c + u (B, h, 1, D); top (B, h, 1, m); sums = sum of phi v^T (B, h, m, D + 1), whose last column is the sum
    of phi.
    """
    # w^T k + c^T k - |k - u|^2 / 2, without what is the same for all keys
    known = (k * centre).sum(3, keepdim=True) - 0.5 * k.square().sum(3, keepdim=True)
    # added, since the gradient of what is subtracted would be negated at full size
    exponent = torch.matmul(k, features.transpose(0, 1)).add_(known * k.shape[3] ** -0.5)
    new_top = torch.maximum(top, exponent.detach().amax(dim=2, keepdim=True))
    phi = exponent.sub_(new_top).exp_()
    return new_top, sums * torch.exp(top - new_top).transpose(2, 3) + torch.matmul(phi.transpose(2, 3), v)


def read_queries(q: torch.Tensor, features: torch.Tensor, bias: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(q W^T + b) X of a block of queries: (B, h, n, D) -> (B, h, n, D); b (B, h, 1, m), X (B, h, m, D)."""
    return torch.matmul(torch.matmul(q, features.transpose(0, 1)).add_(bias).softmax(3), values)


def sum_in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, features: torch.Tensor, block: int, long: int
) -> torch.Tensor:
    """The work of ``favor_attention``, outside of autocast."""
    out_dtype = v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    q, k, v, features = q.to(dtype), k.to(dtype), v.to(dtype), features.to(dtype)
    B, h, N, D = q.shape
    features = features * D**-0.25
    block = -(-N // max(1, N // block))  # equal blocks, no small last one
    again = long <= N and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    c = q.mean(2, keepdim=True)
    centre = c + F.scaled_dot_product_attention(c, k, k)
    top = torch.full([B, h, 1, features.shape[0]], -float("inf"), device=q.device, dtype=dtype)
    # one product gives the sums of phi v^T and of phi
    v = F.pad(v, (0, 1), value=1.0)
    sums = torch.zeros([B, h, features.shape[0], v.shape[3]], device=q.device, dtype=dtype)
    # split, since the gradient of a slice is as large as the whole
    for k_block, v_block in zip(k.split(block, 2), v.split(block, 2)):
        if not torch.jit.is_scripting() and again:
            top, sums = checkpoint(add_keys, k_block, v_block, features, centre, top, sums, use_reentrant=False)
        else:
            top, sums = add_keys(k_block, v_block, features, centre, top, sums)
    values, total = sums.split([sums.shape[3] - 1, 1], dim=3)
    values = values / total
    # of w^T (q - c) + w^T (k - u) the keys' sums lack -w^T (c + u)
    bias = top + total.log().transpose(2, 3) - torch.matmul(centre, features.transpose(0, 1))
    out: list[torch.Tensor] = []
    for q_block in q.split(block, 2):
        if not torch.jit.is_scripting() and again:
            out.append(checkpoint(read_queries, q_block, features, bias, values, use_reentrant=False))
        else:
            out.append(read_queries(q_block, features, bias, values))
    return torch.cat(out, dim=2).to(out_dtype)


# A leaf for torch.fx: the number of blocks depends on the number of tokens.
@torch.fx.wrap
@register_notrace_function
def favor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    features: torch.Tensor,
    block: int = BLOCK,
    long: int = LONG,
) -> torch.Tensor:
    """FAVOR+ attention: q, k, v (B, h, N, D) and features (m, D) -> (B, h, N, D), computed in float32 at least."""
    # TorchScript knows autocast for constant devices only, and none is on around a scripted model's own casts
    if torch.jit.is_scripting():
        return sum_in_blocks(q, k, v, features, block, long)
    else:  # noqa: RET505  TorchScript leaves out this branch, but not what follows an if
        # the meta device has no autocast to switch off
        if not torch.amp.is_autocast_available(q.device.type):
            return sum_in_blocks(q, k, v, features, block, long)
        with torch.autocast(q.device.type, enabled=False):
            return sum_in_blocks(q, k, v, features, block, long)


class PerformerAttention(AttentionMixer):
    """Performer attention in the slot.

    Args:
        num_features: m; None: 64.
        feature_seed: seed of the features.
        redraw_interval: in training, draw new features after so many forward passes; 0: never.

    Raises:
        ValueError: for a wrong keyword, naming what is allowed.
    """

    uses_grid = False

    def __init__(
        self,
        attn: nn.Module,
        grid: Grid,
        num_prefix_tokens: int,
        rope: Optional[nn.Module] = None,
        num_features: Optional[int] = None,
        feature_seed: int = 0,
        redraw_interval: int = 0,
    ) -> None:
        refuse_attention_dropout(attn, "Performer")
        super().__init__(attn, grid, num_prefix_tokens, rope)
        num_features = DEFAULT_FEATURES if num_features is None else num_features
        check_integer("num_features", num_features, 1)
        check_integer("feature_seed", feature_seed, 0, 2**63 - 1, "that a seed may be")
        check_integer("redraw_interval", redraw_interval, 0)
        self.num_features = num_features
        self.feature_seed = feature_seed
        self.redraw_interval = redraw_interval
        weight = self.proj.weight
        self.features: torch.Tensor
        self.register_buffer("features", weight.new_empty(num_features, self.head_dim))
        if redraw_interval:
            self.register_buffer("passes", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.features.copy_(orthogonal_features(self.num_features, self.head_dim, self.feature_seed))
        if self.redraw_interval:
            self.passes.zero_()

    def before_forward(self, grid: Grid) -> None:
        """Count a training pass, and draw new features when their time is over."""
        super().before_forward(grid)
        if self.training and self.redraw_interval:
            self.passes += 1
            draws, rest = divmod(int(self.passes), self.redraw_interval)
            if rest == 0:
                # a new tensor: the old one may still be wanted for a backward pass
                drawn = orthogonal_features(self.num_features, self.head_dim, self.feature_seed + draws)
                self.features = drawn.to(self.features)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
        rope: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        q, k, v = self.project(admit(x, attn_mask, is_causal, self.num_tokens), 0, 3)
        return self.merge(favor_attention(self.rotate(q, rope), self.rotate(k, rope), v, self.features), x)
