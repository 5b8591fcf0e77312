"""The search for a plan: which layers to convert together, given what each conversion changes on its own.

The squared distances of single layers add up, roughly. They order the conversions by squared distance for each GFLOP
saved; plans along this order are then measured as whole models, and the best of these is improved layer by layer.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from .._checks import InputError
from ..mixers import MIXERS
from .sensitivity import (
    Measurement,
    Plan,
    Sensitivity,
    block_gflops,
    plan_from_json,
    plan_to_json,
    temporarily_converted,
)

# a candidate that saves a smaller share of the model's operations than this in every layer isn't measured
LEAST_SAVING = 0.0005
HALF_AN_OPERATION = 0.5e-9  # in GFLOPs: sums of whole numbers of operations, computed in GFLOPs, are off by less


class Option(NamedTuple):
    """What may stand in one layer, the block's GFLOPs with it, and what converting this layer alone changes.

    ``mixer`` holds "mixer" and its keywords; None is softmax attention.
    """

    mixer: Optional[dict[str, Any]]
    gflops: float
    squared_distance: float
    agreement: float


class Step(NamedTuple):
    """Put ``option`` into ``layer``, at ``slope`` squared distance for each GFLOP saved."""

    slope: float
    layer: int
    option: Option


def measure_options(
    sensitivity: Sensitivity,
    softmax_gflops: list[float],
    other_gflops: float,
    mixers: Sequence[str],
    candidates: dict[str, list[dict[str, Any]]],
) -> list[list[Option]]:
    """Measure each candidate in each layer alone.

    Args:
        softmax_gflops, other_gflops: ``block_gflops`` of the softmax model.
        mixers: the mixers to choose from.
        candidates: for each mixer the keywords to try.

    Returns:
        For each layer the options, softmax first.

    Raises:
        ValueError: if no candidate is cheaper than softmax.
    """
    model, depth = sensitivity.model, len(softmax_gflops)
    patches = model.patch_embed.grid_size[0] * model.patch_embed.grid_size[1]
    needed = LEAST_SAVING * (sum(softmax_gflops) + other_gflops)
    cheaper: list[tuple[dict[str, Any], list[float]]] = []
    for name in dict.fromkeys(mixers):
        for keywords in candidates[name]:
            if all(keywords.get(count, 0) <= patches for count in MIXERS[name].token_counts):
                mixer = {"mixer": name, **keywords}
                with temporarily_converted(model, dict.fromkeys(range(depth), mixer)):
                    gflops, _ = block_gflops(model, sensitivity.batches[0][:1])
                if any(softmax - own > needed for softmax, own in zip(softmax_gflops, gflops)):
                    cheaper.append((mixer, gflops))
    if not cheaper:
        raise InputError(f"mixer={list(mixers)}: no candidate is cheaper than softmax attention at {patches} patches")
    sensitivity.measure_single_layers([{layer: mixer} for layer in range(depth) for mixer, _ in cheaper])
    options = []
    for layer in range(depth):
        options.append([Option(None, softmax_gflops[layer], 0.0, 1.0)])
        for mixer, gflops in cheaper:
            alone = sensitivity.measure({layer: mixer})
            options[layer].append(Option(mixer, gflops[layer], alone.distance**2, alone.agreement))
    return options


def order_steps(options: list[list[Option]]) -> list[Step]:
    """All steps from softmax to the cheapest model, those that change least for each GFLOP saved first.

    The steps of a layer follow the lower convex hull of squared distance over GFLOPs. Their slopes ascend, so that the
    order of slopes keeps the order of a layer's steps.
    """
    steps = []
    for layer, (current, *others) in enumerate(options):
        while cheaper := [option for option in others if option.gflops < current.gflops]:
            slopes = [
                (option.squared_distance - current.squared_distance) / (current.gflops - option.gflops)
                for option in cheaper
            ]
            slope = min(slopes)
            current = min((o for o, s in zip(cheaper, slopes) if s == slope), key=lambda option: option.gflops)
            steps.append(Step(slope, layer, current))
    return sorted(steps, key=lambda step: step.slope)


def plan_after(steps: Sequence[Step]) -> Plan:
    """The plan that some steps lead to."""
    return {step.layer: step.option.mixer for step in steps if step.option.mixer}


def plan_with(options: Sequence[Option]) -> Plan:
    """The plan with one option for each layer."""
    return {layer: option.mixer for layer, option in enumerate(options) if option.mixer}


class Search:
    """Measures plans as whole models and chooses among them.

    Args:
        sensitivity: measures a plan.
        options: for each layer, softmax first.
        softmax: measurement of the softmax model.

    Attributes:
        curve: the measurement of each plan that was tried, by ``plan_to_json``.
    """

    def __init__(self, sensitivity: Sensitivity, options: list[list[Option]], softmax: Measurement) -> None:
        self.sensitivity, self.options = sensitivity, options
        self.steps = order_steps(options)
        self.curve = {plan_to_json({}): softmax}
        self.other_gflops = softmax.gflops - sum(own[0].gflops for own in options)

    def choose(self, keep: Optional[float], budget: Optional[float]) -> Plan:
        """The plan for a least agreement or, where it is given, a budget in GFLOPs.

        Raises:
            ValueError: for a budget that no candidate meets.
        """
        if budget is None:
            self.measure_quarters()
            return self.cheapest(keep or 0.0)
        self.check_budget(budget)
        self.measure_quarters()
        return self.closest(budget)

    def measure(self, plan: Plan) -> Measurement:
        """Measure a whole model, and put it on the curve."""
        key = plan_to_json(plan)
        if key not in self.curve:
            self.curve[key] = measured = self.sensitivity.measure(plan)
            print(f"{len(plan):3} layers: {measured.gflops:.3f} GFLOPs, agreement {measured.agreement:.4f}", flush=True)
        return self.curve[key]

    def measure_quarters(self) -> None:
        """Measure the models after each quarter of the steps, so that the curve covers all costs."""
        for quarter in (1, 2, 3, 4):
            self.measure(plan_after(self.steps[: quarter * len(self.steps) // 4]))

    def cheapest(self, keep: float) -> Plan:
        """The plan of least cost that was found with an agreement of at least ``keep``."""
        agreeing = [[option for option in own if option.agreement >= keep] for own in self.options]
        agreeing_steps = order_steps(agreeing)
        # once with all options, once without those that alone change too much
        self.bisect(self.steps, keep)
        self.bisect(agreeing_steps, keep)
        # on few images the layer that saves most may agree more than its distance suggests, and then comes too late
        singles = [
            (option.gflops - own[0].gflops, option.squared_distance, {layer: option.mixer})
            for layer, own in enumerate(agreeing)
            for option in own
            if option.mixer
        ]
        if singles:
            self.measure(min(singles, key=lambda single: single[:2])[2])
        feasible = [key for key, measured in self.curve.items() if measured.agreement >= keep]
        plan = plan_from_json(min(feasible, key=lambda key: (self.curve[key].gflops, self.curve[key].distance)))
        return self.extend(plan, agreeing_steps, keep)

    def bisect(self, steps: list[Step], keep: float) -> None:
        """Find how many of the steps can be taken together with an agreement of at least ``keep``."""
        enough, too_many = 0, len(steps) + 1
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if self.measure(plan_after(steps[:middle])).agreement >= keep:
                enough = middle
            else:
                too_many = middle

    def extend(self, plan: Plan, steps: list[Step], keep: float) -> Plan:
        """Take each further step that leaves an agreement of at least ``keep``."""
        refused: set[int] = set()
        for step in steps:
            current = next(option for option in self.options[step.layer] if option.mixer == plan.get(step.layer))
            # the later steps of a layer change more than the one that was refused
            if step.layer not in refused and step.option.gflops < current.gflops:
                extended = {**plan, **plan_after([step])}
                if self.measure(extended).agreement >= keep:
                    plan = extended
                else:
                    refused.add(step.layer)
        return plan

    def check_budget(self, budget: float) -> None:
        """Raise ValueError for a budget in GFLOPs that no candidate meets."""
        least = self.other_gflops + sum(min(option.gflops for option in own) for own in self.options)
        if budget + HALF_AN_OPERATION < least:
            raise InputError(f"budget_gflops={budget:g} is below the {least:.3f} GFLOPs of the cheapest candidates")

    def closest(self, budget: float) -> Plan:
        """The plan that changes least, among those that were found of at most ``budget`` GFLOPs."""
        budget += HALF_AN_OPERATION
        current = [own[0] for own in self.options]
        spent = self.other_gflops + sum(option.gflops for option in current)
        for step in self.steps:
            if spent > budget:
                spent += step.option.gflops - current[step.layer].gflops
                current[step.layer] = step.option
        self.measure(plan_with(current))
        # the last step may save more than is needed: spend the rest where the distance is largest
        for layer in sorted(range(len(current)), key=lambda layer: -current[layer].squared_distance):
            room = budget - spent + current[layer].gflops
            affordable = [option for option in self.options[layer] if option.gflops <= room]
            best = min(affordable, key=lambda option: option.squared_distance)
            spent += best.gflops - current[layer].gflops
            current[layer] = best
        self.measure(plan_with(current))
        within = [key for key, measured in self.curve.items() if measured.gflops <= budget]
        return plan_from_json(max(within, key=lambda key: (self.curve[key].agreement, -self.curve[key].distance)))

    def rows(self, chosen: Plan) -> list[dict[str, Any]]:
        """The curve as rows, the most expensive model first."""
        rows = [
            dict(layers=len(json.loads(key)), **measured._asdict(), chosen=key == plan_to_json(chosen))
            for key, measured in self.curve.items()
        ]
        return sorted(rows, key=lambda row: (-row["gflops"], -row["agreement"]))
