"""Model cards for the Hub, written from the rows of ``reproduce_vix.csv``."""

from collections.abc import Callable
from pathlib import Path
from typing import Optional

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_vix._files import write_whole
from timm_vix._records import Columns, Record, earlier_records

COLUMNS: Columns = dict(
    system=str,
    keywords=str,
    recipe=str,
    paper=str,
    top1=float,
    top5=float,
    held_out_top1=float,
    epoch=int,
    epochs=int,
    patch_size=int,
    tokens=int,
    images_per_second=float,
    faster_than_softmax=float,
    peak_memory_mib=float,
    seconds=float,
    seed=int,
    parameters=int,
    gflops=float,
    device=str,
    device_name=str,
    dtype=str,
    threads=int,
    batch_size=int,
    torch=str,
    timm=str,
)
# the epochs of each run, in a file beside it; the accuracy is that on the held-out training images
CURVE: Columns = dict(
    system=str,
    recipe=str,
    epochs=int,
    patch_size=int,
    seed=int,
    dtype=str,
    epoch=int,
    train_loss=float,
    held_out_top1=float,
    seconds=float,
    threads=int,
)
CIFAR10 = "uoft-cs/cifar10"  # its name on the Hub
# a system without a number in the paper, a processor of an earlier version, a step that could not be measured
MAY_BE_EMPTY = {"paper", "device_name", "images_per_second", "faster_than_softmax", "peak_memory_mib"}


def read_rows(path: Path) -> tuple[list[Record], int]:
    """The good rows of a results file, none if it isn't there, and the number of damaged lines.

    Raises:
        ValueError: for a file that cannot be read, or that has other columns, naming them.
    """
    records, damaged = earlier_records(path, COLUMNS)
    needed = COLUMNS.keys() - MAY_BE_EMPTY
    good = [record for record in records if all(record[name] is not None for name in needed)]
    return good, damaged + len(records) - len(good)


def seed_suffix(seed: int) -> str:
    """What a seed adds to the name of a run or card: nothing for 0, which most rows have."""
    return f"-seed{seed}" if seed else ""


def num_seeds(row: Record, rows: list[Record]) -> int:
    """With how many seeds the training of a row was done."""
    known_by = ("system", "recipe", "epochs", "patch_size", "dtype")
    return len({other["seed"] for other in rows if all(other[name] == row[name] for name in known_by)})


def card(
    row: Record, trained: Optional[Record] = None, stored: str = "float32", folder: str = "", seeds: int = 1
) -> ModelCard:
    """The card of one row of ``examples/results/reproduce_vix.csv``, with its accuracies in the Hub's metadata.

    Args:
        row: with the accuracies of the weights that the card stands beside.
        trained: the row of the training, where these weights are rounded ones.
        stored: their dtype in the file.
        folder: from which ``local-dir:`` loads them; none: the Hub.
        seeds: with how many the model was trained.
    """
    number, _, of_log = (row["paper"] or "").partition(" ")
    paper = f"{number} %, with 1,024 tokens and 40 or more epochs" if number else "not published"
    if of_log:
        paper += "; the best epoch on the test images, from the log of its code"
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license="apache-2.0",
        datasets=[CIFAR10],
        tags=["image-classification", "timm", "timm_vix"],
        model_name=row["system"],
        eval_results=[accuracy("Top-1 accuracy (%)", row["top1"]), accuracy("Top-5 accuracy (%)", row["top5"])],
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md")),
        row=row,
        trained=trained,
        stored=stored,
        address=f"local-dir:{folder}" if folder else f"hf-hub:USER/{row['system']}",
        paper=paper,
        seeds="One seed was trained" if seeds == 1 else f"These are the weights of one of {seeds} seeds",
        memory=with_unit(row["peak_memory_mib"], "MiB"),
    )


def accuracy(name: str, value: float) -> EvalResult:
    """An accuracy on the test images, in percent, as the Hub lists it beside a model."""
    return EvalResult(
        task_type="image-classification",
        dataset_type=CIFAR10,
        dataset_name="CIFAR-10",
        dataset_split="test",
        metric_type="accuracy",
        metric_name=name,
        metric_value=value,
    )


def with_unit(value: Optional[float], unit: str) -> str:
    return "not measured" if value is None else f"{value:,.0f} {unit}"


def write_cards(results: Path, checkpoint_of: Callable[[Record], Path], folder: Path) -> list[Path]:
    """Write a card for each good row of a results file whose weights exist, and return their paths.

    Args:
        checkpoint_of: The folder in which a row's ``model.safetensors`` is, if it is anywhere.

    Raises:
        ValueError: for a file that cannot be read, or that has other columns, naming them.
        OSError: for a file that cannot be written.
    """
    paths = []
    rows = read_rows(results)[0]
    for row in rows:
        if (checkpoint_of(row) / "model.safetensors").is_file():
            run = f"patch{row['patch_size']}-{row['recipe']}-{row['epochs']}epochs{seed_suffix(row['seed'])}"
            run += "" if row["dtype"] == "float32" else f"-{row['dtype']}"
            paths.append(folder / f"{row['system']}-{run}.md")
            write_whole(paths[-1], f"{card(row, seeds=num_seeds(row, rows))}\n".encode())
    return paths
