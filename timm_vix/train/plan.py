"""Which layers of a trained ViT to convert, and to what: as cheap as a wanted agreement allows, without labels.

    1. every layer alone is converted to every candidate and measured (``sensitivity.py``);
    2. errors of layers add up, roughly: the squared distances give an order of conversions, at each step the one that
       changes least for each operation that it saves;
    3. the conversions are made in that order, and each stays if the whole model, run on the images, still agrees. How
       many stay together is found by bisection; then the rest are tried one by one.

With a budget the order is followed until the model is cheap enough, and what turns out not to be needed is undone.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import nn

from .._checks import check_choice
from .._device import find_device, versions
from .._files import one_line, write_whole
from ..conversion.convert import attention_slots, layer_mixers
from ..conversion.freeze import architecture, fingerprint
from ..mixers import MIXERS
from ..mixers._slot import TokenMixer
from .images import Images, normaliser, transforms
from .listing import find_unlabelled
from .plots import agreement_over_cost, png
from .sensitivity import Measured, Plan, Sensitivity, block_costs, converted, plan_of, text_of
from .settings import KeyValue, check_ranges
from .teacher import build_teacher, check_teacher

FORMAT = "timm_vix plan 1"
SIZES = (16, 25, 49, 64)  # cells of a square grid
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "nystrom": [dict(num_landmarks=m, window_size=w) for m in SIZES for w in (0, 4)],
    "linformer": [dict(num_proj_tokens=k, window_size=w) for k in SIZES for w in (0, 4)],
    "performer": [dict(num_features=m) for m in (32, 64, 128, 256)],
}
# what saves less of a model's operations than this, in one layer, is not worth a look
LEAST_SAVING = 0.0005


class Option(NamedTuple):
    """What one layer may become: mixer and keywords (None: left as it is), its GFLOPs, and what that alone changes.

    ``harm`` is the squared distance.
    """

    entry: Optional[dict[str, Any]]
    cost: float
    harm: float
    agreement: float


class Step(NamedTuple):
    """Take ``option`` in ``layer``, at ``slope`` squared distance for each GFLOP saved."""

    slope: float
    layer: int
    option: Option


def plan_layers(
    source: str,
    data_dir: str,
    mixer: Sequence[str] = ("nystrom",),
    keep: Optional[float] = None,
    budget_gflops: Optional[float] = None,
    source_kwargs: Optional[dict[str, Any]] = None,
    weights: Optional[str] = None,
    pretrained: bool = False,
    img_size: Optional[int] = None,
    images: int = 200,
    batch_size: int = 25,
    candidates: Optional[dict[str, list[dict[str, Any]]]] = None,
    device: str = "auto",
    threads: Optional[int] = None,
    out: str = "plan.json",
) -> dict[str, Any]:
    """Choose the layers to convert; leave ``out``, a figure and the table of all measurements beside it.

    A stopped run is continued by the same call: nothing that is in the table is measured again.

    Args:
        source: A name of timm's, a ``VisionTransformer`` or ``Eva`` with a classifier.
        data_dir: Folder of images of any depth; labels are not wanted.
        mixer: Names of the mixers to choose from.
        keep: Least share of images on which the prediction must stay the same; None: 0.99, unless there is a budget.
        budget_gflops: GFLOPs of one image, a multiply-add counted as two, that must not be exceeded.
        source_kwargs: Further keywords of the source, plain values.
        weights: File with the source's weights, .safetensors or .pth (a state dict; nothing else is unpickled).
        pretrained: Take timm's weights of the source instead.
        img_size: Side of the images in pixels; None: the source's own.
        images: How many to measure on, spread over the folder; more tell finer differences apart.
        batch_size: Images a forward pass.
        candidates: For each mixer a list of keywords to try; None: ``CANDIDATES``.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        threads: Of PyTorch on a CPU.
        out: Name of the plan, ``.json``; the figure and the table have the same name with ``.png`` and ``.csv``.

    Returns:
        The content of ``out``; its ``layers`` are a mapping that ``timm_vix.convert`` takes.

    Raises:
        ValueError: for a wrong argument, a source that can't be converted, images that can't be read, a budget that
            no candidate meets.
        OSError: for a file that cannot be written.

    Example:
        >>> plan = plan_layers("deit_tiny_patch16_224", "photos", ["nystrom", "linformer"], 0.99, pretrained=True)
        >>> timm_vix.convert(model, layers=plan["layers"])
    """
    run = SimpleNamespace(**locals())
    path = Path(out)
    check(run, path)
    if keep is None and budget_gflops is None:
        keep = 0.99
    run.device = find_device(device)
    if threads:
        torch.set_num_threads(threads)
    model, config = build_teacher(run)
    if any(isinstance(module, TokenMixer) for module in model.modules()):
        raise ValueError(f"source={source} has mixers already; a plan starts from a softmax model")
    if not model.num_classes:
        raise ValueError(f"source={source} has no classifier, so there are no predictions that could agree")
    attention_slots(model)
    found = find_unlabelled(Path(data_dir))
    spread = [found[i * len(found) // min(images, len(found))] for i in range(min(images, len(found)))]
    resize, _, plain = transforms(config, "none", 0.0)
    data = Images(spread, [data_dir], config["input_size"][0], resize, plain, 0)
    normalise = normaliser(config, run.device)
    batches = [normalise(torch.stack([data[key][0] for key in keys])) for keys in data.batches(batch_size)]
    size, state = config["input_size"][-1], fingerprint(model.state_dict())
    sensitivity = Sensitivity(
        model, batches, path.with_suffix(".csv"), f"{architecture(model)} {state} {size} px {data.digest()}"
    )
    costs, rest = block_costs(model, batches[0][:1])
    softmax = Measured(1.0, 0.0, round(sum(costs) + rest, 9))
    print(f"{source}: {len(costs)} layers, {softmax.gflops:.3f} GFLOPs at {size} px; {len(data)} images", flush=True)
    options = look_at_layers(sensitivity, costs, rest, mixer, candidates or CANDIDATES)
    steps = in_order(options)
    curve = {text_of({}): softmax}
    if budget_gflops is not None:
        check_budget(budget_gflops, rest + sum(min(option.cost for option in own) for own in options))
    for quarter in (1, 2, 3, 4):
        verify(sensitivity, after(steps[: quarter * len(steps) // 4]), curve)
    if budget_gflops is None:
        chosen = cheapest(sensitivity, options, keep or 0.0, curve)
    else:
        chosen = most_faithful(sensitivity, steps, options, rest, budget_gflops, curve)
    result = dict(
        format=FORMAT,
        source=source,
        architecture=architecture(model),
        weights=state,
        depth=len(costs),
        img_size=size,
        keep=keep,
        budget_gflops=budget_gflops,
        images=len(data),
        **curve[text_of(chosen)]._asdict(),
        softmax_gflops=softmax.gflops,
        layers={str(layer): entry for layer, entry in sorted(chosen.items())},
        curve=rows_of(curve, chosen),
        device=run.device,
        threads=torch.get_num_threads(),
        **versions(),
    )
    write_whole(path, f"{json.dumps(result, indent=1)}\n".encode())
    write_figure(path.with_suffix(".png"), result)
    return result


def check(run: SimpleNamespace, out: Path) -> None:
    """Raise ValueError for a setting that is wrong whatever the data is."""
    ranges = (
        ("keep", "above 0, at most 1", lambda v: 0 < v <= 1),
        ("budget_gflops img_size images batch_size threads", "above 0", lambda v: v > 0),
    )
    check_ranges(run, ranges)
    if run.keep is not None and run.budget_gflops is not None:
        raise ValueError("keep and budget_gflops were both given; allowed is one of them")
    if isinstance(run.mixer, str) or not run.mixer:
        raise ValueError(f"mixer={run.mixer!r}: expected a list of names, such as ['nystrom']")
    for name in run.mixer:
        check_choice("mixer", name, tuple(mixer for mixer in run.candidates or CANDIDATES if mixer in MIXERS))
    check_teacher(run)
    if out.suffix != ".json":
        raise ValueError(f"out={out}: expected a name that ends in .json")


def look_at_layers(
    sensitivity: Sensitivity,
    costs: list[float],
    rest: float,
    mixers: Sequence[str],
    candidates: dict[str, list[dict[str, Any]]],
) -> list[list[Option]]:
    """For each layer what it may become, softmax first; what saves nothing is left out without a look."""
    model, depth = sensitivity.model, len(costs)
    patches = model.patch_embed.grid_size[0] * model.patch_embed.grid_size[1]
    cheaper: list[tuple[dict[str, Any], list[float]]] = []
    for name in dict.fromkeys(mixers):
        for keywords in candidates[name]:
            if max(keywords.get("num_landmarks", 0), keywords.get("num_proj_tokens", 0)) <= patches:
                entry = {"mixer": name, **keywords}
                with converted(model, dict.fromkeys(range(depth), entry)):
                    own, _ = block_costs(model, sensitivity.batches[0][:1])
                if any(old - new > LEAST_SAVING * (sum(costs) + rest) for old, new in zip(costs, own)):
                    cheaper.append((entry, own))
    if not cheaper:
        raise ValueError(f"mixer={list(mixers)}: no candidate is cheaper than softmax attention at {patches} patches")
    sensitivity.scan([{layer: entry} for layer in range(depth) for entry, _ in cheaper])
    options = []
    for layer in range(depth):
        options.append([Option(None, costs[layer], 0.0, 1.0)])
        for entry, own in cheaper:
            alone = sensitivity.measure({layer: entry})
            options[layer].append(Option(entry, own[layer], alone.distance**2, alone.agreement))
    return options


def in_order(options: list[list[Option]]) -> list[Step]:
    """All steps from softmax to the cheapest model, the least harmful for what it saves first.

    In a layer they go along the lower convex hull of harm over cost, so slopes rise and steps follow each other.
    """
    steps = []
    for layer, (here, *others) in enumerate(options):
        while better := [other for other in others if other.cost < here.cost]:
            slopes = [(other.harm - here.harm) / (here.cost - other.cost) for other in better]
            slope = min(slopes)
            here = min((o for o, s in zip(better, slopes) if s == slope), key=lambda option: option.cost)
            steps.append(Step(slope, layer, here))
    return sorted(steps, key=lambda step: step.slope)


def after(steps: Sequence[Step]) -> Plan:
    """The plan to which steps lead."""
    return {step.layer: step.option.entry for step in steps if step.option.entry}


def verify(sensitivity: Sensitivity, plan: Plan, curve: dict[str, Measured]) -> Measured:
    """Measure a whole plan, and note it on the curve."""
    if text_of(plan) not in curve:
        curve[text_of(plan)] = found = sensitivity.measure(plan)
        print(f"{len(plan):3} layers: {found.gflops:.3f} GFLOPs, agreement {found.agreement:.4f}", flush=True)
    return curve[text_of(plan)]


def cheapest(sensitivity: Sensitivity, options: list[list[Option]], keep: float, curve: dict[str, Measured]) -> Plan:
    """The plan of least cost found with an agreement of at least ``keep``."""
    # one chance for all, and one without what is too much alone
    enough = [[option for option in own if option.agreement >= keep] for own in options]
    likely = in_order(enough)
    for steps in (in_order(options), likely):
        good, bad = 0, len(steps) + 1
        while bad - good > 1:
            middle = (good + bad) // 2
            if verify(sensitivity, after(steps[:middle]), curve).agreement >= keep:
                good = middle
            else:
                bad = middle
    # on few images one layer may agree more than its distance lets expect, and then it comes late in every order
    alone = [
        (o.cost - own[0].cost, o.harm, {layer: o.entry}) for layer, own in enumerate(enough) for o in own if o.entry
    ]
    if alone:
        verify(sensitivity, min(alone, key=lambda found: found[:2])[2], curve)
    feasible = [text for text, found in curve.items() if found.agreement >= keep]
    plan = plan_of(min(feasible, key=lambda text: (curve[text].gflops, curve[text].distance)))
    refused: set[int] = set()
    for step in likely:
        here = next(option for option in options[step.layer] if option.entry == plan.get(step.layer))
        # a layer's later steps go further than the one that went too far
        if step.layer not in refused and step.option.cost < here.cost:
            further = {**plan, **after([step])}
            if verify(sensitivity, further, curve).agreement >= keep:
                plan = further
            else:
                refused.add(step.layer)
    return plan


def check_budget(budget: float, least: float) -> None:
    """Raise ValueError for a budget that no candidate meets."""
    if budget < least:
        raise ValueError(f"budget_gflops={budget:g} is below the {least:.3f} GFLOPs of the cheapest candidates")


def most_faithful(
    sensitivity: Sensitivity,
    steps: list[Step],
    options: list[list[Option]],
    rest: float,
    budget: float,
    curve: dict[str, Measured],
) -> Plan:
    """The plan that changes least, among those found of at most ``budget`` GFLOPs; ``rest`` are not the blocks'."""
    here = [own[0] for own in options]
    spent = rest + sum(option.cost for option in here)
    for step in steps:
        if spent > budget:
            spent += step.option.cost - here[step.layer].cost
            here[step.layer] = step.option
    verify(sensitivity, {layer: o.entry for layer, o in enumerate(here) if o.entry}, curve)
    # the last step may have saved more than was wanted: spend it where it helps most
    for layer in sorted(range(len(here)), key=lambda layer: -here[layer].harm):
        room = budget - spent + here[layer].cost
        best = min((o for o in options[layer] if o.cost <= room), key=lambda option: option.harm)
        spent += best.cost - here[layer].cost
        here[layer] = best
    verify(sensitivity, {layer: o.entry for layer, o in enumerate(here) if o.entry}, curve)
    affordable = [text for text, found in curve.items() if found.gflops <= budget]
    return plan_of(max(affordable, key=lambda text: (curve[text].agreement, -curve[text].distance)))


def rows_of(curve: dict[str, Measured], chosen: Plan) -> list[dict[str, Any]]:
    """The models that were measured as a whole, the dearest first."""
    rows = [
        dict(layers=len(json.loads(text)), **found._asdict(), chosen=text == text_of(chosen))
        for text, found in curve.items()
    ]
    return sorted(rows, key=lambda row: (-row["gflops"], -row["agreement"]))


def table_of(result: dict[str, Any]) -> str:
    """The curve and the chosen layers as text."""
    lines = ["layers  GFLOPs  of softmax  agreement  distance"]
    for row in result["curve"]:
        share = 100 * row["gflops"] / result["softmax_gflops"]
        mark = "  <- chosen" if row["chosen"] else ""
        lines.append(
            f"{row['layers']:6}  {row['gflops']:6.3f}  {share:8.1f} %  {row['agreement']:9.4f}  "
            f"{row['distance']:8.4f}{mark}"
        )
    for layer, entry in result["layers"].items():
        lines.append(f"layer {layer}: {', '.join(f'{name}={value}' for name, value in entry.items())}")
    return "\n".join(lines if result["layers"] else [*lines, "no layer is to be converted"])


def write_figure(path: Path, result: dict[str, Any]) -> None:
    """The curve as PNG, if it can be drawn."""
    try:
        write_whole(path, png(agreement_over_cost(result)))
    except ValueError as error:
        print(f"no {path.name}: {error}")


def load_plan(path: Union[str, Path], model: nn.Module) -> Plan:
    """The ``layers`` of a plan file, for ``timm_vix.convert``.

    Raises:
        ValueError: for a file that is no plan, is damaged, was made for another model, or keeps every layer.

    Example:
        >>> timm_vix.convert(model, layers=load_plan("plan.json", model))
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a plan: {one_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("layers"), dict):
        raise ValueError(f"{path} is no plan; expected a file of timm-vix plan")
    depth = len(attention_slots(model))
    if (content.get("architecture"), content.get("depth")) != (architecture(model), depth):
        raise ValueError(
            f"{path} is a plan for {content.get('architecture')} with {content.get('depth')} layers; "
            f"this model is {architecture(model)} with {depth}"
        )
    if not content["layers"]:
        raise ValueError(f"{path} keeps every layer as it is: nothing to convert")
    try:
        layers = layer_mixers(content["layers"], depth, "softmax", {})
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return {layer: {"mixer": name, **keywords} for layer, (name, keywords) in layers.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--source", required=True, help="timm model, e.g. deit_tiny_patch16_224")
    add("--data-dir", required=True, help="folder of images of any depth, labels not wanted")
    add("--mixer", nargs="+", default=["nystrom"], help=f"of {', '.join(CANDIDATES)}; default: nystrom")
    add("--keep", type=float, help="least share of images with the same prediction: 0.99")
    add("--budget-gflops", type=float, help="instead of --keep: the most faithful model within this cost of one image")
    add("--source-kwargs", nargs="*", default={}, action=KeyValue)
    add("--weights", metavar="FILE", help="file with the source's weights")
    add("--pretrained", action="store_true", help="take timm's weights of the source")
    add("--img-size", type=int, help="side of the images in pixels; default: the source's own")
    add("--images", type=int, default=200, help="how many to measure on, spread over the folder: 200")
    add("--batch-size", type=int, default=25)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--threads", type=int, help="of the CPU")
    add("--out", default="plan.json", help="the plan; figure and table have this name with .png and .csv")


def main(arguments: argparse.Namespace) -> None:
    """Plan as the command line asks, and print the curve."""
    result = plan_layers(**{name: value for name, value in vars(arguments).items() if name != "function"})
    print(f"\n{table_of(result)}\n\n{arguments.out}: agreement {result['agreement']:.4f}", end=" ")
    print(f"at {100 * result['gflops'] / result['softmax_gflops']:.1f} % of the GFLOPs of softmax")
