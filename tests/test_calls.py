"""What belongs to one forward pass travels with it: threads, replicas, checkpoints, inference before training."""

import copy
import inspect
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from conftest import FEW, MIXERS, distance, set_long, small
from timm.models._manipulate import reinit_non_persistent_buffers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import SDPBackend, sdpa_kernel

import timm_vix
from timm_vix.slots.model import slots_of

SIZES = ((14, 10), (10, 14), (28, 20), (20, 28))  # two pairs of grids with as many tokens
CASES = [
    pytest.param(mixer, rope, id=f"{mixer}-{rope}" if rope else mixer)
    for mixer, mixer_class in MIXERS.items()
    for rope in ((None, "axial") if mixer_class.supports_rotary else (None,))
]


def dynamic(mixer: str, rope: str | None = None, **kwargs) -> torch.nn.Module:
    return small(mixer, rope, dynamic_img_size=True, **kwargs)


def converted(mixer: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=14, patch_size=2, embed_dim=32, depth=2, num_heads=2, dynamic_img_size=True
    ).eval()
    timm_vix.convert(model, mixer, **FEW.get(mixer, {}))
    return model


@pytest.mark.parametrize("mixer, rope", CASES)
def test_threads_with_images_of_as_many_tokens(mixer, rope):
    model = dynamic(mixer, rope)
    images = [torch.randn(1, 3, *SIZES[i % 4]) for i in range(24)]
    with torch.inference_mode():
        expected = [model(x) for x in images]

    @torch.inference_mode()
    def answer(x):
        return model(x)

    with ThreadPoolExecutor(2) as pool:
        for y, right in zip(pool.map(answer, images), expected):
            assert torch.equal(y, right)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [dynamic, converted])
@pytest.mark.parametrize("mixer", MIXERS)
def test_checkpoints_of_two_sizes_before_the_backward_pass(mixer, build, reentrant, monkeypatch):
    """timm calls the blocks again in the backward pass, where the last image seen has another size."""
    model = build(mixer).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    images = [torch.randn(2, 3, *size) for size in SIZES]
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    gradients = []
    for net in (model, twin):
        sum(net(x.requires_grad_(reentrant)).square().sum() for x in images).backward()
        gradients.append([p.grad for p in net.parameters()])
    for mine, right in zip(*gradients, strict=True):
        assert (mine - right).norm() <= 1e-5 * (1 + right.norm())


def test_somebody_elses_checkpoint_of_a_block():
    model = dynamic("atrous").train()
    twin = copy.deepcopy(model)
    for i, block in enumerate(twin.blocks):
        twin.blocks[i] = checkpoint_wrapper(block)
    images = [torch.randn(2, 3, *size) for size in SIZES]
    for net in (model, twin):
        sum(net(x).square().sum() for x in images).backward()
    for mine, right in zip(twin.parameters(), model.parameters(), strict=True):
        assert (mine.grad - right.grad).norm() <= 1e-5 * (1 + right.grad.norm())


@pytest.mark.parametrize("mixer, rope", CASES)
def test_training_after_another_size_under_inference_mode(mixer, rope):
    model = dynamic(mixer, rope)
    fresh = copy.deepcopy(model)
    with torch.inference_mode():
        model(torch.randn(1, 3, 20, 28))
    x = torch.randn(2, 3, 20, 28)
    for net in (model, fresh):
        net.train()(x).square().sum().backward()
    for mine, right in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine.grad, right.grad)


@pytest.mark.parametrize("mixer, rope", CASES)
def test_set_input_size_under_inference_mode(mixer, rope):
    model = small(mixer, rope)
    fresh = copy.deepcopy(model)
    with torch.inference_mode():
        model(torch.randn(1, 3, 14, 10))
        model.set_input_size((20, 28))
    fresh.set_input_size((20, 28))
    x = torch.randn(2, 3, 20, 28)
    for net in (model, fresh):
        net.train()(x).square().sum().backward()
    for mine, right in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine.grad, right.grad)


@pytest.mark.parametrize("mixer", MIXERS)
def test_replicas_have_the_grid_of_their_own_images(mixer):
    """``nn.DataParallel`` copies the modules once and runs the copies in threads."""
    model = dynamic(mixer)
    model(torch.randn(1, 3, *SIZES[0]))
    replicas = [replica(model) for _ in range(2)]
    images = [torch.randn(1, 3, *size) for size in SIZES[2:]]
    with torch.no_grad():
        expected = [model(x) for x in images]

    def answer(pair):
        with torch.no_grad():
            return pair[0](pair[1])

    with ThreadPoolExecutor(2) as pool:
        for y, right in zip(pool.map(answer, zip(replicas, images)), expected):
            assert torch.equal(y, right)


def replica(module: torch.nn.Module) -> torch.nn.Module:
    """As ``torch.nn.parallel.replicate`` copies a module, on one device."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else replica(child)
    copied._parameters = dict(module._parameters)
    copied._buffers = dict(module._buffers)
    return copied


@pytest.mark.parametrize("mixer, rope", CASES)
def test_a_small_image_is_no_configuration(mixer, rope):
    model = dynamic(mixer, rope)
    before = [slot.config() for slot in slots_of(model).values()]
    model(torch.randn(1, 3, 2, 2))
    assert [slot.config() for slot in slots_of(model).values()] == before


@pytest.mark.parametrize("kind", ["axial", "1d"])
@pytest.mark.parametrize("name", ["vix_nystrom_cifar", "vix_linformer_cifar", "vix_softmax_cifar", "pin_cifar"])
def test_rotary_tables_after_meta_construction(name, kind):
    """What Transformers' TimmWrapper does: build on the meta device, empty, load, fill what no checkpoint holds."""
    options = dict(img_size=16, patch_size=2) if name != "pin_cifar" else dict(img_size=16)
    model = timm.create_model(name, rope=kind, **options).eval()
    x = torch.randn(2, 3, 16, 16)
    late = timm.create_model(name, rope=kind, device="meta", **options).to_empty(device="cpu").eval()
    for tensor in [*late.parameters(), *late.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 7)
    late.load_state_dict(model.state_dict())
    reinit_non_persistent_buffers(late)
    assert torch.equal(late(x), model(x))


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_empty_batch(mixer):
    model = small(mixer).train()  # timm's models take none with a dynamic size or without learned positions
    y = model(torch.randn(0, 3, 14, 10))
    y.sum().backward()
    assert y.shape == (0, 5) and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@sdpa_kernel(SDPBackend.MATH)  # torch's fused kernels have no second derivative
@pytest.mark.parametrize("mixer", MIXERS)
def test_vmap_and_derivatives_of_derivatives(mixer):
    """Hessian-vector products against those of float64 finite differences of the gradient, and against vmap."""
    model = small(mixer, img_size=(6, 10), embed_dim=8, depth=1).double()
    module = model.blocks[0].attn
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    v = torch.randn_like(x)

    def gradient(at):
        at = at.detach().requires_grad_()
        return torch.autograd.grad(module(at).pow(3).sum(), at, create_graph=True)[0], at

    g, at = gradient(x)
    (product,) = torch.autograd.grad((g * v).sum(), at)
    h = 1e-5
    difference = (gradient(x + h * v)[0] - gradient(x - h * v)[0]) / (2 * h)
    assert distance(product, difference) < 1e-5
    batch = torch.randn(3, *x.shape, dtype=torch.float64)
    with torch.no_grad():
        assert distance(torch.vmap(module)(batch), torch.stack([module(one) for one in batch])) < 1e-10
    tangent = torch.func.jvp(module, (x,), (v,))[1]
    with torch.no_grad():
        assert distance(tangent, (module(x + h * v) - module(x - h * v)) / (2 * h)) < 1e-5
    hessian = torch.func.jacrev(torch.func.grad(lambda t: module(t).pow(3).sum()))(x)
    assert distance(hessian.reshape(x.numel(), x.numel()) @ v.flatten(), product.flatten()) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace(mixer, dtype):
    """With gradients on, as torch's default is; its own check traces again without."""
    model, (x, other) = small(mixer, depth=1).to(dtype), torch.randn(2, 2, 3, 14, 10, dtype=dtype)
    traced = torch.jit.trace(model, x)
    with torch.no_grad():
        assert distance(traced(other), model(other)) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's fused attention
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_of_each_image_in_a_long_sequence(mixer, monkeypatch):
    """torch.func refuses hooks on saved tensors, with which long sequences compute activations again."""
    set_long(monkeypatch, 1)
    model = small(mixer, depth=1, **({"window_size": 2} if mixer in ("nystrom", "linformer") else {})).double()
    images = torch.randn(3, 3, 14, 10, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, image.unsqueeze(0)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        model.zero_grad()
        model(image.unsqueeze(0)).square().sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("mixer", ["nystrom", "linformer"])
def test_weights_that_are_no_plain_tensors_are_not_fused(mixer):
    """A quantised linear layer has another weight class, or another dtype; the fused way would read it as floats."""
    torchao = pytest.importorskip("torchao.quantization")
    counts = {"nystrom": "num_landmarks", "linformer": "num_proj_tokens"}
    model = small(mixer, depth=1, **{counts[mixer]: 4})
    x = torch.randn(2, 3, 14, 10)
    assert model.blocks[0].attn.can_fuse_projections(36, torch.zeros(1, 2, 5, 16), None)
    expected = model(x)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert not model.blocks[0].attn.can_fuse_projections(36, torch.zeros(1, 2, 5, 16), None)
    with torch.no_grad():
        assert distance(model(x), expected) < 0.05


class OwnTensor(torch.Tensor):
    """A weight with a class of its own, as sharded and quantised ones have."""


@pytest.mark.parametrize("mixer", ["nystrom", "linformer"])
def test_only_plain_floating_point_weights_are_fused(mixer):
    counts = {"nystrom": "num_landmarks", "linformer": "num_proj_tokens"}
    model = small(mixer, depth=1, **{counts[mixer]: 4})
    x = torch.randn(2, 3, 14, 10)
    expected, attn = model(x), model.blocks[0].attn
    weight = attn.qkv.weight
    attn.qkv.weight = torch.nn.Parameter(weight.detach().as_subclass(OwnTensor))
    assert not attn.can_fuse_projections(36, torch.zeros(1, 2, 5, 16), None)
    assert distance(model(x), expected) < 1e-5
    attn.qkv.weight = weight
    attn.qkv = torch.nn.utils.parametrizations.weight_norm(attn.qkv)
    assert not attn.can_fuse_projections(36, torch.zeros(1, 2, 5, 16), None)
    assert distance(model(x), expected) < 1e-5


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "softmax"])
def test_what_is_kept_aside_moves_with_the_model(mixer):
    for name in ("vit_tiny_patch16_224", "eva_giant_patch14_224"):
        patch = 16 if "16" in name else 14
        model = timm.create_model(name, img_size=4 * patch, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
        reference = copy.deepcopy(model).double()
        timm_vix.convert(model, mixer, **FEW.get(mixer, {}))
        model.double()
        timm_vix.revert(model)
        x = torch.randn(2, 3, 4 * patch, 4 * patch, dtype=torch.float64)
        assert torch.equal(model(x), reference(x))


def test_features_are_those_of_the_whole_model():
    """Layers are counted before timm leaves out those that aren't asked for."""
    kwargs = dict(source="vit_tiny_patch16_224", mixer="linformer", layers="last-2", embed_dim=32, num_heads=2, depth=4)
    kwargs |= dict(img_size=32, patch_size=8, num_proj_tokens=4)
    torch.manual_seed(0)
    whole = timm.create_model("vix_from_timm", **kwargs).eval()
    x = torch.randn(2, 3, 32, 32)
    for index in (1, 2, 3):
        torch.manual_seed(0)
        features = timm.create_model("vix_from_timm", features_only=True, out_indices=[index], **kwargs).eval()
        expected = whole.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
        assert torch.equal(features(x)[0], expected)


@pytest.mark.parametrize("index", [0, 3])
def test_features_of_a_saved_conversion(index, tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=32, num_heads=2, depth=4, img_size=32, patch_size=8
    ).eval()
    timm_vix.convert(model, "linformer", layers=[3], num_proj_tokens=4)
    x = torch.randn(2, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=[index]).eval()
    assert torch.equal(again(x)[0], expected)


def test_mixed_mechanisms_in_one_model(tmp_path):
    from timm.models import save_for_hf

    layers = {0: "linformer", 2: {"mixer": "nystrom", "num_landmarks": 12}}
    model = timm.create_model("vix_softmax_cifar", layers=layers, num_proj_tokens=9, img_size=14, patch_size=2).eval()
    kinds = [type(getattr(block.attn, "core", block.attn)).__name__ for block in model.blocks]
    assert kinds == ["LinformerAttention", "Attention", "NystromAttention", "Attention"]
    assert model.blocks[0].attn.config()["num_proj_tokens"] == [3, 3]
    assert model.blocks[2].attn.config()["num_landmarks"] == 12
    x = torch.randn(2, 3, 14, 14)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    plain = timm.create_model("vix_nystrom_cifar", layers="last-1", img_size=14, patch_size=2)
    assert [hasattr(block.attn, "core") for block in plain.blocks] == [False, False, False, True]


@pytest.mark.parametrize("name", [f"hybrid_{kind}_cifar" for kind in ("vil", "vip", "vin", "mixer", "fnet")])
def test_a_hybrid_softmax_model_gives_its_weights_to_other_hybrids(name, tmp_path, caplog):
    from safetensors.torch import save_file

    arguments = dict(img_size=16, patch_size=2, depth=2)
    source = timm.create_model("hybrid_vit_cifar", **arguments)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    state = source.state_dict()
    shared = [key for key in model.state_dict() if key in state]
    assert any(key.startswith("patch_embed.proj.") for key in shared)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in shared)
    (line,) = [record.message for record in caplog.records]
    assert "needs fine-tuning" in line and "patch_embed" not in line


@pytest.mark.parametrize("mixer", ["performer", "mixer"])
def test_weight_decay_spares_a_conversion_as_it_spares_a_name(mixer):
    from timm.optim import create_optimizer_v2

    arguments = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    options = {"learned_features": True} if mixer == "performer" else {}
    named = timm.create_model("vix_softmax_cifar", mixer=mixer, qkv_bias=True, mlp_ratio=4, **arguments, **options)
    converted = timm.create_model("vit_tiny_patch16_224", **arguments)
    timm_vix.convert(converted, mixer, **options)

    def spared(model):
        groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}

    assert spared(converted) == spared(named)
    expected = (
        {"core.features", "core.feature_bias"} if mixer == "performer" else {"core.patch_bias", "core.prefix_bias"}
    )
    assert {f"blocks.0.attn.{name}" for name in expected} <= spared(converted)


def test_legacy_onnx_of_a_long_performer(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = small("performer", img_size=(48, 48), depth=1)  # 577 tokens: two blocks of unequal length
    x = torch.randn(1, 3, 48, 48)
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        pytest.skip("this torch has one exporter only")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=False)
    except (RuntimeError, ValueError, TypeError) as error:
        if "dynamo" in str(error) or "deprecated" in str(error):
            pytest.skip(f"this torch has no legacy exporter: {error}")
        raise
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert distance(torch.from_numpy(y), model(x)) < 1e-4


class Adapted(torch.nn.Module):
    """A projection with a low-rank part beside it, as LoRA wraps it; it has no weight and bias of its own."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.base = linear
        self.low_rank = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.low_rank(x)


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if MIXERS[mixer].supports_rotary])
def test_adapters_around_projections(mixer):
    model = small(mixer, depth=1)
    attn, x = model.blocks[0].attn, torch.randn(2, 3, 14, 10)
    twin = copy.deepcopy(model)
    attn.qkv, attn.proj = Adapted(attn.qkv), Adapted(attn.proj)
    with torch.no_grad():
        for name in ("qkv", "proj"):
            getattr(twin.blocks[0].attn, name).weight.add_(getattr(attn, name).low_rank.weight)
    assert distance(model(x), twin(x)) < 1e-5


def test_checkpoints_of_the_attention_alone():
    for mixer in ("atrous", "linformer"):
        model = dynamic(mixer).train()
        twin = copy.deepcopy(model)
        for block in twin.blocks:
            block.attn = checkpoint_wrapper(block.attn)
        images = [torch.randn(2, 3, *size) for size in SIZES]
        for net in (model, twin):
            sum(net(x).square().sum() for x in images).backward()
        for mine, right in zip(twin.parameters(), model.parameters(), strict=True):
            assert (mine.grad - right.grad).norm() <= 1e-5 * (1 + right.grad.norm())


def test_linformers_differ_and_reload_at_another_size(tmp_path):
    layers = {0: "linformer", 2: {"mixer": "linformer", "num_proj_tokens": 4}}
    model = timm.create_model("vix_linformer_cifar", layers=layers, img_size=16, patch_size=2).eval()
    model.set_input_size((24, 16))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 24, 16)
    assert torch.equal(again(x), model(x))


def test_frozen_attention_comes_back_frozen():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    timm_vix.convert(model, "fnet")
    timm_vix.freeze_except(model, "head")
    timm_vix.revert(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name, words", [("pin_cifar", "built with its mixer"), ("cvn_cifar", "built with its mixer")])
def test_why_a_model_cannot_be_converted(name, words):
    with pytest.raises(ValueError, match=words):
        timm_vix.convert(timm.create_model(name, img_size=16))
    with pytest.raises(ValueError, match="DataParallel wraps the VisionTransformer at 'module'"):
        timm_vix.convert(torch.nn.DataParallel(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)))
