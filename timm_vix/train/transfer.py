"""Attention transfer: a converted model learns from the softmax model that it was, without labels.

    stage 1   sum over layers l of  |B'_l(x_l) - B_l(x_l)|^2 / |B_l(x_l) - x_l|^2     x_l: the teacher's own tokens
    stage 2   |z' - z|^2 / |z|^2  +  KL(softmax(y) || softmax(y'))                     z: last tokens, y: logits

B is a block of the frozen original and B' the same block with another attention. In stage 1 all layers learn at once
and none hears of another's errors; stage 2 trains the whole model, gently. Both train the parameters of the replaced
attention alone. Stage 3, with labels, is ordinary fine-tuning of the folder that is written.

The idea of stage 1 is that of Zhang et al. 2024, "LoLCATs" (arXiv 2410.10254, section 3.1), on blocks' outputs.
"""

import argparse
import copy
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils.distributed import init_distributed_device_so
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from .._device import autocast, find_device, find_dtype, versions
from .._files import write_table, write_whole
from ..conversion.convert import Conversion, convert
from ..conversion.layers import Layers
from ..mixers import MIXERS
from ..mixers._slot import MixerSlot
from .images import Images, find_unlabelled, normaliser, transforms
from .interrupt import deferred_interrupt
from .losses import BlockMatching, Distillation
from .plan import load_plan
from .results import restore, write_history, write_hub, write_layer_errors
from .settings import KeyValue, check_folder, check_ranges
from .teacher import build_teacher, check_teacher, start_mixers

# What may change between a run and its continuation; the images are recognised by their names instead.
FREE = {"data_dir", "workers", "out", "checkpoint_every", "resume", "overwrite", "weights", "pretrained"}
FILES = ("checkpoint.pt", "steps.csv", "result.csv", "layers.png")


def transfer(
    source: str,
    data_dir: str,
    mixer: str = "nystrom",
    layers: Layers = "all",
    mixer_kwargs: Optional[dict[str, Any]] = None,
    source_kwargs: Optional[dict[str, Any]] = None,
    weights: Optional[str] = None,
    pretrained: bool = False,
    img_size: Optional[int] = None,
    block_steps: int = 300,
    distill_steps: int = 100,
    block_lr: float = 1e-3,
    distill_lr: float = 5e-5,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
    amp: str = "auto",
    threads: Optional[int] = None,
    workers: int = 0,
    out: str = "transferred",
    checkpoint_every: int = 50,
    resume: bool = False,
    overwrite: bool = False,
) -> tuple[nn.Module, Conversion]:
    """Convert ``source`` and fit it to what it was; leave a folder for the Hub, ``hub``, a row and a figure in ``out``.

    Under ``torchrun`` the processes share each batch, and the first of them writes.

    Args:
        source: A name of timm's, a ``VisionTransformer`` or ``Eva``.
        data_dir: Folder of images of any depth; labels are not wanted.
        mixer, layers, mixer_kwargs: See ``timm_vix.convert``; layers may be the .json file of a plan too.
        source_kwargs: Further keywords of the source, plain values.
        weights: File with the source's weights, .safetensors or .pth (a state dict; nothing else is unpickled).
        pretrained: Take timm's weights of the source instead.
        img_size: Side of the images in pixels; None: the source's own.
        block_steps, distill_steps: Steps of stage 1 and 2; 0 leaves the stage out.
        block_lr, distill_lr: Highest learning rates of AdamW; both follow a cosine to zero.
        batch_size: Images a step, over all processes.
        seed: Order and cropping of the images.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        amp: "auto" (bfloat16 where the processor has it), "off" or "bfloat16".
        threads: Of PyTorch on a CPU.
        workers: Processes that load images.
        out: Folder for the results.
        checkpoint_every: Steps between checkpoints.
        resume: Continue the run in ``out``.
        overwrite: Replace the run in ``out``.

    Returns:
        The converted model in eval mode, and what became of its layers.

    Raises:
        ValueError: for a wrong argument, weights or images that don't fit, a loss that isn't finite.
        OSError: for a file that cannot be written; the previous checkpoint is intact.
        KeyboardInterrupt: for Ctrl-C, after the step was finished and a checkpoint saved.

    Example:
        >>> model, report = transfer("deit_tiny_patch16_224", "photos", "nystrom", pretrained=True, out="runs/nystrom")
    """
    run = SimpleNamespace(**locals())
    folder = Path(out)
    check(run, folder)
    settings = dict(vars(run), device=find_device(device))
    if threads:
        torch.set_num_threads(threads)
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = init_distributed_device_so(device=settings["device"])["global_rank"] if world > 1 else 0
    if world > 1 and settings["device"] == "cuda":
        settings["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    run.device, run.dtype = settings["device"], find_dtype(amp, settings["device"])

    teacher, config = build_teacher(run)
    if isinstance(layers, str) and layers.endswith(".json"):
        layers = load_plan(layers, teacher)
    settings["layers"] = str(layers)
    student = copy.deepcopy(teacher)
    report = convert(student, mixer, layers, **(mixer_kwargs or {}))
    converted = sorted({row.layer for row in report.rows if row.changed})
    if not converted:
        raise ValueError(f"mixer={mixer!r}, layers={layers!r} leave every layer as it is: nothing to transfer")
    mixers: dict[str, Any] = {row.path: student.get_submodule(row.path) for row in report.rows if row.changed}
    groups = parameter_groups(list(mixers.values()))
    if not groups:
        raise ValueError(f"mixer={mixer!r} has no parameters to fit")
    student.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)

    resize, augmented, plain = transforms(config, "light", 0.5)
    # every twentieth image is kept apart, to say what was lost
    found = find_unlabelled(Path(data_dir))
    images, apart = (
        Images(part, ["image"], config["input_size"][0], resize, transform, seed)
        for part, transform in (([item for i, item in enumerate(found) if i % 20], augmented), (found[::20], plain))
    )
    if len(images) < batch_size:
        raise ValueError(
            f"data_dir={data_dir} has {len(images)} images to learn from, fewer than batch_size={batch_size}"
        )
    settings = json.loads(json.dumps({k: v for k, v in settings.items() if k not in FREE}, default=str))
    settings.update(images=images.digest(), dtype=str(run.dtype))

    normalise = normaliser(config, run.device)
    position: dict[str, Any] = dict(stage=1, step=0, seconds=0.0, rows=[])

    def new_optimizer(lr: float) -> torch.optim.Optimizer:
        # of copies, since the optimizer writes its learning rate into the groups
        return create_optimizer_v2([dict(group) for group in groups], "adamw", lr=lr, weight_decay=0.0)

    optimizer = new_optimizer(block_lr)
    if resume:
        position = restore(folder / "checkpoint.pt", settings, student, optimizer)
    elif rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "hub", ignore_errors=True)  # a stopped run shall not leave another's model there

    def save() -> None:
        if rank == 0:
            buffer = io.BytesIO()
            state = dict(settings=settings, model=student.state_dict(), optimizer=optimizer.state_dict())
            torch.save(dict(state, position=position), buffer)
            write_whole(folder / "checkpoint.pt", buffer.getbuffer())
            write_table(folder / "steps.csv", ["stage", "step", "losses"], position["rows"])

    stages: dict[int, tuple[str, nn.Module, int, float]] = {
        1: ("blocks", BlockMatching(teacher, student, converted), block_steps, block_lr),
        2: ("distillation", Distillation(teacher, student), distill_steps, distill_lr),
    }
    if not resume:
        seen = [images[key][0] for key in images.batches(batch_size)[0]]
        start_mixers(teacher, mixers, normalise(torch.stack(seen)))
        save()  # a full disk shows now and not after an hour
    with deferred_interrupt() as asked:
        for stage in range(position["stage"], 3):
            name, losses_of, steps, lr = stages[stage]
            if position["stage"] != stage:
                position.update(stage=stage, step=0)
                optimizer = new_optimizer(lr)
            if world > 1 and steps:
                losses_of = DistributedDataParallel(losses_of)
            scheduler = CosineLRScheduler(
                optimizer, max(steps, 2), warmup_t=steps // 20, warmup_lr_init=lr / 100, t_in_epochs=False
            )
            keys = batches(images, batch_size, steps, stage)[position["step"] :]
            loader = DataLoader(images, batch_sampler=[batch[rank::world] for batch in keys], num_workers=workers)
            bar = tqdm(loader, name, steps, False, initial=position["step"], disable=None if rank == 0 else True)
            start = time.perf_counter() - position["seconds"]
            for pixels, _ in bar:
                scheduler.step_update(position["step"])
                with autocast(run.device, run.dtype):
                    losses = losses_of(normalise(pixels))
                loss = losses.mean() if stage == 1 else losses.sum()
                if not loss.isfinite():
                    raise ValueError(
                        f"the loss became {loss.item()} in {name}, step {position['step'] + 1}; lower lr={lr}"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                position["step"] += 1
                values = [round(value, 6) for value in losses.tolist()]
                position["rows"].append([stage, position["step"], values])
                bar.set_postfix_str(" ".join(f"{value:.3f}" for value in values), refresh=False)
                position["seconds"] = time.perf_counter() - start
                if asked.is_set() or position["step"] % checkpoint_every == 0:
                    save()
                if asked.is_set():
                    raise KeyboardInterrupt(
                        f"interrupted in {name} after {position['step']} of {steps} steps; "
                        "the same command with --resume continues"
                    )
            if steps and rank == 0:
                last = ", ".join(f"{value:.4f}" for value in position["rows"][-1][2])
                print(f"{name}: {steps} steps, losses {last}; {position['seconds']:.0f} s so far")
    save()
    student.requires_grad_(True).eval()
    if rank == 0:
        row = result_row(run, report, position, len(images), *compare(teacher, student, apart, normalise, run))
        write_history(folder / "result.csv", [row])
        write_layer_errors(folder / "layers.png", position["rows"], converted, f"{source} -> {row['mixer']}")
        write_hub(folder / "hub", student, config, card(row, report))
        print(f"agrees with {source} on {row['agreement']} % of {len(apart)} images kept apart; wrote {folder / 'hub'}")
    return student, report


def parameter_groups(mixers: list[MixerSlot]) -> list[dict[str, Any]]:
    """The parameters of some mixers by the factor of their learning rate, which timm's schedulers call ``lr_scale``."""
    found: dict[float, list[nn.Parameter]] = {}
    for mixer in mixers:
        for name, parameter in mixer.named_parameters():
            factor = mixer.core.learning_rates.get(name.removeprefix("core."), 1.0)
            found.setdefault(factor, []).append(parameter)
    return [dict(params=parameters, lr_scale=factor) for factor, parameters in found.items()]


def batches(images: Images, batch_size: int, steps: int, stage: int) -> list[list[tuple[int, int]]]:
    """Keys of a stage's steps, epoch after epoch, in an order of its own."""
    found: list[list[tuple[int, int]]] = []
    epoch = stage * 1000
    while len(found) < steps:
        found += images.batches(batch_size, epoch)
        epoch += 1
    return found[:steps]


def check(run: SimpleNamespace, out: Path) -> None:
    """Raise ValueError for a setting that is wrong whatever the data is."""
    ranges = (
        ("batch_size checkpoint_every block_lr distill_lr img_size threads", "above 0", lambda v: v > 0),
        ("block_steps distill_steps seed workers", "0 or more", lambda v: v >= 0),
        ("amp", "auto, off, bfloat16", lambda v: v in ("auto", "off", "bfloat16")),
    )
    check_ranges(run, ranges)
    check_teacher(run)
    check_folder(out, run.resume, run.overwrite)


@torch.inference_mode()
def compare(
    teacher: nn.Module, student: nn.Module, images: Images, normalise: Callable, run: SimpleNamespace
) -> tuple[float, float]:
    """Percent of images on which both predict the same, and the relative distance of their last tokens."""
    same, apart, size = 0, 0.0, 0.0
    loader = DataLoader(images, batch_sampler=images.batches(run.batch_size), num_workers=run.workers)
    for pixels, _ in tqdm(loader, "compare", leave=False, disable=None):
        with autocast(run.device, run.dtype):
            wanted, mine = (model.forward_features(normalise(pixels)) for model in (teacher, student))
            predicted = [model.forward_head(t).argmax(-1) for model, t in ((teacher, wanted), (student, mine))]
        same += int((predicted[0] == predicted[1]).sum())
        apart += float((mine.float() - wanted.float()).square().sum())
        size += float(wanted.float().square().sum())
    return 100 * same / len(images), (apart / size) ** 0.5


def result_row(
    run: SimpleNamespace, report: Conversion, position: dict, images: int, agreement: float, distance: float
) -> dict[str, Any]:
    """What was done and what came of it."""
    mixer, keywords = told_mixers(report)
    return dict(
        source=run.source,
        mixer=mixer,
        layers=" ".join(str(row.layer) for row in report.rows if row.changed),
        keywords=keywords,
        tokens=report.tokens,
        images=images,
        block_steps=run.block_steps,
        distill_steps=run.distill_steps,
        batch_size=run.batch_size,
        agreement=round(agreement, 2),
        feature_distance=round(distance, 4),
        seconds=round(position["seconds"]),
        device=run.device,
        dtype=str(run.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        processes=int(os.environ.get("WORLD_SIZE", 1)),
        **versions(),
    )


def told_mixers(report: Conversion) -> tuple[str, str]:
    """Names and keywords of the mixers in a converted model; a mapping of layers may have several of both."""
    names = {mixer.__name__: name for name, mixer in MIXERS.items()}
    found = dict.fromkeys(
        (names[row.after], " ".join(f"{name}={value}" for name, value in row.config.items()))
        for row in report.rows
        if row.changed
    )
    return ", ".join(dict.fromkeys(name for name, _ in found)), "; ".join(dict.fromkeys(words for _, words in found))


def card(row: dict[str, Any], report: Conversion) -> str:
    """Model card in the Hub's format."""
    facts = "\n".join(f"- {name}: {value}" for name, value in row.items())
    return f"""---
library_name: timm
pipeline_tag: image-classification
license: other
tags:
- image-classification
- timm
- timm_vix
---
# {row["source"]} with {row["mixer"]} attention

The attention of `{row["source"]}` was replaced and fitted to the original without labels. On images that were kept
apart it predicts what the original predicts in {row["agreement"]} % of the cases.

```python
import timm, timm_vix
model = timm.create_model("local-dir:THIS/FOLDER", pretrained=True)  # or "hf-hub:USER/NAME"
```

```
{report.table()}
```

## How it was made

{facts}

## Limits

Agreement was measured on one kind of images and says nothing about labels. The terms of the original weights apply.
"""


def parse_layers(text: str) -> Layers:
    """Layers from a command line: "0,3,5" is a list of indices, anything else is for ``transfer`` to read."""
    return [int(part) for part in text.split(",") if part] if text.replace(",", "").isdecimal() else text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, help="timm model, e.g. deit_tiny_patch16_224")
    parser.add_argument("--data-dir", required=True, help="folder of images, labels not wanted")
    parser.add_argument("--out", default="transferred", help="folder for the results")
    parser.add_argument("--weights", help="file with the source's weights")
    parser.add_argument("--pretrained", action="store_true", help="take timm's weights of the source")
    parser.add_argument("--mixer", default="nystrom")
    parser.add_argument("--layers", default="all", help="all, last-6, every-2, 0,3,5 or a plan.json")
    parser.add_argument("--mixer-kwargs", nargs="*", default={}, action=KeyValue, help="e.g. num_landmarks=64")
    parser.add_argument("--source-kwargs", nargs="*", default={}, action=KeyValue)
    parser.add_argument("--img-size", type=int)
    for name, value in (("block-steps", 300), ("distill-steps", 100), ("batch-size", 16), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--block-lr", type=float, default=1e-3)
    parser.add_argument("--distill-lr", type=float, default=5e-5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto", help="auto, off or bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=50)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")


def main(arguments: argparse.Namespace) -> None:
    names = transfer.__code__.co_varnames[: transfer.__code__.co_argcount]
    given = {name: getattr(arguments, name) for name in names}
    _, report = transfer(**{**given, "layers": parse_layers(arguments.layers)})
    print(report.table())
