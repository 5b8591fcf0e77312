"""How far a model's output moves when layers of it are converted. Labels may be given, and aren't needed.

    agreement = share of images whose most likely class stays the same
    distance  = |Z' - Z| / |Z|        Z, Z': input of the classifier, (images, C), before and after
    GFLOPs    = floating-point operations of one image, counted in a real forward pass
    kept      = top-1 / top-1 of the source, where there are labels; else the agreement

Without a classifier the output tokens (images, N, C) are Z, and the agreement is their mean cosine.

Each plan is measured once. The conversion of a single layer starts from stored outputs of the blocks below it, which it
doesn't change.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .._checks import InputError
from ..conversion.convert import convert
from ..conversion.plan_file import Plan
from ..measure.flops import count_flops
from .measurements import Measurements


class Measurement(NamedTuple):
    """What a conversion changes, and the GFLOPs of one image after it, see the module's docstring."""

    agreement: float
    distance: float
    gflops: float
    kept: float


class StoredTokens(nn.Module):
    """Takes the place of blocks that need not run: returns stored tokens (B, N, C), or its input if there are none."""

    tokens: Optional[torch.Tensor] = None

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
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
    if plan.converts():
        convert(model, layers=plan)
    try:
        yield
    finally:
        if plan.converts():
            convert(model, "softmax", merge=0)


@torch.inference_mode()
def count_gflops(model: nn.Module, image: torch.Tensor) -> float:
    """GFLOPs of a model for one image (1, C, H, W)."""
    return count_flops(lambda: model(image)) / 1e9


def is_finite(features: torch.Tensor, classes: Optional[torch.Tensor]) -> torch.Tensor:
    """For each image, (B,), whether its features and logits are finite, given what ``Sensitivity.predict`` returns."""
    finite = features.flatten(1).isfinite().all(1)
    return finite if classes is None else finite & (classes >= 0)


class Sensitivity:
    """Measures conversions of one model on one set of images.

    Args:
        model: softmax model, frozen and in eval mode; it is converted during a measurement and then restored.
        batches: normalised images, each (B, channels, height, width).
        table: to which rows are appended, and which knows earlier ones.
        run: text that identifies everything the results depend on besides the plan.
        labels: classes of all images, (images,).
        part: name of this part of a run's images, for error messages.
        right: number of images whose label the source predicts; None: counted with ``model``.

    Raises:
        ValueError: for labels of which the model predicts none, when something is measured.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[torch.Tensor],
        table: Measurements,
        run: str,
        labels: Optional[torch.Tensor] = None,
        part: str = "all of them",
        right: Optional[int] = None,
    ) -> None:
        self.part, self.right = part, right
        self.model, self.batches, self.table, self.run, self.labels = model, batches, table, run, labels
        found = table.of_run(run, *Measurement._fields)
        self.known = {what: Measurement(**figures) for what, figures in found.items()}
        self.original: list[tuple[torch.Tensor, Optional[torch.Tensor]]] = []
        self.compared = "agreement" if model.num_classes else "mean cosine"
        self.num_images = sum(len(images) for images in batches)

    @property
    def counted(self) -> Optional[int]:
        """The number of images that what a plan keeps is a share of; None for a mean cosine, which is no count."""
        if not self.model.num_classes:
            return None
        return self.num_images if self.labels is None else self.right

    def measure_single_layers(self, plans: list[tuple[int, Plan]], has_time: Callable[[], bool]) -> None:
        """Measure plans that change nothing below the layer beside them, from the lowest layer to the highest.

        Args:
            has_time: asked before each of them; those that remain when it says no aren't measured.
        """
        missing = [(first, plan) for first, plan in plans if plan.to_json() not in self.known]
        tokens: list[torch.Tensor] = []
        layer = 0
        for first, plan in tqdm(sorted(missing, key=lambda pair: pair[0]), "layers", leave=False, disable=None):
            if not has_time():
                return
            while layer < first:
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
        what = plan.to_json()
        if what in self.known:
            return self.known[what]
        if not self.original:
            self.original = [self.predict(images) for images in self.batches]
            if not all(is_finite(*output).all() for output in self.original):
                raise InputError(f"the source gives outputs that aren't finite on {self.part}; check weights and dtype")
        squared_error, squared_norm, stored = 0.0, 0.0, StoredTokens()
        predicted: list[torch.Tensor] = []
        agreed: list[torch.Tensor] = []  # of each image, from 0 to 1
        unchanged = not plan.converts()
        with temporarily_converted(self.model, plan):
            gflops = count_gflops(self.model, self.batches[0][:1])
            with replace_blocks(self.model, list(range(layer)), stored):
                for i, (images, (features, classes)) in enumerate(zip(self.batches, self.original)):
                    if tokens:
                        stored.tokens = tokens[i]
                    new_features, new_classes = (features, classes) if unchanged else self.predict(images)
                    finite = is_finite(new_features, new_classes)
                    # such outputs count as zeros and as no class, since one NaN would make all sums NaN
                    new_features = new_features.masked_fill(~finite.view(-1, *[1] * (features.dim() - 1)), 0.0)
                    if classes is None or new_classes is None:
                        same = F.cosine_similarity(new_features, features, dim=2).mean(1)
                    else:
                        predicted.append(new_classes.masked_fill(~finite, -1))
                        same = predicted[-1] == classes
                    agreed.append(same.cpu().double())  # not every device has float64
                    squared_error += float((new_features - features).square().sum())
                    squared_norm += float(features.square().sum())
        agreement = float(torch.cat(agreed).mean())
        kept = agreement if self.labels is None else self.top1_kept(torch.cat(predicted), self.labels)
        distance = (squared_error / squared_norm) ** 0.5
        measured = Measurement(round(agreement, 6), round(distance, 6), round(gflops, 9), round(kept, 6))
        self.table.add(self.run, what, **measured._asdict())
        self.known[what] = measured
        return measured

    def top1_kept(self, predicted: torch.Tensor, labels: torch.Tensor) -> float:
        """The top-1 of predicted classes (images,) as a share of the original's."""
        original = torch.cat([classes for _, classes in self.original if classes is not None])
        labels = labels.to(original.device)
        right = int((original == labels).sum()) if self.right is None else self.right
        if right == 0:
            raise InputError(
                f"labels: the source is right on none of {len(labels)} images, which are {self.part}; expected classes "
                "as it numbers them, and images of many classes in each half"
            )
        return int((predicted == labels).sum()) / right

    def predict(self, images: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Input of the classifier, (B, C), and the most likely class, (B,); or tokens (B, N, C) and no class.

        The class is -1 where a logit isn't finite.
        """
        tokens = self.model.forward_features(images)
        if not self.model.num_classes:
            return tokens.float(), None
        logits = self.model.forward_head(tokens)
        classes = logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), -1)
        return self.model.forward_head(tokens, pre_logits=True).float(), classes

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
