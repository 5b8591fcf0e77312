"""The folder that a run leaves for the Hugging Face Hub: weights, configuration and model card."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import ModelCard, ModelCardData
from timm.models import save_for_hf
from torch import nn

from .._files import one_line
from ..conversion.record import record_resolved_arguments
from ..conversion.report import Conversion

LOAD = """```python
import timm{package}
model = timm.create_model("local-dir:THIS/FOLDER", pretrained=True)  # or "hf-hub:USER/NAME"
```"""


def write_hub(
    folder: Path,
    model: nn.Module,
    data_config: dict[str, Any],
    card: ModelCard,
    label_names: Optional[list[str]] = None,
) -> None:
    """Write weights, configuration and card as the Hub and timm's ``local-dir:`` want them, all or nothing.

    Raises:
        OSError: if they cannot be written; an earlier folder stays.
    """
    partial, former = (folder.with_name(f"{folder.name}.{name}") for name in ("partial", "former"))
    try:
        if former.is_dir() and not folder.exists():  # of a process that was killed in between
            os.replace(former, folder)
        shutil.rmtree(partial, ignore_errors=True)
        names = dict(label_names=label_names) if label_names else None
        record_resolved_arguments(model)  # no file of a plan is named
        save_for_hf(model, partial, names, safe_serialization=True, data_config=data_config)
        note_classes_once(partial / "config.json")
        card.save(partial / "README.md")
        shutil.rmtree(former, ignore_errors=True)
        if folder.exists():
            os.replace(folder, former)
        os.replace(partial, folder)
        shutil.rmtree(former, ignore_errors=True)
    except BaseException as error:  # Ctrl-C, too; safetensors has an exception of its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        if former.exists() and not folder.exists():
            os.replace(former, folder)
        if not isinstance(error, Exception):
            raise
        raise OSError(f"cannot write {folder}: {one_line(error)}; what was saved before is intact") from error


def hub_of(folder: Path) -> Path:
    """The folder for the Hub in that of a run, or the folder itself."""
    return folder / "hub" if (folder / "hub").is_dir() else folder


def note_classes_once(path: Path) -> None:
    """Remove num_classes from model_args in a configuration.

    It is also at the top level, and Transformers' wrapper for timm would pass it twice.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    if (config.get("model_args") or {}).get("num_classes") == config["num_classes"]:
        del config["model_args"]["num_classes"]
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def model_card(text: str, license: str, ours: bool, task: str = "image-classification") -> ModelCard:
    """A card with the Hub's metadata before ``text``; ``ours`` marks a model that needs this package to load."""
    tags = [task, "timm", *(["timm_vix"] if ours else [])]
    data = ModelCardData(library_name="timm", pipeline_tag=task, license=license, tags=tags)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def without_folders(value: Any) -> Any:
    """A setting as a card states it: a folder or plan of this machine by its name, since its path says nothing.

    The folder ``hub`` of a run has the name of the run.
    """
    if isinstance(value, Mapping):
        return {name: without_folders(part) for name, part in value.items()}
    if isinstance(value, str) and (value.startswith("local-dir:") or value.endswith(".json")):
        path = Path(os.path.abspath(value.removeprefix("local-dir:")))
        return path.parent.name if path.name == "hub" else path.name
    return value


def finetuned_card(
    name: str,
    license: str,
    ours: bool,
    start: str,
    data: str,
    row: dict[str, Any],
    recipe: dict[str, Any],
    best: bool = False,
) -> ModelCard:
    """The card of a fine-tuned model.

    Args:
        name: In timm's registry.
        start, data: The initial weights and the images, in words.
        row: The row of the history that the weights belong to.
        recipe: Every setting of the run; those that are None are left out.
        best: Whether the epoch was chosen by its accuracy on the validation images.
    """
    which = "best on these images" if best else "last epoch, and no epoch was picked"
    settings = "\n".join(f"- {key}: {without_folders(value)}" for key, value in recipe.items() if value is not None)
    text = f"""# {name}

`{name}` ({row["parameters"] / 1e6:.2f} M parameters, {row["img_size"]} px), trained from {start} on {data}.

| on the validation images | % |
|---|---|
| top-1 | {row["top1"]:.2f} |
| top-5 | {row["top5"]:.2f} |

These are the figures of epoch {row["epoch"]}, the {which}.

{LOAD.format(package=", timm_vix" if ours else "")}

## Recipe

{settings}

## Limits

The model answers every image with one of the classes in `config.json`. It was measured on one split with one seed, and
on nothing from elsewhere. The terms of the training images and of the initial weights apply.
"""
    return model_card(text, license, ours)


def transferred_card(row: dict[str, Any], agreement: str, report: Conversion) -> ModelCard:
    """The card of a model after attention transfer.

    Args:
        row: of result.csv.
        agreement: how far the model agrees with its original, in words.
        report: of the conversion.
    """
    row = without_folders(row)
    facts = "\n".join(f"- {name}: {value}" for name, value in row.items() if value is not None)
    scaled = " The logits of both are scaled." if report.trained_tokens else ""
    text = f"""# {row["source"]} with {row["mixer"]} attention

The attention of `{row["source"]}` was replaced and trained to match the original without labels. On held-out
images {agreement}.{scaled}

{LOAD.format(package=", timm_vix")}

```
{report.table()}
```

## How it was made

{facts}

## Limits

Agreement was measured on one kind of images and says nothing about labels. The terms of the original weights apply.
"""
    task = "image-feature-extraction" if row["agreement"] is None else "image-classification"
    return model_card(text, "other", True, task)


def delta_card(keywords: dict[str, Any], megabytes: float, figures: dict[str, str]) -> ModelCard:
    """The card of a delta of a transferred model.

    Args:
        keywords: with which ``timm.create_model("vix_from_timm", pretrained=True, ...)`` builds what takes it.
        figures: what was measured with the stored weights, by what it is called.
    """
    given = "".join(f"    {name}={value!r},\n" for name, value in keywords.items())
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    text = f"""# {keywords["source"]} with {keywords["mixer"]} attention, as a delta

`delta.safetensors` ({megabytes:.1f} MB) holds the attention weights of `{keywords["source"]}` after its attention was
replaced and trained to match the original without labels. They are stored in bfloat16 and loaded as float32. All other
weights are those of the original.

```python
import timm, timm_vix
model = timm.create_model(
    "vix_from_timm",
    pretrained=True,
{given})
timm_vix.load_delta(model, "delta.safetensors")  # the path of the file beside this card
```

| measured with these weights | |
|---|---|
{rows}

## Limits

The model answers every image with one of the original's classes. The terms of the original weights apply.
"""
    return model_card(text, "other", True)
