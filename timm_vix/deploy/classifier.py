"""Trained models by name, and what they answer to a picture."""

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_input_data_config
from torch import nn

from .. import models
from .._checks import InputError
from .._files import one_line
from .._names import near_names, parse_model
from .._weights import check_classes, check_weights, reason_of, weights_of_file
from ..conversion.delta import load_delta
from ..conversion.record import NAME as CONVERTED
from ..data.decoding import as_shown, image_mode
from ..data.folders import label_names
from ..mixers._mechanism import AttentionMechanism
from ..slots.model import hosts_of, mixer_name
from .exported import ExportedModel, is_exported

FOLDERS = "hf-hub:USER/NAME, a folder with config.json and model.safetensors"
PLACES = f"{FOLDERS}, or a model of timm"
TRAINED = f"{FOLDERS}, a file of timm-vix export (.onnx or .xml), or a model of timm with weights"


def address_of(model: str, trained: bool = True) -> str:
    """What ``timm.create_model`` is given for a name, a place on the Hub or a folder; a run's folder has it in ``hub``.

    Args:
        trained: whether timm must have weights for a name.

    Raises:
        InputError: for what is none of them.
    """
    if timm.is_model(model.split(".")[0]):
        if trained and not timm.is_model_pretrained(model):
            raise InputError(f"model={model} has no trained weights; allowed is {TRAINED}")
        return model
    if model.startswith(("hf-hub:", "hf_hub:")):
        return model
    folder = Path(model.removeprefix("local-dir:"))
    if (folder / "hub" / "config.json").is_file():  # a model's own folder may hold something else by this name
        folder = folder / "hub"
    if (folder / "config.json").is_file():
        return f"local-dir:{folder}"
    places = TRAINED if trained else PLACES
    lacks = f"{'holds no config.json' if folder.is_dir() else 'is not there'}; allowed is {places}"
    if folder.is_file():
        lacks = f"is a file; weights are given by --weights FILE; allowed here is {places}"
    near = near_names(model, timm.list_models())
    raise InputError(f"model={model} {lacks}" + (f"; near names: {near}" if near != "none" else ""))


def load_trained(model: str, weights: Optional[str] = None, delta: Optional[str] = None, **keywords: Any) -> nn.Module:
    """A model in eval mode with its trained weights.

    Args:
        model: see ``address_of``; or a file of ``timm-vix export``.
        weights: a file with them; None: those of the name, the folder or the place on the Hub.
        delta: a file of ``save_delta``, which is put onto the weights.
        **keywords: for ``timm.create_model``.

    Raises:
        InputError: for a model that isn't there or can't be loaded, and for weights of other classes than it has.
    """
    check_weights("weights", weights)
    if is_exported(model):
        if weights or delta or keywords:
            given = "weights" if weights else "delta" if delta else next(iter(keywords))
            raise InputError(f"model={model} is an exported file, which takes no {given}")
        return ExportedModel(Path(model))
    # a conversion has the weights of its source
    address = address_of(model, trained=not weights and "source" not in keywords)
    if weights:
        keywords["pretrained_cfg_overlay"] = weights_of_file(weights, keywords.get("num_classes"))
    try:
        net = timm.create_model(address, pretrained=True, **keywords).eval()
    except Exception as error:  # timm, torch, safetensors and the Hub's client raise by kind of damage
        reason = reason_of(error, model, weights, keywords.get("num_classes"))
        raise InputError(f"model={model} cannot be loaded: {reason}") from error
    check_classes(net, f"model={model}")
    if delta:
        load_delta(net, delta)
    return net


def class_names(model: nn.Module) -> list[str]:
    """The name of each class: those in its configuration, else ImageNet's if it has as many, else numbers.

    Classes of one name also have their number: a crane is a bird, and another crane a machine.

    Raises:
        InputError: for a configuration whose names or descriptions have another form.
    """
    names = label_names(model)
    numbers = range(model.num_classes)
    if len(names) == model.num_classes:
        described = model.pretrained_cfg.get("label_descriptions") or {}
        if not isinstance(described, Mapping):
            raise InputError(f"the model's configuration has label_descriptions={described!r}; expected texts by name")
        found = [str(described.get(name, name)) for name in names]
    elif names or not (subset := infer_imagenet_subset(model)):
        found = [str(i) for i in numbers]
    else:
        information = ImageNetInfo(subset)
        found = [information.index_to_description(i).partition(",")[0] for i in numbers]
    times = Counter(found)
    return [name if times[name] == 1 else f"{name} ({i})" for i, name in enumerate(found)]


def note_of_weights(name: str, model: nn.Module, from_file: bool = False) -> str:
    """A warning for a model of this package with the weights of a softmax model; empty for any other model.

    Args:
        from_file: the weights are of a file, and not those that timm knows for the name. Those of a conversion by name
            are its source's in either case.

    Raises:
        InputError: if such weights are useless, since no mixer of the model has queries, keys and values.
    """
    ours = timm.list_models(module=models.__all__)
    mixers = {mixer_name(host) for host in hosts_of(model).values()} - {"softmax"}
    architecture = name.partition(".")[0]
    if architecture not in (*ours, CONVERTED) or not mixers:
        return ""
    if from_file and architecture != CONVERTED and not getattr(model, "has_softmax_weights", False):
        return ""
    if not any(isinstance(host.core, AttentionMechanism) for host in hosts_of(model).values()):
        raise InputError(
            f"model={name} has the weights of a softmax model, which mean nothing to {', '.join(sorted(mixers))}; "
            "fine-tune it first, and give the folder of the run"
        )
    return "The weights are those of a softmax model, with other attention and not fine-tuned: many answers are wrong."


def preparation_of(net: nn.Module, what: str) -> tuple[dict[str, Any], Any]:
    """timm's data configuration of a model, and the transform of pictures that it stands for.

    Raises:
        InputError: for a configuration that is damaged; ``what`` is its name.
    """
    try:
        config = resolve_input_data_config(net)
        transform: Any = create_transform(**config)
        if config["input_size"][0] in (1, 3):
            black = transform(Image.new(image_mode(config["input_size"][0]), (8, 8)))
            if not black.isfinite().all():
                raise InputError(f"mean={config['mean']} and std={config['std']} give no finite numbers")
    except Exception as error:  # whatever a damaged entry leads to
        reason = f"{type(error).__name__} {one_line(error)}"
        raise InputError(f"{what} has a preparation of images that cannot be used: {reason}") from error
    return config, transform


class Classifier:
    """A trained model with the names of its classes and the preparation of its pictures.

    Args:
        model: "NAME key=value ...", with a name as for ``load_trained``.
        weights, delta: as for ``load_trained``.

    Attributes:
        name, net, names: as given; the model; the names of its classes.
        note: what there is to know about its weights; empty for weights that were trained with its attention.
        size: height and width of the images in pixels.

    Raises:
        InputError: see ``load_trained``; also for a model of neither grey nor RGB pictures.
    """

    def __init__(self, model: str, weights: Optional[str] = None, delta: Optional[str] = None) -> None:
        name, keywords = parse_model(model, find=str)  # as it is, for load_trained
        self.name, self.net = model, load_trained(name, weights, delta, **keywords)
        if isinstance(self.net, ExportedModel):
            self.note = self.net.note
        else:
            self.note = "" if delta else note_of_weights(name, self.net, from_file=bool(weights))
        if not self.net.num_classes:
            raise InputError(f"model={model} has no classifier")
        config, self.transform = preparation_of(self.net, f"model={model}")
        channels, *self.size = config["input_size"]
        if channels not in (1, 3):
            raise InputError(f"model={model} takes images of {channels} channels; allowed is 1 (grey) or 3 (RGB)")
        self.names = class_names(self.net)
        self.mode = image_mode(channels)

    def prepare(self, picture: Union[str, Path, Image.Image]) -> torch.Tensor:
        """What the model sees of a picture or its file, (1, C, H, W).

        Raises:
            InputError: for what is no picture, or a damaged one.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # one that is too large is an error
                image = picture if isinstance(picture, Image.Image) else Image.open(picture)
                with image:
                    return self.transform(as_shown(image, self.mode)).unsqueeze(0)
        except Exception as error:  # what a damaged file raises differs between PIL's readers
            if not isinstance(picture, Image.Image) and not Path(picture).is_file():
                kind = "is a folder" if Path(picture).is_dir() else "does not exist"
                raise InputError(f"{picture} {kind}; expected a picture file") from error
            what = "the picture" if isinstance(picture, Image.Image) else str(picture)
            raise InputError(f"{what} cannot be read as a picture: {one_line(error)}") from error

    @torch.inference_mode()
    def best(self, pixels: torch.Tensor, number: int, net: Optional[nn.Module] = None) -> dict[str, float]:
        """The likeliest classes of one picture, (1, C, H, W), with their shares, the greatest first.

        Args:
            net: another model of the same classes that is to answer.

        Raises:
            InputError: for logits that aren't finite, of which the largest would mean nothing.
        """
        logits = (net or self.net)(pixels)
        if not logits.isfinite().all():
            raise InputError(f"model={self.name} gives logits that aren't finite for this picture")
        shares = logits.softmax(1)[0].topk(min(number, len(self.names)))
        return {self.names[i]: share for share, i in zip(shares.values.tolist(), shares.indices.tolist())}
