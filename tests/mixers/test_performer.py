"""Performer against the naive feature map, the kernel that it estimates, and exact softmax attention."""

import pytest
import torch
from conftest import condition, distance, image, rounding, small
from torch import nn

from timm_vix.mixers import _favor
from timm_vix.mixers._layout import TokenLayout
from timm_vix.mixers.performer import favor_attention, orthogonal_features


def naive(q, k, v, features, feature_bias=None):
    """phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1) in float64 of centred queries and keys, without any stabiliser.

    Features are of all heads (m, D) or each head's (h, m, D), their weights 1 or exp(feature_bias).
    """
    D, m = q.shape[-1], features.shape[-2]
    q, k, v, w = q.double() * D**-0.25, k.double() * D**-0.25, v.double(), features.double()
    mean = q.mean(2, keepdim=True)
    known = torch.exp((mean * k).sum(3))
    q, k = q - mean, k - (known[..., None] * k).sum(2, keepdim=True) / known.sum(2)[..., None, None]
    phi_q, phi_k = (torch.exp(x @ w.mT - x.square().sum(-1, keepdim=True) / 2) / m**0.5 for x in (q, k))
    if feature_bias is not None:
        phi_q = phi_q * feature_bias.double().exp()
    kernel = phi_q @ phi_k.transpose(2, 3) * known[:, :, None]
    return (kernel / kernel.sum(3, keepdim=True)) @ v


@pytest.mark.parametrize("N", [1, 63, 100, 197])
def test_equals_the_naive_formula(N):
    inputs = [*torch.randn(3, 2, 3, N, 16), orthogonal_features(40, 16, seed=0)]
    known = condition(naive, *inputs)
    assert distance(favor_attention(*inputs), naive(*inputs)) < rounding(torch.float32, known)
    doubles = [t.double() for t in inputs]
    assert distance(favor_attention(*doubles), naive(*inputs)) < rounding(torch.float64, known)


def test_learned_features_equal_the_naive_formula_with_gradients():
    q, k, v = torch.randn(3, 2, 3, 63, 16, dtype=torch.float64)
    features, weights = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 40, 16), (3, 1, 40)))
    found = []
    for function in (naive, lambda q, k, v, f, b: favor_attention(q, k, v, f, feature_bias=b)):
        inputs = [t.clone().requires_grad_() for t in (q, k, v, features, weights)]
        y = function(*inputs)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for mine, wanted in zip(*found):
        assert distance(mine, wanted) < rounding(torch.float64, 100)


def test_features_that_learn_begin_as_those_that_do_not():
    plain, learned = (small("performer", learned_features=value) for value in (False, True))
    learned.load_state_dict({k: v for k, v in plain.state_dict().items() if "features" not in k}, strict=False)
    for block in learned.blocks:
        block.attn.core.reset_parameters()
    x = image(plain)
    assert distance(learned(x), plain(x)) < rounding(torch.float32, condition(nn.Module.__call__, plain, x))
    names = [name for name, _ in learned.blocks[0].attn.named_parameters()]
    assert {"core.features", "core.feature_bias"} < set(names)
    with pytest.raises(ValueError, match="redraw_interval=3.*allowed is 0"):
        small("performer", learned_features=True, redraw_interval=3)


@pytest.mark.parametrize("rope", [None, "axial"])
def test_features_that_init_from_inputs_typical_input_estimate_better(rope):
    """Tokens in a few groups, with logits that random features cannot estimate; softmax attention is the oracle."""
    model = small("performer", rope, learned_features=True, num_features=64, depth=1, embed_dim=32, num_heads=2)
    mixer = model.blocks[0].attn
    with torch.no_grad():
        mixer.qkv.weight.normal_(std=0.4)
    N = mixer.num_prefix_tokens + mixer.grid[0] * mixer.grid[1]
    groups = torch.randn(4, 32)
    seen, unseen = groups[torch.randint(4, (2, 3, N))] + 0.3 * torch.randn(2, 3, N, 32)

    def error():
        q, k, v = mixer.project(unseen, 0, 3)
        layout = TokenLayout(mixer.num_prefix_tokens, mixer.grid)
        q, k = (mixer.rotate(part, layout, layout.grid) for part in (q, k))
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return float(distance(mixer(unseen), mixer.merge(exact, unseen)))

    mixer.core.reset_parameters()
    before = error()
    mixer.init_from_inputs(seen)
    after, features = error(), mixer.core.features.clone()
    assert after < 0.8 * before
    mixer.init_from_inputs(seen)
    assert torch.equal(mixer.core.features, features), "the seed decides"


def test_features_start_at_sums_of_queries_and_the_keys_that_they_attend_to():
    model = small("performer", learned_features=True, num_features=30, depth=1)
    mixer = model.blocks[0].attn.double()
    x = torch.randn(4, 9, model.embed_dim, dtype=torch.float64)
    mixer.init_from_inputs(x)
    q, k, _ = (part * mixer.head_dim**-0.25 for part in mixer.project(x, 0, 3))
    c = q.mean(2, keepdim=True)
    weights = torch.exp((c * k).sum(3, keepdim=True))
    u = (weights * k).sum(2, keepdim=True) / weights.sum(2, keepdim=True)
    for head in range(mixer.num_heads):
        sums = 0.8 * ((q - c)[:, head, :, None] + (k - u)[:, head, None]).flatten(0, 2)
        nearest = torch.cdist(mixer.core.features[head], sums).min(1).values
        # features are kept in float32
        assert nearest.max() < rounding(torch.float32, float(sums.detach().norm(dim=1).max()))
    wanted = -0.5 * mixer.core.features.square().sum(2).unsqueeze(1)
    assert distance(mixer.core.feature_bias, wanted) < rounding(torch.float32)


def test_random_features_do_not_start_from_inputs():
    mixer = small("performer", depth=1).blocks[0].attn
    before = mixer.core.features.clone()
    mixer.init_from_inputs(torch.randn(2, 9, mixer.qkv.in_features))
    assert torch.equal(mixer.core.features, before)


@pytest.mark.parametrize("block", [1, 7, 62, 63])
def test_blocks_change_nothing(block):
    # keys grow along the sequence, so that the running maximum moves from block to block
    q, k, v = torch.randn(3, 2, 3, 63, 16, dtype=torch.float64)
    k = k * torch.linspace(0.1, 3, 63)[:, None]
    features = orthogonal_features(40, 16, seed=0).double()
    weight = torch.randn(2, 3, 63, 16, dtype=torch.float64)
    results = []
    for size in (block, 10**9):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        y = favor_attention(*inputs, features, block=size)
        results.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for blocked, whole in zip(*results):
        assert distance(blocked, whole) < rounding(torch.float64, 100)


def test_a_long_sequence_has_the_same_gradients(monkeypatch):
    inputs = [t.requires_grad_() for t in torch.randn(3, 2, 3, 63, 16).unbind()]
    features = orthogonal_features(40, 16, seed=0)
    found = []
    for long in (63, 64):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            monkeypatch.setattr(_favor, "LONG", long)
            y = favor_attention(*inputs, features, block=7)
        # the features of a block of seven
        assert (2 * 3 * 7 * 40 in kept) == (long > 63)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(again, kept) for again, kept in zip(*found))


def test_a_vector_added_to_all_keys_changes_nothing():
    q, k, v, shift = torch.randn(4, 2, 3, 63, 16, dtype=torch.float64)
    features = orthogonal_features(40, 16, seed=0).double()
    moved = favor_attention(q, k + 3 * shift[:, :, :1], v, features)
    assert distance(moved, favor_attention(q, k, v, features)) < rounding(torch.float64, 100)


def test_what_all_queries_share_costs_no_accuracy():
    q, k, v = torch.randn(3, 2, 2, 50, 16) * 0.5
    features = orthogonal_features(256, 16, seed=0)
    errors = []
    for shift in (0, 2):  # without centring the second is three times the first
        exact = torch.nn.functional.scaled_dot_product_attention(q + shift, k, v)
        errors.append(distance(favor_attention(q + shift, k, v, features), exact))
    assert errors[1] < 1.5 * errors[0]


def test_error_falls_with_the_number_of_features():
    q, k, v = torch.randn(3, 2, 2, 50, 16) * 0.5
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = [
        sum(distance(favor_attention(q, k, v, orthogonal_features(m, 16, seed)), exact) for seed in range(5)) / 5
        for m in (64, 1024, 8192)
    ]
    # Monte Carlo: the error goes with 1 / sqrt(m), so by 4 and by 2.8
    assert errors[0] > 2.5 * errors[1] > 5 * errors[2]
    assert errors[2] < 0.1


def test_features_estimate_the_kernel_without_bias():
    q, k = torch.randn(2, 16, dtype=torch.float64) * 0.2
    norms = (q.square().sum() + k.square().sum()) / 2
    draws = torch.stack(
        [torch.exp(orthogonal_features(64, 16, seed).double() @ (q + k) - norms).mean() for seed in range(500)]
    )
    assert abs(draws.mean() - torch.exp(q @ k)) < 4 * draws.std() / 500**0.5
    assert draws.std() / 500**0.5 < 0.02 * torch.exp(q @ k)


def test_features_are_orthogonal_in_blocks_with_gaussian_lengths():
    features = orthogonal_features(72, 32, seed=3)
    for block in features.split(32):
        unit = torch.nn.functional.normalize(block)
        assert distance(unit @ unit.T, torch.eye(len(block))) < rounding(torch.float32)
    lengths = orthogonal_features(3200, 32, seed=0).square().sum(1)  # chi-squared with 32 degrees of freedom
    assert abs(lengths.mean() - 32) < 4 * (64 / 3200) ** 0.5
    assert abs(lengths.var() - 64) < 10
    mean = orthogonal_features(3200, 32, seed=0).mean(0)
    assert mean.abs().max() < 5 / 3200**0.5


def test_seed_decides_the_features():
    first, again, other = (small("performer", feature_seed=seed, depth=1) for seed in (0, 0, 1))
    features = [model.blocks[0].attn.core.features for model in (first, again, other)]
    assert torch.equal(features[0], features[1]) and not torch.equal(features[0], features[2])


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_redraw_every_few_training_passes(dynamic):
    model = small("performer", redraw_interval=3, dynamic_img_size=dynamic)
    x = image(model)

    def features():
        return [block.attn.core.features.clone() for block in model.blocks]

    first = features()
    for _ in range(7):
        model(x)
    assert all(map(torch.equal, features(), first))  # never in eval
    model.train()
    changes, before = [], first
    for _ in range(7):
        model(x).sum().backward()
        changes.append([not torch.equal(a, b) for a, b in zip(features(), before)])
        before = features()
    assert changes == [[False] * 2, [False] * 2, [True] * 2] * 2 + [[False] * 2]


def test_redraws_go_on_after_a_reload():
    model, other = (small("performer", redraw_interval=2).train() for _ in range(2))
    x = image(model)
    for _ in range(5):
        model(x)
    other.load_state_dict(model.state_dict())
    for _ in range(4):
        assert torch.equal(model(x), other(x))
    assert torch.equal(model.blocks[1].attn.core.features, other.blocks[1].attn.core.features)


def test_redraw_leaves_the_backward_pass_alone():
    """A pass whose features are replaced before its backward pass keeps its own."""
    model = small("performer", redraw_interval=1).train()
    x = image(model)
    y = model(x)
    expected = torch.autograd.grad(y.sum(), model.head.weight, retain_graph=True)[0]
    model(x)
    assert torch.equal(torch.autograd.grad(y.sum(), model.head.weight)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inference", [False, True])
def test_what_all_queries_share_costs_no_accuracy_in_half_precision(dtype, inference):
    q, k, v = torch.randn(3, 2, 3, 63, 16)
    q = q + 10 * torch.randn(1, 3, 1, 16)
    inputs = [t.to(dtype) for t in (q, k, v)]
    features = orthogonal_features(40, 16, seed=0)
    doubles = [t.double() for t in inputs]
    scaled = (features * 16**-0.25).to(dtype).double() * 16**0.25  # inference rounds the features
    with torch.set_grad_enabled(not inference):
        y = favor_attention(*inputs, features)
    assert y.dtype == dtype
    assert distance(y, naive(*doubles, scaled if inference else features)) < 12 * torch.finfo(dtype).eps


def test_a_key_of_zeros_has_second_derivatives():
    q, k, v = torch.randn(3, 1, 1, 6, 8, dtype=torch.float64)
    k[:, :, 2] = 0
    features = orthogonal_features(8, 8, seed=0).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(
            lambda k: favor_attention(q, k, v, features), k.requires_grad_(), atol=1e-6, rtol=1e-4
        )
