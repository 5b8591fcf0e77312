"""Stems: total stride, loops over their pieces, who sees whom, timm's padding and layout."""

import copy

import pytest
import timm
import torch
from conftest import distance, gelu, lively, rounding, small, vit
from safetensors.torch import load_file, save_file
from timm.layers import PatchEmbed

from timm_vix.mixers import MIXERS
from timm_vix.mixers._mechanism import AttentionMechanism
from timm_vix.stems import STEMS
from timm_vix.stems.sequential_overlapping import SequentialOverlappingStem
from timm_vix.stems.tokens_to_token import STRIDES, TokensToTokenStem

SEQUENTIAL = [name for name, stem in STEMS.items() if stem is not PatchEmbed]
# in which a token sees all others, and so the padding
GLOBAL = ["t2t"]
CONVOLUTIONAL = [name for name in SEQUENTIAL if name not in GLOBAL]


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stem", CONVOLUTIONAL)
def test_a_patch_is_the_stride(stem, patch_size):
    """A shift by a patch shifts the tokens by one, inside: the stride is the patch and tokens are in raster order."""
    edge = 6 if stem == "conv_pool" else 3  # from here on, padding isn't seen
    H, W = 2 * edge + 2, 2 * edge + 4
    embed = STEMS[stem](img_size=(H * patch_size, W * patch_size), patch_size=patch_size, embed_dim=32).eval()
    x = torch.randn(1, 3, H * patch_size, W * patch_size)
    tokens = embed(x).reshape(H, W, 32)
    down = embed(x.roll(patch_size, 2)).reshape(H, W, 32)
    right = embed(x.roll(patch_size, 3)).reshape(H, W, 32)
    assert distance(down[edge + 1 : -edge, edge:-edge], tokens[edge : -edge - 1, edge:-edge]) < 1e-5
    assert distance(right[edge:-edge, edge + 1 : -edge], tokens[edge:-edge, edge : -edge - 1]) < 1e-5
    assert distance(down[edge:-edge, edge:-edge], tokens[edge:-edge, edge:-edge]) > 0.01


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stem", ["conv", "conv_linear", "conv_pool", "hmlp", "sope", "t2t"])
def test_only_the_linear_stem_is_affine(stem, patch_size):
    embed = STEMS[stem](img_size=32, patch_size=patch_size, embed_dim=32).eval()
    x, y = torch.randn(2, 1, 3, 32, 32)
    blend = embed(0.25 * x + 0.75 * y)
    assert (distance(0.25 * embed(x) + 0.75 * embed(y), blend) < 1e-5) == (stem == "conv_linear")


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stem", ["linear", "hmlp", "conv", "conv_pool", "sope"])
def test_patches_of_a_hierarchical_mlp_never_see_each_other(stem, patch_size):
    p, apart = patch_size, stem in ("linear", "hmlp")
    embed = STEMS[stem](img_size=(4 * p, 5 * p), patch_size=p, embed_dim=32).eval()
    x = torch.randn(1, 3, 4 * p, 5 * p)
    y = x.clone()
    y[:, :, p : 2 * p, 2 * p : 3 * p] += torch.randn(3, p, p)
    changed = (embed(x) != embed(y)).any(dim=2).reshape(4, 5)
    assert changed[1, 2]
    assert (changed.sum() == 1) == apart
    # each pixel of the patch is seen
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(embed(x)[0, 7].square().sum(), x)
    seen = (gradient != 0).any(dim=1)[0]
    assert seen[p : 2 * p, 2 * p : 3 * p].all()
    assert (seen.sum() == p * p) == apart


def test_a_hierarchical_mlp_costs_what_the_paper_says():
    """17.73 G multiply-adds of ViT-B/16 instead of 17.58 with the linear embedding."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for stem in ("hmlp", "linear"):
        embed = STEMS[stem](img_size=224, patch_size=16, embed_dim=768).eval()
        with FlopCounterMode(display=False) as counter:
            embed(torch.zeros(1, 3, 224, 224))
        counts.append(counter.get_total_flops() / 2)
    assert counts[0] - counts[1] == pytest.approx(0.15e9, abs=0.01e9)


@pytest.mark.parametrize("stem", SEQUENTIAL)
def test_gradients_reach_every_parameter_and_pixel(stem):
    embed = STEMS[stem](img_size=32, patch_size=8, embed_dim=32)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    (embed(x) ** 3).sum().backward()
    # a bias before batch normalisation would get none
    assert not [
        name for name, p in embed.named_parameters() if p.grad is None or p.grad.norm() < 1e-4 * p.numel() ** 0.5
    ]
    assert (x.grad != 0).all()


@pytest.mark.parametrize("stem", STEMS)
def test_padding_is_that_of_zeros_to_the_next_patch(stem):
    padded = small("softmax", stem=stem, img_size=(12, 8), patch_size=4, dynamic_img_size=True, dynamic_img_pad=True)
    exact = small("softmax", stem=stem, img_size=(12, 8), patch_size=4)
    exact.load_state_dict(padded.state_dict())
    x = torch.randn(2, 3, 10, 7)
    assert distance(padded(x), exact(torch.nn.functional.pad(x, (0, 1, 0, 2)))) < 1e-6


@pytest.mark.parametrize("stem", SEQUENTIAL)
@pytest.mark.parametrize("patch_size", [3, 32, (4, 8), 0, 6])
def test_other_patch_sizes_are_refused(stem, patch_size):
    with pytest.raises(ValueError, match="patch_size"):
        STEMS[stem](img_size=96, patch_size=patch_size, embed_dim=32)


@pytest.mark.parametrize("stem", SEQUENTIAL)
def test_the_patch_size_stays(stem):
    model = small("softmax", stem=stem)
    with pytest.raises(ValueError, match="patch_size=4"):
        model.set_input_size(patch_size=4)
    assert model(torch.randn(1, 3, 14, 10)).isfinite().all()


@pytest.mark.parametrize("stem", SEQUENTIAL)
def test_the_own_patch_size_is_taken_in_every_form(stem):
    """From JSON it comes as a list."""
    model = small("softmax", stem=stem)
    for patch_size, img_size in ((2, (28, 20)), ((2, 2), (14, 10)), ([2, 2], [10, 18])):
        model.set_input_size(img_size=img_size, patch_size=patch_size)
    assert (model.patch_embed.patch_size, model.patch_embed.grid_size) == ((2, 2), (5, 9))
    with pytest.raises(ValueError, match=r"patch_size=\[2, 6\]"):
        model.set_input_size(patch_size=[2, 6])


def pieces_of(image, side, stride, padding):
    """Square pieces of each image in raster order, as rows: (B, C, H, W) -> (B, N, C·side²)."""
    image = torch.nn.functional.pad(image, (padding,) * 4)
    rows = range(0, image.shape[2] - side + 1, stride)
    columns = range(0, image.shape[3] - side + 1, stride)
    pieces = [image[:, :, i : i + side, j : j + side].flatten(1) for i in rows for j in columns]
    return torch.stack(pieces, dim=1), len(rows), len(columns)


def normalised(x, norm):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
    return x * norm.weight + norm.bias


def naive_tokens_to_token(stem, image, locality):
    """Loops over pieces and over their queries, with the softmax written out; ``locality`` is that of the mixer."""
    patch_size = stem.patch_size[0]
    for layer, stride in zip(stem.proj[:2], STRIDES[patch_size]):
        tokens, height, width = pieces_of(image, *((7, 4, 2) if stride == 4 else (3, stride, 1)))
        x = normalised(tokens, layer.norm1) @ layer.qkv.weight.T + layer.qkv.bias
        q, k, v = x[..., :64], x[..., 64:128], x[..., 128:]
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
        y = []
        for n in range(q.shape[1]):
            far = (places - places[n]).square().sum(1)
            weights = (torch.einsum("bd,bmd->bm", q[:, n], k) / 8 - locality * far).exp()
            y.append(torch.einsum("bm,bmd->bd", weights / weights.sum(1, keepdim=True), v))
        x = v + torch.stack(y, dim=1) @ layer.proj.weight.T + layer.proj.bias
        hidden = gelu(normalised(x, layer.norm2) @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias)
        x = x + hidden @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias
        image = x.transpose(1, 2).unflatten(2, (height, width))
    tokens, _, _ = pieces_of(image, 3, STRIDES[patch_size][2], 1)
    return tokens @ stem.proj[2].weight.flatten(1).T + stem.proj[2].bias


@pytest.mark.parametrize("locality", [0.0, 0.05])
@pytest.mark.parametrize("patch_size, img_size", [(1, (5, 3)), (4, (12, 20)), (16, (32, 48)), (8, (8, 24))])
def test_a_tokens_to_token_stem_is_a_loop_over_pieces(patch_size, img_size, locality):
    """With ``locality`` the loop sees which piece lies in which row and column."""
    mixer = {"mixer": "softmax", "locality": locality}
    stem = TokensToTokenStem(img_size, patch_size, embed_dim=24, mixer=mixer).double()
    lively(stem)
    x = torch.randn(2, 3, *img_size, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (stem, lambda x: naive_tokens_to_token(stem, x, locality)):
        y = function(x)
        assert y.shape == (2, img_size[0] * img_size[1] // patch_size**2, 24)
        slopes = torch.autograd.grad(y.square().sum(), [x, *stem.parameters()])
        results.append(torch.cat([y.flatten(), *(slope.flatten() for slope in slopes)]))
    assert distance(*results) < 1e-12


def naive_affine(x, affine):
    return x * affine.weight.reshape(1, -1, 1, 1) + affine.bias.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("patch_size, widths", [(1, [32]), (2, [32]), (4, [16, 32]), (16, [4, 8, 16, 32])])
@pytest.mark.parametrize("training", [False, True])
def test_a_sequential_overlapping_stem_is_a_loop_over_pieces(patch_size, widths, training):
    stem = SequentialOverlappingStem((2 * patch_size, 3 * patch_size), patch_size, embed_dim=32).double()
    lively(stem).train(training)
    naive = copy.deepcopy(stem)
    x = torch.randn(2, 3, 2 * patch_size, 3 * patch_size, dtype=torch.float64)
    image = naive_affine(x, naive.proj[0])
    assert [layer.conv.out_channels for layer in naive.proj[1:-1]] == widths
    for i, layer in enumerate(naive.proj[1:-1]):
        tokens, height, width = pieces_of(image, 3, min(patch_size, 2), 1)
        y = tokens @ layer.conv.weight.flatten(1).T
        mean, var = layer.bn.running_mean, layer.bn.running_var
        if training:
            mean, var = y.mean((0, 1)), y.var((0, 1), unbiased=False)
        y = (y - mean) / (var + layer.bn.eps).sqrt() * layer.bn.weight + layer.bn.bias
        if i < len(widths) - 1 or len(widths) == 1:
            y = gelu(y)
        image = y.transpose(1, 2).unflatten(2, (height, width))
    expected = naive_affine(image, naive.proj[-1]).flatten(2).transpose(1, 2)
    assert expected.shape == (2, 6, 32)
    assert distance(stem(x), expected) < 1e-12


@pytest.mark.parametrize(
    "mixer", [name for name, mixer_class in MIXERS.items() if issubclass(mixer_class, AttentionMechanism)]
)
def test_every_mixer_with_queries_and_keys_is_inside_a_stem(mixer):
    """At the size at hand, dynamic or not; with gradients; in half precision."""
    arguments = dict(patch_size=4, stem="t2t", stem_mixer=mixer, img_size=(28, 20))
    model = small("softmax", **arguments)
    dynamic = small("softmax", **arguments, dynamic_img_size=True)
    x = torch.randn(2, 3, 28, 20)
    dynamic.load_state_dict(model.state_dict())
    y = model(x)
    assert distance(dynamic(x), y) < rounding(torch.float32)
    assert distance(model(x[1:]), y[1:]) < rounding(torch.float32, 3)  # of its batch mates nothing is seen
    model.set_input_size((20, 36))
    other = torch.randn(2, 3, 20, 36)
    # a mixer whose weights were resampled is the one that resamples them in each pass
    assert distance(dynamic.patch_embed(other).flatten(1, 2), model.patch_embed(other)) < rounding(torch.float32, 3)
    model(other).square().sum().backward()
    assert not [name for name, p in model.patch_embed.named_parameters() if p.grad is None or not p.grad.any()]
    assert model.bfloat16()(other.bfloat16()).isfinite().all()


# its attention has a mask, has none, and sees the tokens
@pytest.mark.parametrize(
    "mixer", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("softmax", "atrous")), "nystrom"]
)
def test_a_stem_with_attention_is_scripted(mixer):
    model = small("softmax", patch_size=4, stem="t2t", stem_mixer=mixer, img_size=(28, 20))
    x = torch.randn(2, 3, 28, 20)
    assert distance(torch.jit.script(model)(x), model(x)) < rounding(torch.float32, 3)


def test_the_keywords_of_all_mixers_are_those_of_the_stem_too():
    arguments = dict(patch_size=4, stem="t2t", img_size=(28, 20))
    x = torch.randn(2, 3, 28, 20)
    plain = small("softmax", **arguments, stem_mixer="softmax").eval()
    far = small("softmax", **arguments, stem_mixer={"mixer": "softmax", "locality": 1e-9}).eval()
    near = small("softmax", **arguments, stem_mixer={"mixer": "softmax", "locality": 10.0}).eval()
    far.load_state_dict(plain.state_dict())
    near.load_state_dict(plain.state_dict())
    assert torch.allclose(far(x), plain(x), atol=1e-5) and not torch.allclose(near(x), plain(x), atol=1e-3)
    convolution = small("softmax", **arguments, stem_mixer={"mixer": "softmax", "conv_residual": True})
    added = set(convolution.state_dict()) - set(plain.state_dict())
    assert added == {f"patch_embed.proj.{step}.core.conv.weight" for step in (0, 1)}
    relu = small("softmax", **arguments, stem_mixer="relu")
    assert relu.patch_embed.proj[0].core.conv is not None  # as in every model with it


def test_landmarks_in_a_stem_are_softmax_when_they_are_all_tokens():
    arguments = dict(patch_size=4, stem="t2t", img_size=(12, 20))
    exact = small("softmax", **arguments, stem_mixer={"mixer": "nystrom", "num_landmarks": 60})
    fewer = small("softmax", **arguments, stem_mixer={"mixer": "nystrom", "num_landmarks": 4})
    softmax = small("softmax", **arguments, stem_mixer="softmax")
    exact.load_state_dict(softmax.state_dict())
    fewer.load_state_dict(softmax.state_dict())
    x = torch.randn(2, 3, 12, 20)
    assert distance(exact(x), softmax(x)) < rounding(torch.float32)
    assert distance(fewer(x), softmax(x)) > 1e-3


def test_weights_inside_a_stem_are_resampled_with_its_checkpoint(tmp_path):
    arguments = dict(patch_size=4, stem="t2t", stem_mixer={"mixer": "linformer", "num_proj_tokens": 6})
    model = small("nystrom", conv_residual=True, **arguments, img_size=(24, 24))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    # the trunk's own weights are another group than those of the mixer in the stem
    checkpoint = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "model.safetensors")))
    loaded = timm.create_model(
        "vix_softmax_cifar", mixer="nystrom", conv_residual=True, num_landmarks=5, embed_dim=32, depth=2, num_heads=2,
        num_classes=5, qkv_bias=True, img_size=(12, 20), **arguments, **checkpoint,
    ).eval()  # fmt: skip
    model.set_input_size((12, 20))
    x = torch.randn(2, 3, 12, 20)
    assert distance(loaded.patch_embed(x), model.patch_embed(x)) < rounding(torch.float32)


def test_a_pretrained_trunk_behind_a_stem(deit):
    overlay = dict(file=str(deit))
    model = timm.create_model("t2t_vin_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    weights = load_file(deit)
    own = {key: value for key, value in weights.items() if not key.startswith("patch_embed.")}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in own.items())
    assert {key for key in model.state_dict() if key not in own} == {
        key for key in model.state_dict() if key.startswith("patch_embed.")
    }
    assert model.patch_embed.grid_size == (14, 14)


@pytest.mark.parametrize("mixer", ["gpsa", "relu", "softmax"])
def test_a_new_stem_does_not_begin_as_trained(mixer, tmp_path):
    """Beside trained weights a gate is nearly closed and a convolution 0; a stem has none, unlike the blocks."""
    save_file(vit().state_dict(), tmp_path / "vit.safetensors")
    overlay = {"file": str(tmp_path / "vit.safetensors"), "num_classes": 5}
    arguments = dict(mixer="gpsa", conv_residual=True, stem="t2t")
    arguments["stem_mixer"] = {"mixer": mixer, "conv_residual": True}
    torch.manual_seed(3)
    new = vit("vix_nystrom_tiny", **arguments)
    torch.manual_seed(3)
    model = vit("vix_nystrom_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    fresh = new.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key]) or not key.startswith("patch_embed."), key
    assert "patch_embed.proj.1.core.conv.weight" in fresh
    assert not model.blocks[0].attn.core.conv.weight.any() and new.blocks[0].attn.core.conv.weight.any()
    assert (new.blocks[0].attn.core.gating_param == 1).all() and (model.blocks[0].attn.core.gating_param == -3).all()


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"stem": "t2t", "stem_mixer": "fnet"}, ["stem_mixer='fnet'", "nystrom", "performer"]),
        ({"stem": "t2t", "stem_mixer": {"num_landmarks": 4}}, ["stem_mixer=None", "nystrom"]),
        ({"stem": "t2t", "stem_mixer": {"mixer": "performer", "ridge": 4}}, ["ridge=4", "num_features"]),
        ({"stem": "conv", "stem_mixer": "performer"}, ["stem_mixer='performer'", "stem='conv'", "stem='t2t'"]),
        ({"stem": "tokens"}, ["stem='tokens'", "'t2t'", "'sope'"]),
    ],
)  # fmt: skip
def test_a_wrong_mixer_in_a_stem(kwargs, words):
    with pytest.raises(ValueError) as error:
        small("softmax", **kwargs)
    assert all(word in str(error.value) for word in words), error.value
