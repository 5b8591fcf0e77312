"""Plan the conversion of a trained ViT for this machine: which layers get which mixer, and where tokens merge.

    1. A block is timed on this machine with every candidate, in turn with softmax.
    2. Of the faster candidates, those that change the output least are tried in each layer alone, as is token merging.
    3. Conversions are added step by step, and whole models are measured: what they keep and how fast they are.

Labels are optional. One half of the images chooses the plan, and the other tells what it keeps on new images. The best
of many plans is often one that was lucky with the half that chooses. So a plan has to keep enough there, and to be
expected to keep enough by its distance, given what all plans kept at theirs. Every measurement is a row of a table, so
the same command continues a stopped run.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Optional

import torch
from timm.models import get_model_args
from torch import nn

from .._checks import InputError
from .._device import find_device, versions
from .._figures import write_figure
from .._files import write_whole
from .._records import check_writable
from ..conversion.identity import architecture, fingerprint
from ..conversion.merging import BLOCKS, class_of
from ..conversion.plan_file import FORMAT, Plan, circumstances
from ..conversion.scaling import scaled_for
from ..data.folders import spread
from ..data.images import normaliser
from ..train.settings import add_settings, documented, given_settings
from .figure import agreement_over_time
from .latency import Latency
from .measurements import Measurements
from .plan_settings import MERGE, PlanSettings
from .search import Search
from .sensitivity import Sensitivity
from .source import ImageSet, build_softmax_model, num_right, read_images, scale_source
from .target import Target, Tried

FEW = 20  # images, of those that choose, on which single steps are measured


@documented(PlanSettings)
def plan_layers(*arguments: Any, **keywords: Any) -> dict[str, Any]:
    """Choose which layers of a trained ViT to convert, to which mixers, and where tokens merge.

    It writes the plan to ``out``, and beside it a figure and a table of all measurements. The same call continues a
    stopped run: it doesn't repeat the measurements in the table. ``mixer`` may also be a mapping from names to lists of
    keywords, which are tried then.

    Args:
        {settings}

    Returns:
        The content of ``out``: the plan in ``layers`` and ``merge``; ``agreement`` and ``distance`` on the images that
        chose it, ``held_out_agreement`` and ``held_out_distance`` on the others; ``speedup``, beside softmax; and
        ``curve``, all whole models that were measured. Without a classifier an agreement is the mean cosine of the
        output tokens. ``kept`` is what was kept on the images that chose, ``expected_kept`` what the plan is expected
        to keep on others by its distance, and ``held_out_kept`` what it kept on them.

    Raises:
        ValueError: for a wrong argument, a source that can't be converted, images that can't be read or are too few, a
            speedup or a budget that no candidate reaches.
        OSError: for a file that cannot be written.

    Example:
        >>> plan = plan_layers("deit_tiny_patch16_224", "photos", keep=0.99, pretrained=True, out="plan.json")
        >>> timm_vix.convert(model, layers="plan.json")
    """
    start = time.monotonic()
    run = PlanSettings(*arguments, **keywords)
    path = Path(run.out)
    check_writable(path)
    run.device = find_device(run.device)
    if run.threads:
        torch.set_num_threads(run.threads)
    model, config = build_softmax_model(run)
    mixers, merging = run.candidates(), merging_is_tried(run, model)
    images = read_images(run, config, model)
    table = Measurements(path.with_suffix(".csv"))
    # both spread over the folder
    choosing = images.select("the half that chooses", slice(0, None, 2))
    others = images.select("the half that is held out", slice(1, None, 2))
    # the labels that the source predicts as it is, before its logits are scaled
    right = [
        None if half.labels is None else num_right(model, batches_of(run, config, half), half.labels)
        for half in (choosing, others)
    ]
    scale_source(model, run.scale_logits, batches_of(run, config, choosing), choosing.labels, right[0])
    chosen = sensitivity_on(choosing, run, model, config, table, right[0])
    held_out = sensitivity_on(others, run, model, config, table, right[1])
    for half in (chosen, held_out):
        half.measure(Plan())  # labels that don't fit show before the search
    if run.keep is not None and (kept := chosen.measure(Plan()).kept) < run.keep:
        raise InputError(
            f"keep={run.keep:g} is beyond the {kept:.4f} of its own top-1 that the source keeps with "
            f"scale_logits={run.scale_logits}; allowed is less, or scale_logits=0"
        )
    passed = torch.cat(chosen.batches)
    passed = passed[torch.arange(run.latency_batch) % len(passed)]
    latency = Latency(model, passed, table, time_key(run, model))
    print(f"{run.source}: {len(model.blocks)} layers, {len(mixers)} candidates{' and merging' * merging}", flush=True)
    costs = latency.time_blocks(mixers, merging)
    target = Target(run.keep, run.speedup, run.budget_gflops)
    tell_resolution(run.keep, chosen.counted)
    few = choosing.select("a few of those that choose", spread(list(range(len(choosing.pixels))), FEW))
    search = Search(
        sensitivity_on(few._replace(labels=None), run, model, config, table),
        chosen,
        latency,
        costs,
        mixers,
        merging,
        target,
        run.minutes,
        start,
    )
    result = content_of(run, search, search.choose(), held_out)
    write_whole(path, f"{json.dumps(result, indent=1)}\n".encode())
    write_figure(path.with_suffix(".png"), agreement_over_time, result)
    return result


def batches_of(run: PlanSettings, config: dict[str, Any], images: ImageSet) -> list[torch.Tensor]:
    """Normalised batches in the dtype of the run."""
    normalise = normaliser(config, run.device)
    return [normalise(batch).to(getattr(torch, run.dtype)) for batch in images.pixels.split(run.batch_size)]


def sensitivity_on(
    images: ImageSet,
    run: PlanSettings,
    model: nn.Module,
    config: dict[str, Any],
    table: Measurements,
    right: Optional[int] = None,
) -> Sensitivity:
    """What measures plans on these images; ``right``: the number of labels that the unscaled source predicts."""
    key = run_key(model, config, images.pixels, images.labels)
    return Sensitivity(model, batches_of(run, config, images), table, key, images.labels, images.part, right)


def merging_is_tried(run: PlanSettings, model: nn.Module) -> bool:
    """Whether token merging is a candidate: it is among the names, and the blocks of the source can merge.

    Raises:
        ValueError: if it was asked for by its name, and they can't.
    """
    others = sorted({class_of(block).__name__ for block in model.blocks if class_of(block) not in BLOCKS})
    if others and run.mixer is not None and MERGE in run.names():
        raise InputError(f"mixer: {MERGE} can't be chosen, since tokens can't merge in blocks of {others[0]}")
    return MERGE in run.names() and not others


def tell_resolution(keep: Optional[float], images: Optional[int]) -> None:
    """Print a note if there are so few images that ``keep`` allows no image to change; ``images``: see ``counted``."""
    # 10 - 0.9 * 10 is a little below 1
    if keep is not None and images is not None and keep < 1 and (1 - keep) * images < 1 - 1e-9:
        print(f"keep={keep:g} of {images} images means all of them; a finer choice needs more images", flush=True)


def content_of(run: PlanSettings, search: Search, plan: Plan, held_out: Sensitivity) -> dict[str, Any]:
    """The content of a plan's file, with what the plan keeps on the images that are held out."""
    model, what, expected = held_out.model, plan.to_json(), search.expected()
    tried = search.curve[what]
    return dict(
        format=FORMAT,
        source=run.source,
        architecture=architecture(model),
        weights=fingerprint(model.state_dict()),
        depth=len(model.blocks),
        **circumstances(model),
        threads=torch.get_num_threads(),
        latency_batch=run.latency_batch,
        keep=run.keep,
        keep_of="top-1" if run.labels else "predictions" if model.num_classes else "cosine",
        speedup_wanted=run.speedup,
        budget_gflops=run.budget_gflops,
        images=search.chosen.num_images,
        held_out_images=held_out.num_images,
        minutes=run.minutes,
        stopped=search.stopped,
        **tried._asdict(),
        expected_kept=expected[what],
        held_out_agreement=held_out.measure(plan).agreement,
        held_out_distance=held_out.measure(plan).distance,
        held_out_kept=held_out.measure(plan).kept,
        softmax_gflops=round(search.costs.whole.gflops, 9),
        softmax_milliseconds=round(tried.milliseconds * tried.speedup, 4),  # timed in turn with the plan
        layers={str(layer): plan.layers[layer] for layer in sorted(plan.layers)},
        merge=plan.merge,
        scale_logits=scaled_for(model),
        curve=rows_of(search.curve, expected, plan),
        device=run.device,
        **versions(),
    )


def run_key(
    model: nn.Module, config: dict[str, Any], pixels: torch.Tensor, labels: Optional[torch.Tensor] = None
) -> str:
    """One line that changes with what the agreement of a model on images depends on, but for versions of libraries."""
    keywords = json.dumps(get_model_args(model), sort_keys=True, default=str)
    weights, images = fingerprint(model.state_dict()), fingerprint({"pixels": pixels})
    labelled = "" if labels is None else f" labelled {fingerprint({'labels': labels})}"
    return (
        f"{architecture(model)} {keywords}, weights {weights}, {len(pixels)} images {images}{labelled} normalised by "
        f"mean {config['mean']} and std {config['std']}"
    )


def time_key(run: PlanSettings, model: nn.Module) -> str:
    """One line that changes with everything times depend on."""
    keywords = json.dumps(get_model_args(model), sort_keys=True, default=str)
    here = json.dumps(circumstances(model) | versions())
    threads = torch.get_num_threads()
    beside = " beside unscaled logits" * (scaled_for(model) > 0)
    return f"time of {architecture(model)} {keywords}{beside}, batch {run.latency_batch}, {threads} threads, {here}"


def rows_of(curve: dict[str, Tried], expected: dict[str, float], chosen: Plan) -> list[dict[str, Any]]:
    """The curve as rows, the slowest model first; ``expected``: what each plan of it is expected to keep."""
    rows = [
        dict(plan=json.loads(what), **tried._asdict(), expected_kept=expected[what], chosen=what == chosen.to_json())
        for what, tried in curve.items()
    ]
    return sorted(rows, key=lambda row: (row["speedup"], -row["agreement"]))


def table_of(result: dict[str, Any]) -> str:
    """The curve and the chosen plan as text."""
    counted, labelled = result["keep_of"] != "cosine", result["keep_of"] == "top-1"
    agreement = "agreement" if counted else "cosine"
    titles = f"{'top-1 kept  ' * labelled}{'expected  ' * counted}distance"
    lines = [f"layers  merges  times as fast  GFLOPs  {agreement:>9}  {titles}"]
    for row in result["curve"]:
        merges, kept = "yes" if row["plan"].get("merge") else "", f"{row['kept']:10.4f}  " * labelled
        kept += f"{row['expected_kept']:8.4f}  " * counted
        lines.append(
            f"{len([name for name in row['plan'] if name != 'merge']):6}  {merges:6}  {row['speedup']:13.2f}  "
            f"{row['gflops']:6.3f}  {row['agreement']:9.4f}  {kept}{row['distance']:8.4f}"
            f"{'  <- chosen' * row['chosen']}"
        )
    for layer, entry in result["layers"].items():
        lines.append(f"layer {layer}: {', '.join(f'{name}={value}' for name, value in entry.items())}")
    if result["merge"]:
        lines.append(f"merge: {result['merge']}")
    if result["scale_logits"]:
        lines.append(f"scale_logits: {result['scale_logits']}")
    nothing = not result["layers"] and not result["merge"]
    return "\n".join([*lines, "no layer is to be converted"] if nothing else lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, PlanSettings)


def main(arguments: argparse.Namespace) -> None:
    """Plan as the command line asks, and print the curve."""
    given = given_settings(arguments, PlanSettings)
    result = plan_layers(**given)
    print(f"\n{table_of(result)}\n")
    agreement = [f"{result[name]:.4f}" for name in ("agreement", "held_out_agreement")]
    compared = "mean cosine of the output tokens" if result["keep_of"] == "cosine" else "agreement"
    if given.get("labels"):
        agreement[0] += f" and {100 * result['kept']:.1f} % of softmax's top-1"
        agreement[1] += f" and {100 * result['held_out_kept']:.1f} %"
    print(
        f"{given.get('out', PlanSettings.out)}: {result['speedup']:.2f} times as fast as softmax; "
        f"{compared} {agreement[0]} on the {result['images']} images that chose it, "
        f"{agreement[1]} on {result['held_out_images']} others"
    )
