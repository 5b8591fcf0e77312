"""Atrous attention against a loop over tokens, and against softmax where they coincide."""

import copy
import math

import pytest
import timm
import torch
from conftest import LAYOUTS, check_equal, distance, heads_of, joined, rounding, small
from test_linformer import rotation
from timm.utils import ParseKwargs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_vix.mixers._dilated import axis_layout, check_dilations
from timm_vix.mixers.atrous import attend_in_windows

# branches, largest window, image in patches of 2 px: padding at one, both or no sides, grids smaller than a window or
# than a dilation, a single row and a single patch
WINDOWS = [
    ((1, 2, 4), 2, (14, 10)),
    ((1, 2), 3, (14, 10)),
    ((4, 1), 3, (10, 22)),
    ((1, 2), 2, (16, 8)),
    ((2,), 2, (14, 10)),
    ((1, 2, 4), 8, (14, 10)),
    ((1, 2, 50), 2, (6, 10)),
    ((1, 3), 2, (2, 10)),
    ((1, 2, 4), 8, (2, 2)),
]


def together(i: int, j: int, length: int, dilation: int, window_size: int) -> bool:
    """Whether two rows share a window: same rest, and among the same ``window_size`` or fewer rows of that rest."""
    dilation = min(dilation, length)
    windows = math.ceil(length / (dilation * window_size))
    side = math.ceil(length / (windows * dilation))
    return i % dilation == j % dilation and i // dilation // side == j // dilation // side


def naive(module, x: torch.Tensor, rope: str | None, read: torch.Tensor | None = None) -> torch.Tensor:
    """A token at a time: sums of gated exponentials over the tokens of its windows, of those that are read (B, N)."""
    B, N, C = x.shape
    h, P, (H, W), n = module.num_heads, module.num_prefix_tokens, module.grid, len(module.core.dilations)
    D = C // h
    q, k, v = heads_of(module, x)
    places = [(0, 0, 0)] * P + [(r, c, r * W + c) for r in range(H) for c in range(W)]
    if rope:
        turn = torch.stack([rotation(place, D, rope) for place in places])
        q, k = (torch.einsum("nij,bhnj->bhni", turn, t) for t in (q, k))
    gates = torch.ones(B, N, h, n, dtype=x.dtype)
    if n > 1:
        gates = n * (x @ module.core.gate_weight.T + module.core.gate_bias).reshape(B, N, h, n).softmax(3)
    out = []
    for i in range(N):
        r, c = places[i][:2]
        logits = torch.einsum("bhd,bhnd->bhn", q[:, :, i], k) / math.sqrt(D)
        weight = torch.zeros(B, h, N, dtype=x.dtype)
        for j in range(N):
            if i < P or j < P or i == j:
                weight[:, :, j] = 1  # once, whatever the gates, which add up to n
                continue
            for b, dilation in enumerate(module.core.dilations):
                shared = together(r, places[j][0], H, dilation, module.core.window_size)
                if shared and together(c, places[j][1], W, dilation, module.core.window_size):
                    weight[:, :, j] += gates[:, i, :, b]
        if read is not None:
            weight = weight * read[:, None]
        weight = weight * (logits - logits.amax(2, keepdim=True)).exp()
        weight = weight / weight.sum(2, keepdim=True).clamp(min=1e-300)  # nothing is left: 0
        out.append(torch.einsum("bhn,bhnd->bhd", weight, v))
    return joined(module, torch.stack(out, dim=2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", [None, "axial", "1d"])
@pytest.mark.parametrize("dilations, window_size, img_size", WINDOWS)
def test_equals_the_loop(dilations, window_size, img_size, rope, layout):
    model = small("atrous", rope, dilations=dilations, window_size=window_size, img_size=img_size, **LAYOUTS[layout])
    module = model.double().blocks[0].attn
    module.qkv.weight.data *= 2
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    bound = rounding(torch.float32 if rope else torch.float64, 10)  # the table of rotations was made in float32
    check_equal(module(x), naive(module, x, rope), (x, *module.parameters()), bound)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dilations, window_size, img_size", WINDOWS[:5])
def test_masked_tokens_are_left_out(dilations, window_size, img_size, layout):
    model = small("atrous", dilations=dilations, window_size=window_size, img_size=img_size, **LAYOUTS[layout])
    module = model.double().blocks[0].attn
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    read = torch.rand(2, module.num_tokens) < 0.5
    read[0, module.num_prefix_tokens : module.num_prefix_tokens + module.grid[1] * 2] = False  # whole windows
    read[:, -1] = True
    check_equal(module(x, attn_mask=read[:, None, None]), naive(module, x, None, read), x, rounding(torch.float64, 10))


@pytest.mark.parametrize("shift", [-15.0, 15.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dilations", [1, (1, 2)], ids=str)
def test_windows_without_an_unmasked_patch_where_all_logits_are_small_or_large(dilations, layout, shift):
    """A number that is added to all logits changes nothing."""
    module = small("atrous", dilations=dilations, window_size=2, **LAYOUTS[layout]).double().blocks[0].attn
    module.qkv.bias.data[:32], module.qkv.bias.data[32:64] = 2.0, shift / 8.0  # 16 channels a head, over sqrt(16)
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    read = torch.ones(2, module.num_tokens, dtype=torch.bool)
    read[:, module.num_prefix_tokens + 15 :] = False
    expected = naive(module, x, None, read)
    weight = torch.randn_like(expected)
    (slope,) = torch.autograd.grad((expected * weight).sum(), x)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        copied, given = copy.deepcopy(module).to(dtype), x.detach().to(dtype).requires_grad_()
        y = copied(given, attn_mask=read[:, None, None])
        bound = 20 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else rounding(dtype)
        assert distance(y.double(), expected) < bound
        (mine,) = torch.autograd.grad((y * weight.to(dtype)).sum(), given)
        assert distance(mine.double(), slope) < 2 * bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", [None, "axial"])
@pytest.mark.parametrize("options", [{"dilations": 1, "window_size": 7}, {"dilations": 1, "window_size": 99}], ids=str)
def test_a_window_over_the_grid_is_softmax(options, rope, layout):
    atrous = small("atrous", rope, **options, **LAYOUTS[layout]).double()
    softmax = small("softmax", rope, **LAYOUTS[layout]).double()
    softmax.load_state_dict(atrous.state_dict())
    x = torch.randn(2, 3, 14, 10, dtype=torch.float64, requires_grad=True)
    ours, theirs = atrous(x), softmax(x)
    bound = rounding(torch.float64, 10)
    assert distance(ours, theirs) < bound
    mine, reference = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs))
    assert distance(mine, reference) < bound


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 1e-4), (torch.float16, 0.01), ("autocast", 0.01), (torch.bfloat16, 0.1)],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 4.0, 7.0])
def test_branches_are_weighed_by_their_exponentials(scale, dtype, tolerance):
    """Where logits are 68 apart, so that one branch's exponentials are nothing beside another's."""
    module = small("atrous", window_size=2, class_token=False, global_pool="avg").blocks[0].attn
    module.qkv.weight.data *= scale
    x = torch.randn(1, 35, 32)
    q, k, _ = module.double().project(x.double(), 0, 3)
    assert (q @ k.transpose(2, 3) / 4).abs().max() > 1.3 * scale**2
    reference = naive(module, x.double(), None)
    if dtype == "autocast":
        with torch.autocast("cpu", torch.float16):
            y = module.float()(x)
    else:
        y = module.to(dtype)(x.to(dtype))
    assert distance(y, reference) < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operations_are_linear_in_tokens(layout):
    """On sides that the windows divide; what prefix tokens alone need is the same on every grid, and subtracted."""

    def operations(side):
        module = small("atrous", window_size=2, img_size=2 * side, **LAYOUTS[layout]).blocks[0].attn
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(torch.randn(1, module.num_tokens, 32))
        return counter.get_total_flops()

    few, more, most = operations(8), operations(16), operations(32)
    assert most - more == 4 * (more - few) > 0
    if layout == "no_prefix":
        assert more == 4 * few


@pytest.mark.parametrize("length", range(1, 30))
@pytest.mark.parametrize("dilation", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("window_size", [1, 2, 5, 8])
def test_windows_are_few_and_hardly_padded(length, dilation, window_size):
    windows, side, dilation = axis_layout(length, dilation, window_size)
    assert side <= window_size and windows * side * dilation >= length
    assert (windows - 1) * window_size * dilation < length  # no window fewer would do
    assert windows * (side - 1) * dilation < length  # nor a smaller one


@pytest.mark.parametrize("given", [(1, 2, 4), [1, 2, 4], "1,2,4", "(1, 2, 4)", None])
def test_dilations_in_all_their_forms(given):
    assert check_dilations(given) == [1, 2, 4]


def test_dilations_from_the_command_line():
    """As timm's scripts parse ``--model-kwargs``."""
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    kwargs = parser.parse_args(["--model-kwargs", "dilations=1,3", "window_size=4"]).model_kwargs
    module = timm.create_model("vix_atrous_tiny", device="meta", depth=1, **kwargs).blocks[0].attn
    assert (module.core.dilations, module.core.window_size) == ([1, 3], 4)


@pytest.mark.parametrize("mean", [5.0, 16.0, 26.0])
def test_autocast_keeps_the_logits_of_mean_keys(mean):
    """Rounded to bfloat16, a logit of 26 would be off by up to 1/16, and the weight of its branch by 6 %."""
    D, grid = 16, (14, 10)
    offset = math.sqrt(mean / math.sqrt(D))
    q, k, v = torch.randn(3, 2, 3, 140, D)
    q, k = ((0.5 * t + offset).bfloat16().float() for t in (q, k))
    v, gates = v.bfloat16(), torch.zeros(2, 3, 140, 2, dtype=torch.bfloat16)
    arguments = (gates.double(), 0, grid, [1, 2], 3, None)
    expected = attend_in_windows(q.double(), k.double(), v.double(), *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend_in_windows(q, k, v, gates, *arguments[1:])
    assert distance(found, expected) < 0.005
