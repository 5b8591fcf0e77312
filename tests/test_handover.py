"""Hand-over between modules: exact values, and the same ones under checkpointing, accumulation, DDP and resume."""

import copy
import math

import pytest
import timm
import torch
from conftest import distance, in_two_processes, rounding, since, small
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_vix._checks import InputError
from timm_vix.conversion.handover import Handover, HandoverSchedule, finish_handover


class Double(nn.Linear):
    """A linear layer that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def pair(schedule, width=3):
    torch.manual_seed(0)
    return Handover(Double(width, width), Double(width, width), schedule)


def mlp_model(schedule):
    """A small ViT whose second layers of the MLPs are handed over to new ones."""
    torch.manual_seed(0)
    model = small("softmax", depth=3).train()
    for block in model.blocks:
        block.mlp.fc2 = Handover(block.mlp.fc2, copy.deepcopy(block.mlp.fc2), schedule)
        nn.init.normal_(block.mlp.fc2.new.weight, std=0.2)
    return model


@pytest.mark.parametrize(
    "kind, shares", [("linear", [1, 0.75, 0.5, 0.25, 0, 0]), ("cosine", [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0, 0])]
)
def test_values(kind, shares):
    schedule = HandoverSchedule(4, kind)
    module, x = pair(schedule), torch.randn(5, 3)
    for taken, a in enumerate(shares):
        assert math.isclose(float(schedule.share), a, abs_tol=1e-7) and schedule.ended == (taken >= 4)
        expected = a * module.old(x) + (1 - a) * module.new(x)
        assert distance(module(x), expected) < 1e-6
        schedule.step()


def test_at_the_ends():
    schedule = HandoverSchedule(1)
    module, x = pair(schedule), torch.randn(2, 3)
    assert torch.equal(module(x), module.old(x))
    module.zero_grad()
    module(x).sum().backward()
    assert not module.new.weight.grad.any() and module.old.weight.grad.any()
    schedule.step()
    before = module.old.calls
    assert torch.equal(module(x), module.new(x))
    assert module.old.calls == before


def gradients(model, x):
    return torch.cat([g.flatten() for g in torch.autograd.grad(model(x).square().sum(), [*model.parameters()])])


def test_gradient_checkpointing():
    schedule = HandoverSchedule(4)
    model, x = mlp_model(schedule), torch.randn(2, 3, 14, 10)
    schedule.step()
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    found = gradients(model, x)
    assert schedule.taken == 1 and distance(found, expected) < rounding(torch.float32)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_module(reentrant):
    schedule = HandoverSchedule(8)
    module, x = pair(schedule), torch.randn(4, 3, requires_grad=True)
    schedule.step()
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert module.new.calls == 2
    gradient = x.grad.clone()
    x.grad = None
    module(x).square().sum().backward()
    assert torch.equal(x.grad, gradient)


def train(model, schedule, images, steps, pieces=1, start=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(start, steps):
        for part in images[step].chunk(pieces):
            (model(part).square().sum() / len(images[step])).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_accumulation_and_resume():
    images = torch.randn(4, 4, 3, 14, 10)
    schedule = HandoverSchedule(3, "cosine")
    whole = train(mlp_model(schedule), schedule, images, 4)
    schedule = HandoverSchedule(3, "cosine")
    assert distance(train(mlp_model(schedule), schedule, images, 4, pieces=2), whole) < rounding(torch.float32)

    schedule = HandoverSchedule(3, "cosine")
    model = mlp_model(schedule)
    train(model, schedule, images, 2)
    saved = copy.deepcopy((model.state_dict(), schedule.state_dict()))
    schedule = HandoverSchedule(3, "cosine")
    model = mlp_model(schedule)
    model.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert torch.equal(train(model, schedule, images, 4, start=2), whole)


def test_finish():
    schedule = HandoverSchedule(1)
    model, x = mlp_model(schedule).eval(), torch.randn(2, 3, 14, 10)
    model.head = Handover(model.head, Handover(model.head, nn.Linear(32, 5), schedule), schedule)
    with pytest.raises(InputError) as error:
        finish_handover(model)
    assert "head is at" in str(error.value) and "step 0 of 1" in str(error.value)
    assert isinstance(model.head, Handover)
    schedule.step()
    expected = model(x)
    finish_handover(model)
    assert torch.equal(model(x), expected)
    assert not any(isinstance(module, Handover) for module in model.modules())
    with pytest.raises(InputError, match="nothing to finish"):
        finish_handover(model)


def test_copies_share_the_schedule():
    schedule = HandoverSchedule(2)
    average = timm.utils.ModelEmaV3(pair(schedule), decay=0.5).module
    schedule.step()
    x = torch.randn(2, 3)
    assert distance(average(x), (average.old(x) + average.new(x)) / 2) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    schedule = HandoverSchedule(4)
    module = pair(schedule).to(dtype)
    schedule.step()
    x = torch.randn(5, 3, dtype=dtype)
    y = module(x)
    assert y.dtype == dtype
    bound = rounding(dtype) if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    assert distance(y, 0.75 * module.old(x) + 0.25 * module.new(x)) < bound


@since("2.7", "may recompile for other reasons")
def test_compiled_once_while_the_share_moves():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    schedule = HandoverSchedule(4)
    module, x = Handover(nn.Linear(3, 3), nn.Linear(3, 3), schedule), torch.randn(5, 3)
    call = torch.compile(module, backend=backend, fullgraph=True)
    for _ in range(4):
        assert torch.equal(call(x), module(x))
        schedule.step()
    assert len(compiled) == 1
    assert torch.equal(call(x), module.new(x))
    assert len(compiled) == 2  # once more, without the old module


def distributed(rank):
    schedule = HandoverSchedule(2)
    torch.manual_seed(0)
    images = torch.randn(4, 4, 3)[:, 2 * rank : 2 * rank + 2]
    module = nn.parallel.DistributedDataParallel(Handover(nn.Linear(3, 3), nn.Linear(3, 3), schedule))
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return train(module, schedule, images, 4).tolist()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # these processes use one thread
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_equal_one(tmp_path):
    found = in_two_processes(distributed, tmp_path)
    schedule = HandoverSchedule(2)
    torch.manual_seed(0)
    images = torch.randn(4, 4, 3)
    module = Handover(nn.Linear(3, 3), nn.Linear(3, 3), schedule)
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    expected = train(module, schedule, images, 4)
    assert found[0] == found[1]
    assert distance(torch.tensor(found[0]), expected) < 1e-5


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: HandoverSchedule(0), ["steps=0", "at least 1"]),
        (lambda: HandoverSchedule(True), ["steps=True"]),
        (lambda: HandoverSchedule(3, "step"), ["kind='step'", "'linear', 'cosine'"]),
        (lambda: Handover(nn.Identity(), nn.Identity(), 3), ["schedule=3", "HandoverSchedule"]),
        (lambda: HandoverSchedule(3).load_state_dict({}), ["state={}", "0 to 3"]),
        (lambda: HandoverSchedule(3).load_state_dict(HandoverSchedule(4).state_dict()), ["'steps': 4", "'steps': 3"]),
        (lambda: HandoverSchedule(3).load_state_dict(dict(steps=3, kind="linear", taken=4)), ["'taken': 4", "0 to 3"]),
    ],
)
def test_bad_input(wrong, words):
    with pytest.raises(InputError) as error:
        wrong()
    for word in words:
        assert word in str(error.value)
