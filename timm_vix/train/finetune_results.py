"""What a fine-tuning leaves: rows of its history, the best weights, a delta, a folder for the Hub and the curve."""

from typing import Any

import timm
import torch
from torch import nn

from .._figures import write_figure
from ..conversion.delta import save_delta
from ..data.folders import name_of
from .checkpoint import Checkpoint, read_tensors, write_history, write_tensors
from .finetune_settings import FinetuneSettings
from .hub import finetuned_card, write_hub
from .plots import learning_curve


def conditions(net: nn.Module, config: dict[str, Any], dtype: str, device: str, batch_size: int) -> dict[str, Any]:
    """What the figures of an epoch depend on."""
    return dict(
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        device=device,
        dtype=dtype,
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        img_size=config["input_size"][-1],
        torch=str(torch.__version__),  # its own class is refused by a weights-only load
        timm=timm.__version__,
    )


def end_epoch(checkpoint: Checkpoint, row: dict[str, Any], run: FinetuneSettings) -> None:
    """Write history and checkpoint; and the weights as ``best.pt`` if they are the best so far."""
    folder, history = checkpoint.path.parent, checkpoint.position["history"]
    history.append(row)
    write_history(folder / "history.csv", history)
    checkpoint.position.update(epoch=row["epoch"], step=0, loss=0.0, seconds=0.0)
    checkpoint.save()
    if run.keep == "best":
        save_best(checkpoint)
    print(
        f"epoch {row['epoch']}/{run.epochs}: loss {row['train_loss']:.3f}, top-1 {row['top1']:.2f} %, "
        f"top-5 {row['top5']:.2f} %, {row['seconds']:.0f} s",
        flush=True,
    )


def save_best(checkpoint: Checkpoint) -> None:
    """After the last step of an epoch, write the weights as ``best.pt`` if no epoch before it was as good.

    The checkpoint comes first: a run that was killed in between does this when it is continued.
    """
    *before, last = checkpoint.position["history"]
    if last["top1"] > max((earlier["top1"] for earlier in before), default=-1.0):
        write_tensors(checkpoint.path.with_name("best.pt"), checkpoint.model.state_dict())


def finish(
    checkpoint: Checkpoint, run: FinetuneSettings, config: dict[str, Any], classes: list[str], images: str
) -> None:
    """Choose the epoch, write its weights as a delta and as a folder for the Hub, and draw the curve."""
    folder, net = checkpoint.path.parent, checkpoint.model
    weights, history = checkpoint.settings["checkpoint"], checkpoint.position["history"]
    row = history[-1]
    if run.keep == "best":
        row = max(history, key=lambda earlier: earlier["top1"])
        net.load_state_dict(read_tensors(folder / "best.pt"))
    if run.train_only:
        save_delta(net, folder / "delta.safetensors")
    quoted = f"`{weights}`" if weights else None
    data = f"`{name_of(run.data_dir)}`" if run.data_dir else "scikit-learn's handwritten digits"
    shown = {name: value for name, value in checkpoint.settings.items() if name != "construction"}
    architecture = net.pretrained_cfg["architecture"]
    local = run.model.startswith("local-dir:")  # a path here tells a reader nothing
    start = "a local folder" if local else f"`{run.model}`" if run.model.startswith("hf-hub:") else "timm's weights"
    height, width = config["input_size"][1:]
    card = finetuned_card(
        architecture if local else run.model,
        run.license,
        ours=timm.model_entrypoint(architecture).__module__.startswith("timm_vix"),
        start=quoted or (start if checkpoint.position["weighted"] else "random weights"),
        data=f"{data} ({len(classes)} classes, {images})",
        row=dict(row, img_size=width if height == width else f"{height}x{width}"),
        best=run.keep == "best",
        recipe={
            **shown,
            "checkpoint": quoted,
            **{key: row[key] for key in ("device", "threads", "torch", "timm")},
        },
    )
    write_hub(folder / "hub", net.eval(), config, card, classes)
    write_figure(folder / "curve.png", learning_curve, history, run.model)
