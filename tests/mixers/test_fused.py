"""Attention fused with its projections, against attention that projects first; long sequences keep less."""

import pytest
import torch
from conftest import distance, image, rounding, small
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import prune

from timm_vix.mixers import _fused

B, N, H, D, M = 2, 37, 3, 8, 5
C = H * D


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = dict(x=(B, N, C), q=(B, H, M, D), k=(B, H, M, D), v=(B, H, M, D), bias=(1, 1, 1, M), w=(4, C, C), b=(4, C))
    return {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}


def fused(x, q, k, v, bias, w, b, dropout=0.0):
    """Both fused attentions, as one list of outputs."""
    read = _fused.fused_attend_to(x, k, v, bias, w[0], b[0], w[3], b[3], dropout)
    return [read, _fused.fused_attend_from(x, q, w[1], w[2], b[2])]


def projected(x, q, k, v, bias, w, b):
    """The same from queries, keys and values of all tokens."""
    queries, keys, values = ((x @ w[i].T + b[i]).unflatten(2, (H, D)).transpose(1, 2) for i in range(3))
    read = scaled_dot_product_attention(queries, k, v, attn_mask=bias).transpose(1, 2).flatten(2) @ w[3].T + b[3]
    return [read, scaled_dot_product_attention(q, keys, values)]


def gradients(outputs, inputs):
    return torch.autograd.grad(sum(y.square().sum() for y in outputs), list(inputs.values()))


@pytest.mark.parametrize("long", [1, 10**9], ids=["long", "short"])
def test_equals_projecting_first(long, monkeypatch):
    monkeypatch.setattr(_fused, "LONG", long)
    inputs = tensors()
    outputs, expected = fused(**inputs), projected(**inputs)
    for y, right in zip(outputs, expected):
        assert distance(y, right) < rounding(torch.float64, 10)
    for name, ours, right in zip(inputs, gradients(outputs, inputs), gradients(expected, inputs)):
        assert distance(ours, right) < rounding(torch.float64, 10), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_no_more_than_where_attention_follows_the_projections(dtype):
    inputs = tensors()
    right = projected(**inputs)
    half = {name: x.detach().to(dtype) for name, x in inputs.items()}
    for ours, theirs, exact in zip(fused(**half), projected(**half), right):
        assert distance(ours, exact) < 3 * (distance(theirs, exact) + torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "tokens, landmarks, small_are_slow, cheaper",
    [
        (197, 50, False, True),
        (197, 50, True, False),  # few tokens: products with the landmarks are most of the work
        (1025, 50, True, False),
        (4097, 50, True, True),
        (4097, 150, False, False),  # many landmarks: 3 x 150 logits a token are more than its 192 channels
    ],
)
def test_which_way_takes_less_time(tokens, landmarks, small_are_slow, cheaper):
    """3 heads of width 64, as in ViT-Ti."""
    assert _fused.is_cheaper(tokens, landmarks, 3, 64, small_are_slow) == cheaper


def test_a_long_sequence_drops_the_same_weights_again(monkeypatch):
    inputs = tensors()
    found = []
    for long in (1, 10**9):
        monkeypatch.setattr(_fused, "LONG", long)
        torch.manual_seed(1)
        outputs = fused(**inputs, dropout=0.5)
        found.append([*outputs, *gradients(outputs, inputs)])
    assert all(torch.equal(ours, right) for ours, right in zip(*found))


@pytest.mark.parametrize("long, kept", [(1, False), (10**9, True)], ids=["long", "short"])
def test_attention_weights_are_kept_for_short_sequences_only(long, kept, monkeypatch):
    monkeypatch.setattr(_fused, "LONG", long)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fused(**tensors())
    assert (B * N * H * M in saved) == kept


def overridden(linear, calls):
    forward = linear.forward

    def own(x):
        calls.append(linear)
        return forward(x)

    linear.forward = own


CALLS = {
    "hook": lambda linear, calls: linear.register_forward_hook(lambda *_: calls.append(linear)),
    "pre-hook": lambda linear, calls: linear.register_forward_pre_hook(lambda *_: calls.append(linear)),
    "backward hook": lambda linear, calls: linear.register_full_backward_hook(lambda *_: calls.append(linear)),
    "backward pre-hook": lambda linear, calls: linear.register_full_backward_pre_hook(lambda *_: calls.append(linear)),
    "forward": overridden,
}


@pytest.mark.parametrize("mixer", ["linformer", "nystrom"])
@pytest.mark.parametrize("attach", CALLS)
def test_projections_with_hooks_are_called(attach, mixer):
    few = {"linformer": "num_proj_tokens", "nystrom": "num_landmarks"}[mixer]
    model = small(mixer, depth=1, **{few: 4})
    attn, calls, x = model.blocks[0].attn, [], image(model)
    assert attn.can_fuse_projections(36, torch.zeros(1, 2, 5, 16), None)
    expected = model(x)
    for linear in (attn.qkv, attn.proj):
        CALLS[attach](linear, calls)
    y = model(x)
    y.sum().backward()
    assert distance(y, expected) < rounding(torch.float32, 3)
    assert {id(linear) for linear in calls} == {id(attn.qkv), id(attn.proj)}


@pytest.mark.parametrize("mixer", ["linformer", "nystrom"])
def test_pruned_projections_train(mixer):
    few = {"linformer": "num_proj_tokens", "nystrom": "num_landmarks"}[mixer]
    model = small(mixer, depth=1, **{few: 4})
    linear = model.blocks[0].attn.proj
    prune.l1_unstructured(linear, "weight", 0.5)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), linear.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(image(model)).square().sum().backward()
        optimizer.step()
    model(image(model))
    assert torch.equal(linear.weight == 0, before == 0) and not torch.equal(linear.weight, before)
