"""Masks of keys, (B, 1, 1, N): every mixer that takes them against loops over the tokens that are read."""

import re

import pytest
import timm
import torch
from conftest import check_equal, distance, heads_of, joined, lively, rounding, small
from torch import nn
from torch.nn.functional import adaptive_avg_pool1d

import timm_vix
from timm_vix._checks import InputError
from timm_vix.mixers import MIXERS

# without anything added softmax is timm's own; a convolution reads masked tokens
DEFAULTS = {"softmax": {"locality": 0.05}, "relu": {"conv_residual": False}}
TAKEN = {name: DEFAULTS.get(name, {}) for name, mixer in MIXERS.items() if mixer.supports_key_mask}
TAKEN |= {
    "performer-learned": {"learned_features": True},
    "performer-locality": {"locality": 0.05},
    "nystrom-qk_norm": {"qk_norm": True},
    "nystrom-rope": {"rope": "axial"},
    "linformer-rope": {"rope": "1d"},
    "nystrom-locality": {"locality": 0.05},
    "linformer-headwise": {"sharing": "headwise"},
    "linformer-none": {"sharing": "none"},
    "linformer-none-locality": {"sharing": "none", "locality": 0.05},
    "nystrom-exact": {"num_landmarks": 35},
    "nystrom-windows": {"window_size": 2},
    "linformer-windows": {"window_size": 3},
    "axial-columns": {"first": "columns", "strip_width": 1},
    "axial-locality": {"locality": 0.05},
}
ROW = dict(img_size=(2, 40))  # a grid of one row, with 20 patches


def slot_of(name: str, **kwargs) -> nn.Module:
    """An attention slot in float64, with a 7x5 grid after a class token and a register unless ``kwargs`` differ."""
    mixer = name.partition("-")[0]
    more = {"num_landmarks": 6} if mixer == "nystrom" else {"num_proj_tokens": 6} if mixer == "linformer" else {}
    return small(mixer, **{"reg_tokens": 1, **more, **TAKEN[name], **kwargs}).double().blocks[0].attn


def masked_tokens(module: nn.Module, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, N, C) and a mask (B, 1, 1, N): one image with half of the grid masked, one with every second token."""
    N, P = module.num_tokens, module.num_prefix_tokens
    mask = torch.rand(batch, N) < 0.6
    mask[0, : P + (N - P) // 2] = False
    mask[0, -1] = mask[1, ::2] = mask[1:, 0] = True
    return torch.randn(batch, N, 32, dtype=torch.float64), mask[:, None, None, :]


def heads(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [part.detach() for part in module.project(x, 0, 3)]


@pytest.mark.parametrize("name", TAKEN)
def test_forms_of_a_mask(name):
    module = slot_of(name)
    x, mask = masked_tokens(module)
    # tables of rotations are made in float32
    bound = rounding(torch.float32 if name.endswith("rope") else torch.float64)
    assert distance(module(x, attn_mask=torch.ones_like(mask)), module(x)) < bound
    expected = module(x, attn_mask=mask)
    for hidden in (torch.finfo(torch.float64).min, -torch.inf, -1e4):
        added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, hidden)
        assert distance(module(x, attn_mask=added), expected) < rounding(torch.float64)
    for all_images, image in zip(module(x, attn_mask=mask[2:]), x):
        assert distance(all_images, module(image.unsqueeze(0), attn_mask=mask[2:])[0]) < rounding(torch.float64)


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("pool", "relu", "glu", "axial", "gpsa", "atrous", "latent", "retention", "nystrom-windows")
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["performer", "nystrom", "linformer-headwise", *SLOW])
def test_scripted(name):
    module = slot_of(name)
    x, mask = masked_tokens(module)
    assert distance(torch.jit.script(module)(x, mask), module(x, mask)) < rounding(torch.float64)


@pytest.mark.parametrize("name", TAKEN)
def test_gradients_with_a_mask(name):
    module = slot_of(name, img_size=(6, 8))
    x, mask = masked_tokens(module, batch=2)
    mask[:, :, :, :2] = True
    tolerance = dict(atol=1e-9, rtol=1e-6)
    assert torch.autograd.gradcheck(
        lambda x: module(x, attn_mask=mask), x.requires_grad_(), **tolerance, fast_mode=True
    )


@pytest.mark.parametrize("rope", ["axial", "1d"])
@pytest.mark.parametrize("name", ["nystrom", "linformer-none"])
def test_a_pooled_token_has_the_mean_place_of_what_is_read(name, rope):
    """In a sequence, which is a grid of one row, the result is that without the masked tokens."""
    module = slot_of(name, rope=rope, class_token=False, reg_tokens=0, global_pool="avg", **ROW)
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    mask = (torch.arange(20) < 12)[None, None, None, :]
    module.is_sequence = True
    assert distance(module(x, attn_mask=mask)[:, :12], module(x[:, :12])) < rounding(torch.float64, 10)


@pytest.mark.parametrize("name", TAKEN)
def test_nothing_is_read_of_masked_tokens(name):
    """Neither values nor maxima, and no gradient comes to them."""
    module = slot_of(name)
    x, mask = masked_tokens(module)
    read = mask[:, 0, 0]
    other = torch.where(read.unsqueeze(2), x, 100 * torch.randn_like(x)).requires_grad_()
    y = module(other, attn_mask=mask)[read]
    assert distance(y, module(x, attn_mask=mask)[read]) < rounding(torch.float64)
    (gradient,) = torch.autograd.grad(y.square().sum(), other)
    assert gradient[~read].abs().max() == 0 and gradient[read].abs().max() > 0


@pytest.mark.parametrize("name", ["performer", "performer-learned", "glu", "nystrom", "linformer-none"])
def test_the_result_is_that_without_the_masked_tokens(name):
    """On a grid of one row for landmarks, which are pooled over the grid."""
    grid = ROW if name[:2] in ("ny", "li") else {}
    module = slot_of(name, class_token=False, reg_tokens=0, global_pool="avg", **grid)
    x, mask = masked_tokens(module)
    module.is_sequence = bool(grid)
    y = module(x, attn_mask=mask)
    for image, row, result in zip(x, mask[:, 0, 0], y):
        assert distance(result[row], module(image[row].unsqueeze(0))[0]) < rounding(torch.float64, 10)


def test_performer_weighs_keys_by_any_number():
    """A token with log 2 added to its logits counts as two equal tokens."""
    module = slot_of("performer")
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    added = torch.zeros(1, 1, 1, 37, dtype=torch.float64)
    added[..., 5:9] = torch.log(torch.tensor(2.0, dtype=torch.float64))
    twice = module(torch.cat([x, x[:, 5:9]], dim=1))
    assert distance(module(x, attn_mask=added), twice[:, :37]) < rounding(torch.float64)


def test_performer_masks_whole_blocks():
    """Sums run over blocks of 256 tokens; the first ones may have nothing to read."""
    module = slot_of("performer", class_token=False, reg_tokens=0, global_pool="avg", img_size=(56, 50))
    x = torch.randn(1, 700, 32, dtype=torch.float64)
    mask = (torch.arange(700) >= 600)[None, None, None, :]
    found = module(x, attn_mask=mask)[:, 600:]
    assert distance(found, module(x[:, 600:])) < rounding(torch.float64)


def cells_of(module: nn.Module, read: torch.Tensor) -> list[list[int]]:
    """The patches that are read in each cell: rows floor(i H / r) to ceil((i + 1) H / r) of r, and columns likewise."""
    (height, width), (rows, columns) = module.grid, module.core.cells(module.grid)
    found = []
    for i in range(rows):
        for j in range(columns):
            down = range(i * height // rows, -(-(i + 1) * height // rows))
            across = range(j * width // columns, -(-(j + 1) * width // columns))
            found.append([r * width + c for r in down for c in across if read[r * width + c]])
    return found


def overlap(module: nn.Module) -> float:
    """How much of the grid a token of a cell stands for: H·W / m over the tokens of a cell."""
    rows, columns = module.core.cells(module.grid)
    return module.grid[0] * module.grid[1] / (rows * columns)


@pytest.mark.parametrize("name", ["nystrom", "nystrom-qk_norm"])
def test_nystrom_is_the_formula_with_what_is_left_of_each_cell(name):
    module = slot_of(name, pinv_iterations=60)
    x, mask = masked_tokens(module)
    assert module.is_sequence is False and module.core.cells(module.grid) == (3, 2)
    P, whole = module.num_prefix_tokens, cells_of(module, [True] * 35)
    expected = torch.zeros_like(x)
    for image in range(3):
        read = mask[image, 0, 0]
        groups = [[token] for token in range(P) if read[token]]
        counts = [1.0] * len(groups)
        for full, left in zip(whole, cells_of(module, read[P:])):
            if left:
                groups.append([P + patch for patch in left])
                counts.append(overlap(module) * len(left) / len(full))
        means = torch.stack([x[image, group].mean(0) for group in groups]).unsqueeze(0)
        pooled = [torch.stack([part[image, :, g].mean(1) for g in groups], 1) for part in heads(module, x)]
        # tokens are pooled before they are projected, which differs where queries and keys are normalised
        q_m, k_m, v_m = (part[0] for part in heads(module, means)) if name.endswith("norm") else pooled
        q, k, v = (part[image] for part in heads(module, x))
        c = torch.tensor(counts, dtype=torch.float64).log()
        F = (q @ k_m.transpose(1, 2) / 4 + c).softmax(2)
        A = (q_m @ k_m.transpose(1, 2) / 4 + c).softmax(2)
        exact = (q_m @ k[:, read].transpose(1, 2) / 4).softmax(2) @ v[:, read]
        AT, eye = A.transpose(1, 2), torch.eye(len(groups), dtype=torch.float64)
        X = v_m + torch.linalg.solve(AT @ A + 0.01 * eye, AT @ (exact - A @ v_m))
        expected[image] = module.merge((F @ X).unsqueeze(0), x[image : image + 1])[0]
    assert distance(module(x, attn_mask=mask), expected) < rounding(torch.float64, 100)


def test_nystrom_with_a_landmark_for_each_patch_is_softmax():
    module = slot_of("nystrom-exact")
    x, mask = masked_tokens(module)
    q, k, v = heads_of(module, x.requires_grad_())
    weights = (q @ k.transpose(2, 3) / 4).masked_fill(~mask, -torch.inf).softmax(3)
    check_equal(module(x, attn_mask=mask), joined(module, weights @ v), x, rounding(torch.float64))


@pytest.mark.parametrize("name", ["linformer", "linformer-headwise", "linformer-none"])
def test_linformer_is_the_formula_with_the_weights_that_are_left(name):
    module = slot_of(name)
    x, mask = masked_tokens(module)
    P, weight, expected = module.num_prefix_tokens, module.core.token_proj.detach(), torch.zeros_like(x)
    sharing, k_count = module.core.sharing, weight.shape[1]
    for image in range(3):
        read = mask[image, 0, 0]
        q, k, v = (part[image] for part in heads(module, x))
        for head in range(2):
            matrices = {"kv": (0, 0), "headwise": (0, 1), "none": (head, 2 + head)}[sharing]
            projected, shares = [], []
            for matrix, part, which in zip(matrices, (k, v), (1, 2)):
                E = weight[matrix].flatten(1)
                shares.append(E[:, read[P:]].abs().sum(1) / E.abs().sum(1))
                E = E / shares[-1].unsqueeze(1)
                if sharing == "none":
                    projected.append(E[:, read[P:]] @ part[head, P:][read[P:]])
                else:  # tokens are projected by E before keys and values are computed
                    tokens = E[:, read[P:]] @ x[image, P:][read[P:]]
                    projected.append(heads(module, tokens.unsqueeze(0))[which][0, head])
            prefix = read[:P]
            keys = torch.cat([k[head, :P][prefix], projected[0]])
            values = torch.cat([v[head, :P][prefix], projected[1]])
            bias = torch.cat([torch.zeros(int(prefix.sum())), (35 / k_count * shares[0]).log()])
            y = (q[head] @ keys.T / 4 + bias).softmax(1) @ values
            expected[image, :, 16 * head : 16 * head + 16] = y
    expected = module.proj(expected)
    assert distance(module(x, attn_mask=mask), expected) < rounding(torch.float64)


def test_a_sequence_is_projected_as_if_it_were_shorter():
    """E of 20 places for n tokens: each of them is their average over piece i of 20."""
    module = slot_of("linformer", **ROW)
    x, mask = masked_tokens(module)
    P, E = module.num_prefix_tokens, module.core.token_proj.detach()[0, :, 0]
    for image, read, y in zip(x, mask[:, 0, 0], module(x, attn_mask=mask)):
        n = int(read[P:].sum())
        projected = E @ adaptive_avg_pool1d(image[P:][read[P:]].T, 20).T
        tokens = torch.cat([image[:P][read[:P]], projected]).unsqueeze(0)
        bias = torch.tensor([0.0] * int(read[:P].sum()) + [n / 6] * 6, dtype=torch.float64)
        bias[int(read[:P].sum()) :] = bias[int(read[:P].sum()) :].log()
        (q, _, _), (_, k, v) = heads(module, image.unsqueeze(0)), heads(module, tokens)
        heads_out = (q @ k.transpose(2, 3) / 4 + bias).softmax(3) @ v
        assert distance(y, module.merge(heads_out, image.unsqueeze(0))[0]) < rounding(torch.float64)


@pytest.mark.parametrize("name", ["axial", "axial-columns", "axial-locality"])
def test_axial_attention_is_the_formula_with_the_keys_that_are_left(name):
    """A loop over queries and rows. Where a row's own query is masked, the mean of its other queries stands in.

    It asks from the masked token's place, which ``locality`` subtracts distances from.
    """
    module = slot_of(name)
    x, mask = masked_tokens(module)
    P, (height, width), w = module.num_prefix_tokens, module.grid, module.core.strip_width
    columns_first = module.core.first == "columns"
    lines, places = (width, height) if columns_first else (height, width)
    grid_of = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    nearness = -module.core.locality * torch.cdist(grid_of, grid_of).square()  # of patches, added to their logits

    def near_by(i: int, others: list[int]) -> torch.Tensor:
        return torch.tensor([float(nearness[i - P, j - P]) if j >= P else 0.0 for j in others], dtype=torch.float64)

    def token(line: int, place: int) -> int:
        return P + (place * width + line if columns_first else line * width + place)

    q, k, v = heads(module, x)
    y = torch.zeros_like(v)
    for image in range(3):
        read = mask[image, 0, 0]
        for head in range(2):
            Q, K, V = q[image, head] / 4, k[image, head], v[image, head]
            y[image, head, :P] = (Q[:P] @ K[read].T).softmax(1) @ V[read]
            for line in range(lines):
                for place in range(places):
                    strip = range(place // w * w, min(place // w * w + w, places))
                    near = [t for t in range(P) if read[t]]
                    near += [token(r, c) for r in range(lines) for c in strip if read[token(r, c)]]
                    here = token(line, place)
                    logits, values = [Q[here] @ K[near].T + near_by(here, near)], [V[near]]
                    for r in range(lines):
                        there = [token(r, c) for c in range(places) if read[token(r, c)]]
                        far = [token(r, c) for c in range(places) if c not in strip and read[token(r, c)]]
                        if far:
                            asks = Q[token(r, place)] if read[token(r, place)] else Q[there].mean(0)
                            p = (asks @ K[far].T + near_by(token(r, place), far)).softmax(0)
                            attended = Q[here] @ (p @ K[far]) + p @ near_by(here, far)
                            logits.append((attended - (p * p.log()).sum()).reshape(1))
                            values.append((p @ V[far]).unsqueeze(0))
                    y[image, head, token(line, place)] = torch.cat(logits).softmax(0) @ torch.cat(values)
    assert distance(module(x, attn_mask=mask), module.merge(y, x)) < rounding(torch.float64)


def test_axial_attention_in_one_strip_is_softmax_with_any_number_added():
    """As is a row's own part: numbers that are added to logits count as in softmax attention."""
    module = slot_of("axial", strip_width=5)
    x, added = torch.randn(2, 37, 32, dtype=torch.float64), torch.randn(2, 1, 1, 37, dtype=torch.float64)
    q, k, v = heads(module, x)
    expected = module.merge((q @ k.transpose(2, 3) / 4 + added).softmax(3) @ v, x)
    assert distance(module(x, attn_mask=added), expected) < rounding(torch.float64)
    row = slot_of("axial", **ROW)
    x, added = torch.randn(2, row.num_tokens, 32, dtype=torch.float64), torch.randn(1, 1, 1, row.num_tokens).double()
    q, k, v = heads(row, x)
    expected = row.merge((q @ k.transpose(2, 3) / 4 + added).softmax(3) @ v, x)
    assert distance(row(x, attn_mask=added), expected) < rounding(torch.float64)


@pytest.mark.parametrize("size", [(14, 10), (6, 60)])
def test_positional_attention_is_among_the_patches_that_are_left(size):
    """Also where all that are left are so far away that their weights among all patches would underflow."""
    module = slot_of("gpsa", img_size=size)
    x, mask = masked_tokens(module)
    if size[1] > 10:
        mask[..., module.num_prefix_tokens :] = (torch.arange(3 * 30) % 30 < 3).expand(3, 1, 1, -1)
    P, (height, width) = module.num_prefix_tokens, module.grid
    q, k, v = heads(module, x)
    gate = module.core.gating_param.detach().sigmoid()
    y = torch.zeros_like(v)
    for image in range(3):
        read = mask[image, 0, 0]
        for head in range(2):
            content = (q[image, head] @ k[image, head, read].T / 4).softmax(1) @ v[image, head, read]
            y[image, head, :P] = content[:P]
            w = module.core.pos_proj.detach()[head]
            left = [token for token in range(height * width) if read[P + token]]
            for token in range(height * width):
                down = torch.tensor([t // width - token // width for t in left], dtype=torch.float64)
                across = torch.tensor([t % width - token % width for t in left], dtype=torch.float64)
                A = (w[0] * across + w[1] * down + w[2] * (across**2 + down**2)).softmax(0)
                places = A @ v[image, head, [P + t for t in left]]
                y[image, head, P + token] = (1 - gate[head]) * content[P + token] + gate[head] * places
    assert distance(module(x, attn_mask=mask), module.merge(y, x)) < rounding(torch.float64)


def test_pooling_is_over_the_neighbours_that_are_read():
    module = slot_of("pool")
    x, mask = masked_tokens(module)
    P, (height, width) = module.num_prefix_tokens, module.grid
    q, k, v = heads(module, x)
    y = torch.zeros_like(v)
    for image in range(3):
        read = mask[image, 0, 0]
        logits = q[image, :, :P] @ k[image][:, read].transpose(1, 2) / 4
        y[image, :, :P] = logits.softmax(2) @ v[image][:, read]
        for row in range(height):
            for column in range(width):
                near = [
                    P + r * width + c
                    for r in range(max(0, row - 1), min(height, row + 2))
                    for c in range(max(0, column - 1), min(width, column + 2))
                ]
                near = [token for token in near if read[token]]
                mean = v[image][:, near].mean(1) if near else 0
                y[image, :, P + row * width + column] = mean - v[image, :, P + row * width + column]
    assert distance(module(x, attn_mask=mask), module.merge(y, x)) < rounding(torch.float64)


def test_relu_attention_sums_over_the_keys_that_are_read():
    module = slot_of("relu")
    x, mask = masked_tokens(module)
    q, k, v = heads(module, x)
    positions = module.core.key_positions.detach().unflatten(0, (2, 16)).flatten(2).transpose(1, 2)
    k[:, :, module.num_prefix_tokens :] += positions
    weights = q.relu() @ k.relu().transpose(2, 3) * mask
    y = weights @ v / (weights.sum(3, keepdim=True) + 1e-6)
    assert distance(module(x, attn_mask=mask), module.merge(y, x)) < rounding(torch.float64)


@pytest.mark.parametrize("name", [name for name in TAKEN if "-" not in name])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_an_image_of_nothing(name, dtype):
    module = slot_of(name)
    x, mask = masked_tokens(module)
    expected = module(x, attn_mask=mask)
    module = module.to(dtype)
    read = mask[:, 0, 0]
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    y = module(x.to(dtype), attn_mask=added)
    assert distance(y[read], expected[read]) < 10 * torch.finfo(dtype).eps
    added[0] = torch.finfo(dtype).min
    given = x.to(dtype).requires_grad_()
    y = module(given, attn_mask=added)
    assert y.isfinite().all()
    y.float().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()} | {"x": given.grad}
    assert [name for name, g in gradients.items() if g is not None and not g.isfinite().all()] == []


@pytest.mark.parametrize("name", [name for name in TAKEN if "-" not in name])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_a_mask_of_integers_is_refused(name, dtype):
    """Ones and zeros could be meant as either form."""
    module = slot_of(name)
    x, mask = masked_tokens(module)
    with pytest.raises(ValueError, match=f"attn_mask has dtype {dtype}: expected booleans, or floating-point numbers"):
        module(x, attn_mask=mask.to(dtype))


@pytest.mark.parametrize("name", [name for name in TAKEN if "-" not in name])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_where_whole_sides_are_masked(name, dtype):
    """Patches that are far from all unmasked ones too."""
    module = slot_of(name, img_size=(28, 60)).float()
    x, mask = torch.randn(2, module.num_tokens, 32), torch.ones(module.grid, dtype=torch.bool)
    mask[:, 4:] = False
    mask = torch.cat([torch.ones(module.num_prefix_tokens, dtype=torch.bool), mask.flatten()])[None, None, None, :]
    expected = module(x, attn_mask=mask)
    for inference in (False, True):  # which goes another way
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(not inference):
            found = module(x, attn_mask=mask)
        assert distance(found, expected) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mixer", ["nystrom", "linformer"])
@torch.no_grad()
def test_a_cell_that_is_masked_has_no_direction_in_float16(mixer):
    """The host's table of sines and cosines is of half precision, too."""
    size = dict(img_size=(56, 40), patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5)
    model = lively(timm.create_model("eva02_tiny_patch14_224", **size).eval())
    timm_vix.convert(model, mixer, **{"num_landmarks" if mixer == "nystrom" else "num_proj_tokens": 6})
    read = torch.ones(1, 1, 1, 36, dtype=torch.bool)
    read[..., 1:21] = False  # the first of three rows of cells, and most of the second
    x = torch.randn(2, 3, 56, 40)
    expected = model.forward_features(x, attn_mask=read)[:, read[0, 0, 0]]
    found = model.half().forward_features(x.half(), attn_mask=read)[:, read[0, 0, 0]]
    assert distance(found, expected) < 0.02


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "softmax"])
def test_who_takes_masks_is_said_where_another_mask_is_refused(mixer):
    """The names in the message are those of the mixers that take masks of keys."""
    module = small(mixer).blocks[0].attn
    x, mask = torch.randn(2, 36, 32), torch.ones(2, 1, 1, 36, dtype=torch.bool)
    if module.core.supports_key_mask:
        assert MIXERS[mixer].supports_key_mask and module(x, attn_mask=mask).isfinite().all()
    for given in (mask.expand(2, 1, 36, 36), mask[..., :35], mask[:1].expand(3, 1, 1, 36), mask[0]):
        with pytest.raises(InputError, match=re.escape(f"attn_mask of shape {list(given.shape)}")) as error:
            module(x, attn_mask=given)
        (names,) = re.findall(r"is taken by (.*) too", str(error.value))
        allowed = {name for name, mixer_class in MIXERS.items() if mixer_class.supports_key_mask}
        assert set(re.findall(r"\w+", names)) - {"and"} | {"softmax"} == allowed


@pytest.mark.parametrize(
    "mixer, keywords",
    [("performer", {"conv_residual": True}), ("relu", {}), ("softmax", {"merge_keys": 0.5})],
)
def test_keywords_with_which_masks_are_refused(mixer, keywords):
    with pytest.raises(InputError, match="merge_keys=1 .* without conv_residual$"):
        small(mixer, **keywords).blocks[0].attn(torch.randn(2, 36, 32), torch.ones(2, 1, 1, 36, dtype=torch.bool))


@pytest.mark.parametrize("name", ["nystrom", "linformer", "pool", "relu", "gpsa"])
def test_numbers_in_between_are_refused(name):
    module = slot_of(name)
    x, mask = masked_tokens(module)
    added = torch.zeros(mask.shape, dtype=torch.float64)
    added[0, 0, 0, 3] = -0.5
    with pytest.raises(InputError, match=r"attn_mask adds -0.5 .*softmax, .* and retention take any numbers"):
        module(x, attn_mask=added)


@pytest.mark.parametrize("name", ["performer", "nystrom", "linformer", "axial"])
def test_models_hand_masks_on(name):
    """timm's ViT gives its blocks the mask that it is called with."""
    mixer = name.partition("-")[0]
    model = small(mixer, depth=1).double()
    pixels = torch.randn(2, 3, 14, 10, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, 36) < 0.5
    mask[..., 0] = True
    block = model.blocks[0]
    x = model.patch_embed(pixels)
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
    x = x + block.ls1(block.attn(block.norm1(x), attn_mask=mask))
    x = x + block.ls2(block.mlp(block.norm2(x)))
    assert distance(model(pixels, attn_mask=mask), model.forward_head(model.norm(x))) < rounding(torch.float64)
