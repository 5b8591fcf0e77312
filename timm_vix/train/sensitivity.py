"""How far a model's output moves when layers of it are converted, and what that saves; no labels are needed.

    agreement = share of images whose most likely class stays the same
    distance  = |Z' - Z| / |Z|        Z, Z': input of the classifier, (images, C), before and after
    cost      = floating-point operations of one image, counted in a real forward pass

Each conversion is measured once: results are rows of a CSV, so that a stopped run continues where it was. The
conversion of a single layer starts from stored outputs of the blocks below it, which it doesn't change.
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


class Measurement(NamedTuple):
    """What a conversion changes, and the GFLOPs of one image after it, see the module's docstring."""

    agreement: float
    distance: float
    gflops: float


class StoredTokens(nn.Module):
    """Takes the place of blocks that need not run: returns stored tokens (B, N, C), or its input if there are none."""

    tokens: Optional[torch.Tensor] = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x if self.tokens is None else self.tokens


@contextlib.contextmanager
def replace_blocks(model: nn.Module, layers: list[int], replacement: nn.Module) -> Iterator[None]:
    """Put one module in the place of some blocks; on leaving, put the blocks back."""
    blocks = [model.blocks[i] for i in layers]
    try:
        for i in layers:
            model.blocks[i] = replacement
        yield
    finally:
        for i, block in zip(layers, blocks):
            model.blocks[i] = block


@contextlib.contextmanager
def temporarily_converted(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Convert a softmax model; on leaving, give it its own attention back."""
    if plan:
        convert(model, layers=plan)
    try:
        yield
    finally:
        if plan:
            convert(model, "softmax", layers=list(plan))


def plan_to_json(plan: Plan) -> str:
    """A plan as JSON, with layers in ascending order."""
    return json.dumps({str(layer): plan[layer] for layer in sorted(plan)})


def plan_from_json(text: str) -> Plan:
    """The inverse of ``plan_to_json``."""
    return {int(layer): mixer for layer, mixer in json.loads(text).items()}


@torch.inference_mode()
def block_gflops(model: nn.Module, image: torch.Tensor) -> tuple[list[float], float]:
    """GFLOPs of each block of a model for one image (1, C, H, W), and of everything outside the blocks."""
    with counter() as flops:
        model(image)
    counts = flops.get_flop_counts()
    blocks = [sum(counts[f"{type(model).__name__}.blocks.{i}"].values()) / 1e9 for i in range(len(model.blocks))]
    return blocks, flops.get_total_flops() / 1e9 - sum(blocks)


class Sensitivity:
    """Measures conversions of one model on one set of images.

    Args:
        model: softmax model, frozen and in eval mode; it is converted during a measurement and then restored.
        batches: normalised images, each (B, channels, height, width).
        table: CSV to which rows are appended, and from which earlier ones are read.
        run: text that identifies everything the results depend on besides the layers; other rows are ignored.

    Raises:
        ValueError: for a table of another program.
    """

    def __init__(self, model: nn.Module, batches: list[torch.Tensor], table: Path, run: str) -> None:
        self.model, self.batches, self.table, self.run = model, batches, table, run
        self.known: dict[str, Measurement] = {}
        self.original: list[tuple[torch.Tensor, torch.Tensor]] = []
        if table.exists() and table.stat().st_size:
            rows, damaged = read_records(table, COLUMNS, exact=True)
            complete = [row for row in rows if None not in row.values() and row["run"] == run]
            self.known = {row["layers"]: Measurement(*(row[name] for name in Measurement._fields)) for row in complete}
            if damaged:
                print(f"{table}: {damaged} damaged lines are measured again")

    def measure_single_layers(self, plans: list[Plan]) -> None:
        """Measure plans of one layer each, from the lowest layer to the highest."""
        missing = [plan for plan in plans if plan_to_json(plan) not in self.known]
        tokens: list[torch.Tensor] = []
        layer = 0
        for plan in tqdm(sorted(missing, key=min), "layers", leave=False, disable=None):
            while layer < min(plan):
                tokens = self.run_block(layer, tokens)
                layer += 1
            self.measure(plan, layer, tokens)

    @torch.inference_mode()
    def measure(self, plan: Plan, layer: int = 0, tokens: Optional[list[torch.Tensor]] = None) -> Measurement:
        """Convert, compare with the original on all images, and append the row.

        Args:
            layer: the first layer that runs.
            tokens: input of that layer for each batch, (B, N, C); None: the model's own.
        """
        if plan_to_json(plan) in self.known:
            return self.known[plan_to_json(plan)]
        if not self.original:
            self.original = [self.predict(images) for images in self.batches]
        same, squared_error, squared_norm, stored = 0, 0.0, 0.0, StoredTokens()
        with temporarily_converted(self.model, plan):
            blocks, rest = block_gflops(self.model, self.batches[0][:1])
            with replace_blocks(self.model, list(range(layer)), stored):
                for i, (images, (features, classes)) in enumerate(zip(self.batches, self.original)):
                    if tokens:
                        stored.tokens = tokens[i]
                    new_features, new_classes = self.predict(images)
                    same += int((new_classes == classes).sum())
                    squared_error += float((new_features - features).square().sum())
                    squared_norm += float(features.square().sum())
        agreement = same / sum(len(images) for images in self.batches)
        distance = (squared_error / squared_norm) ** 0.5
        measured = Measurement(round(agreement, 6), round(distance, 6), round(sum(blocks) + rest, 9))
        append_record(self.table, COLUMNS, dict(run=self.run, layers=plan_to_json(plan), **measured._asdict()))
        self.known[plan_to_json(plan)] = measured
        return measured

    def predict(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of the classifier, (B, C), and the most likely class, (B,)."""
        tokens = self.model.forward_features(images)
        return self.model.forward_head(tokens, pre_logits=True).float(), self.model.forward_head(tokens).argmax(-1)

    @torch.inference_mode()
    def run_block(self, layer: int, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        """Output of the original's block ``layer`` for each batch of its input; the first block takes none."""
        outputs: list[torch.Tensor] = []
        handle = self.model.blocks[layer].register_forward_hook(lambda block, args, output: outputs.append(output))
        stored = StoredTokens()
        # the blocks above needn't run either, since nothing reads their output
        others = [i for i in range(len(self.model.blocks)) if i != layer]
        try:
            with replace_blocks(self.model, others, stored):
                for i, images in enumerate(self.batches):
                    stored.tokens = tokens[i] if tokens else None
                    self.model.forward_features(images)
        finally:
            handle.remove()
        return outputs
