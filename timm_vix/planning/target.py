"""What a plan is to reach, and what is known of a whole model that was tried for it."""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

from .._checks import InputError
from .latency import Cost

HALF_AN_OPERATION = 0.5e-9  # in GFLOPs: sums of whole numbers of operations, computed in GFLOPs, are off by less


class Tried(NamedTuple):
    """A whole model that was measured."""

    agreement: float
    distance: float
    gflops: float
    kept: float
    milliseconds: float
    speedup: float


class Target(NamedTuple):
    """What is wanted; one of these is given."""

    keep: Optional[float] = None
    speedup: Optional[float] = None
    gflops: Optional[float] = None

    @property
    def cost(self) -> str:
        """The cost that the search reduces, "milliseconds" or "gflops"."""
        return "milliseconds" if self.gflops is None else "gflops"

    def allows(self, tried: Tried) -> bool:
        """Whether a model meets the target, so that it may be chosen."""
        if self.keep is not None:
            return tried.kept >= self.keep
        if self.speedup is not None:
            return tried.speedup >= self.speedup
        return tried.gflops <= (self.gflops or 0.0) + HALF_AN_OPERATION

    def worth(self, tried: Tried) -> tuple[float, ...]:
        """Of two models that are allowed, the one of larger worth is chosen."""
        return (tried.speedup if self.keep is not None else tried.kept, -tried.distance)

    def is_near(self, cost: float, softmax: Cost) -> bool:
        """Whether an estimate in ms or GFLOPs is about what is wanted, or less; times are noisy."""
        if self.gflops is not None:
            return cost <= 1.02 * self.gflops
        return cost * (self.speedup or 0.0) <= 1.1 * softmax.milliseconds

    def wanted(self) -> str:
        """What is given, as "name=value"."""
        names = dict(keep=self.keep, speedup=self.speedup, budget_gflops=self.gflops)
        return " ".join(f"{name}={value:g}" for name, value in names.items() if value is not None)

    def unreached(self, speedup: float, gflops: float) -> InputError:
        """The error for a speedup or a budget that isn't reached, given the best there is."""
        if self.gflops is not None:
            return InputError(f"{self.wanted()} is below the {gflops:.3f} GFLOPs of the cheapest candidates")
        return InputError(f"{self.wanted()} is beyond the {speedup:.2f} of the fastest candidates on this machine")


def expected_shares(tried: Sequence[Tried], images: int) -> list[float]:
    """What models are expected to keep on new images: a parabola over their distances, fitted to what all of them kept.

    A share of some hundred images is off by about a point, and the fastest of many models is often one that was lucky
    with these images. Its distance, which has no jumps, tells more about other images.

    Args:
        tried: models, the source first; the parabola goes through it.
        images: number of images that what they kept is a share of. The result is rounded to whole images.
    """
    distance, kept = np.array([(model.distance, model.kept) for model in tried]).T
    powers = np.stack([distance, distance**2], axis=1)
    # the variance of a share grows with the number of images whose class changes, and that with the distance
    weights = np.maximum(distance, 0.01) ** -0.5
    slopes, *_ = np.linalg.lstsq(weights[:, None] * powers, weights * (kept - kept[0]), rcond=None)
    expected = np.maximum(kept[0] + powers @ slopes, 0.0)
    return (np.round(expected * images) / images).tolist()
