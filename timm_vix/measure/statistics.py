"""What measured times say: differences beyond their spread, exponents, crossovers, Pareto fronts."""

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np


def exponent(tokens: Sequence[float], costs: Sequence[float]) -> Optional[float]:
    """The b of cost = a · tokens^b, by least squares of logarithms; None for fewer than two sizes.

    Only sizes above the geometric mean of the smallest and the largest are fitted: below, a constant cost dominates.

    Example:
        >>> exponent([100, 1000, 10000], [1, 10, 1000])
        2.0
    """
    points = [(n, cost) for n, cost in zip(tokens, costs) if n >= (min(tokens) * max(tokens)) ** 0.5 * 0.999]
    if len({n for n, _ in points}) < 2:
        points = list(zip(tokens, costs))
    if len({n for n, _ in points}) < 2:
        return None
    x, y = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def crossing(tokens: Sequence[float], ratios: Sequence[float]) -> Optional[float]:
    """The number of tokens from which the ratio stays above 1, by interpolation of logarithms.

    The smallest number of tokens, if the ratio is above 1 throughout; None, if it isn't above 1 at the largest.
    """
    below = [i for i, ratio in enumerate(ratios) if ratio <= 1]
    if not below:
        return float(tokens[0])
    if below[-1] == len(ratios) - 1:
        return None
    i = below[-1]
    (x0, x1), (y0, y1) = np.log(tokens[i : i + 2]), np.log(ratios[i : i + 2])
    return float(np.exp(x0 - y0 * (x1 - x0) / (y1 - y0)))


def crossover(
    tokens: Sequence[float], ratios: Sequence[float], lows: Sequence[float], highs: Sequence[float]
) -> tuple[Optional[float], Optional[float], Optional[float]]:
    """The number of tokens from which a mechanism is faster, and the smallest and largest that the spread allows."""
    order = sorted(range(len(tokens)), key=lambda i: tokens[i])
    sizes = [tokens[i] for i in order]
    median, earliest, latest = (crossing(sizes, [r[i] for i in order]) for r in (ratios, highs, lows))
    return median, earliest, latest


def crossover_text(tokens: Sequence[float], found: tuple[Optional[float], Optional[float], Optional[float]]) -> str:
    """E.g. "from 430 tokens (380 to 510)", "at all sizes (from 197 tokens)", "not up to 4,097 tokens"."""
    median, earliest, latest = found
    first, last = min(tokens), max(tokens)
    if median is None:
        return f"not up to {last:,.0f} tokens"
    if latest is not None and latest == first:
        return f"at all sizes (from {first:,.0f} tokens)"
    low = f"below {first:,.0f}" if earliest is None or earliest == first else f"{earliest:,.0f}"
    high = f"above {last:,.0f}" if latest is None else f"{latest:,.0f}"
    start = f"{first:,.0f} or fewer" if median == first else f"{median:,.0f}"
    return f"from {start} tokens ({low} to {high})"


def compare_times(seconds: np.ndarray, baseline: Optional[np.ndarray] = None) -> dict[str, Any]:
    """Latencies in ms, and the ratio baseline / model with its spread: 10th to 90th percentile over the rounds.

    One or two rounds have no spread.

    Args:
        seconds: (rounds,) of a model.
        baseline: (rounds,) of the model that was timed in turn with it.
    """
    rounds = len(seconds)
    p50, p90 = np.percentile(seconds * 1e3, (50, 90)).tolist()
    row = dict(latency_p50_ms=p50, latency_p90_ms=p90, rounds=rounds)
    if baseline is None:
        return row
    low, median, high = np.percentile(baseline / seconds, (10, 50, 90)).tolist()
    return row | dict(
        baseline_p50_ms=float(np.median(baseline)) * 1e3,
        speedup=median,
        speedup_low=None if rounds < 3 else low,
        speedup_high=None if rounds < 3 else high,
        difference=verdict(rounds, low, high),
    )


def verdict(rounds: int, low: float, high: float) -> str:
    """Whether a ratio of times with this spread is a difference: "faster", "slower", "none", or "unknown".

    It is "none" if the spread, from the 10th to the 90th percentile over the rounds, contains 1, and "unknown" with
    fewer than five rounds: of equally fast models, three ratios lie on the same side of 1 in a quarter of the cases.
    """
    if rounds < 5:
        return "unknown"
    return "faster" if low > 1 else "slower" if high < 1 else "none"


def pareto(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats in both, cheapest first: less cost, more gain."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        if not front or gains[i] > gains[front[-1]]:
            front.append(i)
    return front
