"""Weights on another grid: the properties that resampling promises."""

import pytest
import torch
from conftest import distance, rounding

from timm_vix.mixers._resample import resample_input_weight, resample_output_weight

GRIDS = [((7, 5), (14, 10)), ((7, 5), (4, 9)), ((8, 6), (4, 3)), ((3, 3), (3, 3)), ((1, 5), (6, 1))]
BOUND = rounding(torch.float64)


@pytest.mark.parametrize("old, new", GRIDS, ids=str)
def test_input_weights_keep_their_sums(old, new):
    weight = torch.randn(4, *old, dtype=torch.float64)
    assert distance(resample_input_weight(weight, new).sum((1, 2)), weight.sum((1, 2))) < BOUND


def test_input_weights_of_an_enlarged_image_give_the_same():
    """Each patch repeated 2 x 3 times, met by the resampled weight, gives what the patches gave."""
    weight, patches = torch.randn(4, 7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    enlarged = patches.repeat_interleave(2, 0).repeat_interleave(3, 1)
    resampled = resample_input_weight(weight, (14, 15))
    assert distance((resampled * enlarged).sum((1, 2)), (weight * patches).sum((1, 2))) < BOUND


@pytest.mark.parametrize("old, new", GRIDS, ids=str)
def test_output_weights_keep_constants(old, new):
    weight = torch.full([2, *old], 3.0, dtype=torch.float64)
    assert distance(resample_output_weight(weight, new), torch.full([2, *new], 3.0)) < BOUND


def test_output_weights_twice_as_fine_keep_a_plane_inside():
    rows = torch.arange(7.0, dtype=torch.float64).reshape(1, 7, 1).expand(1, 7, 5)
    fine = resample_output_weight(rows, (14, 10))
    expected = (torch.arange(14.0) + 0.5) / 2 - 0.5
    assert distance(fine[0, 1:-1], expected[1:-1, None].expand(-1, 10)) < BOUND
