"""Attention transfer: a converted model learns from the softmax model that it was, without labels.

    stage 1   sum over layers l of  |B'_l(x_l) - B_l(x_l)|^2 / |B_l(x_l) - x_l|^2     x_l: the teacher's own tokens
    stage 2   |z' - z|^2 / |z|^2  +  KL(softmax(y) || softmax(y'))                     z: last tokens, y: logits

B is a block of the frozen original and B' the same block with another attention. In stage 1 all layers learn at once
and none depends on another's errors; stage 2 fits the model as a whole, gently. Both train the parameters of the
replaced attention alone, unless ``distill_part="all"`` lets stage 2 train the whole network. Stage 3, with labels, is
ordinary fine-tuning of the folder that is written. To grow the size of the images, transfer at each size in turn, and
let ``start`` name the folder of the one before.

``pass_through`` sends the output of one converted block a step through the frozen rest of the original, and adds the
relative error at its end: Fan et al. 2024, "ScaleKD" (arXiv 2411.06786), section 3.3. ``mean_free`` adds the squared
error without its mean over the tokens (section 3.2 there).

With ``scale_logits`` the original is scaled, too. In stage 1 no tokens merge; a conversion that only merges has no
stage 1.

The idea of stage 1 is that of Zhang et al. 2024, "LoLCATs" (arXiv 2410.10254, section 3.1), on blocks' outputs.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils.distributed import init_distributed_device_so
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._checks import InputError
from .._device import autocast, find_device, find_dtype
from .._files import write_table
from ..conversion.convert import convert
from ..conversion.identity import fingerprint
from ..conversion.report import Conversion
from ..data.images import Images, normaliser
from ..slots.slot import MixerSlot
from .build import construction, try_forward
from .checkpoint import Checkpoint, clear
from .interrupt import deferred_interrupt
from .loop import Loop
from .losses import BlockMatching, Distillation
from .schedule import warmup_and_cosine
from .settings import add_settings, documented, given_settings
from .teacher import build_teacher, start_mixers
from .transfer_results import compare, finish, in_words, layers_with_other_attention
from .transfer_settings import TransferSettings
from .transfer_start import batches, convert_copy, load_start, mixers_of, prepare_images

FILES = ("checkpoint.pt", "steps.csv", "result.csv", "layers.png")


@documented(TransferSettings)
def transfer(*arguments: Any, **keywords: Any) -> tuple[nn.Module, Conversion]:
    """Convert ``source`` and train it, without labels, to reproduce the outputs of the original.

    It writes ``hub``, a folder for the Hub, ``result.csv`` and, after a first stage, the figure ``layers.png`` to
    ``out``. Under ``torchrun`` the processes share each batch, and the first process writes.

    Args:
        {settings}

    Returns:
        The converted model in eval mode, and what became of its layers.

    Raises:
        ValueError: for a wrong argument, weights or images that don't fit, a loss that isn't finite.
        OSError: for a file that cannot be written; the previous checkpoint is intact.
        KeyboardInterrupt: for Ctrl-C, after the step was finished and a checkpoint saved.

    Example:
        >>> model, report = transfer("deit_tiny_patch16_224", "photos", "nystrom", pretrained=True, out="runs/nystrom")
    """
    run = TransferSettings(*arguments, **keywords)
    folder = Path(run.out)
    rank = join_processes(run)
    dtype = find_dtype(run.amp, run.device)
    teacher, config = build_teacher(run.source, run.source_kwargs, run.weights, run.img_size, run.device)
    student, report = convert_copy(teacher, run)
    try_forward(student, "the converted model", run, config, dtype)
    mixers = mixers_of(student, report)
    if report.trained_tokens:  # the original predicts better with scaled logits as well
        convert(teacher, scale_logits=report.trained_tokens)
    layers = layers_with_other_attention(student, report)
    if not layers and run.block_steps:
        if rank == 0:
            print("stage 1 is left out: the blocks alone, without merging, are those of the original")
        run.block_steps = 0
    images, held_out = prepare_images(run, config)
    start = load_start(student, run.start) if run.start else ""
    settings = dict(settings_of(run, images, dtype, teacher, config), start=start)
    normalise = normaliser(config, run.device)
    position: dict[str, Any] = dict(stage=1, step=0, seconds=0.0, rows=[])

    def optimizer_of(stage: int) -> torch.optim.Optimizer:
        groups = stage_groups(run, student, mixers, stage)
        return create_optimizer_v2(groups, "adamw", lr=lr_of(run, stage), weight_decay=0.0)

    checkpoint = Checkpoint(folder / "checkpoint.pt", settings, student, optimizer_of(1), position, (images,))

    def save() -> None:
        if rank == 0:
            checkpoint.save()
            write_table(folder / "steps.csv", ["stage", "step", "losses"], position["rows"])

    if run.resume:
        saved = checkpoint.read()
        if saved["settings"].get("images") == images.digest():  # an earlier version counted the names of the folders
            saved["settings"]["images"] = settings["images"]
        checkpoint.check_settings(saved["settings"])  # before its position, which is another one's if they differ
        checkpoint.optimizer = optimizer_of(saved["position"]["stage"])
        checkpoint.restore(saved)
    else:
        if rank == 0:
            clear(folder, FILES)
        if not run.start:
            seen = [images[key][0] for key in images.batches(run.batch_size)[0]]
            start_mixers(teacher, mixers, normalise(torch.stack(seen)))
        save()  # a full disk shows now and not after an hour
    with deferred_interrupt() as asked:
        loop = Loop(checkpoint, run.checkpoint_every, asked, save, show=rank == 0)
        for stage in range(position["stage"], 3):
            if position["stage"] != stage:
                position.update(stage=stage, step=0)
                checkpoint.optimizer = optimizer_of(stage)
            losses = (
                BlockMatching(teacher, student, layers, run.mean_free, run.pass_through)
                if stage == 1
                else Distillation(teacher, student, run.mean_free)
            )
            train_stage(loop, losses, images, normalise, run, dtype)
    save()
    student.requires_grad_(True).eval()
    if rank == 0:
        figures = compare(teacher, student, held_out, normalise, run, dtype)
        finish(run, report, position, student, config, dict(images=images.readable, dtype=str(dtype), **figures))
        scaled = ", with logits scaled likewise" if report.trained_tokens else ""
        print(f"on {held_out.readable} held-out images {in_words(figures)}{scaled}; wrote {folder / 'hub'}")
    return student, report


def join_processes(run: TransferSettings) -> int:
    """Give a run its device and threads, and return its rank among the processes of ``torchrun``; alone: 0.

    Raises:
        ValueError: for a batch that is smaller than the number of processes.
    """
    device = run.device = find_device(run.device)
    if run.threads:
        torch.set_num_threads(run.threads)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if run.batch_size < world:
        raise InputError(f"batch_size={run.batch_size}: allowed is at least 1 for each of the {world} processes")
    if world == 1:
        return 0
    joined = init_distributed_device_so(device=device)
    run.device = joined["device"]
    return joined["global_rank"]


def settings_of(
    run: TransferSettings, images: Images, dtype: torch.dtype, teacher: nn.Module, config: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same when the run is continued, as plain values."""
    return {
        **json.loads(json.dumps(run.recorded() | dict(layers=str(run.layers)), default=str)),
        "images": images.digest(run.folders),
        "content": images.checksum(),
        "dtype": str(dtype),
        "teacher": fingerprint(teacher.state_dict()),
        "construction": construction(teacher, config),
    }


def lr_of(run: TransferSettings, stage: int) -> float:
    return run.block_lr if stage == 1 else run.distill_lr


def train_stage(
    loop: Loop,
    losses_of: nn.Module,
    images: Images,
    normalise: Callable[[torch.Tensor], torch.Tensor],
    run: TransferSettings,
    dtype: torch.dtype,
) -> None:
    """Take the steps of a stage that are left; ``losses_of`` gives its losses for a batch of images."""
    position, optimizer = loop.checkpoint.position, loop.checkpoint.optimizer
    stage, lr = position["stage"], lr_of(run, position["stage"])
    name, rate, steps = (
        ("blocks", "block_lr", run.block_steps) if stage == 1 else ("distillation", "distill_lr", run.distill_steps)
    )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and steps:
        losses_of = DistributedDataParallel(losses_of)
    scheduler = warmup_and_cosine(optimizer, lr, steps, steps // 20)
    keys = [batch[rank::world] for batch in batches(images, run.batch_size, steps, stage)[position["step"] :]]
    for pixels, _ in loop.steps(name, images.loader(keys, run.workers), steps):
        scheduler.step_update(position["step"])
        with autocast(run.device, dtype):
            losses = losses_of(normalise(pixels), position["step"])
        loop.update(losses.mean() if stage == 1 else losses.sum(), f"lower {rate}={lr}")
        values = [round(value, 6) for value in losses.tolist()]
        position["rows"].append([stage, position["step"] + 1, values])
        loop.note(" ".join(f"{value:.3f}" for value in values))
    if steps and rank == 0:
        last = ", ".join(f"{value:.4f}" for value in position["rows"][-1][2])
        print(f"{name}: {steps} steps, losses {last}; {position['seconds']:.0f} s so far")


def stage_groups(
    run: TransferSettings, student: nn.Module, mixers: dict[str, MixerSlot], stage: int
) -> list[dict[str, Any]]:
    """The parameters that a stage trains, by the factor of their learning rate (timm's ``lr_scale``).

    All others stop requiring a gradient.
    """
    student.requires_grad_(stage == 2 and run.distill_part == "all")
    for mixer in mixers.values():
        mixer.requires_grad_(True)
    if stage == 2 and run.distill_part == "all":
        groups = param_groups_layer_decay(student, weight_decay=0.0, layer_decay=run.layer_decay)
    else:
        groups = [dict(params=[p for mixer in mixers.values() for p in mixer.parameters()], lr_scale=1.0)]
    own = {
        parameter: mixer.core.learning_rates.get(name.removeprefix("core."), 1.0)
        for mixer in mixers.values()
        for name, parameter in mixer.named_parameters()
    }
    found: dict[float, list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group["params"]:
            found.setdefault(group["lr_scale"] * own.get(parameter, 1.0), []).append(parameter)
    return [dict(params=parameters, lr_scale=factor) for factor, parameters in found.items()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, TransferSettings)


def main(arguments: argparse.Namespace) -> None:
    _, report = transfer(**given_settings(arguments, TransferSettings))
    print(report.table())
