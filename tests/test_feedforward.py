"""Structured feed-forward layers: against their merged dense weights, and the best that their structure allows."""

import copy

import pytest
import timm
import torch
from conftest import distance, small
from torch import nn

from timm_vix._checks import InputError
from timm_vix.conversion.feedforward import BlockLinear, LowRankLinear, structure_mlp
from timm_vix.conversion.handover import HandoverSchedule, finish_handover


def dense_by_columns(layer):
    """The weight that a layer applies, from unit inputs: (m, n)."""
    n = layer.first.shape[-1] * getattr(layer, "blocks", 1)
    unit = torch.eye(n, dtype=layer.first.dtype)
    return (layer(unit) - layer(torch.zeros_like(unit))).T


def monarch_by_loops(layer):
    """The weight of a block layer, entry by entry: input block j goes by channel c of its part i to output block i."""
    b, k = layer.blocks, layer.first.shape[1]
    m, n = layer.second.shape[1], layer.first.shape[2]
    weight = torch.zeros(b * m, b * n, dtype=layer.first.dtype)
    for i in range(b):
        for j in range(b):
            for c in range(k // b):
                column = layer.second[i, :, j * (k // b) + c]
                weight[i * m : (i + 1) * m, j * n : (j + 1) * n] += torch.outer(
                    column, layer.first[j, i * (k // b) + c]
                )
    return weight


def test_low_rank_equals_its_dense_weight():
    layer, x = LowRankLinear(6, 10, 3, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    assert distance(layer(x), x @ (layer.second @ layer.first).T + layer.bias) < 1e-12
    assert distance(layer.dense(), dense_by_columns(layer)) < 1e-12
    assert torch.linalg.matrix_rank(layer.dense()) == 3


@pytest.mark.parametrize("n, m, blocks", [(8, 16, 2), (36, 18, 3), (8, 8, 2)])
def test_blocks_equal_their_dense_weight(n, m, blocks):
    layer = BlockLinear(n, m, blocks, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 5, n, dtype=torch.float64)
    expected = monarch_by_loops(layer)
    assert distance(layer.dense(), expected) < 1e-12
    assert distance(layer(x), x @ expected.T + layer.bias) < 1e-12
    assert distance(layer(x[0, 0, 0]), expected @ x[0, 0, 0] + layer.bias) < 1e-12


def test_low_rank_is_the_best_for_its_inputs():
    torch.manual_seed(0)
    weight = torch.randn(10, 6, dtype=torch.float64)
    inputs = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    covariance = inputs.T @ inputs / 500
    layer = LowRankLinear(6, 10, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.approximate(weight, covariance)
    # by the singular values of W C^(1/2): what is left of the outputs is the rest of their squares
    values, vectors = torch.linalg.eigh(covariance)
    singular = torch.linalg.svdvals(weight @ vectors @ values.sqrt().diag())
    error = (inputs @ (weight - layer.dense().detach()).T).square().sum() / 500
    assert float(error) == pytest.approx(float(singular[3:].square().sum()), rel=1e-9)


def test_each_pair_of_blocks_is_the_best_of_its_rank():
    torch.manual_seed(0)
    weight = torch.randn(16, 8, dtype=torch.float64)
    layer = BlockLinear(8, 16, 2, dtype=torch.float64)
    with torch.no_grad():
        layer.approximate(weight, torch.eye(8, dtype=torch.float64))
    for i in range(2):
        for j in range(2):
            pair = weight[8 * i : 8 * i + 8, 4 * j : 4 * j + 4]
            u, s, v = torch.linalg.svd(pair, full_matrices=False)
            best = u[:, :2] @ s[:2].diag() @ v[:2]
            assert distance(layer.dense()[8 * i : 8 * i + 8, 4 * j : 4 * j + 4], best) < 1e-9


@pytest.mark.parametrize("kind", ["low_rank", "block"])
@pytest.mark.parametrize("weighted", [False, True])
@torch.no_grad()
def test_model_equals_one_with_the_dense_weights(kind, weighted):
    model, x = small("softmax").double(), torch.randn(3, 3, 14, 10).double()
    reference, trained = copy.deepcopy(model), copy.deepcopy(model)
    left = structure_mlp(model, kind, 0.8, x if weighted else None)
    assert set(left) == {f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)}
    assert all(0.5 < share <= 0.8 for share in left.values())
    for own, other in zip(model.blocks, reference.blocks):
        for name in ("fc1", "fc2"):
            getattr(other.mlp, name).weight.copy_(getattr(own.mlp, name).dense())
            getattr(other.mlp, name).bias.copy_(getattr(own.mlp, name).bias)
    assert distance(model(x), reference(x)) < 1e-10
    if weighted:  # what is lost has no mean: the first layer sees the same inputs in the trained model
        seen = []
        trained.blocks[0].mlp.fc1.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
        trained(x)
        inputs, outputs = seen[0], trained.blocks[0].mlp.fc1(seen[0])
        assert distance(model.blocks[0].mlp.fc1(inputs).mean((0, 1)), outputs.mean((0, 1))) < 1e-10


def test_hand_over():
    model, x = small("softmax"), torch.randn(2, 3, 14, 10)
    direct, before, schedule = copy.deepcopy(model), model(x), HandoverSchedule(1, "cosine")
    structure_mlp(model, "block", 0.8, x, schedule)
    assert torch.equal(model(x), before)
    schedule.step()
    finish_handover(model)
    structure_mlp(direct, "block", 0.8, x)
    assert torch.equal(model(x), direct(x))
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "model, kwargs, words",
    [
        (lambda: small("softmax"), dict(kind="toeplitz"), ["kind='toeplitz'", "'low_rank', 'block'"]),
        (lambda: small("softmax"), dict(share=1.0), ["share=1.0", "below 1"]),
        (lambda: small("softmax"), dict(share=0.001), ["share=0.001", "blocks.0.mlp.fc1", "at least"]),
        (lambda: small("softmax"), dict(kind="block", share=0.1), ["share=0.1", "blocks.0.mlp.fc1", "0.750, 0.375"]),
        (lambda: small("softmax"), dict(images=torch.zeros(0, 3, 14, 10)), ["images=(0, 3, 14, 10)"]),
        (lambda: small("softmax"), dict(images=torch.full((1, 3, 14, 10), torch.inf)), ["images", "finite"]),
        (lambda: timm.create_model("test_resnet"), {}, ["ResNet", "Mlp"]),
    ],
    ids=["kind", "share", "rank", "blocks", "no_images", "infinite", "resnet"],
)
def test_bad_input(model, kwargs, words):
    model = model()
    names = list(model.state_dict())
    with pytest.raises(InputError) as error:
        structure_mlp(model, **kwargs)
    for word in words:
        assert word in str(error.value)
    assert list(model.state_dict()) == names


def test_structured_twice_is_refused():
    model = small("softmax")
    structure_mlp(model, "low_rank", 0.5)
    with pytest.raises(InputError, match="blocks.0.mlp.fc1 is a LowRankLinear"):
        structure_mlp(model, "low_rank", 0.5)
