"""Attention through positive random features, FAVOR+, as softmax attention to the features; see ``performer.py``.

Shapes: B images, N tokens, h heads, D head width, m features.
"""

from typing import Optional

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ._masks import added_to_logits
from ._precision import outside_autocast

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


def centres(
    q: torch.Tensor, k: torch.Tensor, key_bias: Optional[torch.Tensor] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """c and u of unscaled queries and keys (B, h, N, D): the mean query, and what it sees of the keys, (B, h, 1, D).

    ``key_bias`` (B, 1, 1, N): the log of the weight of each query in the mean, and of each key.
    """
    c = q.mean(2, keepdim=True) if key_bias is None else torch.matmul(key_bias.softmax(3), q)
    return c, F.scaled_dot_product_attention(c, k, k, attn_mask=key_bias)


def add_keys(
    k: torch.Tensor,
    v: torch.Tensor,
    features: torch.Tensor,
    centre: torch.Tensor,
    top: torch.Tensor,
    sums: torch.Tensor,
    key_bias: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a block of keys and values to the running sums, each relative to its feature's exp(top).

    k (B, h, n, D) unscaled; v (B, h, n, D + 1), the values and a column of ones; features (m, D) or (h, m, D), scaled
    by D^-1/4; centre = c + u (B, h, 1, D); top (B, h, 1, m); sums = sum of phi v^T (B, h, m, D + 1), whose last column
    is the sum of phi. ``key_bias`` (B, 1, n, 1): the log of the weight of each key, which counts for the maximum too.
    """
    # w^T k + c^T k - |k - u|^2 / 2, without what is the same for all keys
    known = ((k * centre).sum(3, keepdim=True) - 0.5 * k.square().sum(3, keepdim=True)) * k.shape[3] ** -0.5
    if key_bias is not None:
        known = known + key_bias
    # added, since the gradient of what is subtracted would be negated at full size
    exponent = torch.matmul(k, features.transpose(-2, -1)).add_(known)
    new_top = torch.maximum(top, exponent.detach().amax(dim=2, keepdim=True))
    phi = exponent.sub_(new_top).exp_()
    return new_top, sums * torch.exp(top - new_top).transpose(2, 3) + torch.matmul(phi.transpose(2, 3), v)


def read_queries(q: torch.Tensor, features: torch.Tensor, bias: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(q W^T + b) X of a block of queries: (B, h, n, D) -> (B, h, n, D); b (B, h, 1, m), X (B, h, m, D)."""
    return torch.matmul(torch.matmul(q, features.transpose(-2, -1)).add_(bias).softmax(3), values)


def block_sizes(num_tokens: int, block: int) -> list[int]:
    """Nearly equal sizes of about ``block`` tokens; given one by one, since a traced graph has no uneven split."""
    count = max(1, num_tokens // block)
    return [num_tokens // count + int(i < num_tokens % count) for i in range(count)]


def sum_in_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    features: torch.Tensor,
    feature_bias: Optional[torch.Tensor],
    block: int,
    key_bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The work of ``favor_attention``, outside of autocast."""
    out_dtype = v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    q, k, v, features = q.to(dtype), k.to(dtype), v.to(dtype), features.to(dtype)
    B, h, N, D = q.shape
    features = features * D**-0.25
    again = False
    if not torch.jit.is_scripting():
        again = LONG <= N and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if key_bias is not None:
        key_bias = added_to_logits(key_bias, dtype)
    c, u = centres(q, k, key_bias)
    centre = c + u
    top = torch.full([B, h, 1, features.shape[-2]], -float("inf"), device=q.device, dtype=dtype)
    # one product gives the sums of phi v^T and of phi
    v = F.pad(v, (0, 1), value=1.0)
    sums = torch.zeros([B, h, features.shape[-2], v.shape[3]], device=q.device, dtype=dtype)
    first = 0
    # split, since the gradient of a slice is as large as the whole
    for k_block, v_block in zip(k.split(block_sizes(k.shape[2], block), 2), v.split(block_sizes(k.shape[2], block), 2)):
        bias_block: Optional[torch.Tensor] = None
        if key_bias is not None:
            bias_block = key_bias[..., first : first + k_block.shape[2]].transpose(2, 3)
            first += k_block.shape[2]
        if not torch.jit.is_scripting() and again:
            top, sums = checkpoint(
                add_keys, k_block, v_block, features, centre, top, sums, bias_block, use_reentrant=False
            )
        else:
            top, sums = add_keys(k_block, v_block, features, centre, top, sums, bias_block)
    values, total = sums.split([sums.shape[3] - 1, 1], dim=3)
    values = values / total
    # of w^T (q - c) + w^T (k - u) the keys' sums lack -w^T (c + u)
    bias = top + total.log().transpose(2, 3) - torch.matmul(centre, features.transpose(-2, -1))
    if feature_bias is not None:
        bias = bias + feature_bias.to(dtype)
    out: list[torch.Tensor] = []
    for q_block in q.split(block_sizes(q.shape[2], block), 2):
        if not torch.jit.is_scripting() and again:
            out.append(checkpoint(read_queries, q_block, features, bias, values, use_reentrant=False))
        else:
            out.append(read_queries(q_block, features, bias, values))
    return torch.cat(out, dim=2).to(out_dtype)


def favor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    features: torch.Tensor,
    block: int = BLOCK,
    feature_bias: Optional[torch.Tensor] = None,
    key_bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """FAVOR+ attention: q, k, v (B, h, N, D) -> (B, h, N, D), computed in float32 at least.

    ``features``: (m, D), or (h, m, D) for each head its own; ``feature_bias`` (h, 1, m): the log of their weights;
    ``key_bias`` (B, 1, 1, N): the log of how many tokens each one stands for, or a mask.
    """
    # no autocast is on around a scripted model's own casts
    if torch.jit.is_scripting():
        return sum_in_blocks(q, k, v, features, feature_bias, block, key_bias)
    else:  # noqa: RET505  TorchScript leaves out this branch, but not what follows an if
        with outside_autocast(q.device):
            return sum_in_blocks(q, k, v, features, feature_bias, block, key_bias)
