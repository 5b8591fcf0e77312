"""Fine-tunes any model of timm's registry on a folder of images, or on scikit-learn's handwritten digits.

A run that was killed continues with the numbers of one that was not. Nothing random has a state that could be lost: the
order of the images is a function of (seed, epoch), the augmentation of an image of (seed, epoch, image), and mixup,
dropout and stochastic depth of (seed, epoch, step). So the checkpoint holds weights, optimizer and position, and no
generator. On a CPU, with as many threads, this is exact to the last bit; on CUDA up to kernels that add in no fixed
order. Other threads add in another order, and another device may draw other numbers for dropout.
"""

import io
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_input_data_config
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .._device import autocast, find_device, find_dtype
from .._files import one_line, write_whole
from .._names import check_model
from ..conversion.delta import save_delta
from ..conversion.freeze import PARTS, freeze_except
from .images import STEP, Images, find_images, normaliser, reseed, seed_of, transforms
from .interrupt import deferred_interrupt
from .results import clear, model_card, restore, write_curve, write_history, write_hub
from .settings import check_folder, check_ranges, check_weights

# What stands in for an argument that is None: digits are learnt from scratch, a folder is usually fine-tuned.
DIGITS = dict(model="vix_nystrom_cifar", img_size=32, batch_size=16, epochs=9, lr=1e-3, flip=0.0)
FOLDER = dict(batch_size=32, epochs=5, lr=2e-4, flip=0.5)
# What may change between a run and its continuation; images and initial weights are recognised by their names instead.
FREE = {"data_dir", "val_dir", "checkpoint", "device", "threads", "workers", "out", "checkpoint_every", "resume"}
FREE |= {"overwrite", "license"}


def finetune(
    model: Optional[str] = None,
    model_kwargs: Optional[dict[str, Any]] = None,
    pretrained: bool = False,
    checkpoint: Optional[str] = None,
    train_only: Optional[str] = None,
    data_dir: Optional[str] = None,
    val_dir: Optional[str] = None,
    held_out: float = 0.2,
    img_size: Optional[int] = None,
    in_chans: Optional[int] = None,
    batch_size: Optional[int] = None,
    epochs: Optional[int] = None,
    lr: Optional[float] = None,
    warmup: float = 0.1,
    schedule: str = "cosine",
    keep: str = "last",
    weight_decay: float = 0.05,
    layer_decay: Optional[float] = None,
    drop_path: float = 0.0,
    mixup: float = 0.0,
    label_smoothing: float = 0.1,
    augment: str = "light",
    flip: Optional[float] = None,
    seed: int = 0,
    device: str = "auto",
    amp: str = "auto",
    threads: Optional[int] = None,
    workers: int = 0,
    out: str = "finetuned",
    checkpoint_every: int = 200,
    resume: bool = False,
    overwrite: bool = False,
    license: str = "other",
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train; leave ``history.csv``, ``curve.png``, ``checkpoint.pt`` and a folder for the Hub, ``hub``, in ``out``.

    Args:
        model: Name in timm's registry, or ``local-dir:DIR``; the digits have a default.
        model_kwargs: Further keywords of the model, plain values.
        pretrained: Start from the weights that timm knows for the name.
        checkpoint: Start from this .safetensors or .pth file (a state dict; nothing else is unpickled).
        train_only: "attention", "mlp", "mixer" or "head": all else is frozen (``freeze_except``), and
            ``delta.safetensors`` in ``out`` is what changed; None: everything trains.
        data_dir: Folder of class folders, or of ``train/`` with ``val/``, ``validation/`` or ``test/``; without one of
            these, a share of every class is held out. None: the 1,797 digits of scikit-learn.
        val_dir: Validation folder of class folders, where it is elsewhere.
        held_out: That share.
        warmup: Share of all steps in which the learning rate rises.
        schedule: "cosine": it then falls to zero; "constant": it stays.
        keep: "last", or "best": what ``hub`` and the caller get is the epoch of the highest top-1, the first of equals.
        layer_decay: Factor on the learning rate from each layer to the one below.
        mixup: Alpha of the beta distribution; 0 is off.
        augment: "none"; "light": crop and flip; "rand": crop, flip and RandAugment.
        flip: Probability of a mirrored image; 0 where left and right differ, as in digits.
        amp: "auto" takes bfloat16 where the processor computes in it; "off"; "bfloat16".
        threads: CPU threads; None leaves torch's number.
        checkpoint_every: Steps between checkpoints inside an epoch; one follows every epoch anyway.
        resume: Continue the run in ``out``; its settings must be the same, but for places, device, threads and workers.
        overwrite: Replace the run in ``out``.
        license: For the model card.

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
    settings = dict(locals())
    if data_dir is None and model is None:
        settings["model_kwargs"] = {"patch_size": 4, "num_landmarks": 16, **(model_kwargs or {})}
    for name, value in (DIGITS if data_dir is None else FOLDER).items():
        settings[name] = value if settings[name] is None else settings[name]
    run = SimpleNamespace(**settings)
    folder = Path(run.out)
    check(run, folder)
    run.device = find_device(run.device)
    run.dtype = find_dtype(run.amp, run.device)
    settings["amp"] = str(run.dtype).removeprefix("torch.")
    if threads:
        torch.set_num_threads(threads)

    train_items, val_items, classes = find_images(run.data_dir, run.val_dir, run.held_out)
    torch.manual_seed(seed_of(STEP, run.seed))
    net, config = build_model(run, len(classes))
    if run.train_only:
        print(freeze_except(net, run.train_only))
    resize, augmented, plain = transforms(config, run.augment, run.flip)
    train = Images(train_items, classes, config["input_size"][0], resize, augmented, run.seed)
    val = Images(val_items, classes, config["input_size"][0], resize, plain, run.seed)
    settings["images"] = f"{train.digest()}; {val.digest()}"
    settings = json.loads(json.dumps({key: value for key, value in settings.items() if key not in FREE}))

    batch_size = min(run.batch_size, len(train) - len(train) % 2)  # even, as mixup pairs images
    steps = len(train) // batch_size
    total = steps * run.epochs
    optimizer = create_optimizer_v2(net, "adamw", lr=run.lr, weight_decay=weight_decay, layer_decay=layer_decay)
    scheduler = CosineLRScheduler(
        optimizer,
        max(total, 2),  # timm warns at 1
        lr_min=run.lr if schedule == "constant" else 0.0,
        warmup_t=int(warmup * total),
        warmup_lr_init=run.lr / 100,
        t_in_epochs=False,
    )
    mix = Mixup(mixup, label_smoothing=label_smoothing, num_classes=len(classes)) if mixup else None
    smoothing = 0.0 if mix else label_smoothing
    normalise = normaliser(config, run.device)
    weights = Path(run.checkpoint).name if run.checkpoint else None
    position: dict[str, Any] = dict(epoch=0, step=0, loss=0.0, seconds=0.0, history=[], weights=weights)
    if resume:
        path = folder / "checkpoint.pt"
        position = restore(path, settings, net, optimizer)
        before = position.get("weights", weights)  # earlier versions did not tell
        if before != weights:
            raise ValueError(f"resume: settings differ from those of {path}: checkpoint={before} before, {weights} now")
    else:
        clear(folder)
    history = position["history"]

    def prepare(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = (tensor.to(run.device) for tensor in batch)
        return normalise(pixels), labels

    def save() -> None:
        buffer = io.BytesIO()
        state = dict(settings=settings, model=net.state_dict(), optimizer=optimizer.state_dict(), position=position)
        torch.save(state, buffer)
        write_whole(folder / "checkpoint.pt", buffer.getbuffer())

    def after_batch() -> None:
        step = position["step"]
        if asked.is_set() or (net.training and step % checkpoint_every == 0):
            position["seconds"] = time.perf_counter() - start
            save()
        if asked.is_set():
            raise KeyboardInterrupt(
                f"interrupted in epoch {epoch + 1} after {step} of {steps} steps; saved {folder / 'checkpoint.pt'}; "
                "resume continues from there"
            )

    save()  # a full disk shows now and not after an hour
    with deferred_interrupt() as asked:
        for epoch in range(position["epoch"], run.epochs):
            start = time.perf_counter() - position["seconds"]
            net.train()
            loader = DataLoader(
                train, batch_sampler=train.batches(batch_size, epoch)[position["step"] :], num_workers=workers
            )
            bar = tqdm(loader, f"epoch {epoch + 1}/{run.epochs}", steps, False, initial=position["step"], disable=None)
            for batch in bar:
                reseed(STEP, run.seed, epoch, position["step"])
                if run.device.startswith("cuda"):
                    torch.cuda.manual_seed(seed_of(STEP, run.seed, epoch, position["step"]))
                scheduler.step_update(epoch * steps + position["step"])
                inputs, targets = prepare(batch)
                if mix:
                    inputs, targets = mix(inputs, targets)
                with autocast(run.device, run.dtype):
                    logits = net(inputs)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                if not loss.isfinite():
                    raise ValueError(
                        f"loss became {loss.item()} in epoch {epoch + 1}, step {position['step'] + 1}; "
                        f"lower lr={run.lr} or set amp=off"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                position["step"] += 1
                position["loss"] += loss.item()
                bar.set_postfix(loss=f"{position['loss'] / position['step']:.3f}", refresh=False)
                after_batch()
            train_seconds = time.perf_counter() - start
            top1, top5 = evaluate(net, val, run, prepare, after_batch)
            row = dict(
                epoch=epoch + 1,
                train_loss=position["loss"] / steps,
                top1=top1,
                top5=top5,
                lr=max(group["lr"] for group in optimizer.param_groups),
                # not rounded: a comparison takes the time of training from the rate, and of validation from the rest
                seconds=time.perf_counter() - start,
                images_per_second=steps * batch_size / train_seconds,
                parameters=sum(parameter.numel() for parameter in net.parameters()),
                device=run.device,
                dtype=settings["amp"],
                threads=torch.get_num_threads(),
                batch_size=batch_size,
                img_size=config["input_size"][-1],
                torch=str(torch.__version__),  # its own class is refused by a weights-only load
                timm=timm.__version__,
            )
            history.append(row)
            if keep == "best" and top1 > max((earlier["top1"] for earlier in history[:-1]), default=-1.0):
                buffer = io.BytesIO()
                torch.save(net.state_dict(), buffer)
                write_whole(folder / "best.pt", buffer.getbuffer())
            write_history(folder / "history.csv", history)
            position.update(epoch=epoch + 1, step=0, loss=0.0, seconds=0.0)
            save()
            print(
                f"epoch {epoch + 1}/{run.epochs}: loss {row['train_loss']:.3f}, top-1 {top1:.2f} %, "
                f"top-5 {top5:.2f} %, {row['seconds']:.0f} s",
                flush=True,
            )
    write_curve(folder / "curve.png", history, run.model)
    if run.train_only:
        save_delta(net, folder / "delta.safetensors")
    last = history[-1]
    if keep == "best":
        last = max(history, key=lambda row: row["top1"])
        net.load_state_dict(torch.load(folder / "best.pt", map_location=run.device, weights_only=True))
    quoted = f"`{weights}`" if weights else None
    data = f"`{Path(run.data_dir).name}`" if run.data_dir else "scikit-learn's handwritten digits"
    card = model_card(
        run.model,
        run.license,
        ours=type(net).__module__.startswith("timm_vix"),
        start=quoted or ("timm's weights" if run.pretrained else "random weights"),
        data=f"{data} ({len(classes)} classes, {len(train):,} images; validation: {len(val):,})",
        last=last,
        picked=keep == "best",
        recipe={**settings, "checkpoint": quoted, **{key: last[key] for key in ("device", "threads", "torch", "timm")}},
    )
    write_hub(folder / "hub", net.eval(), config, card, classes)
    return net, history


def check(run: SimpleNamespace, out: Path) -> None:
    """Raise ValueError for a setting that is wrong whatever the data is."""
    ranges = (
        ("epochs batch_size lr img_size in_chans threads checkpoint_every", "above 0", lambda v: v > 0),
        ("weight_decay mixup seed workers", "0 or more", lambda v: v >= 0),
        ("warmup drop_path label_smoothing", "0 to below 1", lambda v: 0 <= v < 1),
        ("layer_decay", "above 0, at most 1", lambda v: 0 < v <= 1),
        ("flip", "0 to 1", lambda v: 0 <= v <= 1),
        ("held_out", "above 0, below 1", lambda v: 0 < v < 1),
        ("schedule", "cosine, constant", lambda v: v in ("cosine", "constant")),
        ("keep", "last, best", lambda v: v in ("last", "best")),
        ("augment", "none, light, rand", lambda v: v in ("none", "light", "rand")),
        ("train_only", ", ".join(PARTS), lambda v: v in PARTS),
        ("amp", "auto, off, bfloat16", lambda v: v in ("auto", "off", "bfloat16")),
    )
    check_ranges(run, ranges)
    if run.mixup and run.batch_size % 2:
        raise ValueError(f"batch_size={run.batch_size}: mixup pairs images; allowed is an even number")
    if not run.model:
        raise ValueError("model is missing: with data_dir it is a name of timm.list_models(), such as vix_nystrom_tiny")
    check_model(run.model)
    check_weights("checkpoint", run.checkpoint)
    check_folder(out, run.resume, run.overwrite)


def build_model(run: SimpleNamespace, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model with its initial weights; also return timm's data configuration for it."""
    extra: dict[str, Any] = dict(run.model_kwargs or {})
    if run.checkpoint:
        extra["pretrained_cfg_overlay"] = dict(file=run.checkpoint, source=None, custom_load=False)
    if run.drop_path:
        extra["drop_path_rate"] = run.drop_path
    weighted = bool(run.pretrained or run.checkpoint)
    # timm tells only its log which keys of a file found no place
    notes: dict[str, str] = {}
    logger, pattern = logging.getLogger("timm.models._builder"), re.compile(r"(Missing|Unexpected) keys \((.*?)\)")

    def listen(record: logging.LogRecord) -> bool:
        found = pattern.findall(record.getMessage())
        notes.update(found)
        return not found and record.levelno >= logging.WARNING

    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(listen)
    try:
        given = resolve_model_input_args(run.model, dict(img_size=run.img_size, in_chans=run.in_chans), **extra)
        given["num_classes"] = num_classes  # a saved converted model tells its own
        # a continued run has its weights in its own checkpoint
        model = timm.create_model(**given, pretrained=weighted and not run.resume)
    except Exception as error:  # timm, torch and safetensors raise by kind of damage
        source = f" with checkpoint={run.checkpoint}" if run.checkpoint else ""
        options = f" and model_kwargs={run.model_kwargs}" if run.model_kwargs else ""
        raise ValueError(f"model={run.model}{source}{options} cannot be built: {one_line(error)}") from error
    finally:
        logger.removeFilter(listen)
        logger.setLevel(level)
    if run.checkpoint and "Unexpected" in notes:
        keys = one_line(notes["Unexpected"])
        raise ValueError(f"checkpoint={run.checkpoint} does not fit model={run.model}, which has no {keys}")
    if "Missing" in notes:
        print(f"new in {run.model}: {one_line(notes['Missing'])}")

    wish: dict[str, Any] = dict(img_size=run.img_size) if run.img_size else {}
    if not weighted:
        wish.update(mean=(0.5,), std=(0.5,))
    config = resolve_input_data_config(model, wish)
    if config["input_size"][0] not in (1, 3):
        raise ValueError(f"in_chans={config['input_size'][0]}: allowed is 1 (grey) or 3 (RGB)")
    if min(config["input_size"]) <= 64 and not weighted:
        config["crop_pct"] = 1.0  # small images have no margin to cut away
    model.to(run.device).eval()
    try:
        with torch.inference_mode(), autocast(run.device, run.dtype):
            model(torch.zeros(1, *config["input_size"], device=run.device))
    except Exception as error:
        raise ValueError(f"model={run.model} fails on {config['input_size']} images: {one_line(error)}") from error
    return model, config


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: Images, run: SimpleNamespace, prepare: Callable, after_batch: Callable
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent."""
    model.eval()
    top1, top5 = AverageMeter(), AverageMeter()
    loader = DataLoader(images, batch_sampler=images.batches(run.batch_size), num_workers=run.workers)
    for batch in tqdm(loader, "validate", leave=False, disable=None):
        inputs, labels = prepare(batch)
        with autocast(run.device, run.dtype):
            logits = model(inputs)
        for meter, value in zip((top1, top5), accuracy(logits, labels, topk=(1, 5))):
            meter.update(value.item(), len(labels))
        after_batch()
    return top1.avg, top5.avg
