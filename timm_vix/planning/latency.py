"""The cost of a plan on this machine: estimated from the times of blocks, or measured as the time of a whole model.

    T(plan) = T_rest + sum over layers of t(mixer, share of the patches that is left) + what merging costs there

The times t are measured on one block, since all blocks are alike. On the whole grid the block has softmax or a
candidate. At smaller shares it has softmax or a mixer that takes merged tokens, and t is interpolated between the
shares. All are timed in turn. The estimate orders the steps of a search, whose differences are smaller than the noise
of a whole model's time. A plan is chosen by the measured time of the whole model beside softmax.
"""

import copy
import json
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import nn

from ..conversion.convert import convert
from ..conversion.merge_block import run_block
from ..conversion.merge_steps import merge_steps, merged_in_layers
from ..conversion.plan_file import Plan
from ..conversion.scaling import scaled_for
from ..conversion.sites import attention_sites
from ..measure.flops import count_flops
from ..measure.job import time_interleaved
from ..measure.memory import set_malloc
from ..measure.statistics import compare_times
from ..mixers import MIXERS
from ..mixers._layout import TokenLayout, num_patches
from ..mixers._merging import Groups
from ..slots.model import layout_of
from .measurements import Measurements
from .sensitivity import count_gflops, temporarily_converted

Candidate = Optional[dict[str, Any]]  # "mixer" and its keywords; None: softmax
# shares of the patches that are left, at which blocks are timed
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
# share of the patches that a block merges when the cost of merging is timed
MERGED = 0.04
# blocks are timed this many times as long as whole models, all blocks in turn
TIME_OF_BLOCKS = 8


class Time(NamedTuple):
    """Median time of one pass of a whole model, and how many times as fast as softmax it is, timed in turn."""

    milliseconds: float
    speedup: float


class Cost(NamedTuple):
    """Least time of one block in a pass, and its GFLOPs for one image; whatever else the machine does adds time."""

    milliseconds: float
    gflops: float


class Work(NamedTuple):
    """A block that is measured: its mixer, the share of the patches that it sees, and whether it merges some."""

    mixer: Candidate
    share: float = 1.0
    merges: bool = False

    def to_json(self) -> str:
        return json.dumps({"block": self.mixer, "share": self.share, "merges": self.merges})


def follows_merging(mixer: Candidate) -> bool:
    """Whether a mixer may stand where tokens have merged."""
    return mixer is None or MIXERS[mixer["mixer"]].takes_merged_tokens(**mixer)


class Latency:
    """Times one model's blocks and whole plans, each for ``seconds`` or a few rounds if these take longer.

    Args:
        model: softmax model in eval mode, whose logits may be scaled; it is converted during a measurement and then
            restored.
        images: normalised images of one pass.
        table: to which rows are appended, and which knows earlier ones.
        run: text that identifies everything that times depend on besides the plan.
    """

    rounds, seconds = 9, 1.5

    def __init__(self, model: nn.Module, images: torch.Tensor, table: Measurements, run: str) -> None:
        self.model, self.images, self.table, self.run = model, images, table, run
        # the same weights in modules of their own, so that both can be called in turn
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.softmax = copy.deepcopy(model, shared)
        self.scaled = scaled_for(model) > 0
        if self.scaled:  # times are compared with those of the source as it is
            convert(self.softmax, scale_logits=0)
        self.job = dict(device=str(images.device), rounds=self.rounds, seconds=self.seconds)
        self.known = {what: Time(**figures) for what, figures in table.of_run(run, *Time._fields).items()}
        set_malloc(2**25)  # the most that glibc would learn, as in ``measure``

    def time_model(self, plan: Plan, longer: int = 1) -> Time:
        """Time a whole model in turn with softmax, for so many times as long as usual, and append the row."""
        what = plan.to_json() if longer == 1 else f"{longer} times as long: {plan.to_json()}"
        if what not in self.known:
            with temporarily_converted(self.model, plan):
                models = [self.softmax, self.model]
                calls = [lambda model=model: self.call(model, self.images) for model in models]
                times = time_interleaved(calls, {**self.job, "seconds": longer * self.seconds})
            row = compare_times(times[:, 1], times[:, 0])
            speedup = round(row["speedup"], 4) if plan.converts() or self.scaled else 1.0
            measured = Time(round(row["latency_p50_ms"], 4), speedup)
            self.table.add(self.run, what, **measured._asdict())
            self.known[what] = measured
        return self.known[what]

    @staticmethod
    @torch.inference_mode()
    def call(module: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        module(*arguments, **keywords)

    def time_blocks(self, mixers: list[dict[str, Any]], merging: bool) -> "Costs":
        """Time a block with each mixer, all in turn, and append the rows; nothing if all of them are there."""
        wanted = [Work(None), *(Work(mixer) for mixer in mixers)]
        if merging:
            followers: list[Candidate] = [None, *(mixer for mixer in mixers if follows_merging(mixer))]
            wanted += [Work(mixer, share) for mixer in followers for share in SHARES[1:]]
            wanted += [Work(None, share, True) for share in SHARES]
        found = self.table.of_run(self.run, *Cost._fields)
        costs = {what: Cost(**figures) for what, figures in found.items()}
        if any(work.to_json() not in costs for work in wanted):
            # All blocks are timed again, since the speed of a machine changes with its load. Rows that were missing are
            # written last, so that a table that a kill left incomplete still lacks one, and all are timed again.
            wanted.sort(key=lambda work: work.to_json() not in costs)
            costs = {work.to_json(): cost for work, cost in zip(wanted, self.measure_blocks(wanted))}
            # the whole model too, to whose time those of the blocks are added
            self.known.pop(Plan().to_json(), None)
            self.time_model(Plan())
            for what, cost in costs.items():
                self.table.add(self.run, what, **cost._asdict())
        model = self.time_model(Plan()).milliseconds
        gflops = count_gflops(self.model, self.images[:1])
        return Costs(self.model, costs, Cost(model, gflops))

    def measure_blocks(self, works: list[Work]) -> list[Cost]:
        """Time the middle block as each of the works describes it, all in turn."""
        layer = len(self.model.blocks) // 2
        x, keywords = self.input_of(layer)
        layout = layout_of(self.model)
        merged = max(1, round(MERGED * num_patches(layout)))
        block = self.model.blocks[layer]
        places = [(site.parent, site.name) for site in attention_sites(self.model)[layer]]
        own = [getattr(parent, name) for parent, name in places]

        attention = {work.to_json(): self.attention_of(work, layer) for work in works}

        def call_of(work: Work, x: torch.Tensor) -> Callable[[], None]:
            modules = attention[work.to_json()]
            groups = None if work.share == 1.0 else groups_of(len(x), layout, work.share, x.device)
            tokens = x if groups is None else x[:, : groups.counts.shape[1]].contiguous()

            @torch.inference_mode()
            def call() -> None:
                for (parent, name), module in zip(places, modules):
                    setattr(parent, name, module)
                if groups is None and not work.merges:
                    block(tokens, **keywords)
                else:
                    run_block(block, merged * work.merges, layout.num_prefix_tokens, tokens, groups, **keywords)

            return call

        try:
            # blocks are timed once in a plan, and the least of their times needs many rounds
            job = {**self.job, "seconds": TIME_OF_BLOCKS * self.seconds}
            times = time_interleaved([call_of(work, x) for work in works], job)
            gflops = [count_flops(call_of(work, x[:1])) / 1e9 for work in works]
        finally:
            for (parent, name), module in zip(places, own):
                setattr(parent, name, module)
        milliseconds = (1e3 * times.min(axis=0)).round(5).tolist()
        return [Cost(*cost) for cost in zip(milliseconds, gflops)]

    @torch.inference_mode()
    def input_of(self, layer: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """What a block gets in a pass: tokens (B, N, C), and keywords."""
        found: list[tuple[torch.Tensor, dict[str, Any]]] = []
        handle = self.model.blocks[layer].register_forward_pre_hook(
            lambda block, args, keywords: found.append((args[0], keywords)), with_kwargs=True
        )
        try:
            self.model(self.images)
        finally:
            handle.remove()
        return found[0]

    def attention_of(self, work: Work, layer: int) -> list[nn.Module]:
        """The modules that take the place of a block's attention in a work."""
        merge = [int(i == layer) for i in range(len(self.model.blocks))]
        slot = work.mixer is None and (work.merges or work.share < 1.0)
        plan = Plan({layer: work.mixer} if work.mixer else {}, merge if slot else 0)
        with temporarily_converted(self.model, plan):
            return [getattr(site.parent, site.name) for site in attention_sites(self.model)[layer]]


def groups_of(batch: int, layout: TokenLayout, share: float, device: torch.device) -> Groups:
    """Groups of neighbours in the sequence, of which there are as many as a share of the patches."""
    P, patches = layout.num_prefix_tokens, num_patches(layout)
    left = max(1, round(share * patches))
    place = torch.cat([torch.arange(P), P + torch.arange(patches) * left // patches])
    counts = torch.bincount(place, minlength=P + left).float()
    return Groups(place.expand(batch, -1).to(device), counts.expand(batch, -1).to(device))


class Costs:
    """Estimates of what plans cost, from the costs of single blocks.

    Args:
        model: softmax model.
        blocks: cost of each measured work, see ``Work``.
        whole: cost of the whole softmax model.
    """

    def __init__(self, model: nn.Module, blocks: dict[str, Cost], whole: Cost) -> None:
        layout = layout_of(model)
        self.patches, self.depth = num_patches(layout), len(model.blocks)
        self.blocks, self.whole = blocks, whole

    def of_mixer(self, mixer: Candidate, name: str, share: float = 1.0, merges: bool = False) -> float:
        """Cost of a block with a share of the patches, interpolated between those that were measured."""
        points = [
            (other, getattr(cost, name))
            for other in sorted(SHARES)
            if (cost := self.blocks.get(Work(mixer, other, merges).to_json())) is not None
        ]
        shares, costs = zip(*points)
        return float(np.interp(share, shares, costs))

    def of_plan(self, plan: Plan, name: str) -> float:
        """``name``, "milliseconds" or "gflops", of a whole model."""
        left, cost = self.patches, getattr(self.whole, name)
        merged = merged_in_layers(merge_steps(plan.merge, self.depth), self.patches)
        for layer, r in enumerate(merged):
            share = left / self.patches
            cost += self.of_mixer(plan.layers.get(layer), name, share) - self.of_mixer(None, name)
            if r:
                # timed with another number of merged tokens, which changes only how many tokens the MLP has
                cost += self.of_mixer(None, name, share, True) - self.of_mixer(None, name, share)
                left -= r
        return cost
