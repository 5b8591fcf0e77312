"""What a transfer leaves: how far the converted model agrees with its original, as a row, a figure and a Hub folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from .._checks import InputError
from .._device import autocast, device_name, versions
from .._figures import write_figure
from ..conversion.report import Conversion
from ..data.images import Images
from ..mixers._keywords import ADDING_NOTHING
from ..slots.model import is_softmax
from .checkpoint import write_history
from .hub import transferred_card, write_hub
from .plots import layer_errors
from .transfer_settings import TransferSettings


@torch.inference_mode()
def compare(
    teacher: nn.Module,
    student: nn.Module,
    images: Images,
    normalise: Callable[[torch.Tensor], torch.Tensor],
    run: TransferSettings,
    dtype: torch.dtype,
) -> dict[str, Optional[float]]:
    """Percent of images on which both predict the same; mean cosine and relative distance of their last tokens.

    Without a classifier there are no predictions, and the first is None.

    Raises:
        ValueError: for tokens that aren't finite.
    """
    number, same, cosine, difference, size = 0, 0, 0.0, 0.0, 0.0
    keys = images.batches(run.batch_size)
    for pixels, _ in tqdm(images.loader(keys, run.workers), "compare", len(keys), leave=False, disable=None):
        with autocast(run.device, dtype):
            wanted, mine = (model.forward_features(normalise(pixels)) for model in (teacher, student))
            predicted = [model.forward_head(t).argmax(-1) for model, t in ((teacher, wanted), (student, mine))]
        mine, wanted = mine.float(), wanted.float()
        for name, tokens in (("original", wanted), ("converted", mine)):
            if not tokens.isfinite().all():
                advice = f"lower block_lr={run.block_lr} and distill_lr={run.distill_lr}"
                advice = advice if name == "converted" else "check its weights"
                raise InputError(f"the {name} model gives tokens that aren't finite; {advice}, or set amp=off")
        number += len(pixels)
        same += int((predicted[0] == predicted[1]).sum())
        cosine += float(cosine_similarity(mine, wanted, dim=2).mean(1).sum())
        difference += float((mine - wanted).square().sum())
        size += float(wanted.square().sum())
    distance = (difference / size) ** 0.5 if size else float(difference > 0)
    agreement = round(100 * same / number, 2) if teacher.num_classes else None
    return dict(agreement=agreement, cosine=round(cosine / number, 4), feature_distance=round(distance, 4))


def in_words(figures: dict[str, Any]) -> str:
    """How far the converted model agrees with its original: in predictions, or without a classifier in tokens."""
    if figures["agreement"] is None:
        return f"its output tokens have a mean cosine of {figures['cosine']} to those of the original"
    return f"it predicts what the original predicts in {figures['agreement']} % of the cases"


def finish(
    run: TransferSettings,
    report: Conversion,
    position: dict[str, Any],
    student: nn.Module,
    config: dict[str, Any],
    figures: dict[str, Any],
) -> None:
    """Write the row, the figure and the folder for the Hub; ``figures`` are what was measured."""
    folder = Path(run.out)
    mixer, keywords = mixers_in_words(report)
    layers = [row.layer for row in report.rows if row.changed]
    row = dict(
        source=run.source,
        mixer=mixer,
        layers=" ".join(map(str, layers)),
        keywords=keywords,
        tokens=report.tokens,
        images=figures["images"],
        block_steps=run.block_steps,
        distill_steps=run.distill_steps,
        batch_size=run.batch_size,
        agreement=figures["agreement"],
        cosine=figures["cosine"],
        feature_distance=figures["feature_distance"],
        seconds=round(position["seconds"]),
        device=run.device,
        device_name=device_name(run.device),
        dtype=figures["dtype"].removeprefix("torch."),
        threads=torch.get_num_threads(),
        processes=int(os.environ.get("WORLD_SIZE", 1)),
        **versions(),
    )
    write_history(folder / "result.csv", [row])
    matched = layers_with_other_attention(student, report)
    # without the error behind the rest of the original
    if errors := [values[: len(matched)] for stage, _, values in position["rows"] if stage == 1]:
        write_figure(folder / "layers.png", layer_errors, errors, matched, f"{run.source} -> {mixer}")
    write_hub(folder / "hub", student, config, transferred_card(row, in_words(figures), report))


def layers_with_other_attention(student: nn.Module, report: Conversion) -> list[int]:
    """The layers whose attention computes something else than before, which the first stage trains.

    Softmax attention that got a slot, since tokens merge after it or its logits are scaled, computes the same as the
    original's.
    """
    changed = {row.layer: student.get_submodule(row.path) for row in report.rows if row.changed}
    return sorted(layer for layer, module in changed.items() if not is_softmax(module))


def mixers_in_words(report: Conversion) -> tuple[str, str]:
    """Names and keywords of the mixers in a converted model; a mapping of layers may have several of both.

    How many tokens each layer merges and the scaling of logits are among the keywords.
    """
    found = dict.fromkeys(
        (row.mixer, " ".join(f"{k}={v}" for k, v in row.config.items() if ADDING_NOTHING.get(k) != v))
        for row in report.rows
        if row.changed
    )
    keywords = [words for words in dict.fromkeys(words for _, words in found) if words]
    merged = ["similar" if row.merged is None else str(row.merged) for row in report.rows]
    if any(number != "0" for number in merged):
        keywords.append(f"merge={','.join(merged)}")
    if report.trained_tokens:
        keywords.append(f"scale_logits={report.trained_tokens}")
    return ", ".join(dict.fromkeys(name for name, _ in found)), "; ".join(keywords)
