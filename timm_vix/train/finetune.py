"""Fine-tunes any model of timm's registry on a folder of images, or on scikit-learn's handwritten digits.

A killed run that continues gives the same numbers as one that ran through. No random state can be lost: the
order of the images is a function of (seed, epoch), the augmentation of an image of (seed, epoch, image), and mixup,
dropout and stochastic depth of (seed, epoch, step). So the checkpoint holds weights, optimizer and position, and no
generator. On a CPU, with as many threads, this is exact to the last bit; on CUDA up to kernels that add in no fixed
order. Other threads add in another order, and another device may draw other numbers for dropout.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from tqdm import tqdm

from .._checks import InputError
from .._device import autocast, find_device, find_dtype
from .._files import one_line
from ..conversion.freeze import freeze_except
from ..data.datasets import Items
from ..data.folders import find_images
from ..data.images import Images, normaliser, transforms
from ..data.seeds import STEP, reseed, seed_of
from .build import build_model, construction
from .checkpoint import Checkpoint, clear, read_tensors
from .finetune_results import conditions, end_epoch, finish, save_best
from .finetune_settings import FinetuneSettings
from .interrupt import deferred_interrupt
from .loop import Loop
from .schedule import warmup_and_cosine
from .settings import documented
from .tract import first_layers, tract

FILES = ("checkpoint.pt", "best.pt", "history.csv", "curve.png", "delta.safetensors")


@documented(FinetuneSettings)
def finetune(*arguments: Any, **keywords: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Fine-tune a timm model on labelled images.

    It writes ``history.csv``, ``curve.png``, ``checkpoint.pt`` and ``hub``, a folder for the Hub, to ``out``. With
    ``resume=True`` a run continues with the same settings; paths, device, threads and workers may differ. The dtype may
    not, so give ``amp`` where it would be another one on the other device.

    Args:
        {settings}

    Returns:
        The trained model in eval mode, and the rows of ``history.csv``, one per epoch.

    Raises:
        ValueError: for arguments or data that cannot be used; nothing saved before is touched.
        OSError: for a file that cannot be written; the previous checkpoint is intact.
        KeyboardInterrupt: for Ctrl-C, after the step was finished and a checkpoint saved.

    Example:
        >>> model, history = finetune("vix_nystrom_tiny", data_dir="photos", out="runs/photos")
        >>> history[-1]["top1"]
    """
    run = FinetuneSettings(*arguments, **keywords)
    folder = Path(run.out)
    run.device = find_device(run.device)
    dtype = find_dtype(run.amp, run.device)
    if run.threads:
        torch.set_num_threads(run.threads)
    train_items, val_items, classes = find_images(run.data_dir, run.val_dir, run.held_out, run.data_root)
    torch.manual_seed(seed_of(STEP, run.seed))
    net, config = build_model(run, dtype, len(classes))
    if run.train_only:
        print(freeze_except(net, run.train_only))
    if run.tract:
        for layer in first_layers(net):
            tract(layer, run.tract)
    train, val = prepare_images(run, config, train_items, val_items, classes)
    settings = settings_of(run, dtype, train, val) | dict(construction=construction(net, config))
    batch_size = min(run.batch_size, len(train) - len(train) % 2)  # even, as mixup pairs images
    steps = len(train) // batch_size
    optimizer, scheduler = optimizer_of(net, run, steps)
    forward = torch.compile(net) if run.compile else net
    objective = objective_of(forward, run, config, len(classes), dtype)
    position: dict[str, Any] = dict(epoch=0, step=0, loss=0.0, seconds=0.0, history=[])
    # a continued run has the entry of its checkpoint; an earlier version gave a folder random weights, and has no entry
    position["weighted"] = run.pretrained or (":" in run.model and not run.resume)
    checkpoint = Checkpoint(folder / "checkpoint.pt", settings, net, optimizer, position, (train, val))
    start_or_resume(checkpoint, run)
    history = position["history"]
    with deferred_interrupt() as asked, told_if_it_cannot_be_compiled(run):
        loop = Loop(checkpoint, run.checkpoint_every, asked)
        for epoch in range(position["epoch"], run.epochs):
            net.train()
            loader = train.loader(train.batches(batch_size, epoch)[position["step"] :], run.workers)
            for pixels, labels in loop.steps(f"epoch {epoch + 1}/{run.epochs}", loader, steps):
                seed_step(run, epoch, position["step"])
                scheduler.step_update(epoch * steps + position["step"])
                loss = objective(pixels, labels)
                loop.update(loss, divergence_advice(run))
                position["loss"] += loss.item()
                loop.note(f"loss={position['loss'] / (position['step'] + 1):.3f}")
            start = time.perf_counter()
            top1, top5 = evaluate(forward, val, run, dtype, normaliser(config, run.device), loop.stop_if_asked)
            row = dict(
                epoch=epoch + 1,
                train_loss=position["loss"] / steps,
                top1=top1,
                top5=top5,
                lr=max(group["lr"] for group in optimizer.param_groups),
                seconds=position["seconds"] + time.perf_counter() - start,
                train_seconds=position["seconds"],
                images_per_second=steps * batch_size / position["seconds"],
                **conditions(net, config, settings["amp"], run.device, batch_size),
            )
            end_epoch(checkpoint, row, run)
    finish(checkpoint, run, config, classes, f"{train.readable:,} images; validation: {val.readable:,}")
    return net, history


def settings_of(run: FinetuneSettings, dtype: torch.dtype, train: Images, val: Images) -> dict[str, Any]:
    """What must be the same when the run is continued, as plain values."""
    return {
        **json.loads(json.dumps(run.recorded())),
        "amp": str(dtype).removeprefix("torch."),
        "checkpoint": Path(run.checkpoint).name if run.checkpoint else None,  # the file may move
        "images": f"{train.digest()}; {val.digest()}",
        "content": f"{train.checksum()}; {val.checksum()}",
    }


def objective_of(
    net: nn.Module, run: FinetuneSettings, config: dict[str, Any], num_classes: int, dtype: torch.dtype
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The cross-entropy of a batch of pixels and labels, with the label smoothing and mixup of the run."""
    mix = Mixup(run.mixup, label_smoothing=run.label_smoothing, num_classes=num_classes) if run.mixup else None
    smoothing = 0.0 if mix else run.label_smoothing  # mixup smooths its labels itself
    normalise = normaliser(config, run.device)

    def objective(pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs, targets = normalise(pixels), labels.to(run.device)
        if mix:
            inputs, targets = mix(inputs, targets)
        with autocast(run.device, dtype):
            logits = net(inputs)
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    return objective


@contextlib.contextmanager
def told_if_it_cannot_be_compiled(run: FinetuneSettings) -> Iterator[None]:
    """Raise InputError where torch.compile fails, as for lack of a C++ compiler."""
    if not run.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    try:
        yield
    except TorchDynamoException as error:
        raise InputError(f"compile: {one_line(error)}; train without it") from error


def divergence_advice(run: FinetuneSettings) -> str:
    """What helps against a training that diverges."""
    return f"lower lr={run.lr} or set amp=off"


def prepare_images(
    run: FinetuneSettings, config: dict[str, Any], train: Items, val: Items, classes: list[str]
) -> tuple[Images, Images]:
    """The images of training and validation, which are decoded when they are needed."""
    resize, augmented, evaluated = transforms(config, run.augment, run.flip)
    channels = config["input_size"][0]
    return (
        Images(train, classes, channels, resize, augmented, run.seed, lazy=True),
        Images(val, classes, channels, resize, evaluated, run.seed, lazy=True),
    )


def optimizer_of(net: nn.Module, run: FinetuneSettings, steps: int) -> tuple[torch.optim.Optimizer, Scheduler]:
    """AdamW, and the schedule of its learning rate; ``steps`` are those of an epoch."""
    total = steps * run.epochs
    optimizer = create_optimizer_v2(net, "adamw", lr=run.lr, weight_decay=run.weight_decay, layer_decay=run.layer_decay)
    lr_min = run.lr if run.schedule == "constant" else 0.0
    return optimizer, warmup_and_cosine(optimizer, run.lr, total, int(run.warmup * total), lr_min)


def start_or_resume(checkpoint: Checkpoint, run: FinetuneSettings) -> None:
    """Continue from the checkpoint, or replace an earlier run by one at its start."""
    if run.resume:
        checkpoint.restore(checkpoint.read())
        if run.keep == "best" and checkpoint.position["history"]:
            if not checkpoint.position["step"]:
                save_best(checkpoint)
            read_tensors(checkpoint.path.with_name("best.pt"))  # a damaged file shows now and not after the training
    else:
        clear(checkpoint.path.parent, FILES)
    checkpoint.save()  # a full disk shows now and not after an hour


def seed_step(run: FinetuneSettings, epoch: int, step: int) -> None:
    """Make mixup, dropout and stochastic depth a function of (seed, epoch, step), on every device."""
    reseed(STEP, run.seed, epoch, step)
    seed = seed_of(STEP, run.seed, epoch, step)
    if run.device.startswith("cuda"):
        torch.cuda.manual_seed_all(seed)  # the model's device may not be the current one
    elif run.device.startswith("mps"):
        torch.mps.manual_seed(seed)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: Images,
    run: FinetuneSettings,
    dtype: torch.dtype,
    normalise: Callable[[torch.Tensor], torch.Tensor],
    after_batch: Callable[[], None],
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent, over the images that can be read.

    Right answers are counted before one division, so that equally good epochs have equal accuracies.

    Raises:
        ValueError: for logits that aren't finite, of which the largest would mean nothing.
    """
    model.eval()
    number, first, among_five = 0, 0, 0
    keys = images.batches(run.batch_size)
    for pixels, labels in tqdm(images.loader(keys, run.workers), "validate", len(keys), leave=False, disable=None):
        with autocast(run.device, dtype):
            logits = model(normalise(pixels))
        if not logits.isfinite().all():
            raise InputError(f"the model gives logits that aren't finite after training; {divergence_advice(run)}")
        right = logits.topk(min(5, logits.shape[1])).indices == labels.to(run.device)[:, None]
        number += len(labels)
        first += int(right[:, 0].sum())
        among_five += int(right.sum())
        after_batch()
    return 100 * first / number, 100 * among_five / number
