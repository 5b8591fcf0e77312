"""The paper's CIFAR-10 table again: every system by two recipes. Stop it at any time: nothing is trained twice.

    python examples/reproduce_vix.py --data-dir cifar10                       # all systems, both recipes
    python examples/reproduce_vix.py --data-dir cifar10 --recipes modern --systems ccn_cifar cvn_cifar --epochs 5
    python examples/reproduce_vix.py --cards cards                            # only the cards of weights that exist
    python examples/reproduce_vix.py --data-dir cifar10 --recipes modern --systems ccn_cifar --ship examples/checkpoints

``cifar10`` holds train/ and test/ with class folders. A tenth of the training images is held out of training, the epoch
that is best on it is kept, and the test images are looked at once. ``paper`` is the official code's recipe (AdamW at a
constant 1e-3, no augmentation, the batch that each system had; without the dropout that some of them had), ``modern``
is the same for all: warm-up, cosine, label smoothing, crop and flip, mixup. With an accelerator every pixel is a token
and training lasts 40 and 100 epochs; without one, patches are 2 x 2 pixels and there are 2 epochs. Nyström and
Linformer have the paper's 64 landmarks and projected tokens, but at most a quarter of the tokens: with as many as
tokens they would approximate nothing. Training is in float32 unless --amp says otherwise. Each row of
examples/results/reproduce_vix.csv says which it was, and reproduce_vix_curves.csv has a row for each of its epochs;
weights stay in --runs. With --ship those of the wanted rows also go to a folder each, small: in bfloat16, with a card
that states the accuracy of the rounded weights. On Linux MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 before
the command lets glibc keep the memory of large tensors, which saves page faults in every step, most with --compile.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from reproduction.cards import COLUMNS, CURVE, num_seeds, read_rows, seed_suffix, write_cards
from reproduction.shipping import accuracy_of, ship

import timm_vix
from timm_vix._checks import InputError
from timm_vix._device import device_name, find_device, find_dtype
from timm_vix._files import one_line
from timm_vix._records import append_record, earlier_records
from timm_vix.cli import in_one_line
from timm_vix.data.folders import list_images
from timm_vix.measure.flops import count_flops
from timm_vix.measure.job import measure_in_process
from timm_vix.train.finetune import finetune

# The order of training, the four best of the paper and its four ViX first: top-1 of the paper on CIFAR-10, from its
# leaderboard or, marked so, from the logs of its repository (the best epoch on the test images), and its batch size.
PAPER: dict[str, tuple[str, int]] = {
    "ccn_cifar": ("83.36", 160),
    "cvn_cifar": ("83.26", 160),
    "levip_cifar": ("79.50", 192),
    "hybrid_vit_cifar_rope": ("76.9", 64),
    "hybrid_vin_cifar": ("75.26", 128),
    "vix_nystrom_cifar": ("65.06", 128),
    "vix_performer_cifar": ("53.70 (log)", 128),
    "vix_linformer_cifar": ("50.65 (log)", 256),
    "vix_softmax_cifar": ("56.82 (log)", 64),
    "hybrid_pin_cifar": ("74.0", 128),
    "hybrid_vit_cifar": ("74.07 (log)", 64),
    "hybrid_vil_cifar": ("64.77 (log)", 256),
    "hybrid_vip_cifar": ("", 128),
    "vix_softmax_cifar_rope": ("69.33 (log)", 64),
    "vix_linformer_cifar_rope": ("55.89 (log)", 320),
    "vix_performer_cifar_rope": ("60.74 (log)", 192),
    "vix_nystrom_cifar_rope": ("68.37 (log)", 192),
    "hybrid_vil_cifar_rope": ("64.40 (log)", 256),
    "hybrid_vip_cifar_rope": ("76.55 (log)", 192),
    "hybrid_vin_cifar_rope": ("72.94 (log)", 192),
    "ccp_cifar": ("", 160),
    "cct_cifar": ("", 48),
    "cvp_cifar": ("", 160),
    "cvt_cifar": ("", 160),
    "levin_cifar": ("", 192),
    "pin_cifar": ("", 128),
    "pip_cifar": ("", 128),
    "hybrid_pip_cifar": ("", 128),
    "fnet2d_cifar": ("", 128),
    "vix_fnet_cifar": ("", 512),
    "hybrid_fnet_cifar": ("", 512),
    "vix_mixer_cifar": ("", 640),
    "hybrid_mixer_cifar": ("", 640),
}
# every other model of this size is trained, too
OTHERS = [name for name in timm.list_models("*_cifar*", module=timm_vix.models.__all__) if name not in PAPER]
SYSTEMS = {**PAPER, **dict.fromkeys(OTHERS, ("", 128))}
# keywords for the number of landmarks or projected tokens, and the names of the systems that have them
FEW = {
    "num_landmarks": ("vix_nystrom", "hybrid_vin", "ccn", "cvn", "levin", "pin", "hybrid_pin"),
    "num_proj_tokens": ("vix_linformer", "hybrid_vil"),
}
# epochs: with an accelerator, without
RECIPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "paper": (
        dict(lr=1e-3, schedule="constant", warmup=0.0, weight_decay=0.01, label_smoothing=0.0, augment="none"),
        40,
        2,
    ),
    "modern": (
        dict(lr=1e-3, warmup=0.05, weight_decay=0.05, label_smoothing=0.1, augment="light", mixup=0.2, batch_size=128),
        100,
        2,
    ),
}


def patched(system: str, patch_size: int) -> dict[str, Any]:
    """The keywords that give a system patches of this size, and not too many landmarks for them."""
    keywords: dict[str, Any] = dict(patch_size=patch_size)
    if system.startswith("cv"):
        keywords = dict(embed_strides=(patch_size, 1, 1))
    elif "pin_" in system or "pip_" in system:
        keywords["stride"] = patch_size
    few = (32 // patch_size) ** 2 // 4
    return keywords | {name: few for name, families in FEW.items() if few < 64 and system.startswith(families)}


def extent(recipe: str, given: argparse.Namespace, device: str) -> tuple[int, int]:
    """Epochs and patch size: what was asked for, or what the device can do."""
    _, full, reduced = RECIPES[recipe]
    epochs = (reduced if device == "cpu" else full) if given.epochs is None else given.epochs
    return epochs, given.patch_size or (2 if device == "cpu" else 1)


def recipe_name(recipe: str, strength: Optional[float]) -> str:
    """How rows call a recipe; with TrAct it is another one."""
    return recipe if strength is None else f"{recipe} tract={strength:g}"


def run_key(system: str, recipe: str, given: argparse.Namespace, device: str) -> dict[str, Any]:
    """What a run and its row are known by."""
    epochs, patch_size = extent(recipe, given, device)
    name = recipe_name(recipe, given.tract)
    dtype = str(find_dtype(given.amp, device)).removeprefix("torch.")
    return dict(system=system, recipe=name, epochs=epochs, patch_size=patch_size, seed=given.seed, dtype=dtype)


def run_folder(runs: str, row: dict[str, Any]) -> Path:
    """Where a run has its checkpoint and model."""
    half = "" if row["dtype"] == "float32" else f"-{row['dtype']}"
    name = f"{row['recipe']}-{row['epochs']}-{row['patch_size']}{seed_suffix(row['seed'])}{half}"
    return Path(runs) / name / row["system"]


def rounded(step: dict[str, Any], name: str, digits: int) -> Any:
    """A measured number, or nothing where there is none: a device without a memory count, a failed measurement."""
    return None if step.get(name) is None else round(step[name], digits)


def train(key: dict[str, Any], recipe: str, given: argparse.Namespace, device: str) -> dict[str, Any]:
    """Train or continue the run of a key by one recipe, test it, and return its row."""
    settings = RECIPES[recipe][0]
    system, epochs, patch_size = key["system"], key["epochs"], key["patch_size"]
    out = run_folder(given.runs, key)
    _, history = finetune(
        system,
        model_kwargs=patched(system, patch_size),
        data_dir=str(Path(given.data_dir) / "train"),
        img_size=None,
        held_out=0.1,
        keep="best",
        epochs=epochs,
        seed=given.seed,
        device=given.device,
        threads=given.threads,
        workers=given.workers,
        amp=given.amp,
        compile=given.compile,
        out=str(out),
        resume=(out / "checkpoint.pt").exists(),
        license="apache-2.0",
        tract=given.tract,
        **{"batch_size": SYSTEMS[system][1], **settings},
    )
    add_curve(curves_of(Path(given.results)), key, history)
    best = max(history, key=lambda row: row["top1"])
    top1, top5 = accuracy_of(out / "hub", given.data_dir, device)
    keywords = " ".join(f"{name}={value}".replace(" ", "") for name, value in patched(system, patch_size).items())
    step = measure_in_process(  # in a process of its own, whose memory is nothing else's
        {name: best[name] for name in ("device", "dtype", "threads", "batch_size")}
        | dict(
            model=f"{system} {keywords}",
            baseline=f"vix_softmax_cifar patch_size={patch_size}",
            img_size=32,
            mode="train",
        )
    )
    if "error" in step:
        print(f"a step of {system} could not be measured: {step['error']}; its row has the run's speed and no memory")
    shared = ("parameters", "device", "dtype", "threads", "batch_size", "torch", "timm")
    return dict(
        system=system,
        keywords=keywords,
        recipe=key["recipe"],
        paper=SYSTEMS[system][0],
        top1=round(top1, 2),
        top5=round(top5, 2),
        held_out_top1=round(best["top1"], 2),
        epoch=best["epoch"],
        epochs=epochs,
        patch_size=patch_size,
        tokens=(32 // patch_size) ** 2,
        images_per_second=rounded(step, "images_per_s", 1) or round(best["images_per_second"], 1),
        faster_than_softmax=rounded(step, "speedup", 3),
        peak_memory_mib=rounded(step, "peak_memory_mib", 1),
        seconds=round(sum(row["seconds"] for row in history), 1),
        seed=given.seed,
        gflops=gigaflops(system, patch_size),
        device_name=device_name(device),
        **{key: best[key] for key in shared},
    )


def curves_of(results: Path) -> Path:
    """The file that has the epochs of the runs of a results file."""
    return results.with_stem(f"{results.stem}_curves")


def add_curve(path: Path, key: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Append a row for each epoch of a run that has none; a run that was stopped in between left the first ones."""
    known = {row["epoch"] for row in earlier_records(path, CURVE)[0] if row.items() >= key.items()}
    for epoch in (epoch for epoch in history if epoch["epoch"] not in known):
        row = {name: epoch[name] for name in ("epoch", "threads")}
        row |= dict(train_loss=round(epoch["train_loss"], 4), held_out_top1=round(epoch["top1"], 2))
        append_record(path, CURVE, {**key, **row, "seconds": round(epoch["seconds"], 1)})


@torch.inference_mode()
def gigaflops(system: str, patch_size: int) -> float:
    """10^9 floating-point operations of a forward pass of one image."""
    model = timm.create_model(system, **patched(system, patch_size)).eval()
    return round(count_flops(lambda: model(torch.zeros(1, 3, 32, 32))) / 1e9, 4)


def ship_wanted(
    wanted: list[tuple[str, str]], rows: list[dict[str, Any]], given: argparse.Namespace, device: str
) -> None:
    """Ship the model of each wanted row, under the name of its system."""
    for system, recipe in wanted:
        key = run_key(system, recipe, given, device)
        for row in (row for row in rows if row.items() >= key.items()):
            folder = given.ship / f"{system}{seed_suffix(row['seed'])}"
            hub = run_folder(given.runs, row) / "hub"
            size = ship(hub, folder, row, given.data_dir, device, num_seeds(row, rows))
            print(f"{folder}: {size / 1e6:.2f} MB", flush=True)


def run_all(given: argparse.Namespace) -> None:
    """Train what has no row yet, and write the wanted cards and small models."""
    path = Path(given.results)
    if not given.data_dir and not given.cards:
        raise InputError("neither --data-dir nor --cards was given; expected one of them or both")
    if given.ship and (not given.data_dir or len(given.recipes) > 1):
        raise InputError(
            "--ship measures and stores one model of each system: expected --data-dir and one of --recipes"
        )
    device = find_device(given.device)
    # what the end needs is looked at before hours of training
    rows, damaged = read_rows(path)
    earlier_records(curves_of(path), CURVE)
    if damaged:
        print(f"{path}: {damaged} damaged lines are ignored")
    if given.data_dir:
        _, classes = list_images(Path(given.data_dir) / "train")
        list_images(Path(given.data_dir) / "test", classes)
    # system by system, so that a stop leaves whole rows of the table
    wanted = [(system, recipe) for system in given.systems for recipe in given.recipes] if given.data_dir else []
    failed: list[str] = []
    for i, (system, recipe) in enumerate(wanted):
        key = run_key(system, recipe, given, device)
        name = key["recipe"]
        if any(row.items() >= key.items() for row in rows):
            print(f"[{i + 1}/{len(wanted)}] {system}, {name}: already in {path}")
            continue
        print(f"[{i + 1}/{len(wanted)}] {system}, {name}:", flush=True)
        try:
            row = train(key, recipe, given, device)
        except (ValueError, OSError, RuntimeError) as error:  # the others may do, and the same command tries again
            print(f"error: {system}, {name}: {one_line(error)}", file=sys.stderr, flush=True)
            failed.append(f"{system} ({name})")
            continue
        rows.append(row)
        append_record(path, COLUMNS, row)
        print(f"test images: top-1 {row['top1']} %, paper {row['paper'] or 'without a number'}", flush=True)
    if given.ship:
        ship_wanted(wanted, rows, given, device)
    if given.cards:
        cards = write_cards(path, lambda row: run_folder(given.runs, row) / "hub", Path(given.cards))
        print("\n".join(map(str, cards)) or f"no card: the weights of no row of {path} are in {given.runs}")
    if failed:
        print(f"without a row: {', '.join(failed)}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with train/ and test/; none: only --cards")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS, metavar="SYSTEM")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--epochs", type=int, help="with an accelerator 40 (paper) and 100 (modern), without 2")
    parser.add_argument("--patch-size", type=int, choices=(1, 2, 4), help="with an accelerator 1, without 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tract", type=float, help="lambda of TrAct; its rows have a recipe of their own")
    parser.add_argument("--amp", choices=("off", "auto", "bfloat16"), default="off", help="auto: where it is fast")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--runs", default="runs/reproduce", help="folder of checkpoints and models")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results" / "reproduce_vix.csv"))
    parser.add_argument("--cards", metavar="DIR", help="write a model card for each row whose weights exist")
    parser.add_argument("--ship", metavar="DIR", type=Path, help="write the wanted rows' models there, in bfloat16")
    in_one_line(run_all)(parser.parse_args())


if __name__ == "__main__":
    main()
