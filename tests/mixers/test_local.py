"""What every mixer takes by a keyword: a convolution of the values, and a Gaussian bias of the logits."""

import copy
import math

import pytest
import timm
import torch
from conftest import LAYOUTS, check_equal, distance, image, lively, rounding, small
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import timm_vix
from timm_vix.mixers import MIXERS
from timm_vix.mixers._layout import TokenLayout
from timm_vix.mixers._local import locality_channels
from timm_vix.mixers._mechanism import AttentionMechanism, AttentionShape, MechanismHost, TokenMixing
from timm_vix.slots.landmark_slot import LandmarkSlot
from timm_vix.slots.model import slots_of

LOCAL = [name for name in MIXERS if "locality" in MIXERS[name].keywords()]


def places(grid: tuple[int, int], key_grid: tuple[int, int]) -> list[tuple[float, float]]:
    """Where tokens stand among keys: each, every so many, or so many to a key; by a loop."""
    steps = [
        (other + count - 1) // count if count < other else 1 / ((count + other - 1) // other)
        for count, other in zip(grid, key_grid)
    ]
    return [(row * steps[0], column * steps[1]) for row in range(grid[0]) for column in range(grid[1])]


def dense_bias(locality: float, queries: TokenLayout, keys: TokenLayout) -> torch.Tensor:
    """-locality |p_i - p_j|^2 for patches and 0 for prefix tokens, (Nq, Nk), in float64."""
    P, (p, r) = keys.num_prefix_tokens, (places(queries.grid, keys.grid), places(keys.grid, keys.grid))
    bias = torch.zeros(P + len(p), P + len(r), dtype=torch.float64)
    for i, here in enumerate(p):
        for j, there in enumerate(r):
            bias[P + i, P + j] = -locality * ((here[0] - there[0]) ** 2 + (here[1] - there[1]) ** 2)
    return bias


@pytest.mark.parametrize("grids", [(((7, 5),) * 2), (((1, 9),) * 2), ((4, 3), (7, 5)), ((8, 5), (4, 3)), ((1, 1),) * 2])
@pytest.mark.parametrize("P", [0, 2])
def test_channels_give_the_dense_bias(grids, P):
    queries, keys = (TokenLayout(P, grid) for grid in grids)
    D = 24
    for dtype, tolerance in (
        (torch.float64, 1e-13),
        (torch.float32, 1e-6),
        (torch.float16, 1e-4),
        (torch.bfloat16, 1e-3),
    ):
        for locality in (0.003, 0.3):
            of_queries, of_keys = locality_channels(locality, D, queries, keys, torch.empty(0, dtype=dtype))
            found = (of_queries.double() @ of_keys.double().transpose(2, 3))[0, 0] / math.sqrt(D + 8)
            assert (found - dense_bias(locality, queries, keys)).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_channels_survive_a_large_grid(dtype):
    """Squares of places reach 1,000 there and cancel to 1; half precision alone would be off by a half."""
    layout = TokenLayout(1, (64, 6))
    of_queries, of_keys = locality_channels(0.02, 64, layout, layout, torch.empty(0, dtype=dtype))
    found = (of_queries.double() @ of_keys.double().transpose(2, 3))[0, 0] / math.sqrt(72)
    place = torch.cartesian_prod(torch.arange(64.0), torch.arange(6.0)).double()
    expected = -0.02 * torch.cdist(place, place).square()
    assert (found[1:, 1:] - expected).abs().max() < (1e-5 if dtype == torch.float32 else 3e-3)
    assert not found[0].any() and not found[:, 0].any()


@pytest.mark.parametrize("rope", [None, "axial"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softmax_has_the_dense_bias(layout, rope):
    module = small("softmax", rope, locality=0.05, **LAYOUTS[layout]).double().blocks[0].attn
    here = TokenLayout(module.num_prefix_tokens, module.grid)
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    q, k, v = module.project(x, 0, 3)
    q, k = module.rotate(q, here, here.grid), module.rotate(k, here, here.grid)
    weights = (q @ k.transpose(2, 3) / 4 + dense_bias(0.05, here, here)).softmax(3)
    expected = module.merge(weights @ v, x)
    check_equal(module(x), expected, x, 1e-12)
    single = copy.deepcopy(module).float()
    assert distance(single(x.float()), module(x)) < 1e-5


def test_what_is_added_to_softmax_leaves_it_fused():
    module = small("softmax", conv_residual=True, locality=0.05).blocks[0].attn.eval()
    x = torch.randn(2, module.num_tokens, 32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # no other kernel is allowed
        y = module(x)
    assert distance(y, module.double()(x.double())) < rounding(torch.float32)


@pytest.mark.parametrize(
    "mixer, rope, more",
    [*((mixer, rope, {}) for mixer in LOCAL for rope in (None, "axial")), ("linformer", None, {"sharing": "none"})],
)
def test_locality_is_the_mechanism_on_wider_heads(mixer, rope, more):
    module = small(mixer, rope, locality=0.05, reg_tokens=1, **more).double().blocks[0].attn
    here = TokenLayout(module.num_prefix_tokens, module.grid)
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64)
    q, k, v = module.project(x, 0, 3)
    q, k = module.rotate(q, here, here.grid), module.rotate(k, here, here.grid)
    # for each patch its place and square, by a loop: 2 a p_i p_j - a |p_j|^2 - a |p_i|^2, four channels and four zeros
    a = 0.05 * math.sqrt(24)
    rows = [(row - 3, column - 2) for row, column in places(here.grid, here.grid)]
    of_q = torch.tensor([[2 * a * r, 2 * a * c, 1, -a * (r * r + c * c), 0, 0, 0, 0] for r, c in rows]).double()
    of_k = torch.tensor([[r, c, -a * (r * r + c * c), 1, 0, 0, 0, 0] for r, c in rows]).double()
    of_q, of_k = (nn.functional.pad(t, (0, 0, 2, 0)).expand(2, 2, -1, -1) for t in (of_q, of_k))
    core = module.core
    if mixer == "performer":  # its random features are of these channels, in which the split differs
        of_q, of_k = locality_channels(0.05, 16, here, here, q)
        of_q, of_k = of_q.expand(2, 2, -1, -1), of_k.expand(2, 2, -1, -1)
    wide = [torch.cat([q * math.sqrt(24 / 16), of_q], 3), torch.cat([k, of_k], 3), nn.functional.pad(v, (0, 8))]
    if isinstance(module, LandmarkSlot):  # it pools before it projects and turns; channels are pooled for themselves
        cells = core.cells(here.grid)
        q_m, k_m, v_m = module.landmarks(x, here, cells, None)
        pooled = [core.pool(t, here, cells, False) for t in (of_q, of_k)]
        q_m = torch.cat([q_m * math.sqrt(24 / 16), pooled[0]], 3)
        landmarks = [q_m, torch.cat([k_m, pooled[1]], 3), nn.functional.pad(v_m, (0, 8))]
        expected = core.attend(*wide, *landmarks, here)
    else:
        expected = core(*wide, here, here, *([x] if core.needs_tokens else []))
    assert distance(module(x), module.merge(expected[..., :16], x)) < 1e-6
    plain = small(mixer, rope, reg_tokens=1, **more).double().blocks[0].attn
    assert distance(module(x), plain(x)) > 1e-3


@pytest.mark.parametrize("mixer", MIXERS)
def test_nothing_changes_where_nothing_is_added(mixer):
    off = {"locality": 0.0} if mixer in LOCAL else {}
    plain, same = small(mixer), small(mixer, conv_residual=MIXERS[mixer].conv_residual, **off)
    same.load_state_dict(plain.state_dict())
    x = image(plain)
    assert torch.equal(same(x), plain(x))
    assert type(same.blocks[0].attn) is type(plain.blocks[0].attn)


@pytest.mark.parametrize("mixer", MIXERS)
def test_any_mixer_adds_a_convolution_of_its_values(mixer):
    module = small(mixer, conv_residual=True, reg_tokens=1).double().blocks[0].attn
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    y, conv = module(x), module.core.conv
    zeros = {"core.conv.weight": torch.zeros_like(conv.weight)}
    without = functional_call(module, {**module.state_dict(), **zeros}, (x,))
    tokens = isinstance(module.core, TokenMixing)
    v = x if tokens else module.project(x, 2, 3)[0].transpose(1, 2).flatten(2)
    padded = nn.functional.pad(v[:, 2:].unflatten(1, (7, 5)), (0, 0, 2, 2, 2, 2))
    local = sum(padded[:, i : i + 7, j : j + 5] * conv.weight[:, 0, i, j] for i in range(5) for j in range(5)).flatten(
        1, 2
    )
    local = nn.functional.pad(local, (0, 0, 2, 0))
    expected = local if tokens else local @ module.proj.weight.T
    assert distance(y - without, expected) < 1e-10


class Halved(AttentionMechanism):
    """A mechanism that knows nothing of what is added: half the softmax attention, with widths as they come."""

    def __init__(self, shape: AttentionShape, factor: float = 0.5) -> None:
        super().__init__(shape)
        self.factor = factor
        self.width = shape.head_dim

    def forward(self, q, k, v, queries: TokenLayout, keys: TokenLayout):
        assert q.shape[3] == k.shape[3] == v.shape[3] == self.width
        return self.factor * nn.functional.scaled_dot_product_attention(q, k, v)


def test_a_mechanism_of_tomorrow_has_both(monkeypatch):
    monkeypatch.setitem(MIXERS, "halved", Halved)
    keywords = dict(conv_residual=True, locality=0.05)
    model, softmax = small("halved", factor=1.0, **keywords), small("softmax", **keywords)
    softmax.load_state_dict(model.state_dict())
    x = image(model)
    assert torch.equal(model(x), softmax(x))
    assert model.blocks[0].attn.config() == {"factor": 1.0, **keywords}


@pytest.mark.parametrize("mixer", LOCAL)
def test_half_precision_keeps_the_bias(mixer):
    model = small(mixer, locality=0.3, img_size=(32, 24), patch_size=2)
    x = image(model)
    reference = model(x)
    assert distance(copy.deepcopy(model).bfloat16()(x.bfloat16()), reference) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(model(x), reference) < 0.05


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_converted_model_starts_as_without_the_convolution_and_comes_back(mixer, tmp_path):
    def source():
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5
        ).eval()

    local = {"locality": 0.05} if mixer in LOCAL else {}
    plain, model = source(), source()
    timm_vix.convert(plain, mixer, **local)
    timm_vix.convert(model, mixer, conv_residual=True, **local)
    x = torch.randn(2, 3, 32, 32)
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})  # the mixer's own random weights
    assert distance(model(x), plain(x)) < 1e-6
    assert all(slot.config().items() >= {"conv_residual": True, **local}.items() for slot in slots_of(model).values())
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    timm_vix.convert(model, "softmax")
    assert not slots_of(model)


@pytest.mark.parametrize(
    "name, keywords, words",
    [
        ("vix_softmax_cifar", {"conv_residual": "yes"}, ["conv_residual='yes'", "True, False"]),
        ("vix_softmax_cifar", {"locality": -1.0}, ["locality=-1.0", "at least 0"]),
        ("vix_axial_cifar", {"locality": "far"}, ["locality='far'", "at least 0"]),
        ("vix_pool_cifar", {"locality": 0.1}, ["locality=0.1", "'pool' takes conv_residual"]),
        ("vix_fnet_cifar", {"locality": 0.1}, ["locality=0.1", "'fnet' takes conv_residual"]),
        ("vix_softmax_cifar", {"conv_residual": True, "patch_drop_rate": 0.5}, ["patch_drop_rate=0.5", "whole patch"]),
        ("cvt_13", {"conv_residual": True}, ["conv_residual=True", "28x28", "56x56", "key_stride=1"]),
    ],
)
def test_what_is_refused(name, keywords, words):
    with pytest.raises(ValueError) as error:
        timm.create_model(name, **keywords)
    assert all(word in str(error.value) for word in words)


def test_merging_refuses_what_belongs_to_the_whole_grid():
    """In the last layer tokens merge after all attention, so the class token is that of a model without merging."""
    for keywords in ({"locality": 0.05}, {"conv_residual": True}):
        model = small("softmax")
        plain = copy.deepcopy(model)
        with pytest.raises(ValueError, match=r"blocks.1 .*without conv_residual and locality"):
            timm_vix.convert(model, "softmax", merge=3, **keywords)
        timm_vix.convert(model, "softmax", merge=[0, 3], **keywords)
        timm_vix.convert(plain, "softmax", **keywords)
        merged, whole = (lively(net).double() for net in (model, plain))  # the convolution starts at 0
        x = image(model).double()
        assert distance(merged(x), whole(x)) < rounding(torch.float64)
        assert distance(merged.forward_features(x), whole.forward_features(x)) > 1e-3


def test_a_mask_meets_locality_and_refuses_the_convolution():
    x = torch.randn(1, 36, 32)
    module = small("softmax", locality=0.05).blocks[0].attn
    mask = torch.ones(36, 36, dtype=torch.bool).tril()
    assert distance(module(x, is_causal=True), module(x, attn_mask=mask)) < 1e-5
    with pytest.raises(ValueError, match="and without conv_residual"):
        small("softmax", conv_residual=True).blocks[0].attn(x, attn_mask=mask)


HOSTS = {
    "levin_128s": dict(img_size=(80, 48), depth=(1, 1, 1), conv_residual=True),
    "cvn_13": dict(img_size=(40, 24), depths=(1, 1, 1)),
    "pin_tiny": dict(img_size=(64, 48), depth=(1, 1, 1), base_dims=(64, 64, 64), conv_residual=True),
}


@pytest.mark.parametrize("name", HOSTS)
def test_other_hosts_take_both(name):
    """Also where queries and keys have grids of their own, in the units of the keys."""
    model = timm.create_model(name, mixer="softmax", num_classes=5, locality=0.1, **HOSTS[name]).eval().double()
    hosts = [module for module in model.modules() if isinstance(module, MechanismHost)]
    # between LeViT's stages there are fewer queries than values
    assert sum(host.core.conv is not None for host in hosts) == (3 if "conv_residual" in HOSTS[name] else 0)
    for host in hosts:
        P = getattr(host, "num_prefix_tokens", 0)
        queries, keys = TokenLayout(P, host.grid), TokenLayout(P, getattr(host, "key_grid", host.grid))
        counts = [P + layout.grid[0] * layout.grid[1] for layout in (queries, keys, keys)]
        heads, D = host.num_heads, getattr(host, "key_dim", 64)
        q, k, v = (
            torch.randn(1, heads, n, width).double() for n, width in zip(counts, (D, D, getattr(host, "val_dim", D)))
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(D) + dense_bias(0.1, queries, keys)).softmax(3)
        local = 0 if host.core.conv is None else host.core.conv(v, keys)
        assert distance(host.mix(q, k, v, queries, keys, q), weights @ v + local) < 1e-12
    assert model(torch.randn(2, 3, *HOSTS[name]["img_size"]).double()).isfinite().all()
