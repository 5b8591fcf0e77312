"""Nyström against the formula with torch's pseudo-inverse and solver, and against softmax where they coincide."""

import math

import pytest
import torch
from conftest import LAYOUTS, check_equal, distance, heads_of, joined, rounding, small
from test_linformer import mean_places, rotation
from torch.nn.functional import scaled_dot_product_attention

from timm_vix.mixers._layout import TokenLayout
from timm_vix.mixers.nystrom import fit_landmarks


def sharpened(model):
    """Attention far from uniform: a token's key is its query, so that it attends to itself, and A has an inverse."""
    for block in model.blocks:
        qkv = block.attn.qkv
        for tensor in (qkv.weight.data, qkv.bias.data):
            tensor[:64] *= 3
            queries, keys, _ = tensor.chunk(3)
            keys.copy_(queries)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", [None, "axial", "1d"])
def test_a_landmark_for_each_patch_is_softmax(rope, layout):
    """It is computed as that. The next test shows that the formula gives the same."""
    nystrom = small("nystrom", rope, num_landmarks=35, **LAYOUTS[layout]).double()
    softmax = small("softmax", rope, **LAYOUTS[layout]).double()
    softmax.load_state_dict(nystrom.state_dict())
    x = torch.randn(2, 3, 14, 10, dtype=torch.float64, requires_grad=True)
    check_equal(nystrom(x), softmax(x), x, rounding(torch.float64, 100))


@pytest.mark.parametrize("ridge", [0.0, 0.003, 0.3])
def test_a_landmark_for_each_token_needs_no_other_values(ridge):
    """X = V + (A^T A + r I)^-1 A^T (O - A V) with O = A V: what the mixer computes as softmax is its formula."""
    k, v = torch.randn(2, 2, 2, 35, 16, dtype=torch.float64).requires_grad_().unbind()
    q = 2 * k  # so that A has an inverse
    exact = scaled_dot_product_attention(q, k, v)
    values = fit_landmarks(q, k, v, exact, torch.zeros(1, 1, 1, 35, dtype=torch.float64), ridge, 80)
    A = (q @ k.transpose(2, 3) / 4).softmax(3)
    squared = torch.linalg.cond((A.transpose(2, 3) @ A + ridge * torch.eye(35, dtype=A.dtype)).detach()).max()
    assert squared < 1e4, "an ill-conditioned case shows nothing"
    bound = rounding(torch.float64, float(squared))
    assert distance(values, v) < bound
    weight = torch.randn_like(values)
    for given, expected in ((v, weight), (q, torch.zeros_like(q)), (k, torch.zeros_like(k))):
        (gradient,) = torch.autograd.grad((values * weight).sum(), given, retain_graph=True)
        assert (gradient - expected).norm() < bound * weight.norm()


def naive(module, x: torch.Tensor, rope: str | None, cells: tuple[int, int]) -> tuple[torch.Tensor, float]:
    """F (V~ + (A^T A + r I)^-1 A^T (O - A V~)), or F A^+ O without a ridge; landmarks averaged by a loop over cells.

    Returned with the condition of A^T A + r I, the largest of all images and heads.
    """
    B, _, C = x.shape
    P, (H, W), D = module.num_prefix_tokens, module.grid, module.head_dim
    patches = x[:, P:].reshape(B, H, W, C)
    landmarks = [x[:, i] for i in range(P)]
    for i in range(cells[0]):
        for j in range(cells[1]):
            # a cell takes in every patch that it touches, as torch's adaptive pooling
            rows = slice(i * H // cells[0], -(-(i + 1) * H // cells[0]))
            columns = slice(j * W // cells[1], -(-(j + 1) * W // cells[1]))
            landmarks.append(patches[:, rows, columns].mean(dim=(1, 2)))
    (q, k, v), (Q, K, V) = heads_of(module, x), heads_of(module, torch.stack(landmarks, dim=1))
    if rope:
        start = [(0, 0, 0)] * P
        places = start + [(r, c, r * W + c) for r in range(H) for c in range(W)]
        rows, columns = mean_places(H, cells[0]), mean_places(W, cells[1])
        means = start + [(r, c, r * W + c) for r in rows for c in columns]
        turn = torch.stack([rotation(place, D, rope) for place in places])
        turn_cells = torch.stack([rotation(place, D, rope) for place in means])
        q, k = (torch.einsum("nij,bhnj->bhni", turn, t) for t in (q, k))
        Q, K = (torch.einsum("nij,bhnj->bhni", turn_cells, t) for t in (Q, K))
    # a cell stands for as many patches as it averages; torch counts those on a border twice, the bias does not
    c = torch.tensor([0.0] * P + [math.log(H * W / (cells[0] * cells[1]))] * (cells[0] * cells[1]), dtype=x.dtype)
    kernel, A = (torch.softmax(t @ K.transpose(2, 3) / math.sqrt(D) + c, dim=3) for t in (q, Q))
    exact = torch.softmax(Q @ k.transpose(2, 3) / math.sqrt(D), dim=3) @ v
    squares = A.transpose(2, 3) @ A + module.core.ridge * torch.eye(A.shape[3], dtype=x.dtype)
    if module.core.ridge:
        values = V + torch.linalg.solve(squares, A.transpose(2, 3) @ (exact - A @ V))
    else:
        values = torch.linalg.pinv(A) @ exact
    return joined(module, kernel @ values), float(torch.linalg.cond(squares.detach()).max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", [None, "axial", "1d"])
@pytest.mark.parametrize("ridge", [0.0, 0.003, 0.3])
def test_equals_the_formula(ridge, rope, layout):
    options = {"num_landmarks": 6, "ridge": ridge, "pinv_iterations": 80}
    module = sharpened(small("nystrom", rope, **options, **LAYOUTS[layout]).double()).blocks[0].attn
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    ours, (reference, squared) = module(x), naive(module, x, rope, (3, 2))
    assert squared < 1e4, "an ill-conditioned case shows nothing"
    # the table of rotations was made in float32
    bound = rounding(torch.float32) if rope else rounding(torch.float64, squared)
    check_equal(ours, reference, (x, module.qkv.weight, module.proj.weight), bound)


def test_convolution_adds_what_a_loop_adds_from_the_values():
    module = small("nystrom", conv_residual=True, reg_tokens=1).double().blocks[0].attn
    x = torch.randn(1, 37, 32, dtype=torch.float64)
    weight = module.core.conv.weight.detach().clone()
    module.core.conv.weight.data.zero_()
    without = module(x)
    module.core.conv.weight.data.copy_(weight)
    v = (x @ module.qkv.weight.T + module.qkv.bias)[0, 2:, 64:].reshape(7, 5, 32)
    local = torch.zeros(37, 32, dtype=torch.float64)
    for r in range(7):
        for c in range(5):
            for i in range(-2, 3):
                for j in range(-2, 3):
                    if 0 <= r + i < 7 and 0 <= c + j < 5:
                        local[2 + r * 5 + c] += weight[:, 0, i + 2, j + 2] * v[r + i, c + j]
    assert distance(module(x) - without, (local @ module.proj.weight.T)[None]) < rounding(torch.float64, 100)


@pytest.mark.parametrize("rope", ["axial", "1d"])
def test_a_landmark_meets_queries_by_relative_position(rope):
    """The same query and landmark content, both moved by a whole cell: the same logit."""
    module = small("nystrom", rope, img_size=(16, 12), num_landmarks=12).double().blocks[0].attn
    q, k = (torch.randn(16, dtype=torch.float64).expand(1, 1, n, 16) for n in (49, 13))
    layout = TokenLayout(1, (8, 6))
    k = module.rotate(k, layout, module.core.cells(layout.grid))
    logits = (module.rotate(q, layout, layout.grid) @ k.transpose(2, 3))[0, 0, 1:, 1:].reshape(8, 6, 4, 3)
    assert distance(logits[2:, 2:, 1:, 1:], logits[:-2, :-2, :-1, :-1]) < rounding(torch.float32)
    assert distance(logits[2:, 2:, 1:, :-1], logits[:-2, :-2, :-1, 1:]) > 0.1


def test_more_landmarks_come_closer_to_softmax():
    x = torch.randn(8, 3, 32, 32)
    softmax = small("softmax", img_size=32)
    errors = []
    for num_landmarks in (4, 64, 256):
        nystrom = small("nystrom", img_size=32, num_landmarks=num_landmarks)
        nystrom.load_state_dict(softmax.state_dict())
        errors.append(distance(nystrom(x), softmax(x)))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 10.0, 100.0])
def test_any_attention_matrix_is_solved_in_float32(scale):
    """Uniform attention has rank one and sharp attention rows of zeros: neither may blow the answer up."""
    module = small("nystrom", num_landmarks=12).blocks[0].attn
    module.qkv.weight.data[:64] *= scale
    module.qkv.bias.data.zero_()
    x = torch.randn(4, 36, 32, requires_grad=True)
    y = module(x)
    y.square().mean().backward()
    # A^T A + ridge is at worst 12 / ridge = 1,200 times as large in one direction as in another
    assert distance(y, module.double()(x.double())) < rounding(torch.float32, 12 / module.core.ridge)
    assert x.grad.isfinite().all() and y.abs().max() < 100 * x.abs().max()


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.003])
@pytest.mark.parametrize("pinv_iterations", [1, 12, 60])
def test_iterating_on_does_no_harm(pinv_iterations, ridge):
    """A singular matrix in float32: what it cannot see must not grow from step to step."""
    q, k, v = torch.randn(3, 2, 2, 197, 16).unbind()
    exact = scaled_dot_product_attention(q, k, v)
    values = fit_landmarks(q, k, v, exact, torch.zeros(1, 1, 1, 197), ridge, pinv_iterations)
    # with each token as its own landmark the values that give the exact outputs are the tokens' own
    assert distance(scaled_dot_product_attention(q, k, values), exact) < 1e-3
    # and wrong ones come closer
    wrong = v.roll(1, 2)
    values = fit_landmarks(q, k, wrong, exact, torch.zeros(1, 1, 1, 197), ridge, pinv_iterations)
    before, after = (distance(scaled_dot_product_attention(q, k, x), exact) for x in (wrong, values))
    assert after < before * (1 if pinv_iterations == 1 else 0.5)
