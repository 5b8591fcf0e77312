"""The search for a plan: which layers to convert and which tokens to merge, one step after another.

The search is greedy. It starts from the model that merges equally many tokens in all layers, as many as the target
allows, and again from the softmax model. A step is another mixer in one layer, more merging in one layer, or a little
more merging in all layers. The search takes the step with the largest ratio of saved cost to added squared distance.
The squared distances of single layers roughly add up, so they select a short list of steps. The steps of this list are
measured in the present plan, since conversions interact. After each step the whole model is measured: its agreement on
all images that choose, and its time, in turn with softmax.
"""

import time
from typing import Any, Optional

import numpy as np

from .._checks import InputError
from ..conversion.plan_file import Plan
from ..measure.statistics import pareto
from .latency import Candidate, Costs, Latency, follows_merging
from .sensitivity import Sensitivity
from .steps import Steps
from .target import Target, Tried, expected_shares

# a candidate must save at least this share of a block's cost
LEAST_SAVING = 0.02
# number of candidates for each layer, of steps on the short list, and of failed steps in a row that end a descent
MOST_CANDIDATES, SHORT_LIST, PATIENCE = 5, 4, 5
LONGER = 4  # the best plans are timed this many times as long as others
EPSILON = 1e-12  # the least squared distance in the denominator of a ratio


class Search:
    """Measures plans as whole models and chooses among them.

    Args:
        few, chosen: measure plans on a few of the images that choose, and on all of these.
        latency: measures times.
        costs: estimates them.
        mixers: the candidates.
        merging: whether tokens may merge.
        target: what is wanted.
        minutes: after which no further plan is measured.
        start: ``time.monotonic()`` from which the minutes count.

    Attributes:
        curve: the measurement of each plan that was tried, by ``Plan.to_json``.
    """

    def __init__(
        self,
        few: Sensitivity,
        chosen: Sensitivity,
        latency: Latency,
        costs: Costs,
        mixers: list[dict[str, Any]],
        merging: bool,
        target: Target,
        minutes: float,
        start: float,
    ) -> None:
        self.few, self.chosen, self.latency, self.costs = few, chosen, latency, costs
        self.target, self.minutes, self.end = target, minutes, start + 60 * minutes
        self.stopped = False  # whether the time is over
        self.depth, self.patches = costs.depth, costs.patches
        self.steps = Steps(self.depth, self.patches, merging)
        self.curve: dict[str, Tried] = {}
        self.mixers = self.cheaper(mixers)
        if not self.mixers and not merging:
            raise InputError(
                f"no candidate is cheaper than softmax attention at {self.patches} patches: "
                f"mixer={sorted({mixer['mixer'] for mixer in mixers})}"
            )
        self.check_reachable()

    def choose(self) -> Plan:
        """The plan for the target.

        Raises:
            ValueError: for one that no plan reaches.
        """
        self.measure(Plan())
        self.mixers = self.promising(self.mixers)
        self.alone = self.measure_alone()
        starts = [Plan()]
        if self.steps.in_each and (alike := self.merge_alike()).merge:
            starts.insert(0, alike)  # first, since it is nearer to the target if there is no time for both
        for start in starts:
            self.improve(self.descend(start, set()))
        if self.stopped:
            print(f"the search ends after minutes={self.minutes:g}; the same call with more goes on", flush=True)
        return self.best()

    def best(self) -> Plan:
        """The best plan that was tried, by what it kept and by what it is expected to keep.

        It is timed for longer, since noise makes the fastest of many seem too fast.
        """
        expected = self.expected()
        timed: set[str] = set()
        while allowed := [
            what
            for what, tried in self.curve.items()
            if self.target.allows(tried._replace(kept=min(tried.kept, expected[what])))
        ]:
            best = max(allowed, key=lambda what: self.target.worth(self.curve[what]._replace(kept=expected[what])))
            plan = Plan.from_json(best)
            if best in timed:
                return plan
            timed.add(best)
            self.curve[best] = self.curve[best]._replace(**self.latency.time_model(plan, LONGER)._asdict())
        curve = self.curve.values()
        fastest, cheapest = max(tried.speedup for tried in curve), min(tried.gflops for tried in curve)
        if self.stopped:
            raise InputError(
                f"minutes={self.minutes:g} were over before the target was reached: {self.target.wanted()} was wanted, "
                f"and models so far are up to {fastest:.2f} times as fast as softmax, with {cheapest:.3f} GFLOPs; the "
                "same call with more minutes goes on"
            )
        raise self.target.unreached(fastest, cheapest)

    def expected(self) -> dict[str, float]:
        """What each plan of the curve is expected to keep. A mean cosine is no count, so that it needs no other."""
        if self.chosen.counted is None:
            return {what: tried.kept for what, tried in self.curve.items()}
        source = Plan().to_json()
        plans = [source, *(what for what in self.curve if what != source)]
        return dict(zip(plans, expected_shares([self.curve[what] for what in plans], self.chosen.counted)))

    def measure(self, plan: Plan) -> Tried:
        """Measure a whole model, and put it on the curve."""
        what = plan.to_json()
        if what not in self.curve:
            kept, timed = self.chosen.measure(plan), self.latency.time_model(plan)
            self.curve[what] = tried = Tried(**kept._asdict(), **timed._asdict())
            changes = f"{len(plan.layers):3} layers converted, {self.steps.merged(plan):4} tokens merged"
            figures = f"{tried.speedup:.2f} times as fast, {tried.gflops:.3f} GFLOPs"
            figures += f", {self.chosen.compared} {tried.agreement:.4f}"
            figures += f", {tried.kept:.4f} of top-1" if self.chosen.labels is not None else ""
            print(f"{changes}: {figures}", flush=True)
        return self.curve[what]

    def squared_distance(self, plan: Plan) -> float:
        """The squared distance of a plan on the few images; 0 for softmax without merging."""
        return self.few.measure(plan).distance ** 2 if plan.converts() else 0.0

    # ------------------------------------------------------------------ candidates

    def saving(self, mixer: Candidate) -> float:
        """The share of a block's cost that a mixer saves."""
        return 1 - self.costs.of_mixer(mixer, self.target.cost) / self.costs.of_mixer(None, self.target.cost)

    def cheaper(self, mixers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The mixers that are cheaper than softmax on the whole grid."""
        return [mixer for mixer in mixers if self.saving(mixer) > LEAST_SAVING]

    def promising(self, mixers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A few mixers, first the Pareto front of cost and distance; the mixer is in all layers for the distance."""
        if len(mixers) <= MOST_CANDIDATES:
            return mixers
        found: list[dict[str, Any]] = []
        rest: list[tuple[float, dict[str, Any]]] = []
        for mixer in mixers:
            if not self.has_time():
                return mixers[:MOST_CANDIDATES]
            rest.append((self.squared_distance(Plan(dict.fromkeys(range(self.depth), mixer))), mixer))
        while len(found) < MOST_CANDIDATES:
            front = pareto([-self.saving(mixer) for _, mixer in rest], [-distance for distance, _ in rest])
            count = min(len(front), MOST_CANDIDATES - len(found))
            # from the cheapest to the most faithful
            found += [rest[front[i * (len(front) - 1) // max(1, count - 1)]][1] for i in range(count)]
            rest = [pair for i, pair in enumerate(rest) if i not in front]
        return found

    def measure_alone(self) -> dict[str, float]:
        """The squared distance of each candidate, and of a step of merging, in each layer alone, as time allows."""
        plans = [(layer, Plan({layer: mixer})) for layer in range(self.depth) for mixer in self.mixers]
        # in whole passes, since blocks that merge are called together
        merging = [(layer, r) for layer in range(self.depth) for r in self.steps.in_one]
        plans += [(0, self.steps.with_merging(Plan(), layer, r)) for layer, r in merging]
        self.few.measure_single_layers(plans, self.has_time)
        names = [plan.to_json() for _, plan in plans]
        return {name: self.few.known[name].distance ** 2 for name in names if name in self.few.known}

    def estimate(self, plan: Plan) -> float:
        """The squared distance of a plan, as the sum of those of its parts."""
        total = sum(self.alone.get(Plan({layer: mixer}).to_json(), 0.0) for layer, mixer in plan.layers.items())
        for layer, r in enumerate(self.steps.merges(plan)):
            if r:
                steps = [self.steps.with_merging(Plan(), layer, one) for one in self.steps.in_one]
                alone = [self.alone.get(step.to_json(), 0.0) for step in steps]
                total += float(np.interp(r, [0, *self.steps.in_one], [0.0, *alone]))
        return total

    # ------------------------------------------------------------------ steps

    def best_step(self, plan: Plan, refused: set[str]) -> Optional[tuple[str, Plan]]:
        """The step that saves most for the squared distance that it adds, measured in place."""
        cost, here = self.costs.of_plan(plan, self.target.cost), self.estimate(plan)
        least = 1e-4 * getattr(self.costs.whole, self.target.cost)
        found = []
        for name, new in self.steps.onward(plan, self.mixers):
            saved = cost - self.costs.of_plan(new, self.target.cost)
            if name not in refused and saved > least:
                found.append((saved / max(self.estimate(new) - here, EPSILON), saved, name, new))
        if not found:
            return None
        short = sorted(found, key=lambda step: -step[0])[:SHORT_LIST]
        before = self.squared_distance(plan)
        ratios = [saved / max(self.squared_distance(new) - before, EPSILON) for _, saved, _, new in short]
        _, _, name, new = short[ratios.index(max(ratios))]
        return name, new

    def has_time(self) -> bool:
        """Whether another step may be taken; the search notes if it was stopped by this."""
        self.stopped = self.stopped or time.monotonic() >= self.end
        return not self.stopped

    def descend(self, plan: Plan, refused: set[str]) -> Plan:
        """Take steps while the target allows it, or until it is reached.

        Args:
            refused: names of steps that aren't to be taken; those that fail are added.
        """
        failed = 0
        while self.has_time() and failed < PATIENCE and (step := self.best_step(plan, refused)):
            name, new = step
            allowed = self.target.allows(self.measure(new))
            if self.target.keep is not None and not allowed:
                refused.add(name)
                failed += 1
                continue
            plan, failed = new, 0
            if self.target.keep is None and allowed:
                break
        return plan

    def merge_alike(self) -> Plan:
        """The most merging, alike in all layers, that ``keep`` allows or that is still short of a speedup or budget."""
        plan, new = Plan(), self.steps.with_more_everywhere(Plan())
        softmax = self.costs.of_plan(plan, self.target.cost)
        # no layer merges more than half of its tokens, so that more may change nothing
        while self.has_time() and self.steps.can_merge(plan) and self.steps.merged(new) > self.steps.merged(plan):
            # a little merging may cost more than it saves
            pays = self.costs.of_plan(new, self.target.cost) < softmax
            if pays and self.target.allows(self.measure(new)) != (self.target.keep is not None):
                break
            plan, new = new, self.steps.with_more_everywhere(new)
        return plan if self.costs.of_plan(plan, self.target.cost) < softmax else Plan()

    def improve(self, plan: Plan) -> None:
        """Undo changes that a speedup or a budget doesn't need; with ``keep`` replace the change that distorts most."""
        if self.target.keep is not None:
            if self.has_time() and (back := self.steps.back(plan)):
                name, without = min(back, key=lambda step: self.estimate(step[1]))
                self.descend(without, {name})
            return
        while self.target.allows(self.measure(plan)):
            # the smallest estimated distance first
            for _, less in sorted(self.steps.back(plan), key=lambda step: self.estimate(step[1])):
                near = self.target.is_near(self.costs.of_plan(less, self.target.cost), self.costs.whole)
                if self.has_time() and near and self.target.allows(self.measure(less)):
                    plan = less
                    break
            else:
                return

    # ------------------------------------------------------------------ targets that can't be reached

    def check_reachable(self) -> None:
        """Raise ValueError for a target that the cheapest plans miss by far, before a search for it."""
        if self.target.keep is not None:
            return
        everything: list[Candidate] = [None, *self.mixers]
        plans = []
        for mixers in (everything, [mixer for mixer in everything if follows_merging(mixer)]):
            cheapest = max(mixers, key=self.saving)
            plans.append(Plan({layer: cheapest for layer in range(self.depth) if cheapest}))
        if self.steps.in_one:
            # no layer merges more than half
            plans.append(Plan(plans[1].layers, [self.patches if layer < 3 else 0 for layer in range(self.depth)]))
        costs = [self.costs.of_plan(plan, self.target.cost) for plan in plans]
        if not any(self.target.is_near(cost, self.costs.whole) for cost in costs):
            raise self.target.unreached(self.costs.whole.milliseconds / min(costs), min(costs))
