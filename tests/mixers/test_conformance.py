"""What every mixer owes the host, over all mixers, positions and token layouts."""

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from conftest import (
    LAYOUTS,
    OTHERS_ARE_SLOW,
    VALUES_ONLY,
    VARIANTS,
    condition,
    distance,
    gradients,
    image,
    rounding,
    set_long,
    small,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

from timm_vix.mixers import MIXERS

TRAITS = [
    {"qk_norm": True},
    {"scale_attn_norm": True},
    {"pre_norm": True},
    {"init_values": 0.1},
    {"qkv_bias": False},
    {"num_heads": 1, "embed_dim": 24},
    {"img_size": (16, 12)},
    {"img_size": (2, 10)},
    {"img_size": (2, 2)},
]


def check_float32(model: nn.Module, x: torch.Tensor) -> None:
    """Outputs and gradients in float32 are those in float64, but for rounding."""
    double = copy.deepcopy(model).double()
    assert double(x.double()).dtype == torch.float64
    for function in (nn.Module.__call__, gradients):
        bound = rounding(torch.float32, condition(function, model, x))
        assert bound < 1e-3, "an ill-conditioned case shows nothing"
        found, expected = function(model, x), function(double, x.double())
        assert (found - expected).norm() <= bound * expected.norm()  # also where both are 0


OTHER_LAYOUTS = [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "class"]


@pytest.mark.parametrize("layout", ["class", *OTHER_LAYOUTS])
@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_float32_agrees_with_float64(mixer, rope, options, layout):
    model = small(mixer, rope, **options, **LAYOUTS[layout])
    check_float32(model, image(model))


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_gradients_are_those_of_finite_differences(mixer, rope, options):
    model = small(mixer, rope, **options, img_size=(6, 10), embed_dim=8, depth=1)
    module = model.double().blocks[0].attn
    names = [name for name, _ in module.named_parameters()]
    x = torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return functional_call(module, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(call, (x, *module.parameters()), atol=1e-9, rtol=1e-6, fast_mode=True)


@pytest.mark.parametrize("mixer, rope, options", OTHERS_ARE_SLOW)
def test_traits_of_the_host(mixer, rope, options):
    for traits in TRAITS:
        model = small(mixer, rope, **{**options, **traits})
        check_float32(model, image(model))


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_what_a_long_sequence_computes_again_is_the_same(mixer, rope, options, monkeypatch):
    dropout = {"attn_drop_rate": 0.3} if MIXERS[mixer].supports_dropout else {}
    model = small(mixer, rope, **options, **dropout).train()
    x = image(model)
    found = []
    for long in (1, 10**9):
        set_long(monkeypatch, long)
        torch.manual_seed(1)
        found.append(gradients(model, x))
    assert torch.equal(*found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_every_parameter_gets_a_gradient(mixer, rope, options, layout):
    # all tokens are pooled: a last block's effect on patches is lost on a class token, and the other way round
    pooling = {"global_pool": "avg", "pool_include_prefix": True}
    model = small(mixer, rope, **{**options, **LAYOUTS[layout], **pooling}, qk_norm=True, init_values=0.1).train()
    model(image(model, batch=1)).square().sum().backward()
    dead = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    if mixer in VALUES_ONLY and model.num_prefix_tokens == 0:  # patches have no queries and keys there
        dead = {name for name in dead if "q_norm" not in name and "k_norm" not in name}
    assert not dead


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"], ids=str)
@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_half_precision_costs_no_more_than_in_softmax_attention(mixer, rope, options, dtype):
    def error(model):
        half, autocast = copy.deepcopy(model), contextlib.nullcontext()
        images = x
        if dtype == "autocast":
            autocast = torch.autocast("cpu", torch.bfloat16)
        else:
            half, images = half.to(dtype), x.to(dtype)
        with autocast:
            y, g = half(images).float(), gradients(half, images)
            with torch.no_grad():  # attention takes another way where no gradient is wanted
                inferred = half(images).float()
        assert y.isfinite().all() and g.isfinite().all() and inferred.isfinite().all()
        exact = model(x)
        return distance(y, exact), distance(inferred, exact), distance(g, gradients(model, x))

    half_dtype = torch.bfloat16 if dtype == "autocast" else dtype
    model, softmax = small(mixer, rope, **options), small("softmax", rope)
    softmax.load_state_dict({k: v for k, v in model.state_dict().items() if k in softmax.state_dict()}, strict=False)
    x = image(model, batch=4)
    for mine, theirs in zip(error(model), error(softmax)):
        assert mine < 3 * (theirs + torch.finfo(half_dtype).eps)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_an_image_does_not_depend_on_its_batch_mates(mixer, rope, options, training):
    model = small(mixer, rope, **{**options, **({"redraw_interval": 0} if "redraw_interval" in options else {})})
    model.double().train(training)  # in float32 a product rounds by the size of its batch
    x = image(model, batch=4).double()
    x[1:] *= 30
    assert distance(model(x[:1]), model(x)[:1]) < 1e-12


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_dropout_acts_in_training_only(mixer, rope, options):
    for rate in ("proj_drop_rate", "drop_path_rate", "pos_drop_rate"):
        model = small(mixer, rope, **{**options, rate: 0.5})
        x = image(model, batch=8)
        y = model(x)
        assert torch.equal(model(x), y)
        model.train()
        assert distance(model(x), y) > 1e-3 or (rope and rate == "pos_drop_rate")


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_attention_dropout_acts_or_is_refused(mixer, rope, options):
    if not MIXERS[mixer].supports_dropout:
        with pytest.raises(ValueError, match="attn_drop_rate=0.5"):
            small(mixer, rope, **options, attn_drop_rate=0.5)
        return
    model = small(mixer, rope, **options, attn_drop_rate=0.5)
    x = image(model)
    assert torch.equal(model(x), model(x))
    assert distance(model.train()(x), model.eval()(x)) > 1e-3
    slot = model.blocks[0].attn
    tokens = torch.randn(1, model.num_prefix_tokens + model.patch_embed.num_patches, 32)
    dropped, whole = slot.train()(tokens), slot.eval()(tokens)
    assert ((dropped - whole).abs().amax(2) > 1e-6).all()  # of prefix tokens too


@pytest.mark.parametrize("mixer, rope, options", [case for case in VARIANTS if MIXERS[case.values[0]].supports_dropout])
def test_attention_dropout_leaves_the_mean_and_varies_by_its_rate(mixer, rope, options):
    """A weight w of a value is 0 with probability p, else w / (1 - p): its mean is w, its variance w² p / (1 - p)."""
    model, other = (small(mixer, rope, **options, attn_drop_rate=rate).double() for rate in (0.3, 0.6))
    other.load_state_dict(model.state_dict())
    slot = model.blocks[0].attn
    # far from the mean of all values, which is also that of any share of them
    tokens = 3 * torch.randn(1, model.num_prefix_tokens + model.patch_embed.num_patches, 32, dtype=torch.float64)
    with torch.no_grad():
        whole, dropped = slot.eval()(tokens)[0], slot.train()(tokens.expand(600, -1, -1))
        more = other.blocks[0].attn.train()(tokens.expand(300, -1, -1))
    error = dropped.std(0) / 600**0.5
    assert (error > 1e-5).all(), "each output is random"
    assert ((dropped.mean(0) - whole).abs() < 6 * error).all()  # of 50,000 outputs in all tests, 5 is too near
    assert float(more.var(0).sum() / dropped.var(0).sum()) == pytest.approx((0.6 / 0.4) / (0.3 / 0.7), rel=0.1)


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_state_goes_through_safetensors(mixer, rope, options, tmp_path):
    model, other = (small(mixer, rope, **options) for _ in range(2))
    for parameter in other.parameters():
        parameter.data.normal_()
    x = image(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_copies_are_equal_and_independent(mixer, rope, options, copied, dynamic):
    model = small(mixer, rope, **options, dynamic_img_size=dynamic)
    x = image(model)
    twin = copied(model)
    y = model(x)
    if dynamic:
        twin(torch.randn(1, 3, 6, 8))  # must not move the original's grid
    assert torch.equal(twin(x), y) and torch.equal(model(x), y)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_meta_device_build(mixer, rope, options):
    stem = "conv" if rope == "axial" else "conv_linear" if rope else "linear"
    normal = small(mixer, rope, **options, stem=stem)
    with torch.device("meta"):
        model = small(mixer, rope, **options, stem=stem)
    assert all(t.is_meta for t in itertools.chain(model.parameters(), model.buffers()))
    model.to_empty(device="cpu")
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 77)
    model.init_weights()
    for (name, tensor), (_, expected) in zip(model.named_buffers(), normal.named_buffers(), strict=True):
        assert torch.equal(tensor, expected), name
    bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    assert not bad
    assert model.eval()(image(normal)).isfinite().all()


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_built_with_a_dtype(mixer, rope, options):
    model = small(mixer, rope, **options, dtype=torch.bfloat16)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    cast = small(mixer, rope, **options).to(torch.bfloat16)
    assert {k for k, t in model.state_dict().items() if t.is_floating_point()} == {
        k for k, t in cast.state_dict().items() if t.is_floating_point()
    }
    cast.load_state_dict(model.state_dict())
    x = image(model).bfloat16()
    assert torch.equal(model(x), cast(x))


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_small_inputs_are_precise_and_large_ones_stay_finite(mixer, rope, options):
    module = small(mixer, rope, **options).blocks[0].attn
    x = torch.randn(2, 36, 32)
    for scale in (0.0, 1e-6):
        check_float32(module, scale * x)
    x = (1e3 * x).requires_grad_()
    y = module(x)
    y.square().mean().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
