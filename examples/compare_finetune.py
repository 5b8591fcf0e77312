"""Train several models by one recipe, and collect one CSV row per epoch. Stop it at any time: nothing is trained twice.

    python examples/compare_finetune.py caltech101 --data-dir caltech101 --weights deit_tiny_patch16_224.safetensors
    python examples/compare_finetune.py cifar10 --data-dir cifar10 --epochs 1
    python examples/compare_finetune.py claims --data-dir cifar10
    python examples/compare_finetune.py parts_caltech101 --data-dir caltech101 --weights deit_tiny.safetensors
    python examples/compare_finetune.py parts_cifar10 --data-dir cifar10 --weights deit_tiny.safetensors

The folders hold train/ and val/ (or test/) with class folders. Unfinished runs and checkpoints stay in --runs; finished
models are skipped, because their rows are in examples/results/finetune_<table>.csv.
"""

import argparse
from pathlib import Path
from typing import Any

from reproduce_vix import rounded
from torch import nn

from timm_vix._checks import InputError
from timm_vix._names import parse_model
from timm_vix._records import Columns, append_record, check_writable, earlier_records
from timm_vix.cli import in_one_line
from timm_vix.measure.job import measure_in_process
from timm_vix.train.finetune import finetune

# DeiT's weights expect ImageNet's mean and deviation, so the models take them from the tag of these weights.
CALTECH101 = dict(epochs=5, img_size=224, batch_size=32, lr=2e-4, weight_decay=0.05, augment="light")
# attention only, after Touvron et al. 2022
PARTS = [f"deit_tiny_patch16_224.fb_in1k{only}" for only in ("", " train_only=attention", " train_only=mlp")]
SWAPPED = [f"vix_{mixer}_tiny.deit_fb_in1k" for mixer in ("nystrom", "linformer", "performer")]
TABLES = {
    # the second on a part of the images, in a file of its own
    **dict.fromkeys(("caltech101", "caltech101_part"), (CALTECH101, ["deit_tiny_patch16_224.fb_in1k", *SWAPPED])),
    "cifar10": (
        dict(epochs=1, img_size=32, model_kwargs=dict(patch_size=2), batch_size=64, lr=1e-3, augment="light"),
        ["hybrid_vin_cifar", "vix_nystrom_cifar", "vix_softmax_cifar", "hybrid_vit_cifar_rope"],
    ),
    "parts_caltech101": (CALTECH101, PARTS),
    "parts_cifar10": (dict(CALTECH101, img_size=96), PARTS),
    # the claims of the papers about stems, positions and feed-forward layers, at few tokens: minutes on a processor
    "claims": (
        dict(epochs=3, img_size=32, model_kwargs=dict(patch_size=4), batch_size=128, lr=1e-3, augment="light"),
        [
            *("vix_softmax_cifar", "vix_softmax_cifar_rope", "hybrid_vit_cifar", "hybrid_vit_cifar stem=conv_linear"),
            *(f"vix_softmax_cifar {dhvt}" for dhvt in ("stem=sope", "mlp=daff", "stem=sope mlp=daff")),
        ],
    ),
}


# of a table: the columns of finetune's history, and of ``step_cost``
COLUMNS: Columns = dict(
    **dict(model=str, dataset=str, epoch=int, train_loss=float, top1=float, top5=float, lr=float, seconds=float),
    **dict(images_per_second=float, parameters=int, device=str, dtype=str, threads=int, batch_size=int, img_size=int),
    **dict(torch=str, timm=str),
)
PARTS_COLUMNS: Columns = dict(trained=int, peak_memory_mib=float, step_ms=float, faster_than_all=float)


def step_cost(model: str, net: nn.Module, row: dict[str, Any]) -> dict[str, Any]:
    """A training step of the part that trains, beside one of the whole model: parameters, memory, time.

    A measurement that fails is printed and leaves cells empty.
    """
    job = {name: row[name] for name in ("img_size", "batch_size", "dtype", "device", "threads")}
    found = measure_in_process(dict(job, model=model, baseline=model.split()[0], mode="train", rounds=15))
    if "error" in found:
        print(f"a step of {model} could not be measured: {found['error']}; its rows have no memory and time of it")
    return dict(
        trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
        peak_memory_mib=rounded(found, "peak_memory_mib", 1),
        step_ms=rounded(found, "latency_p50_ms", 1),
        faster_than_all=rounded(found, "speedup", 3),
    )


def run_all(given: argparse.Namespace) -> None:
    """Train the models of a table that have no rows yet."""
    settings: dict[str, Any]
    settings, models = TABLES[given.table]
    # float32, so that rows of any processor can be compared
    settings = dict(settings, data_dir=given.data_dir, checkpoint=given.weights, device=given.device, amp="off")
    settings.update(threads=given.threads, workers=given.workers)
    for name in ("epochs", "img_size"):
        if getattr(given, name) is not None:
            settings[name] = getattr(given, name)
    path = Path(given.results) / f"finetune_{given.table}.csv"
    columns = {**COLUMNS, **PARTS_COLUMNS} if given.table.startswith("parts_") else COLUMNS
    check_writable(path)
    rows, _ = earlier_records(path, columns)
    saved = [text.partition("=") for text in given.saved or ()]
    folders = {name: folder for name, _, folder in saved if folder}
    if given.models or saved:
        models = [*(given.models or ()), *(name for name, _, _ in saved)]
    for model in models:
        size, epochs = settings["img_size"], settings["epochs"]
        known = [row["epoch"] for row in rows if (row["model"], row["img_size"]) == (model, size)]
        trained = max(known, default=0)
        if trained and trained == epochs:
            print(f"{model}: already in {path}")
            continue
        out = Path(given.runs) / given.table / f"{model}_{size}px_{epochs}epochs".replace(" ", "_")
        started = (out / "checkpoint.pt").exists()
        # one with a checkpoint was stopped before all its rows were there
        if trained > epochs or (trained and not started):
            raise InputError(f"{path} has {model} after {trained} epochs; another --results keeps {epochs} apart")
        print(f"{model}:")
        if model in folders:  # which have weights and keywords
            start = dict(model=f"local-dir:{folders[model]}", pretrained=True, model_kwargs=None, checkpoint=None)
        else:
            name, keywords = parse_model(model)
            start = dict(model=name, train_only=keywords.pop("train_only", None))
            start["model_kwargs"] = {**settings.get("model_kwargs", {}), **keywords}
        net, history = finetune(**{**settings, **start}, out=str(out), resume=started)
        extra = step_cost(model, net, history[-1]) if given.table.startswith("parts_") else {}
        for row in history:  # also those that are there: of two rows of one epoch the last counts
            append_record(path, columns, dict(model=model, dataset=given.table, **row, **extra))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--weights", help="initial weights, .safetensors or .pth; none: from scratch")
    parser.add_argument("--models", nargs="+", help="other models than the table's")
    parser.add_argument(
        "--saved", nargs="+", metavar="NAME=FOLDER", help="converted models, as timm-vix transfer leaves"
    )
    parser.add_argument("--img-size", type=int, help="another size than the table's")
    parser.add_argument("--epochs", type=int, help="per model; caltech101 5, cifar10 1")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", default="runs", help="folder for checkpoints and models")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results"), help="folder of the CSV")
    in_one_line(run_all)(parser.parse_args())


if __name__ == "__main__":
    main()
