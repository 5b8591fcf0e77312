"""Fine-tune any model that timm knows, on a folder of images or, without one, on scikit-learn's handwritten digits.

    python examples/finetune.py                                    # digits: above 95 %, within two minutes on two cores
    python examples/finetune.py --model vix_nystrom_tiny --pretrained --data-dir photos --out runs/photos

``photos`` holds one folder per class, or train/ and val/ with such folders. The run leaves checkpoint.pt, history.csv,
curve.png and hub/, which ``timm.create_model("local-dir:runs/photos/hub", pretrained=True)`` loads. After a crash or
Ctrl-C, the same command with --resume continues with the numbers of a run that was never stopped.
"""

import argparse
import sys
from typing import Any

import torch

from timm_vix.train.finetune import finetune
from timm_vix.train.settings import KeyValue


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)  # one line, as for every other wrong input


def parse() -> dict[str, Any]:
    """Return what was given as keywords of ``finetune``; what was not given stays with its defaults."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("--model", help="name of timm.list_models(), or local-dir:FOLDER; for digits vix_nystrom_cifar")
    add("--model-kwargs", nargs="+", action=KeyValue, metavar="KEY=VALUE", help="further keywords of the model")
    add("--pretrained", action="store_true", help="start from the weights that timm knows for the name")
    add("--checkpoint", metavar="FILE", help="start from this .safetensors or .pth file")
    add("--train-only", metavar="PART", help="attention, mlp, mixer or head; all else is frozen; by default nothing is")
    add("--data-dir", metavar="DIR", help="class folders, or train/ and val/ (or test/) with class folders")
    add("--val-dir", metavar="DIR", help="validation folder, if elsewhere; without any, a fifth is held out")
    add("--img-size", type=int)
    add("--in-chans", type=int, help="1 (grey) or 3")
    add("--batch-size", type=int, help="32; digits 16")
    add("--epochs", type=int, help="5; digits 9")
    add("--lr", type=float, help="learning rate of AdamW: 2e-4; digits 1e-3")
    add("--warmup", type=float, help="share of the steps in which the learning rate rises: 0.1")
    add("--weight-decay", type=float, help="0.05")
    add("--layer-decay", type=float, help="factor on the learning rate from layer to layer; off")
    add("--drop-path", type=float, help="stochastic depth: 0")
    add("--mixup", type=float, help="alpha; 0 (off)")
    add("--label-smoothing", type=float, help="0.1")
    add("--augment", help="none, light (crop and flip) or rand (and RandAugment): light")
    add("--flip", type=float, help="probability of a mirrored image: 0.5; digits 0")
    add("--seed", type=int, help="0")
    add("--device", help="auto, cpu, cuda, cuda:1 ...: auto")
    add("--amp", help="auto (bfloat16 where the processor has it), off or bfloat16: auto")
    add("--threads", type=int, help="CPU threads")
    add("--workers", type=int, help="processes that augment images: 0")
    add("--out", metavar="DIR", help="folder for the results: finetuned")
    add("--checkpoint-every", type=int, metavar="STEPS", help="steps between checkpoints inside an epoch: 200")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--license", help="for the model card")
    return vars(parser.parse_args())


def main() -> int:
    try:
        settings = parse()
        finetune(**settings)
    except torch.OutOfMemoryError:
        print("error: the device is out of memory; lower --batch-size or --img-size", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted; what was saved before is intact", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
