"""Attention through positive random features, FAVOR+, as softmax attention to the features; see ``performer.py``.

Shapes: B images, N tokens, h heads, D head width, m features.
"""

from typing import Optional

import torch
from torch.nn import functional as F

from ._attention import attention, takes_bias
from ._gradients import checkpoint_if_long, may_need_gradients
from ._masks import added_to_logits
from ._precision import dtype_of_products, outside_autocast

# How many numbers the features or keys of an image have in one block. So a long sequence never has all of its N x m
# features in memory at once. Larger blocks are hardly faster, smaller ones are slower. Functions get it as a default of
# an argument, since TorchScript reads no global numbers.
ELEMENTS = 2**18
# From so many tokens on, training computes features twice rather than keep them all for the gradient.
LONG = 8192


def orthogonal_features(num_features: int, head_dim: int, seed: int) -> torch.Tensor:
    """Rows that are Gaussian each and orthogonal within each block of D: (m, D), the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    blocks = [
        torch.nn.init.orthogonal_(torch.empty(head_dim, head_dim, device="cpu"), generator=generator)
        for _ in range(-(-num_features // head_dim))
    ]
    lengths = torch.randn(num_features, head_dim, generator=generator, device="cpu").norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:num_features] * lengths


def centres(
    q: torch.Tensor, k: torch.Tensor, key_bias: Optional[torch.Tensor] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """c, the mean of unscaled queries (B, h, N, D), and u, the mean of the keys by the attention of c: (B, h, 1, D).

    ``key_bias`` (B, 1, 1, N): the log of the weight of each query in the mean, and of each key.
    """
    weight = None if key_bias is None else added_to_logits(key_bias, q.dtype)
    # a query of zeros sees the mean; in half precision torch's own mean copies everything to float32
    zero = torch.zeros([q.shape[0], q.shape[1], 1, q.shape[3]], device=q.device, dtype=q.dtype)
    c = attention(zero, q, q, weight)
    return c, attention(c, k, k, weight)


def add_keys(
    k: torch.Tensor,
    v: torch.Tensor,
    features: torch.Tensor,
    top: torch.Tensor,
    values: torch.Tensor,
    total: torch.Tensor,
    key_bias: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add a block of keys and values to the running sums, each relative to its feature's exp(top).

    k (B, h, n, D) unscaled; v (B, h, n, E); features (B, h, m, D), D^-1/4 w + D^-1/2 (c + u); top and total, the sum of
    phi, (B, h, m, 1); values, the sum of phi v^T, (B, h, m, E). ``key_bias`` (B, 1, 1, n): the log of the weight of
    each key, which counts for the maximum too. Exponents are computed in the dtype of the features.
    """
    k = k.to(features.dtype)
    # vector_norm is faster, but its second derivative at 0 is NaN
    squares = k.square().sum(3) if may_need_gradients() else torch.linalg.vector_norm(k, dim=3).square()
    # w^T k + c^T k - |k - u|^2 / 2, without what is the same for all keys
    known = -0.5 * k.shape[3] ** -0.5 * squares.unsqueeze(2)
    if key_bias is not None:
        known = known + key_bias
    # added, since the gradient of what is subtracted would be negated at full size
    exponent = torch.matmul(features, k.transpose(2, 3)).add_(known)
    new_top = torch.maximum(top, exponent.detach().amax(dim=3, keepdim=True))
    phi = exponent.sub_(new_top).exp_()
    shrink = torch.exp(top - new_top)
    dtype = dtype_of_products(v)
    phi = phi.to(dtype)
    added = torch.matmul(phi, v.to(dtype)).to(values.dtype)
    return new_top, values * shrink + added, total * shrink + phi.sum(3, keepdim=True, dtype=total.dtype)


def read_queries(q: torch.Tensor, features: torch.Tensor, bias: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(q W^T + b) X of a block of queries: (B, h, n, D) -> (B, h, n, E); b (B, h, 1, m), X (B, h, m, E)."""
    weights = torch.matmul(q.to(features.dtype), features.transpose(-2, -1)).add_(bias).softmax(3)
    return torch.matmul(weights.to(values.dtype), values)


def tokens_of_block(width: int, elements: int = ELEMENTS) -> int:
    """How many tokens a block has if an image has ``width`` features or channels for each."""
    return max(1, elements // width)


def block_sizes(num_tokens: int, block: int) -> list[int]:
    """Nearly equal sizes of about ``block`` tokens; given one by one, since a traced graph has no uneven split."""
    count = max(1, num_tokens // block)
    return [num_tokens // count + int(i < num_tokens % count) for i in range(count)]


def sum_over_keys(
    k: torch.Tensor, v: torch.Tensor, features: torch.Tensor, key_bias: Optional[torch.Tensor], block: int, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums of ``add_keys`` over all keys, in blocks; with ``again`` each is computed again for the gradient."""
    B, h, m = k.shape[0], k.shape[1], features.shape[-2]
    top = torch.full([B, h, m, 1], -float("inf"), device=k.device, dtype=features.dtype)
    total = torch.zeros([B, h, m, 1], device=k.device, dtype=features.dtype)
    values = torch.zeros([B, h, m, v.shape[3]], device=k.device, dtype=features.dtype)
    sizes = block_sizes(k.shape[2], block)
    first = 0
    # split, since the gradient of a slice is as large as the whole
    for k_block, v_block in zip(k.split(sizes, 2), v.split(sizes, 2)):
        bias_block: Optional[torch.Tensor] = None
        if key_bias is not None:
            bias_block = key_bias[..., first : first + k_block.shape[2]]
            first += k_block.shape[2]
        if torch.jit.is_scripting():
            top, values, total = add_keys(k_block, v_block, features, top, values, total, bias_block)
        else:
            top, values, total = checkpoint_if_long(
                add_keys, again, k_block, v_block, features, top, values, total, bias_block
            )
    return top, values, total


def read_in_blocks(
    q: torch.Tensor, features: torch.Tensor, bias: torch.Tensor, values: torch.Tensor, block: int, again: bool
) -> torch.Tensor:
    """``read_queries`` for all queries, in blocks."""
    out: list[torch.Tensor] = []
    for q_block in q.split(block_sizes(q.shape[2], block), 2):
        if torch.jit.is_scripting():
            out.append(read_queries(q_block, features, bias, values))
        else:
            out.append(checkpoint_if_long(read_queries, again, q_block, features, bias, values))
    return torch.cat(out, dim=2)


def sum_in_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    features: torch.Tensor,
    feature_bias: Optional[torch.Tensor],
    block: Optional[int],
    key_bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The work of ``favor_attention``, outside of autocast."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    B, h, N, D = q.shape
    m = features.shape[-2]
    features = features.to(dtype) * D**-0.25
    fused = takes_bias(q, v, dtype)
    if fused:  # the same features for queries and keys, or what is common to all logits wouldn't cancel
        features = features.to(q.dtype).to(dtype)
    again = False
    if not torch.jit.is_scripting():
        again = LONG <= N and (q.requires_grad or k.requires_grad or v.requires_grad)
    if key_bias is not None:
        key_bias = added_to_logits(key_bias, dtype)
    block = tokens_of_block(h * max(m, D)) if block is None else block
    c, u = centres(q, k, key_bias)
    centre = c.to(dtype) + u.to(dtype)
    top, values, total = sum_over_keys(k, v, features + D**-0.5 * centre, key_bias, block, again)
    values = (values / total).to(dtype_of_products(v))
    # the exponent has w^T (q - c) + w^T (k - u), of which the sums over keys don't contain -w^T (c + u)
    bias = (top + total.log()).transpose(2, 3) - torch.matmul(centre, features.transpose(-2, -1))
    if feature_bias is not None:
        bias = bias + feature_bias.to(dtype)
    if fused:
        keys = features.to(q.dtype).expand(B, h, m, D)
        y = F.scaled_dot_product_attention(q, keys, values.to(q.dtype), attn_mask=bias, scale=1.0).to(v.dtype)
        # the layout of the result depends on the kernel, of which an exported graph knows nothing
        if not torch.jit.is_scripting() and torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
            y = y.contiguous()
        return y
    return read_in_blocks(q, features, bias, values, block, again).to(v.dtype)


def favor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    features: torch.Tensor,
    block: Optional[int] = None,
    feature_bias: Optional[torch.Tensor] = None,
    key_bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """FAVOR+ attention: q, k (B, h, N, D), v (B, h, N, E) -> (B, h, N, E).

    Exponents and sums are computed in float32 at least, products with values in their own dtype, or in float32 for
    float16.

    ``features``: (m, D), or (h, m, D) for each head its own; ``feature_bias`` (h, 1, m): the log of their weights;
    ``key_bias`` (B, 1, 1, N): the log of how many tokens each one stands for, or a mask.
    """
    # no autocast is on around a scripted model's own casts
    if torch.jit.is_scripting():
        return sum_in_blocks(q, k, v, features, feature_bias, block, key_bias)
    else:
        with outside_autocast(q.device):
            return sum_in_blocks(q, k, v, features, feature_bias, block, key_bias)
