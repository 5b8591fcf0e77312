"""Convolutional vision transformers: names and size of the published model, attention against the formula."""

import logging
import math

import pytest
import timm
import torch
from conftest import PROJECTED, VALUES_ONLY, distance, lively
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models._features_fx import GraphExtractNet

from timm_vix.mixers import MIXERS
from timm_vix.mixers._layout import TokenLayout
from timm_vix.mixers._mechanism import AttentionMechanism, AttentionShape

MIXER = {"cvn": "nystrom", "cvp": "performer", "cvt": "softmax"}
NAMES = [f"{family}_{size}" for family in MIXER for size in ("cifar", "13")]
SHAPE = dict(img_size=(20, 12), embed_dims=(16, 16, 32), depths=(1, 1, 2), num_heads=(1, 2, 2), num_classes=5)
# CvT has layers of their own for queries and keys, which no patch compares in VALUES_ONLY
ON_ONE_GRID = [
    name
    for name, kind in MIXERS.items()
    if issubclass(kind, AttentionMechanism) and name not in (*PROJECTED, *VALUES_ONLY)
]
# with which keywords a mechanism that approximates softmax attention is that
EXACT = {
    "softmax": {},
    "nystrom": {"num_landmarks": 999},
    "linformer": {"num_proj_tokens": 999},
    "performer": {"num_features": 2048},
}


def small(name="cvt_13", **kwargs):
    """A model in eval mode with grids of 5x3, 3x2 and 2x1 tokens, or as ``embed_strides`` says."""
    return lively(timm.create_model(name, **{**SHAPE, "embed_strides": (4, 2, 2), **kwargs}).eval())


def test_axial_attention_of_whole_strips_is_softmax_where_keys_are_on_the_queries_grid():
    reference = small("cvt_13", key_stride=1).double()
    x = torch.randn(2, 3, 20, 12, dtype=torch.float64)
    for strip_width, low, high in ((9, 0, 1e-10), (1, 1e-7, 0.1)):
        model = small("cvn_13", mixer="axial", strip_width=strip_width, key_stride=1).double()
        model.load_state_dict(reference.state_dict())
        assert low <= distance(model(x), reference(x)) < high
    with pytest.raises(ValueError, match=r"needs queries and keys on one grid; here .* by key_stride=1"):
        small("cvn_13", mixer="axial")


def test_registered_names():
    assert set(timm.list_models(module="cvt")) == set(NAMES)


@pytest.mark.parametrize(
    "name, printed, ours",
    [
        # the official code's print leaves out its own normalisations; ours have one more, and another convolution
        ("cvn_cifar", 851_416, 22 * 128 + 2 * 128 + 4 * (25 * 128 - 33 * 4)),
        ("cvp_cifar", 852_424, 22 * 128 + 2 * 128),
    ],
)
def test_parameters_are_the_papers(name, printed, ours):
    model = timm.create_model(name, num_classes=200, device="meta")
    assert sum(p.numel() for p in model.parameters()) == printed + ours


def test_names_and_shapes_are_those_of_the_published_weights():
    """CvT-13-224x224-IN-1k: 20 M parameters, 4.5 G multiply-adds; keys as its layers are called."""
    state = timm.create_model("cvt_13", device="meta").state_dict()
    expected = {}
    dims, depths, kernels = (64, 192, 384), (1, 2, 10), (7, 3, 3)
    for i, (dim, before) in enumerate(zip(dims, (3, *dims))):
        stage = f"stage{i}"
        expected[f"{stage}.patch_embed.proj.weight"] = (dim, before, kernels[i], kernels[i])
        expected[f"{stage}.patch_embed.proj.bias"] = (dim,)
        expected |= {f"{stage}.patch_embed.norm.{part}": (dim,) for part in ("weight", "bias")}
        for j in range(depths[i]):
            block = f"{stage}.blocks.{j}"
            for norm in ("norm1", "norm2"):
                expected |= {f"{block}.{norm}.{part}": (dim,) for part in ("weight", "bias")}
            for x in "qkv":
                convolution = f"{block}.attn.conv_proj_{x}"
                expected[f"{convolution}.conv.weight"] = (dim, 1, 3, 3)
                expected |= {
                    f"{convolution}.bn.{part}": (dim,) for part in ("weight", "bias", "running_mean", "running_var")
                }
                expected[f"{convolution}.bn.num_batches_tracked"] = ()
            for name, shape in {
                **{f"attn.proj_{x}": (dim, dim) for x in "qkv"},
                "attn.proj": (dim, dim),
                "mlp.fc1": (4 * dim, dim),
                "mlp.fc2": (dim, 4 * dim),
            }.items():
                expected |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    expected |= {"stage2.cls_token": (1, 1, 384), "norm.weight": (384,), "norm.bias": (384,)}
    expected |= {"head.weight": (1000, 384), "head.bias": (1000,)}
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert (
        sum(value.numel() for key, value in state.items() if "running" not in key and "num_b" not in key) == 19_997_480
    )


def naive(module, x: torch.Tensor) -> torch.Tensor:
    """Softmax attention with convolutional projections, from CvT's formula: logits over the root of all channels."""
    B, _, C = x.shape
    P, h = module.num_prefix_tokens, module.num_heads
    image = x[:, P:].transpose(1, 2).reshape(B, C, *module.grid)
    parts = {}
    for name in "qkv":
        tokens = x
        convolution = getattr(module, f"conv_proj_{name}")
        if convolution is not None:
            stride = 1 if name == "q" else 2
            weight, bn = convolution.conv.weight, convolution.bn
            padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
            rows, columns = (math.ceil(side / stride) for side in module.grid)
            out = torch.zeros(B, C, rows, columns, dtype=x.dtype)
            for i in range(3):
                for j in range(3):
                    taken = padded[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
                    out += weight[:, 0, i, j].reshape(-1, 1, 1) * taken[:, :, :rows, :columns]
            tokens = out.flatten(2).transpose(1, 2)
            tokens = (tokens - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
            tokens = torch.cat([x[:, :P], tokens], dim=1)
        linear = getattr(module, f"proj_{name}")
        parts[name] = (tokens @ linear.weight.T + linear.bias).reshape(B, -1, h, C // h)
    scale = C if module.conv_proj_q is not None else C // h
    out = []
    for head in range(h):
        q, k, v = (parts[name][:, :, head] for name in "qkv")
        out.append((q @ k.transpose(1, 2) / math.sqrt(scale)).softmax(2) @ v)
    return torch.cat(out, dim=2) @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize("projection", ["conv", "linear"])
@pytest.mark.parametrize("mixer", EXACT)
def test_attention_is_the_formula_at_the_exact_limit(mixer, projection):
    model = small(mixer=mixer, projection=projection, embed_strides=(2, 1, 1), **EXACT[mixer]).double()
    module = model.stage2.blocks[0].attn
    if mixer == "linformer":  # an average over one patch is the identity
        module.core.reset_parameters()
    for x in "qk":  # Performer's few features are enough for small logits
        getattr(module, f"proj_{x}").weight.data *= 0.3 if mixer == "performer" else 6
    for bn in (m for m in module.modules() if hasattr(m, "running_mean")):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 1 + module.grid[0] * module.grid[1], 32, dtype=torch.float64, requires_grad=True)
    ours, reference = module(x), naive(module, x)
    assert distance(ours, reference) < (0.1 if mixer == "performer" else 1e-10)
    weight = torch.randn_like(ours)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, reference))
    assert distance(mine, theirs) < (0.2 if mixer == "performer" else 1e-9)


@pytest.mark.parametrize("ridge", [0.01, 0.3])
@pytest.mark.parametrize("key_grid", [(8, 6), (4, 4)], ids=str)
@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_few_landmarks_are_nystroms_formula(num_prefix_tokens, key_grid, ridge):
    """F (V~ + (A^T A + r I)^-1 A^T (O - A V~)) with landmarks averaged by a loop, values wider than keys."""
    P, query_grid, cells = num_prefix_tokens, (8, 6), (2, 2)
    queries, keys = TokenLayout(P, query_grid), TokenLayout(P, key_grid)
    shape = AttentionShape(15, 3, 5, 7, queries, keys)
    core = PROJECTED["nystrom"](shape, 4, pinv_iterations=60, ridge=ridge)
    assert core.cells(key_grid) == cells
    counts = [P + grid[0] * grid[1] for grid in (query_grid, key_grid, key_grid)]
    q, k, v = (
        torch.randn(2, 3, n, width, dtype=torch.float64, requires_grad=True)
        for n, width in zip(counts, (5, 5, 7), strict=True)
    )

    def landmarks(tokens, grid):
        height, width = grid[0] // cells[0], grid[1] // cells[1]
        image = tokens[:, :, P:].unflatten(2, grid)
        means = [
            image[:, :, i * height : (i + 1) * height, j * width : (j + 1) * width].mean(dim=(2, 3))
            for i in range(cells[0])
            for j in range(cells[1])
        ]
        return torch.cat([tokens[:, :, :P], torch.stack(means, dim=2)], dim=2)

    Q, K, V = landmarks(q, query_grid), landmarks(k, key_grid), landmarks(v, key_grid)
    c = torch.tensor([0.0] * P + [math.log(key_grid[0] * key_grid[1] / 4)] * 4, dtype=torch.float64)
    kernel, A = ((t @ K.transpose(2, 3) / math.sqrt(5) + c).softmax(3) for t in (q, Q))
    exact = (Q @ k.transpose(2, 3) / math.sqrt(5)).softmax(3) @ v
    At = A.transpose(2, 3)
    X = V + torch.linalg.solve(At @ A + ridge * torch.eye(P + 4), At @ (exact - A @ V))
    ours, reference = core(q, k, v, queries, keys), kernel @ X
    assert distance(ours, reference) < 1e-8
    weight = torch.randn_like(ours)
    for mine, theirs in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, reference))):
        assert distance(mine, theirs) < 1e-6


@pytest.mark.parametrize("kwargs", [{}, {"class_token": False}, {"projection": "linear"}, {"key_stride": 1}], ids=str)
@pytest.mark.parametrize("mixer", PROJECTED)
def test_trains_and_comes_back(mixer, kwargs, tmp_path):
    # of the last block, a class token alone would give queries of patches no gradient
    kwargs = {"embed_strides": (2, 1, 1), "global_pool": "avg", **kwargs}
    if mixer == "nystrom" and (kwargs.get("projection") == "linear" or kwargs.get("key_stride") == 1):
        kwargs["conv_residual"] = True
    model = small(mixer=mixer, **kwargs)
    model.set_grad_checkpointing()
    x = torch.randn(3, 3, 20, 12)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("mixer", ON_ONE_GRID)
def test_every_parameter_of_a_mechanism_on_one_grid_learns(mixer, class_token):
    """One without gradient stops distributed training."""
    kwargs = dict(key_stride=1, class_token=class_token, global_pool="avg", embed_strides=(2, 1, 1))
    model = small(mixer=mixer, **kwargs).train()
    model.head(model.forward_features(torch.randn(3, 3, 20, 12))).square().sum().backward()  # of all tokens
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("mixer", VALUES_ONLY)
@pytest.mark.parametrize("name", ["cvt_13", "cvt_cifar"])
def test_queries_and_keys_without_effect_are_refused(name, mixer):
    with pytest.raises(ValueError) as error:
        timm.create_model(name, mixer=mixer, key_stride=1, device="meta")
    given, allowed = str(error.value).split(": expected one of ")
    assert given == f"mixer={mixer!r}"
    assert sorted(allowed.split(", ")) == sorted(map(repr, [*PROJECTED, *ON_ONE_GRID]))


def test_features_are_drawn_anew_in_training():
    model = timm.create_model("cvp_13", **SHAPE, redraw_interval=2)
    model.set_grad_checkpointing()  # which runs the blocks again, and counts once
    cores = [module for module in model.modules() if isinstance(module, MIXERS["performer"])]
    before = [core.features.clone() for core in cores]
    assert len(cores) == 4
    for passes in (1, 2):
        model.eval()(torch.randn(1, 3, 20, 12))
        model.train()(torch.randn(4, 3, 20, 12)).sum().backward()
        assert [int(core.passes) for core in cores] == [passes] * 4
        assert [torch.equal(core.features, old) for core, old in zip(cores, before)] == [passes == 1] * 4


@pytest.mark.parametrize("mixer", PROJECTED)
def test_an_image_does_not_depend_on_its_batch_mates(mixer):
    model = small(mixer=mixer, embed_strides=(2, 1, 1))
    x = torch.randn(4, 3, 20, 12)
    x[1:] *= 30
    assert distance(model(x[:1]), model(x)[:1]) < 1e-5


def test_softmax_weights_load_into_every_mixer(tmp_path):
    reference = small()
    save_file(reference.state_dict(), tmp_path / "cvt.safetensors")
    overlay = {"file": str(tmp_path / "cvt.safetensors"), "num_classes": 5}
    arguments = {**SHAPE, "pretrained": True, "pretrained_cfg_overlay": overlay}
    x = torch.randn(2, 3, 20, 12)
    assert torch.equal(timm.create_model("cvt_13", **arguments).eval()(x), reference(x))
    for name in ("cvn_13", "cvp_13"):
        state = timm.create_model(name, **arguments).state_dict()
        assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items())
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "cvt.safetensors")
    with pytest.raises(ValueError, match="doesn't fit cvn_13"):
        timm.create_model("cvn_13", **arguments)


def loaded(state, tmp_path, name, **kwargs):
    """A model like ``small``'s that takes weights as ``pretrained=True`` does."""
    save_file(state, tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 5}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**SHAPE, **kwargs}).eval()


@pytest.mark.parametrize(
    "saved, name, fresh",
    [
        ("cvt_13", "cvn_13", ""),  # Nyström attention has no parameters by which its own weights are known
        ("cvt_13", "cvp_13", "stage0.blocks.*.attn.core.features, stage1.blocks.*.attn.core.features"),
        ("cvn_13", "cvp_13", "stage0.blocks.*.attn.core.features, stage1.blocks.*.attn.core.features"),
        ("cvt_13", "cvt_13", None),
        ("cvp_13", "cvp_13", None),
    ],
)
def test_weights_of_another_mixer_are_told(saved, name, fresh, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model = loaded(small(saved).state_dict(), tmp_path, name)
    lines = [record.message for record in caplog.records]
    assert len(lines) == (fresh is not None)
    told = (
        f"Newly initialized: {fresh}" if fresh else "the same names as a softmax ViT's. If they are of one, the model"
    )
    assert all("needs fine-tuning" in line and name in line and told in line for line in lines)
    save_for_hf(model, tmp_path, safe_serialization=True)
    caplog.clear()
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert not [record.message for record in caplog.records if "fine-tuning" in record.message]


def test_an_inherited_models_convolution_starts_as_nothing(tmp_path, caplog):
    softmax = small(key_stride=1)
    arguments = dict(key_stride=1, num_landmarks=2)
    with caplog.at_level(logging.WARNING):
        model = loaded(softmax.state_dict(), tmp_path, "cvn_13", conv_residual=True, **arguments)
    assert "Newly initialized: stage0.blocks.*.attn.core.conv.weight" in caplog.records[0].message
    plain = loaded(softmax.state_dict(), tmp_path, "cvn_13", **arguments)
    x = torch.randn(2, 3, 20, 12)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("name, key", [("cvn_13", "core.conv.weight"), ("cvp_13", "core.features")])
def test_a_checkpoint_that_lacks_a_mixers_weight_is_refused(name, key, tmp_path):
    kwargs = dict(key_stride=1, conv_residual=True) if name == "cvn_13" else {}
    state = small(name, **kwargs).state_dict()
    del state[f"stage1.blocks.0.attn.{key}"]
    with pytest.raises(ValueError, match=rf"doesn't fit {name}. Missing: stage1.blocks.*{key}"):
        loaded(state, tmp_path, name, **kwargs)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_features": 3}, ["num_features=3", "nystrom", "num_landmarks"]),
        ({"num_landmarks": 0}, ["num_landmarks=0", "at least 1"]),
        ({"ridge": -1}, ["ridge=-1"]),
        ({"mixer": "fnet"}, ["fnet", "softmax", "nystrom", "performer"]),
        ({"projection": "average"}, ["average", "conv", "linear"]),
        ({"key_stride": 3}, ["key_stride=3", "1, 2"]),
        ({"conv_residual": True}, ["conv_residual=True", "grid", "key_stride=1"]),
        ({"img_size": 1, "embed_kernels": (7, 3, 3)}, ["img_size=1", "stage 0"]),
        ({"embed_strides": (2, 1)}, ["embed_strides=(2, 1)", "three positive integers"]),
        ({"embed_strides": (0, 1, 1)}, ["embed_strides=(0, 1, 1)", "three positive integers"]),
        ({"depths": (1, 1)}, ["depths=(1, 1)", "three positive integers"]),
        ({"embed_dims": 64}, ["embed_dims=64", "three positive integers"]),
        ({"embed_kernels": (7, 3, 3.0)}, ["embed_kernels=(7, 3, 3.0)", "three positive integers"]),
        ({"num_heads": (3, 3, 3)}, ["num_heads=(3, 3, 3)", "embed_dims=(16, 16, 32)"]),
        ({"img_size": "20"}, ["img_size='20'", "positive integer"]),
        ({"global_pool": "max"}, ["global_pool='max'", "avg"]),
        ({"global_pool": "token", "class_token": False}, ["global_pool='token'", "avg"]),
        ({"class_token": "x"}, ["class_token='x'", "True, False"]),
        ({"class_token": 2}, ["class_token=2", "True, False"]),
    ],
    ids=str,
)
def test_a_wrong_keyword_is_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        timm.create_model("cvn_13", **{**SHAPE, **kwargs})
    assert not [word for word in words if word not in str(error.value)], error.value


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The TorchScript type system:UserWarning")
@pytest.mark.parametrize("kind", ["model", "features", "maps", "TorchScript", "torch.fx", "torch.export"])
def test_another_image_of_as_many_tokens_is_refused(kind):
    model = small("cvn_13")
    x, other = torch.randn(2, 3, 20, 12), torch.randn(2, 3, 12, 20)
    build = {
        "model": lambda: model,
        "features": lambda: timm.create_model("cvn_13", **SHAPE, features_only=True),
        "maps": lambda: model.forward_intermediates,
        "TorchScript": lambda: torch.jit.script(model),
        "torch.fx": lambda: GraphExtractNet(model, return_nodes=["head"]),
        "torch.export": lambda: torch.export.export(model, (x,)).module(),
    }
    built = build[kind]()
    built(x)
    with pytest.raises(
        (AssertionError, RuntimeError, torch.jit.Error),
        match="Input height .* doesn't match model|Guard failed|Expected input",
    ):
        built(other)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_takes_another_mixer(name):
    for mixer in PROJECTED:
        model = timm.create_model(name, mixer=mixer, device="meta")
        assert {type(m) for m in model.modules() if type(m) in PROJECTED.values()} == {PROJECTED[mixer]}


@pytest.mark.parametrize("projection", ["conv", "linear"])
def test_initialisation_is_cvts(projection):
    arguments = dict(embed_dims=(64, 64, 64), num_heads=(2, 2, 2), conv_residual=True, key_stride=1)
    model = small("cvn_13", **arguments, projection=projection)
    for again in (False, True):
        torch.manual_seed(0)
        if again:
            model.init_weights()
        else:
            model = timm.create_model("cvn_13", **{**SHAPE, **arguments, "projection": projection})
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
                assert module.bias is None or not module.bias.any()
            if isinstance(module, torch.nn.Conv2d):  # torch's: uniform within one over the root of the inputs
                bound = math.prod(module.weight.shape[1:]) ** -0.5
                assert 0.8 * bound < module.weight.abs().max() <= bound
        assert model.stage2.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_a_pruned_model_has_no_class_token():
    model = small("cvt_13")
    x = torch.randn(2, 3, 20, 12)
    model.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="global_pool='token'"):
        model.reset_classifier(5, "token")
    model.reset_classifier(5, "avg")
    assert distance(model(x), model.head(model.forward_features(x).mean(1))) < 1e-6


@pytest.mark.parametrize("mixer, keywords", [("linformer", dict(num_proj_tokens=1)), ("relu", {})])
def test_weights_on_a_grid_are_resampled_for_another_size(mixer, keywords, tmp_path):
    arguments = dict(SHAPE, embed_strides=(4, 2, 2), mixer=mixer, **keywords)
    saved = lively(timm.create_model("cvn_13", **arguments))
    save_for_hf(saved, tmp_path, safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(40, 24)).eval()
    assert model(torch.randn(2, 3, 40, 24)).isfinite().all()
    host, larger = saved.stage0.blocks[0].attn, model.stage0.blocks[0].attn
    for name, resample in host.core.grid_parameters.items():
        parameter = getattr(host.core, name)
        assert torch.equal(getattr(larger.core, name), resample(parameter, larger.key_grid)), name
        assert getattr(larger.core, name).shape != parameter.shape


def test_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="num_landmark"):
        small(num_landmark=3)
