"""Softmax attention for few queries or keys, in the ways that it takes, against the formula in float64."""

import contextlib

import pytest
import torch
from conftest import distance, rounding
from torch.nn.functional import scaled_dot_product_attention

from timm_vix.mixers._attention import attention, in_whole_vectors, takes_bias

TOKENS, FEW = 197, 50


def exact(q, k, v, bias):
    q, k, v, bias = (t.detach().double() for t in (q, k, v, bias))
    return (q @ k.mT * q.shape[3] ** -0.5 + bias).softmax(3) @ v


def tensors(dtype, few_keys, value_dim=16):
    queries, keys = (TOKENS, FEW) if few_keys else (FEW, TOKENS)
    q, k, v = (2 * torch.randn(2, 3, n, d) for n, d in ((queries, 16), (keys, 16), (keys, value_dim)))
    return [t.to(dtype) for t in (q, k, v, torch.randn(2, 1, 1, keys))]


@pytest.mark.parametrize("value_dim", [16, 24])
@pytest.mark.parametrize("few_keys", [False, True], ids=["few queries", "few keys"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, rounding(torch.float32)), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_equals_the_formula(dtype, tolerance, training, few_keys, value_dim):
    inputs = tensors(dtype, few_keys, value_dim)
    with contextlib.nullcontext() if training else torch.no_grad():
        y = attention(*[t.requires_grad_(training) for t in inputs[:3]], inputs[3])
    assert y.dtype == dtype
    assert distance(y, exact(*inputs)) < tolerance
    if training:
        found = torch.autograd.grad(y.float().square().sum(), inputs[:3])
        doubles = [t.detach().double().requires_grad_() for t in inputs[:3]]
        right = (doubles[0] @ doubles[1].mT / 4 + inputs[3].double()).softmax(3) @ doubles[2]
        for mine, wanted in zip(found, torch.autograd.grad(right.square().sum(), doubles)):
            assert distance(mine, wanted) < 3 * tolerance


def test_without_a_bias():
    q, k, v, bias = tensors(torch.bfloat16, True)
    with torch.no_grad():
        assert distance(attention(q, k, v), exact(q, k, v, torch.zeros_like(bias))) < 1e-2


@pytest.mark.parametrize("keys, padded", [(50, 64), (64, 64), (1, 32)])
def test_keys_that_fill_vectors_are_not_seen(keys, padded):
    q, k, v = torch.randn(3, 2, 3, keys, 16, dtype=torch.float64)
    for bias in (None, torch.randn(2, 1, 1, keys, dtype=torch.float64)):
        wide_k, wide_v, wide_bias = in_whole_vectors(k, v, bias)
        assert wide_k.shape[2] == wide_v.shape[2] == wide_bias.shape[3] == padded
        y = scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=wide_bias)
        assert distance(y, scaled_dot_product_attention(q, k, v, attn_mask=bias)) < 1e-12


def test_dropout_acts_in_both_ways():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, bias = tensors(dtype, True)
        v = torch.ones_like(v)
        y = attention(q, k, v, bias, dropout=0.5)
        assert abs(float(y.float().mean()) - 1) < 0.05 and float(y.float().std()) > 0.1


def test_which_bias_a_fused_kernel_takes():
    q, v, dtype = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.float32
    assert not takes_bias(q, v, dtype)  # it has no gradient there
    with torch.no_grad():
        assert takes_bias(q, v, dtype) and takes_bias(q.bfloat16(), v.bfloat16(), dtype)
        assert not takes_bias(q, v[..., :3], dtype)
        assert not takes_bias(q.bfloat16().to("meta"), v.bfloat16().to("meta"), dtype)
        assert takes_bias(q.to("meta"), v.to("meta"), dtype)
