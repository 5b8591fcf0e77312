"""Name what is on photographs, by a model that is shipped in examples/checkpoints or by any trained one.

python examples/classify.py --list                                      # the shipped models
python examples/classify.py photo.jpg --model hybrid_pin_cifar          # one of them, by name
python examples/classify.py photo.jpg --model runs/photos/hub           # the model of a run
python examples/classify.py photo.jpg --model photos.onnx               # a file of timm-vix export, .onnx or .xml
python examples/classify.py photo.jpg --delta examples/deltas/axial/delta.safetensors \\
    --model "vix_from_timm source=deit_tiny_patch16_224 mixer=axial"    # a shipped delta, on weights of timm
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub import ModelCard

import timm_vix  # noqa: F401  registers the names
from timm_vix._checks import InputError, check_integer
from timm_vix.cli import in_one_line
from timm_vix.deploy.classifier import Classifier

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SHIPPED = sorted(folder.name for folder in CHECKPOINTS.iterdir() if (folder / "config.json").is_file())


def list_shipped() -> None:
    """Print the shipped models, each with its size and the accuracy that its card states."""
    for name in SHIPPED:
        (result, *_) = ModelCard.load(CHECKPOINTS / name / "README.md").data.eval_results
        size = (CHECKPOINTS / name / "model.safetensors").stat().st_size
        print(f"{name}: {size / 1e6:.1f} MB, {result.metric_value} % of {result.dataset_name}'s test images")


def classify(given: argparse.Namespace) -> None:
    """Print the classes of each photograph."""
    if not given.photos and not given.list:
        raise InputError("no photo was given; expected picture files, or --list")
    check_integer("top", given.top, 1)
    if given.list:
        list_shipped()
    if given.photos:
        shipped = given.model in SHIPPED
        place = str(CHECKPOINTS / given.model) if shipped else given.model
        classifier = Classifier(place, given.weights, given.delta)
        print(f"{given.model}, {len(classifier.names)} classes. {classifier.note}".rstrip())
    wrong = 0
    for photo in given.photos:
        try:
            best = classifier.best(classifier.prepare(photo), given.top)
        except InputError as error:  # the others may do
            print(f"error: {error}", file=sys.stderr)
            wrong += 1
            continue
        print(f"{photo}: {', '.join(f'{name} {100 * share:.0f} %' for name, share in best.items())}")
    if wrong:
        sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path)
    parser.add_argument(
        "--model",
        default="hybrid_pin_cifar",
        help=f"{', '.join(SHIPPED)}; a folder, an exported file, hf-hub:USER/NAME or timm's name",
    )
    parser.add_argument("--weights", help="file with the weights of timm's name, .safetensors or .pth")
    parser.add_argument("--delta", metavar="FILE", help="a file of timm_vix.save_delta, put onto the weights")
    parser.add_argument("--top", type=int, default=3, help="classes shown")
    parser.add_argument("--list", action="store_true", help="show the shipped models")
    in_one_line(classify, "interrupted")(parser.parse_args())


if __name__ == "__main__":
    main()
