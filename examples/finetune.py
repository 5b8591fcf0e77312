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
from timm_vix.train.finetune_settings import FinetuneSettings
from timm_vix.train.settings import add_settings, given_settings


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)  # one line, as for every other wrong input


def parse() -> dict[str, Any]:
    """Return what was given as keywords of ``finetune``; what was not given stays with its defaults."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, FinetuneSettings)
    return given_settings(parser.parse_args(), FinetuneSettings)


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
