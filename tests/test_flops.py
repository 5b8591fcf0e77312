"""Floating-point operations that are counted, against formulas of the shapes alone; a multiply-add is two."""

import numpy as np
import pytest
import timm
import torch

from timm_vix.measure.attention import UnfusedAttention
from timm_vix.measure.flops import counter

B, P, C, DEPTH, HEADS, CLASSES = 2, 16, 192, 12, 3, 1000
LANDMARKS = 49  # 7x7 cells, on both grids


def trunk(n: int) -> int:
    """Everything but the mixers: patch embedding, MLPs of ratio 4, classifier."""
    return 2 * (n - 1) * 3 * P * P * C + DEPTH * 2 * (2 * n * C * 4 * C) + 2 * C * CLASSES


def softmax(n: int) -> float:
    return 2 * n * C * 3 * C + 2 * (2 * n * n * C) + 2 * n * C * C


def few(n: int, m: int) -> float:
    """N tokens attend to m, or m to N: folded into both projections, or with a projection on the side of N each."""
    folded = 2 * (2 * n * HEADS * m * C) + 2 * (2 * HEADS * m * (C // HEADS) * C)
    return folded if HEADS * m < C + m else 2 * (2 * n * m * C) + 2 * (2 * n * C * C)


def linformer(n: int) -> float:
    k = LANDMARKS
    return 2 * k * (n - 1) * C + 2 * (k + 1) * C * 2 * C + few(n, k + 1)


def nystrom(n: int) -> float:
    m, head = LANDMARKS + 1, C // HEADS
    inner = 2 * m * m * head
    solve = HEADS * (3 * inner + 2 * m**3 + 2 / 3 * m**3 + inner)  # logits, A V, A^T E; A^T A, its factors, their use
    return 2 * m * C * 3 * C + 2 * few(n, m) + solve


def performer(n: int, features: int = 64) -> float:
    """Features of queries and keys, their sums with the values, and what the queries read."""
    projections = 2 * n * C * 3 * C + 2 * n * C * C
    return projections + 4 * (2 * n * features * C)


def token_mlp(n: int) -> float:
    return 2 * (2 * n * (C // 2) * C)


def fourier(n: int) -> float:
    return 2.5 * n * C * np.log2(C) + 5 * n * (C // 2 + 1) * np.log2(n)


@pytest.mark.parametrize("side", [14, 32], ids=lambda side: f"{16 * side}px")
@pytest.mark.parametrize(
    "name, mixer",
    [
        ("vit_tiny_patch16_224", softmax),
        ("vix_linformer_tiny", linformer),
        ("vix_nystrom_tiny", nystrom),
        ("vix_performer_tiny", performer),
        ("vix_fnet_tiny", fourier),
        ("vix_mixer_tiny", token_mlp),
    ],
)
def test_operations_are_those_of_the_formula(name, mixer, side) -> None:
    model = timm.create_model(name, img_size=16 * side).eval()
    with torch.inference_mode(), counter() as flops:
        model(torch.zeros(B, 3, 16 * side, 16 * side))
    n = side * side + 1
    assert flops.get_total_flops() == pytest.approx(B * (trunk(n) + DEPTH * mixer(n)), rel=0.02)


@pytest.mark.parametrize(
    "name, mixer, again",
    [("vit_tiny_patch16_224", softmax, lambda n: 2 * n * n * C), ("vix_mixer_tiny", token_mlp, lambda n: 0)],
)
def test_a_training_step_is_three_times_the_forward_pass(name, mixer, again) -> None:
    """But for the patch embedding, whose images have no gradient, and the scores that SDPA computes again."""
    side, n = 14, 197
    model = timm.create_model(name)
    with counter() as flops:
        model(torch.zeros(B, 3, 16 * side, 16 * side)).sum().backward()
    expected = 3 * (trunk(n) + DEPTH * mixer(n)) - 2 * (n - 1) * 3 * P * P * C + DEPTH * again(n)
    assert flops.get_total_flops() == pytest.approx(B * expected, rel=0.005)


def test_fourier_transforms_count_by_their_formulas() -> None:
    x = torch.zeros(3, 8, 16)
    for transform, expected in (
        (lambda: torch.fft.fft(x.to(torch.complex64), dim=1), 3 * 16 * 5 * 8 * 3),
        (lambda: torch.fft.rfft(x, dim=2), 3 * 8 * 2.5 * 16 * 4),
        (lambda: torch.fft.irfft(torch.zeros(3, 8, 9, dtype=torch.complex64), n=16, dim=2), 3 * 8 * 2.5 * 16 * 4),
        (lambda: torch.fft.fft2(x.to(torch.complex64)), 3 * (16 * 5 * 8 * 3 + 8 * 5 * 16 * 4)),
    ):
        with counter() as flops:
            transform()
        assert flops.get_total_flops() == expected


def test_fused_attention_and_its_backward_count_as_the_products_they_are() -> None:
    n, c = 65, 32
    model = timm.create_model("vit_tiny_patch16_224", img_size=128, depth=1, embed_dim=c, num_heads=2)
    with counter() as fused:
        model(torch.zeros(1, 3, 128, 128)).sum().backward()
    with counter() as unfused, UnfusedAttention():
        model(torch.zeros(1, 3, 128, 128)).sum().backward()
    # the fused backward computes the scores once more
    assert fused.get_total_flops() - unfused.get_total_flops() == 2 * n * n * c


@pytest.mark.parametrize(
    "matrix, y, systems, vectors",
    [
        ((3, 3), (3,), 1, 1),
        ((3, 3), (3, 2), 1, 2),
        ((7, 3, 3), (7, 3), 7, 7),
        ((7, 3, 3), (7, 3, 2), 7, 14),
        ((7, 3, 3), (3, 2), 7, 14),
        ((3, 3), (5, 3, 2), 5, 10),
        ((2, 1, 3, 3), (1, 7, 3, 2), 14, 28),
    ],
    ids=str,
)
def test_linear_systems_are_counted_with_their_batches(matrix, y, systems, vectors):
    with counter() as flops:
        torch.linalg.solve(torch.eye(3).expand(matrix), torch.ones(y))
    assert flops.get_total_flops() == systems * 2 / 3 * 3**3 + vectors * 2 * 3**2
