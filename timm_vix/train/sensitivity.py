"""How far a model goes from itself when layers of it are converted, and what that saves; no labels are wanted.

    agreement = share of images whose most likely class stays the same
    distance  = |Z' - Z| / |Z|        Z, Z': what the classifier reads, (images, C), before and after
    cost      = floating-point operations of one image, counted in a real forward pass

Each conversion is measured once: results are rows of a CSV, so that a run which was stopped goes on where it was. A
conversion of one layer starts from the tokens that the blocks below it gave, which are the same as before.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import nn
from tqdm import tqdm

from .._records import Columns, append_record, read_records
from ..conversion.convert import convert
from ..measure.flops import counter

COLUMNS: Columns = dict(run=str, layers=str, agreement=float, distance=float, gflops=float)

Plan = dict[int, dict[str, Any]]  # layer -> "mixer" and its keywords


class Measured(NamedTuple):
    """What a conversion costs (GFLOPs of one image) and what it changes, see the module's docstring."""

    agreement: float
    distance: float
    gflops: float


class Given(nn.Module):
    """Stands for blocks that need not run: hands on the tokens that they gave before, (B, N, C), or those given."""

    tokens: Optional[torch.Tensor] = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x if self.tokens is None else self.tokens


@contextlib.contextmanager
def stand_in(model: nn.Module, layers: list[int], given: Given) -> Iterator[None]:
    """Put ``given`` in the place of some blocks."""
    blocks = [model.blocks[i] for i in layers]
    try:
        for i in layers:
            model.blocks[i] = given
        yield
    finally:
        for i, block in zip(layers, blocks):
            model.blocks[i] = block


@contextlib.contextmanager
def converted(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Convert a model for a while."""
    if plan:
        convert(model, layers=plan)
    try:
        yield
    finally:
        if plan:
            convert(model, "softmax", layers=list(plan))


def text_of(plan: Plan) -> str:
    """A plan as JSON, the same for the same plan."""
    return json.dumps({str(layer): plan[layer] for layer in sorted(plan)})


def plan_of(text: str) -> Plan:
    """The plan of ``text_of``."""
    return {int(layer): entry for layer, entry in json.loads(text).items()}


@torch.inference_mode()
def block_costs(model: nn.Module, image: torch.Tensor) -> tuple[list[float], float]:
    """GFLOPs of each block of a model for one image (1, C, H, W), and of all that is not in a block."""
    with counter() as flops:
        model(image)
    counts = flops.get_flop_counts()
    blocks = [sum(counts[f"{type(model).__name__}.blocks.{i}"].values()) / 1e9 for i in range(len(model.blocks))]
    return blocks, flops.get_total_flops() / 1e9 - sum(blocks)


class Sensitivity:
    """Measures conversions of one model on one set of images.

    Args:
        model: softmax model, frozen and in eval mode; it is converted while it is measured, and then as it was.
        batches: normalised images, each (B, channels, height, width).
        table: CSV to which rows are appended, and from which earlier ones are read.
        run: what the rows depend on besides the layers; other rows of the table are left alone.

    Raises:
        ValueError: for a table of another program.
    """

    def __init__(self, model: nn.Module, batches: list[torch.Tensor], table: Path, run: str) -> None:
        self.model, self.batches, self.table, self.run = model, batches, table, run
        self.known: dict[str, Measured] = {}
        self.original: list[tuple[torch.Tensor, torch.Tensor]] = []
        if table.exists() and table.stat().st_size:
            rows, damaged = read_records(table, COLUMNS, exact=True)
            complete = [row for row in rows if None not in row.values() and row["run"] == run]
            self.known = {row["layers"]: Measured(*(row[name] for name in Measured._fields)) for row in complete}
            if damaged:
                print(f"{table}: {damaged} damaged lines are measured again")

    def scan(self, plans: list[Plan]) -> None:
        """Measure plans of one layer each, the lowest first."""
        todo = [plan for plan in plans if text_of(plan) not in self.known]
        tokens: list[torch.Tensor] = []
        layer = 0
        for plan in tqdm(sorted(todo, key=min), "scan", leave=False, disable=None):
            while layer < min(plan):
                tokens = self.advance(layer, tokens)
                layer += 1
            self.measure(plan, layer, tokens)

    @torch.inference_mode()
    def measure(self, plan: Plan, layer: int = 0, tokens: Optional[list[torch.Tensor]] = None) -> Measured:
        """Convert, compare with the original on all images, and note the row.

        Args:
            layer: the lowest layer that is run; the original's ``tokens`` stand for what the ones below it give.
            tokens: for each batch (B, N, C).
        """
        if text_of(plan) in self.known:
            return self.known[text_of(plan)]
        if not self.original:
            self.original = [self.look(images) for images in self.batches]
        same, apart, size, given = 0, 0.0, 0.0, Given()
        with converted(self.model, plan):
            blocks, rest = block_costs(self.model, self.batches[0][:1])
            with stand_in(self.model, list(range(layer)), given):
                for i, (images, (features, classes)) in enumerate(zip(self.batches, self.original)):
                    if tokens:
                        given.tokens = tokens[i]
                    mine, predicted = self.look(images)
                    same += int((predicted == classes).sum())
                    apart += float((mine - features).square().sum())
                    size += float(features.square().sum())
        number = sum(len(images) for images in self.batches)
        found = Measured(round(same / number, 6), round((apart / size) ** 0.5, 6), round(sum(blocks) + rest, 9))
        append_record(self.table, COLUMNS, dict(run=self.run, layers=text_of(plan), **found._asdict()))
        self.known[text_of(plan)] = found
        return found

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the classifier reads, (B, C), and the most likely class, (B,)."""
        tokens = self.model.forward_features(images)
        return self.model.forward_head(tokens, pre_logits=True).float(), self.model.forward_head(tokens).argmax(-1)

    @torch.inference_mode()
    def advance(self, layer: int, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the original's block ``layer`` makes of each batch; none stands for the model's own input."""
        outputs: list[torch.Tensor] = []
        handle = self.model.blocks[layer].register_forward_hook(lambda block, args, output: outputs.append(output))
        given = Given()
        # blocks above are stood for as well, since nobody looks at what comes of them
        others = [i for i in range(len(self.model.blocks)) if i != layer]
        try:
            with stand_in(self.model, others, given):
                for i, images in enumerate(self.batches):
                    given.tokens = tokens[i] if tokens else None
                    self.model.forward_features(images)
        finally:
            handle.remove()
        return outputs
