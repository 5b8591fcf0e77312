"""Which layers of a trained ViT to convert, and to what: as cheap as a wanted agreement allows, without labels.

    1. every layer alone is converted to every candidate and measured (``sensitivity.py``);
    2. the squared distances of single layers add up, roughly, which gives an order of conversions: at each step the one
       that changes least for each operation that it saves;
    3. along this order whole models are measured, and bisection finds how many conversions can be made together; then
       the others are tried one by one (``search.py``).

With a budget the order is followed until the model is cheap enough, and what turns out not to be needed is undone.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch
from timm.models import get_model_args
from torch import nn

from .._checks import InputError, check_choice
from .._device import find_device, versions
from .._files import one_line, write_whole
from ..conversion.convert import attention_sites
from ..conversion.delta import architecture, fingerprint, mechanisms_of
from ..conversion.layers import layer_mixers
from ..mixers import MIXERS
from .images import Images, normaliser, transforms
from .listing import find_unlabelled
from .plots import agreement_over_cost, png
from .search import Search, measure_options
from .sensitivity import Measurement, Plan, Sensitivity, block_gflops, plan_to_json
from .settings import KeyValue, check_ranges
from .teacher import build_teacher, check_teacher

FORMAT = "timm_vix plan 1"
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    name: list(mixer_class.candidates) for name, mixer_class in MIXERS.items() if mixer_class.candidates
}


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
        data_dir: Folder of images of any depth; labels are not used.
        mixer: Names of the mixers to choose from.
        keep: Least share of images on which the prediction must stay the same; None: 0.99, unless there is a budget.
        budget_gflops: GFLOPs of one image, a multiply-add counted as two, that must not be exceeded.
        source_kwargs: Further keywords of the source, plain values.
        weights: File with the source's weights, .safetensors or .pth (a state dict; nothing else is unpickled).
        pretrained: Take timm's weights of the source instead.
        img_size: Side of the images in pixels; None: the source's own.
        images: How many to measure on, spread over the folder; more images resolve smaller differences.
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
    model, config = build_softmax_model(run)
    pixels = read_pixels(run, config)
    normalise = normaliser(config, run.device)
    batches = [normalise(batch) for batch in pixels.split(batch_size)]
    sensitivity = Sensitivity(model, batches, path.with_suffix(".csv"), run_key(model, config, pixels))
    block_costs, other_costs = block_gflops(model, batches[0][:1])
    softmax = Measurement(1.0, 0.0, round(sum(block_costs) + other_costs, 9))
    depth, size = len(block_costs), config["input_size"][-1]
    print(f"{source}: {depth} layers, {softmax.gflops:.3f} GFLOPs at {size} px; {len(pixels)} images", flush=True)
    options = measure_options(sensitivity, block_costs, other_costs, mixer, candidates or CANDIDATES)
    search = Search(sensitivity, options, softmax)
    chosen = search.choose(keep, budget_gflops)
    result = dict(
        format=FORMAT,
        source=source,
        architecture=architecture(model),
        weights=fingerprint(model.state_dict()),
        depth=depth,
        img_size=size,
        keep=keep,
        budget_gflops=budget_gflops,
        images=len(pixels),
        **search.curve[plan_to_json(chosen)]._asdict(),
        softmax_gflops=softmax.gflops,
        layers={str(layer): entry for layer, entry in sorted(chosen.items())},
        curve=search.rows(chosen),
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
        raise InputError("keep and budget_gflops were both given; allowed is one of them")
    if isinstance(run.mixer, str) or not run.mixer:
        raise InputError(f"mixer={run.mixer!r}: expected a list of names, such as ['nystrom']")
    for name in run.mixer:
        check_choice("mixer", name, tuple(mixer for mixer in run.candidates or CANDIDATES if mixer in MIXERS))
    check_teacher(run)
    if out.suffix != ".json":
        raise InputError(f"out={out}: expected a name that ends in .json")


def build_softmax_model(run: SimpleNamespace) -> tuple[nn.Module, dict[str, Any]]:
    """The source, frozen, and timm's data configuration for it.

    Raises:
        ValueError: for a model whose attention is not softmax, or can't be converted, or that has no classifier.
    """
    model, config = build_teacher(run)
    if any(name != "softmax" for name, _ in mechanisms_of(model).values()):
        raise InputError(f"source={run.source} has mixers already; a plan starts from a softmax model")
    if not model.num_classes:
        raise InputError(f"source={run.source} has no classifier, so there are no predictions that could agree")
    attention_sites(model)
    return model, config


def read_pixels(run: SimpleNamespace, config: dict[str, Any]) -> torch.Tensor:
    """The images of a run as uint8 pixels (images, channels, height, width), spread evenly over the folder."""
    found = find_unlabelled(Path(run.data_dir))
    count = min(run.images, len(found))
    spread = [found[i * len(found) // count] for i in range(count)]
    resize, _, evaluate = transforms(config, "none", 0.0)
    data = Images(spread, [run.data_dir], config["input_size"][0], resize, evaluate, 0)
    return torch.stack([data[0, i][0] for i in range(len(data))])


def run_key(model: nn.Module, config: dict[str, Any], pixels: torch.Tensor) -> str:
    """One line that changes with everything the measurements of a model on some images depend on."""
    keywords = json.dumps(get_model_args(model), sort_keys=True, default=str)
    weights, images = fingerprint(model.state_dict()), fingerprint({"pixels": pixels})
    return (
        f"{architecture(model)} {keywords}, weights {weights}, {len(pixels)} images {images} normalised by "
        f"mean {config['mean']} and std {config['std']}"
    )


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
        raise InputError(f"{path} cannot be read as a plan: {one_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("layers"), dict):
        raise InputError(f"{path} is no plan; expected a file of timm-vix plan")
    depth = len(attention_sites(model))
    if (content.get("architecture"), content.get("depth")) != (architecture(model), depth):
        raise InputError(
            f"{path} is a plan for {content.get('architecture')} with {content.get('depth')} layers; "
            f"this model is {architecture(model)} with {depth}"
        )
    if not content["layers"]:
        raise InputError(f"{path} keeps every layer as it is: nothing to convert")
    try:
        layers = layer_mixers(content["layers"], depth, "softmax", {})
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    return {layer: {"mixer": name, **keywords} for layer, (name, keywords) in layers.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--source", required=True, help="timm model, e.g. deit_tiny_patch16_224")
    add("--data-dir", required=True, help="folder of images of any depth, labels not used")
    add("--mixer", nargs="+", default=["nystrom"], help=f"of {', '.join(CANDIDATES)}; default: nystrom")
    add("--keep", type=float, help="least share of images with the same prediction: 0.99")
    add("--budget-gflops", type=float, help="instead of --keep: the most faithful model within this cost of one image")
    add("--source-kwargs", nargs="*", default={}, action=KeyValue, metavar="KEY=VALUE", help="keywords of the source")
    add("--weights", metavar="FILE", help="file with the source's weights")
    add("--pretrained", action="store_true", help="take timm's weights of the source")
    add("--img-size", type=int, help="side of the images in pixels; default: the source's own")
    add("--images", type=int, default=200, help="how many to measure on, spread over the folder: 200")
    add("--batch-size", type=int, default=25, help="images measured at once: 25")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--threads", type=int, help="of the CPU")
    add("--out", default="plan.json", help="the plan; figure and table have this name with .png and .csv")


def main(arguments: argparse.Namespace) -> None:
    """Plan as the command line asks, and print the curve."""
    result = plan_layers(**{name: value for name, value in vars(arguments).items() if name != "function"})
    print(f"\n{table_of(result)}\n\n{arguments.out}: agreement {result['agreement']:.4f}", end=" ")
    print(f"at {100 * result['gflops'] / result['softmax_gflops']:.1f} % of the GFLOPs of softmax")
