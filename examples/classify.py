"""Classify photographs with a trained model, such as the hub/ folder of a run.

python examples/classify.py photo.jpg --model runs/reproduce/modern-100-1/ccn_cifar/hub      # a second
"""

import argparse
import sys
from pathlib import Path

import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_input_data_config

import timm_vix  # noqa: F401  registers the names
from timm_vix._files import one_line

CHECKPOINT = Path(__file__).parent / "checkpoint"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder with config.json and model.safetensors")
    parser.add_argument("--top", type=int, default=3, help="classes shown")
    given = parser.parse_args()
    try:
        if given.top < 1:
            raise ValueError(f"top={given.top}; allowed is a whole number above 0")
        if not (given.model / "config.json").is_file():
            raise ValueError(f"model={given.model} holds no config.json; train one with examples/reproduce_vix.py")
        try:
            model = timm.create_model(f"local-dir:{given.model}", pretrained=True).eval()
        except Exception as error:  # timm, torch and safetensors raise by kind of damage
            reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
            raise ValueError(f"model={given.model} cannot be loaded: {reason}") from error
        config = resolve_input_data_config(model)
        channels = config["input_size"][0]
        if channels not in (1, 3):
            raise ValueError(f"model={given.model} takes images of {channels} channels; allowed is 1 (grey) or 3 (RGB)")
        names = model.pretrained_cfg.get("label_names") or []
        if len(names) != model.num_classes:  # names of other classes
            names = [str(i) for i in range(model.num_classes)]
        transform = create_transform(**config)
        for photo in given.photos:
            with Image.open(photo) as image, torch.inference_mode():
                pixels = transform(image.convert("RGB" if channels == 3 else "L"))
                shares = model(pixels.unsqueeze(0)).softmax(1)[0]
            best = shares.topk(min(given.top, len(names)))
            answers = (
                f"{names[i]} {100 * share:.0f} %" for share, i in zip(best.values.tolist(), best.indices.tolist())
            )
            print(f"{photo}: {', '.join(answers)}")
    except (ValueError, OSError, UnidentifiedImageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
