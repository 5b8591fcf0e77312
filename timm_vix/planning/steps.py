"""The plans that are one step from a plan: another mixer in a layer, more merging in one layer or in all, or less."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from ..conversion.merge_steps import first_merge, merge_steps, merged_in_layers
from ..conversion.plan_file import Plan
from .latency import follows_merging

# Shares of the patches: merged by a step in one layer; merged in each layer by a step in all layers; left at the end,
# below which no further step merges. The first merging in a layer has a fixed cost, so merging few tokens there may not
# save time where merging many does.
MERGED_IN_ONE, MERGED_IN_EACH, LEAST_LEFT = (0.05, 0.15, 0.4), 0.01, 0.1


class Steps:
    """Steps between plans of one model.

    Args:
        depth: its number of layers.
        patches: its number of patches.
        merging: whether tokens may merge.

    Attributes:
        in_one: how many patches a step in one layer merges; empty without merging.
        in_each: how many patches a step in all layers merges in each; 0 without merging.
    """

    def __init__(self, depth: int, patches: int, merging: bool) -> None:
        self.depth, self.patches = depth, patches
        self.in_one = sorted({max(1, round(share * patches)) for share in MERGED_IN_ONE}) if merging else []
        self.in_each = max(1, round(MERGED_IN_EACH * patches)) if merging else 0

    def onward(self, plan: Plan, mixers: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Plan]]:
        """All steps from a plan by name, cheaper or not; ``mixers``: the candidates."""
        first = first_merge(self.merges(plan))
        for layer in range(self.depth):
            for mixer in mixers:
                if first is None or layer <= first or follows_merging(mixer):
                    yield f"{layer} {json.dumps(mixer)}", Plan({**plan.layers, layer: mixer}, plan.merge)
        if not self.in_one or not self.can_merge(plan):
            return
        last = max((layer for layer, mixer in plan.layers.items() if not follows_merging(mixer)), default=0)
        for layer in range(last, self.depth):
            for r in self.in_one:
                yield f"merge {r} {layer}", self.with_merging(plan, layer, r)
        if last == 0:
            yield "merge alike", self.with_more_everywhere(plan)

    def back(self, plan: Plan) -> list[tuple[str, Plan]]:
        """Plans with one conversion, or some merging in one layer, taken back.

        Each has the name of the step that leads back to ``plan``.
        """
        found = [
            (f"{layer} {json.dumps(mixer)}", Plan({i: m for i, m in plan.layers.items() if i != layer}, plan.merge))
            for layer, mixer in plan.layers.items()
        ]
        for layer, r in enumerate(self.merges(plan)):
            if r:
                less = max((one for one in self.in_one if one <= r), default=r)
                found.append((f"merge {less} {layer}", self.with_merging(plan, layer, -less)))
        return found

    def with_more_everywhere(self, plan: Plan) -> Plan:
        """A plan that merges a little more in each layer."""
        for layer in range(self.depth):
            plan = self.with_merging(plan, layer, self.in_each)
        return plan

    def with_merging(self, plan: Plan, layer: int, more: int) -> Plan:
        """A plan whose ``layer`` merges more patches."""
        merge = self.merges(plan)
        merge[layer] += more
        return Plan(plan.layers, merge if any(merge) else 0)

    def merges(self, plan: Plan) -> list[Any]:
        """How many patches each layer is asked to merge."""
        return list(merge_steps(plan.merge, self.depth))

    def merged(self, plan: Plan) -> int:
        """How many patches have merged after the last layer."""
        return sum(r or 0 for r in merged_in_layers(self.merges(plan), self.patches))

    def can_merge(self, plan: Plan) -> bool:
        """Whether so many patches are left that more may merge."""
        return self.patches - self.merged(plan) > LEAST_LEFT * self.patches
