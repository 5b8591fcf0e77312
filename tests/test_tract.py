"""TrAct: the gradient of autograd times a dense inverse, under accumulation, scaling and several processes."""

import numpy as np
import pytest
import timm
import torch
from conftest import distance, in_two_processes
from PIL import Image
from torch import nn

import timm_vix
from timm_vix._checks import InputError
from timm_vix.train.tract import first_layers, tract

LAYERS = {
    "patches": (lambda: nn.Conv2d(3, 8, 4, 4), (2, 3, 12, 8)),
    "left_over": (lambda: nn.Conv2d(3, 8, (2, 3), (2, 3)), (2, 3, 7, 8)),
    "fewer_rows_than_inputs": (lambda: nn.Conv2d(3, 8, 8, 8), (2, 3, 8, 16)),
    "overlapping": (lambda: nn.Conv2d(2, 8, 3, 2, 1), (2, 2, 7, 6)),
    "padded": (lambda: nn.Conv2d(2, 8, 2, 2, (1, 0)), (2, 2, 6, 6)),
    "linear": (lambda: nn.Linear(6, 8, bias=False), (3, 5, 6)),
}


def loss_of(layer, x):
    return layer(x).square().mul(torch.linspace(0, 1, 8).reshape(8, *[1] * (x.ndim - 2) * (x.ndim == 4))).sum()


def rows_by_hand(layer, x):
    """Each input of the layer, cut out by loops: (R, n)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    x = nn.functional.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    (h, w), (down, right) = layer.kernel_size, layer.stride
    return torch.stack(
        [
            image[:, i : i + h, j : j + w].flatten()
            for image in x
            for i in range(0, x.shape[2] - h + 1, down)
            for j in range(0, x.shape[3] - w + 1, right)
        ]
    )


def expected(layer, x, strength, autocast=False):
    """Gradients of weight and bias, the first by autograd and a dense inverse, in float64."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(layer, x)
    gradients = torch.autograd.grad(loss, list(layer.parameters()))
    a = rows_by_hand(layer, x).double()
    inverse = torch.linalg.inv(a.T @ a / len(a) + strength * torch.eye(a.shape[1], dtype=torch.float64))
    return [(gradients[0].flatten(1).double() @ inverse).reshape(gradients[0].shape), *gradients[1:]]


@pytest.mark.parametrize("strength", [0.1, 3.0])
@pytest.mark.parametrize("case", LAYERS)
def test_gradient_times_a_dense_inverse(case, strength):
    build, shape = LAYERS[case]
    layer, x = build(), torch.randn(shape)
    wanted = expected(layer, x, strength)
    hooks = tract(layer, strength)
    for _ in range(2):  # nothing of the first pass is left for the second
        layer.zero_grad()
        loss_of(layer, x).backward()
        for parameter, gradient in zip(layer.parameters(), wanted):
            assert distance(parameter.grad, gradient) < 1e-4
    hooks.remove()
    plain = torch.autograd.grad(loss_of(layer, x), layer.weight)[0]
    assert distance(plain, wanted[0]) > 0.1


def test_accumulation_scaler_and_half_precision():
    layer, x = nn.Conv2d(3, 8, 4, 4), torch.randn(4, 3, 12, 8)
    wanted = [expected(layer, part, 0.1)[0] for part in x.chunk(2)]
    wanted_in_half_precision = expected(layer, x, 0.1, autocast=True)[0]
    tract(layer)
    for part in x.chunk(2):
        loss_of(layer, part).backward()
    assert distance(layer.weight.grad, sum(wanted)) < 1e-4

    layer.zero_grad()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler.scale(loss_of(layer, x[:2])).backward()
    scaler.unscale_(optimizer)
    assert distance(layer.weight.grad, wanted[0]) < 1e-4
    before = layer.weight.detach().clone()
    layer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    scaler.scale(1e9 * loss_of(layer, x)).backward()  # overflows, so the step is skipped
    scaler.step(optimizer)
    assert torch.equal(layer.weight, before)

    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(layer, x)
    loss.backward()
    assert distance(layer.weight.grad, wanted_in_half_precision) < 1e-4


def test_two_passes_before_one_gradient():
    layer, x = nn.Conv2d(3, 8, 4, 4), torch.randn(4, 3, 12, 8)
    wanted = expected(layer, x, 0.1)[0]
    tract(layer)
    with torch.no_grad():
        layer(100 * x)  # nothing is trained by this one
    (loss_of(layer, x[:1]) + loss_of(layer, x[1:])).backward()
    assert distance(layer.weight.grad, wanted) < 1e-4


def test_two_losses_of_the_same_images():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3, bias=False).double(), torch.randn(20, 5, dtype=torch.float64)
    hooks = tract(layer, 0.1)
    one, other = layer(x).square().sum(), layer(x).sin().sum()
    one.backward()
    first = layer.weight.grad.clone()
    other.backward()
    hooks.remove()
    raw = nn.Linear(5, 3, bias=False).double()
    raw.load_state_dict(layer.state_dict())
    inverse = torch.linalg.inv(x.T @ x / 20 + 0.1 * torch.eye(5, dtype=torch.float64))
    gradients = [torch.autograd.grad(loss, raw.weight)[0] for loss in (raw(x).square().sum(), raw(x).sin().sum())]
    assert distance(first, gradients[0] @ inverse) < 1e-12
    assert distance(layer.weight.grad, sum(gradients) @ inverse) < 1e-12


def distributed(rank):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 8), torch.randn(4, 6)
    tract(layer)
    parallel = nn.parallel.DistributedDataParallel(layer)
    loss_of(parallel, x[2 * rank : 2 * rank + 2]).backward()
    return layer.weight.grad.tolist()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # these processes use one thread
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path):
    found = in_two_processes(distributed, tmp_path)
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 8), torch.randn(4, 6)
    wanted = (expected(layer, x[:2], 0.1)[0] + expected(layer, x[2:], 0.1)[0]) / 2
    for rank in (0, 1):
        assert distance(torch.tensor(found[rank]), wanted) < 1e-4


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vix_nystrom_cifar", "hybrid_vin_cifar", "crossvit_9_240"])
def test_first_layers_see_the_images(name):
    model = timm.create_model(name, device="meta")
    seen = {}

    def note(module, args):
        seen[module] = args[0].shape[1]

    for layer in first_layers(model):
        layer.register_forward_pre_hook(note)
    model(torch.zeros(1, 3, *model.pretrained_cfg["input_size"][1:], device="meta"))
    assert set(seen.values()) == {3} and len(seen) == len(first_layers(model))


def test_an_option_of_training(tmp_path):
    for name in ("dark", "bright"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 128, (16, 16, 3), np.uint8) + 127 * (name == "bright")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    settings = dict(model="vit_tiny_patch16_224", model_kwargs=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1))
    settings |= dict(img_size=16, batch_size=6, epochs=1, amp="off", threads=1, device="cpu", warmup=0.0)
    settings |= dict(data_dir=tmp_path / "images", augment="none", weight_decay=0.0)
    # a step of Adam moves each weight by the sign of its gradient
    weights = []
    for strength in (0.1, None):
        model, _ = timm_vix.finetune(out=tmp_path / str(strength), tract=strength, **settings)
        weights.append(model.patch_embed.proj.weight.detach())
    assert (weights[0] != weights[1]).float().mean() > 0.1
    with pytest.raises(InputError, match="frozen"):
        timm_vix.finetune(out=tmp_path / "head", tract=0.1, train_only="head", **settings)
    with pytest.raises(InputError, match="tract=0.0: allowed is above 0"):
        timm_vix.finetune(out=tmp_path / "zero", tract=0.0, **settings)


def frozen():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    return layer


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: tract(nn.Conv2d(4, 4, 2, groups=2)), ["groups=2", "allowed is 1"]),
        (lambda: tract(nn.Conv2d(4, 4, 2, dilation=2)), ["dilation=(2, 2)", "(1, 1)"]),
        (lambda: tract(nn.Conv2d(4, 4, 3, padding="same")), ["padding='same'"]),
        (lambda: tract(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), ["padding_mode='reflect'"]),
        (lambda: tract(nn.Conv1d(4, 4, 2)), ["Conv1d", "nn.Conv2d or nn.Linear"]),
        (lambda: tract(nn.Linear(4, 4), 0), ["strength=0", "above 0"]),
        (lambda: tract(frozen()), ["frozen"]),
        (lambda: first_layers(nn.Linear(2, 2)), ["Linear", "no first layer"]),
    ],
)
def test_bad_input(wrong, words):
    with pytest.raises(InputError) as error:
        wrong()
    for word in words:
        assert word in str(error.value)
