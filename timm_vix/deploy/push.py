"""Check the folder that a run left, and upload it to the Hugging Face Hub by timm's own function.

    hf auth login
    timm-vix push runs/nystrom me/vix_nystrom_flowers

The model is loaded twice and must give equal outputs, also equal to those of the checkpoint of the run where there is
one. Its configuration and card must be complete, and name no place of this machine. Nothing is uploaded unless all of
that holds. Afterwards ``timm.create_model("hf-hub:me/vix_nystrom_flowers", pretrained=True)`` loads the model wherever
this package is imported.
"""

import argparse
import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from timm.data import resolve_model_data_config
from timm.models import push_to_hf_hub
from torch import nn

from .._checks import InputError
from .._files import one_line
from ..data.folders import label_names
from ..train.checkpoint import read_tensors
from ..train.hub import hub_of
from .check import known_images, one_by_one
from .classifier import class_names, load_trained, preparation_of

FILES = {"config.json", "model.safetensors", "README.md"}  # what a Hub folder holds, and what is uploaded
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
# an absolute path of Unix, of a home folder or of Windows within a text; neither a web address, which has two slashes
# after the colon, nor a Markdown link within a site, unless that begins with a folder of a machine
ABSOLUTE = re.compile(
    r"(?:^|(?<!\])\(|\]\((?=file:/|~/|[A-Za-z]:\\|\\|/(?:home|root|Users|tmp|mnt|media|var|private)/)|"
    r"[\s\"'`=:,|\[*>{;])((?:file:/+|/|~/|[A-Za-z]:\\|\\\\)[\w.~-]+(?:[/\\][^\s\"'`)\]*<|}]*)?)"
)
# what would tell a loader to take the weights from elsewhere
PLACES = {"file", "url", "hf_hub_id", "hf_hub_filename", "checkpoint_path", "state_dict", "source_url"}
LABELS = ("label_names", "label_descriptions")
FRONT_MATTER = ("library_name", "license", "pipeline_tag", "tags")
# the line of a card that loads the model
LOADING = re.compile(r'create_model\("(?:local-dir|hf-hub):[^"]*", pretrained=True\)(?:  # or "hf-hub:[^"]*")?')

# what the Hub's client raises, and the base classes of its HTTP library, taken from the client so that none is named
CLIENT_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="what a run left: its folder, or hub/ in it")
    parser.add_argument("repository", metavar="USER/NAME", help="where it goes; it is created where it isn't there")
    parser.add_argument("--private", action="store_true", help="a repository that is created is seen by you alone")
    parser.add_argument("--revision", help="branch that is written, created where it isn't there; default: main")
    parser.add_argument("--dry-run", action="store_true", help="check the folder, without login, and upload nothing")


def main(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        check_repository(arguments.repository)
        check_folder(hub_of(arguments.folder))
        print(f"{arguments.folder} can be uploaded to {arguments.repository}; nothing was")
        return
    address = push(arguments.folder, arguments.repository, arguments.private, arguments.revision)
    print(f'timm.create_model("hf-hub:{address}", pretrained=True) loads it')


def push(folder: Path, repository: str, private: bool = False, revision: Optional[str] = None) -> str:
    """Check a run's folder and upload it; return its address on the Hub, USER/NAME or USER/NAME@REVISION.

    Raises:
        InputError: for a folder that fails a check, a name that can't be one, no login, no rights or no connection. If
            a check fails nothing was uploaded.
    """
    check_repository(repository)
    if not get_token():
        raise InputError("no login for the Hub: run `hf auth login`, or set HF_TOKEN; --dry-run checks without it")
    hub = hub_of(folder)
    model, card = check_folder(hub)
    # beside the configuration of the weights, where the run has them
    labels = {name: model.pretrained_cfg.pop(name) for name in LABELS if name in model.pretrained_cfg}
    address = f"{repository}@{revision}" if revision else repository
    card.text = LOADING.sub(f'create_model("hf-hub:{address}", pretrained=True)', card.text)
    api = HfApi(library_name="timm_vix")
    # beside timm's weights: the folder's configuration, see note_classes_once in hub.py, and its card
    files = {"config.json": (hub / "config.json").read_bytes(), "README.md": str(card).encode()}
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        # the weights come first, so that no card stands beside others than those that it describes
        push_to_hf_hub(
            model,
            repository,
            revision=revision,
            private=private,
            safe_serialization=True,
            model_config=labels,
            data_config=resolve_model_data_config(model),
        )
        api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message="Add model card and classes",
            revision=revision,
        )
    except CLIENT_ERRORS as error:
        raise InputError(f"repository={repository}: {reason_of(error)}") from error
    return address


def check_repository(repository: str) -> None:
    """Raise InputError for what is no USER/NAME."""
    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise HFValidationError("a user or organisation, a slash and a name are expected")
    except HFValidationError as error:
        raise InputError(f"repository={repository!r} is no USER/NAME: {one_line(error)}") from error


def reason_of(error: Exception) -> str:
    """Why the Hub didn't take something, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hub doesn't know this login; run `hf auth login` with a token that may write"
    if status == 403:
        return f"this login has no right to write there; the Hub says: {one_line(error)}"
    return f"the upload failed, and the same command tries again: {one_line(error)}"


def check_folder(hub: Path) -> tuple[nn.Module, ModelCard]:
    """The model of a Hub folder in eval mode, in bfloat16 where its file is and else in float32, and its card.

    Raises:
        InputError: for a folder that should not be uploaded, naming why.
    """
    if not hub.is_dir():
        raise InputError(f"{hub} {'is a file' if hub.exists() else 'does not exist'}; expected the folder of a run")
    present = {path.name for path in hub.iterdir()}
    if missing := sorted(FILES - present):
        raise InputError(f"{hub} lacks {', '.join(missing)}; expected the folder of a run, or hub/ in it")
    if pickles := sorted(name for name in present if Path(name).suffix in PICKLES):
        raise InputError(f"{hub} holds {', '.join(pickles)}, a pickle, which runs code when it is read; remove it")
    if others := sorted(present - FILES):
        raise InputError(f"{hub} also holds {', '.join(others)}; allowed are {', '.join(sorted(FILES))}")
    try:
        config = json.loads((hub / "config.json").read_text(encoding="utf-8"))
        card = ModelCard.load(hub / "README.md", ignore_metadata_errors=False)
    except Exception as error:  # damaged JSON, YAML or text
        raise InputError(f"{hub} cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{hub / 'config.json'} holds a {type(config).__name__}; expected a mapping as timm writes it")
    check_config(hub / "config.json", config)
    check_card(hub / "README.md", card)
    model, again = load_trained(f"local-dir:{hub}"), load_trained(f"local-dir:{hub}")
    preparation_of(model, str(hub))
    if (names := label_names(model)) and len(names) != model.num_classes:
        raise InputError(f"{hub / 'config.json'}: {len(names)} label_names for a model of {model.num_classes} classes")
    class_names(model)  # raises for descriptions of classes that no program can show
    images = known_images(model.pretrained_cfg["input_size"])
    outputs = one_by_one(model, images)
    if not outputs.isfinite().all():
        raise InputError(f"{hub}: the model's outputs are not finite")
    if not torch.equal(outputs, one_by_one(again, images)):
        raise InputError(f"{hub}: two loads give different outputs, so something of the model is not in its folder")
    check_run(hub, model, images)
    with safe_open(hub / "model.safetensors", "pt") as file:
        stored = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  it is no dict
    return (model.bfloat16() if stored & {"BF16", "F16", "F32", "F64"} == {"BF16"} else model), card


def entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each plain value of a configuration with its name."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield name, key
            yield from entries(part, str(key))
    elif isinstance(value, list):
        for part in value:
            yield from entries(part, name)
    else:
        yield name, value


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Raise InputError for a configuration that names a file or another place of weights."""
    for name, value in entries(config):
        if isinstance(value, str) and (name in PLACES or ABSOLUTE.search(value)):
            raise InputError(f"{path}: {name}={value!r} is a place, which means nothing elsewhere; remove it")


def check_card(path: Path, card: ModelCard) -> None:
    """Raise InputError for a card without metadata, licence or figures, or that names a file of this machine."""
    data = card.data.to_dict()
    if missing := [name for name in FRONT_MATTER if not data.get(name)]:
        raise InputError(f"{path} lacks {', '.join(missing)} in its front matter")
    if data["license"] == "other" and "terms" not in card.text:
        raise InputError(f"{path}: the licence is 'other', and the text names no terms; say which hold")
    if not re.search(r"\d\s?%|\|\s*\d", card.text):
        raise InputError(f"{path} has no figures; say what was measured, such as | top-1 | 75.4 % |")
    texts = [card.text, *(value for _, value in entries(data) if isinstance(value, str))]
    if found := next(filter(None, map(ABSOLUTE.search, texts)), None):
        raise InputError(f"{path} names {found[1]!r}, a path of this machine; remove it")


def check_run(hub: Path, model: nn.Module, images: torch.Tensor) -> None:
    """Raise InputError if the run beside the folder kept other weights than the folder has."""
    hub = Path(os.path.abspath(hub))  # "." has no name
    best, last = hub.parent / "best.pt", hub.parent / "checkpoint.pt"
    if hub.name != "hub" or not last.is_file():
        return
    try:
        kept = read_tensors(last)
        path = best if kept["settings"].get("keep") == "best" else last
        weights = read_tensors(best) if path == best else kept["model"]
        trained = copy.deepcopy(model)
        trained.load_state_dict(weights)
    except Exception as error:  # torch raises by kind of damage
        raise InputError(f"{last} cannot be compared with {hub}: {one_line(error)}") from error
    if not torch.equal(one_by_one(trained, images), one_by_one(model, images)):
        raise InputError(f"{hub} gives other outputs than the weights in {path}; resume the run, which writes it anew")
