"""DAFF: a loop over patches and their neighbours, any grid and prefix tokens, trained weights of a plain MLP."""

import copy

import pytest
import timm
import torch
from conftest import LAYOUTS, distance, gelu, image, lively, rounding, small, small_arguments
from safetensors.torch import save_file
from timm.layers import Mlp

import timm_vix
from timm_vix.mixers._layout import TokenLayout
from timm_vix.models._daff import DepthwiseFeedForward


def batch_norm(x, norm):
    """Over images and patches, (B, N, C), in training."""
    mean, var = norm.bn.running_mean, norm.bn.running_var
    if norm.training:
        mean, var = x.mean((0, 1)), x.var((0, 1), unbiased=False)
    return (x - mean) / (var + norm.bn.eps).sqrt() * norm.bn.weight + norm.bn.bias


def naive(layer, x):
    """One patch after the other, with the neighbours that exist."""
    P, (height, width) = layer.num_prefix_tokens, layer.grid
    h = gelu(batch_norm(x[:, P:] @ layer.fc1.weight.T + layer.fc1.bias, layer.bn1))
    local = []
    for i in range(height):
        for j in range(width):
            total = torch.zeros_like(h[:, 0])
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= i + down < height and 0 <= j + right < width:
                        weight = layer.conv.weight[:, 0, down + 1, right + 1]
                        total = total + weight * h[:, (i + down) * width + j + right]
            local.append(total)
    h = h + gelu(batch_norm(torch.stack(local, dim=1), layer.bn2))
    y = batch_norm(h @ layer.fc2.weight.T + layer.fc2.bias, layer.bn3)
    if P == 0:
        return y
    hidden = gelu(y.mean(1) @ layer.compress.weight.T + layer.compress.bias)
    factor = hidden @ layer.excite.weight.T + layer.excite.bias
    prefix = [x[:, p] * factor for p in range(P)]
    return torch.cat([torch.stack(prefix, dim=1), y], dim=1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_prefix_tokens, grid", [(0, (4, 3)), (1, (3, 5)), (5, (2, 2)), (1, (1, 6)), (1, (4, 1))])
def test_daff_is_a_loop_over_patches(num_prefix_tokens, grid, training):
    layer = DepthwiseFeedForward(Mlp(8, 16), TokenLayout(num_prefix_tokens, grid)).double()
    lively(layer).train(training)
    with torch.no_grad():
        for norm in (layer.bn1, layer.bn2, layer.bn3):
            norm.bn.running_mean.normal_()
            norm.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(3, num_prefix_tokens + grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (copy.deepcopy(layer), lambda x: naive(layer, x)):
        y = function(x)
        parameters = list((layer if not isinstance(function, torch.nn.Module) else function).parameters())
        slopes = torch.autograd.grad((y**3).sum(), [x, *parameters])
        results.append(torch.cat([y.flatten(), *(slope.flatten() for slope in slopes)]))
    assert distance(*results) < 1e-10


@pytest.mark.parametrize(
    "mixer, block, layout",
    [*(("softmax", "sequential", layout) for layout in LAYOUTS), ("nystrom", "parallel", "registers")],
)
def test_models_with_daff(mixer, block, layout):
    """At the grid at hand, dynamic or not; scripted; an image's output has nothing of its batch mates."""
    arguments = dict(**LAYOUTS[layout], mlp="daff", block=block)
    model, dynamic = small(mixer, **arguments), small(mixer, **arguments, dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    x = image(model)
    y = model(x)
    # two sizes in turn, of which one has as many patches as the other
    wide = torch.randn(2, 3, 10, 14)
    expected = small(mixer, **arguments, img_size=(10, 14))
    model.set_input_size((10, 14))
    expected.load_state_dict(model.state_dict())
    assert distance(model(wide), expected(wide)) < rounding(torch.float32)
    wide_map = dynamic.forward_intermediates(wide, intermediates_only=True)[-1]
    assert wide_map.shape[2:] == (5, 7)
    assert distance(dynamic(x), y) < rounding(torch.float32)
    assert distance(model(wide[1:]), model(wide)[1:]) < rounding(torch.float32)
    if layout in ("no_prefix", "registers"):
        assert distance(torch.jit.script(model)(wide), model(wide)) < rounding(torch.float32)


def test_new_linear_layers_start_as_those_of_the_vit():
    layer = timm.create_model("vix_nystrom_tiny", mlp="daff", depth=1).blocks[0].mlp
    for linear in (layer.compress, layer.excite):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1) and not linear.bias.any()


def test_a_checkpointed_pass_has_the_grid_of_its_images():
    """Gradients of images of two sizes with as many patches, whose backward passes come afterwards."""
    model = small("softmax", mlp="daff", dynamic_img_size=True, pos_embed="none").double()
    images = [torch.randn(1, 3, *size, dtype=torch.float64) for size in ((14, 10), (10, 14))]

    def slopes(checkpointing):
        model.set_grad_checkpointing(checkpointing)
        loss = sum(model(x).square().sum() for x in images)
        return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, list(model.parameters()))])

    assert distance(slopes(True), slopes(False)) < 1e-12


def test_a_plain_mlp_continues_in_the_patches(tmp_path):
    """Loaded weights: in evaluation a patch has its old MLP, a prefix token none."""
    plain = small("softmax")
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    checkpoint = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "model.safetensors")))
    model = timm.create_model("vix_softmax_cifar", mlp="daff", **small_arguments("softmax"), **checkpoint).eval()
    x = torch.randn(2, 36, 32)
    for block, old in zip(model.blocks, plain.blocks):
        y = block.mlp(x)
        assert distance(y[:, 1:], old.mlp(x)[:, 1:]) < 1e-4  # the normalisation's epsilon, twice
        assert not y[:, 0].any()
    save_file(lively(model).state_dict(), tmp_path / "daff.safetensors")
    checkpoint["pretrained_cfg_overlay"]["file"] = str(tmp_path / "daff.safetensors")
    again = timm.create_model("vix_softmax_cifar", mlp="daff", **small_arguments("softmax"), **checkpoint).eval()
    kept = [key for key in again.state_dict() if not key.startswith("head.")]  # timm leaves out another label set's
    assert all(torch.equal(again.state_dict()[key], model.state_dict()[key]) for key in kept)


def test_every_parameter_learns_and_exports():
    model = small("nystrom", mlp="daff")
    x = image(model)
    exported = torch.export.export(model, (x,)).module()
    assert distance(exported(x), model(x)) < rounding(torch.float32)
    model.train()
    (model(x) ** 2).sum().backward()
    # what is added before batch normalisation is taken away by it
    free = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not free


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"mlp": "swiglu"}, ["mlp='swiglu'", "'mlp'", "'daff'"]),
        ({"mlp": "daff", "patch_drop_rate": 0.2}, ["patch_drop_rate=0.2", "mlp='daff'", "allowed is 0"]),
        ({"mlp": "daff", "mlp_layer": timm.layers.SwiGLU}, ["mlp='daff'", "SwiGLU", "Mlp"]),
    ],
)
def test_wrong_input(kwargs, words):
    with pytest.raises(ValueError) as error:
        small("softmax", **kwargs)
    assert all(word in str(error.value) for word in words), error.value


def test_another_number_of_tokens_is_refused():
    layer = DepthwiseFeedForward(Mlp(8, 16), TokenLayout(1, (3, 5)))
    with pytest.raises(ValueError, match="15 tokens .* 16 tokens"):
        layer(torch.randn(1, 15, 8))


def test_tokens_cannot_merge_before_daff():
    with pytest.raises(ValueError, match="whole patch grid.*mlp='mlp'"):
        timm_vix.convert(small("softmax", mlp="daff"), "softmax", merge=2)
