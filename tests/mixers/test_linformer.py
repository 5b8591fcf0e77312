"""Linformer against a loop written from the paper's equation 7, and against softmax where they coincide."""

import math
import statistics

import pytest
import timm
import torch
from conftest import LAYOUTS, check_equal, distance, heads_of, image, joined, lively, rounding, small, vit
from timm.models import save_for_hf

import timm_vix
from timm_vix.mixers._layout import TokenLayout
from timm_vix.mixers._resample import resample_input_weight
from timm_vix.slots.model import hosts_of


def rotation(position, D: int, kind: str) -> torch.Tensor:
    """The (D, D) matrix that turns a query or key at (row, column, place in raster order)."""
    row, column, place = position
    if kind == "1d":
        angles = [place * 10000.0 ** (-2 * i / D) for i in range(D // 2)]
    else:
        angles = [p * 100.0 ** (-4 * i / D) for p in (row, column) for i in range(D // 4)]
    R = torch.zeros(D, D, dtype=torch.float64)
    for i, angle in enumerate(angles):
        R[2 * i, 2 * i] = R[2 * i + 1, 2 * i + 1] = math.cos(angle)
        R[2 * i, 2 * i + 1], R[2 * i + 1, 2 * i] = -math.sin(angle), math.sin(angle)
    return R


def mean_places(length: int, cells: int) -> list[float]:
    """The mean place of the patches that each cell of an axis touches."""
    return [statistics.mean(range(i * length // cells, -(-(i + 1) * length // cells))) for i in range(cells)]


def naive(module, x: torch.Tensor, rope: str | None, cells: tuple[int, int]) -> torch.Tensor:
    """softmax(Q (E K)^T / sqrt(D) + log(tokens in a region)) (F V), a head at a time, prefix tokens unprojected."""
    B, N, C = x.shape
    h, P, (H, W) = module.num_heads, module.num_prefix_tokens, module.grid
    D, k = C // h, cells[0] * cells[1]
    q, keys, values = heads_of(module, x)
    E = module.core.token_proj.flatten(2)
    bias = torch.tensor([0.0] * P + [math.log(H * W / k)] * k, dtype=x.dtype)
    out = torch.zeros(B, h, N, D, dtype=x.dtype)
    for b in range(B):
        for head in range(h):
            first, second = {"kv": (0, 0), "headwise": (0, 1), "none": (head, h + head)}[module.core.sharing]
            for_keys, for_values = E[first], E[second]
            # the paper's E (x W) adds the bias of W once for each projected token; ours (E x) W + b adds it whole
            shift_k = shift_v = torch.zeros(k, 1, dtype=x.dtype)
            if module.core.sharing != "none":
                shift_k, shift_v = (1 - M.sum(1, keepdim=True) for M in (for_keys, for_values))
            bias_k, bias_v = module.qkv.bias.reshape(3, h, D)[1:, head]
            K = torch.cat([keys[b, head, :P], for_keys @ keys[b, head, P:] + shift_k * bias_k])
            V = torch.cat([values[b, head, :P], for_values @ values[b, head, P:] + shift_v * bias_v])
            Q = q[b, head]
            if rope:
                patches = [(r, c, r * W + c) for r in range(H) for c in range(W)]
                rows, columns = mean_places(H, cells[0]), mean_places(W, cells[1])
                regions = [(r, c, r * W + c) for r in rows for c in columns]
                start = [(0, 0, 0)] * P
                Q = torch.stack([rotation(p, D, rope) @ v for p, v in zip(start + patches, Q, strict=True)])
                K = torch.stack([rotation(p, D, rope) @ v for p, v in zip(start + regions, K, strict=True)])
            out[b, head] = torch.softmax(Q @ K.T / math.sqrt(D) + bias, dim=1) @ V
    return joined(module, out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", [None, "axial", "1d"])
@pytest.mark.parametrize("sharing", ["kv", "headwise", "none"])
def test_equals_a_loop(sharing, rope, layout):
    model = small("linformer", rope, sharing=sharing, num_proj_tokens=6, **LAYOUTS[layout]).double()
    module = model.blocks[0].attn
    module.core.token_proj.data.normal_(std=0.3)
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    bound = rounding(torch.float32 if rope else torch.float64, 10)  # the table of rotations was made in float32
    check_equal(module(x), naive(module, x, rope, (3, 2)), (x, *module.parameters()), bound)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", [None, "axial", "1d"])
@pytest.mark.parametrize("sharing", ["kv", "headwise", "none"])
def test_a_projection_for_each_patch_is_softmax(sharing, rope, layout):
    linformer = small("linformer", rope, sharing=sharing, num_proj_tokens=35, **LAYOUTS[layout]).double()
    for block in linformer.blocks:
        block.attn.core.reset_parameters()  # the average over a region of one patch: the identity
    softmax = small("softmax", rope, **LAYOUTS[layout]).double()
    softmax.load_state_dict({k: v for k, v in linformer.state_dict().items() if "token_proj" not in k})
    x = torch.randn(2, 3, 14, 10, dtype=torch.float64, requires_grad=True)
    ours, theirs = linformer(x), softmax(x)
    bound = rounding(torch.float64, 100)
    assert distance(ours, theirs) < bound
    for name, parameter in softmax.named_parameters():
        mine = torch.autograd.grad(ours.square().sum(), linformer.get_parameter(name), retain_graph=True)[0]
        reference = torch.autograd.grad(theirs.square().sum(), parameter, retain_graph=True)[0]
        assert (mine - reference).norm() < bound * (1 + reference.norm()), name


def test_a_constant_image_is_attended_to_as_by_softmax():
    """Averages of equal patches are the patches, and a region weighs as much as its patches: nothing is lost."""
    linformer = small("linformer", num_proj_tokens=6, no_embed_class=True, pos_embed="none").double()
    softmax = small("softmax", no_embed_class=True, pos_embed="none").double()
    for block in linformer.blocks:
        block.attn.core.reset_parameters()
    softmax.load_state_dict({k: v for k, v in linformer.state_dict().items() if "token_proj" not in k})
    x = torch.randn(2, 3, 1, 1, dtype=torch.float64).expand(2, 3, 14, 10)
    assert distance(linformer(x), softmax(x)) < rounding(torch.float32)  # averages are initial weights, in float32


@pytest.mark.parametrize("rope", ["axial", "1d"])
def test_a_region_meets_queries_by_relative_position(rope):
    """The same query and region content, both moved by a whole region: the same logit."""
    module = small("linformer", rope, img_size=(16, 12), num_proj_tokens=12).double().blocks[0].attn
    q, k = (torch.randn(16, dtype=torch.float64).expand(1, 1, n, 16) for n in (49, 13))
    layout = TokenLayout(1, (8, 6))
    k = module.rotate(k, layout, (4, 3))
    logits = (module.rotate(q, layout, layout.grid) @ k.transpose(2, 3))[0, 0, 1:, 1:].reshape(8, 6, 4, 3)
    assert distance(logits[2:, 2:, 1:, 1:], logits[:-2, :-2, :-1, :-1]) < rounding(torch.float32)
    assert distance(logits[2:, 2:, 1:, :-1], logits[:-2, :-2, :-1, 1:]) > 0.1


@pytest.mark.parametrize(
    "options, regions",
    [
        ({"num_proj_tokens": 6}, (3, 2)),
        ({"num_proj_tokens": 35}, (7, 5)),  # one for each patch, and more than the patches of the other grid
        ({"num_proj_tokens": 8, "window_size": 2}, (4, 2)),
        ({"num_proj_tokens": 8, "rope": "axial"}, (4, 2)),
        ({"num_proj_tokens": 8, "sharing": "none", "stem": "conv"}, (4, 2)),
        ({}, (7, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(10, 14), (4, 10)], ids=str)
def test_regions_of_a_saved_model_stay_on_another_grid(size, options, regions, tmp_path):
    """A number of projected tokens alone would give others there."""
    model = small("linformer", **options)
    assert model.blocks[0].attn.core.regions == regions
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size).eval()
    model.set_input_size(img_size=size)
    assert [block.attn.core.regions for block in again.blocks] == [regions] * 2
    x = image(model)
    assert distance(again(x), model(x)) < rounding(torch.float32, 3)


FAMILIES = {
    "pin_tiny": dict(img_size=(20, 12), patch_size=4, stride=2, base_dims=(16, 16), depth=(1, 2), heads=(1, 2)),
    "convix_gpsa_tiny": dict(img_size=(80, 48), depth=3, local_up_to_layer=2, embed_dim=8, num_heads=4),
    "levin_128s": dict(img_size=(160, 96), embed_dim=(32, 64), key_dim=8, num_heads=(2, 4), depth=(1, 2)),
    "cvn_13": dict(img_size=(40, 24), embed_dims=(16, 16, 32), depths=(1, 1, 2), num_heads=(1, 2, 2)),
    "vix_softmax_cifar": dict(img_size=(20, 12), patch_size=4, stem="t2t", depth=1, stem_mixer="linformer"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_regions_stay_in_every_family(name, tmp_path):
    arguments = dict(FAMILIES[name], mixer="linformer", num_proj_tokens=8)
    if name == "vix_softmax_cifar":  # in the stem
        arguments["stem_mixer"] = {"mixer": arguments.pop("mixer"), "num_proj_tokens": arguments.pop("num_proj_tokens")}
    model = lively(timm.create_model(name, **arguments))
    save_for_hf(model, tmp_path, safe_serialization=True)
    size = arguments["img_size"][::-1]
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size).eval()
    moved = 0
    for saved, loaded in zip(hosts_of(model).values(), hosts_of(again).values(), strict=True):
        assert loaded.core.regions == saved.core.regions
        weight = resample_input_weight(saved.core.token_proj, loaded.core.token_proj.shape[2:])
        assert torch.equal(loaded.core.token_proj, weight)
        moved += saved.core.regions[0] != saved.core.regions[1]
    assert moved
    assert again(torch.randn(2, 3, *size)).isfinite().all()


@pytest.mark.parametrize("num_proj_tokens, regions, size", [(8, (2, 4), (48, 32)), (60, (6, 10), (16, 32))])
def test_regions_in_the_stem_of_a_converted_model_stay(num_proj_tokens, regions, size, tmp_path):
    """What is recorded of a conversion are the regions of its blocks."""
    mixer = {"mixer": "linformer", "num_proj_tokens": num_proj_tokens, "window_size": 2}
    model = vit("t2t_vit_tiny", stem_mixer=mixer, img_size=(32, 48), depth=1)
    timm_vix.convert(model, "performer")
    lively(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size).eval()
    model.set_input_size(size)
    assert [again.patch_embed.proj[step].core.regions for step in (0, 1)] == [regions] * 2
    x = image(model)
    assert distance(again(x), model(x)) < rounding(torch.float32, 3)
