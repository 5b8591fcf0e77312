"""The model that is fine-tuned, with its initial weights and the configuration of its images."""

import contextlib
import copy
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import get_model_args, resolve_model_input_args
from torch import nn

from .._checks import InputError
from .._device import autocast
from .._files import one_line
from .._names import weights_config
from .._weights import weights_of_file


@contextlib.contextmanager
def keys_that_differ() -> Iterator[dict[str, str]]:
    """The keys by which weights and model differ, "Missing" and "Unexpected", where timm loads weights inside.

    timm only logs them, which is kept silent here.
    """
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
        yield notes
    finally:
        logger.removeFilter(listen)
        logger.setLevel(level)


def build_model(run: Any, dtype: torch.dtype, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model of ``FinetuneSettings`` in eval mode; also return timm's data configuration for it.

    Raises:
        ValueError: for keywords or weights that don't fit the model, or a model that fails on images of this size.
    """
    extra: dict[str, Any] = dict(run.model_kwargs or {})
    if "num_classes" in extra:
        raise InputError(f"model_kwargs: num_classes={extra['num_classes']!r} is given by the images, which decide it")
    if run.drop_path:
        if "drop_path_rate" in extra:
            raise InputError(
                f"drop_path={run.drop_path} and model_kwargs: drop_path_rate={extra['drop_path_rate']!r} were both "
                "given; allowed is one of them"
            )
        extra["drop_path_rate"] = run.drop_path
    weighted = bool(run.pretrained or run.checkpoint or ":" in run.model)  # a folder or place of the Hub has weights
    try:
        given = resolve_model_input_args(run.model, dict(img_size=run.img_size, in_chans=run.in_chans), **extra)
        given["num_classes"] = num_classes  # instead of those that a saved converted model records
        if run.checkpoint:  # not resolved before, or a saved model would lose the folder or the place that it is from
            given["pretrained_cfg_overlay"] = weights_of_file(run.checkpoint)
        with keys_that_differ() as notes:
            # a continued run has its weights in its own checkpoint
            model = timm.create_model(**given, pretrained=weighted and not run.resume)
    except Exception as error:  # timm, torch and safetensors raise by kind of damage
        source = f" with checkpoint={run.checkpoint}" if run.checkpoint else ""
        options = f" and model_kwargs={run.model_kwargs}" if run.model_kwargs else ""
        raise InputError(f"model={run.model}{source}{options} cannot be built: {one_line(error)}") from error
    if run.checkpoint and "Unexpected" in notes:
        keys = one_line(notes["Unexpected"])
        raise InputError(f"checkpoint={run.checkpoint} does not fit model={run.model}, which has no {keys}")
    if "Missing" in notes:
        print(f"new in {run.model}: {one_line(notes['Missing'])}")

    wanted: dict[str, Any] = dict(img_size=run.img_size) if run.img_size else {}
    if not weighted:
        wanted.update(mean=(0.5,), std=(0.5,))
    config = resolve_input_data_config(model, wanted)
    if min(config["input_size"][1:]) <= 64 and not weighted:
        config["crop_pct"] = 1.0  # small images have no margin to cut away
    model.to(run.device).eval()
    try_forward(model, f"model={run.model}", run, config, dtype)
    if run.batch_size == 1:  # a batch norm after pooling has one value for each channel, and fails in training alone
        training = copy.deepcopy(model).train()
        try_forward(training, f"batch_size=1: model={run.model} in training", run, config, dtype)
    return model, config


@torch.inference_mode()
def try_forward(model: nn.Module, name: str, run: Any, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Raise ValueError for a model that fails on images as a run has them, two in a batch where it has batches.

    Before an earlier run is replaced, and before hours of work.
    """
    images = torch.zeros(min(2, run.batch_size), *config["input_size"], device=run.device)
    try:
        with autocast(run.device, dtype):
            model(images)
    except Exception as error:  # of any kind that a model's parts may raise
        raise InputError(f"{name} fails on {config['input_size']} images: {one_line(error)}") from error


def construction(model: nn.Module, data_config: dict[str, Any]) -> dict[str, Any]:
    """What a model computes besides its weights: architecture, keywords, pooling and its images' preparation.

    A folder that is named in ``local-dir:`` may hold another configuration later, under the same name.
    """
    found = dict(
        architecture=weights_config(model).get("architecture"),
        keywords={name: value for name, value in get_model_args(model).items() if name != "conversion"},
        images=data_config,
    )
    # a class, such as a norm layer, has a name that stays, and an address that doesn't
    return json.loads(json.dumps(found, default=lambda value: getattr(value, "__name__", type(value).__name__)))
