"""Fine-tune any model that timm knows, on a folder of images or, without one, on scikit-learn's handwritten digits.

    python examples/finetune.py                                    # digits: above 95 %, within two minutes on two cores
    python examples/finetune.py --model vix_nystrom_tiny --pretrained --data-dir photos --out runs/photos

``photos`` holds one folder per class, or train/ and val/ with such folders. The run leaves checkpoint.pt, history.csv,
curve.png and hub/, which ``timm.create_model("local-dir:runs/photos/hub", pretrained=True)`` loads. After a crash or
Ctrl-C, the same command with --resume continues with the numbers of a run that was never stopped.
"""

import argparse
from typing import NoReturn

import torch

from timm_vix._checks import InputError
from timm_vix.cli import in_one_line
from timm_vix.train.finetune import finetune
from timm_vix.train.finetune_settings import FinetuneSettings
from timm_vix.train.settings import add_settings, given_settings


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # one line, as for every other wrong input


def train(parser: argparse.ArgumentParser) -> None:
    """Fine-tune with what was given; what was not given stays with its defaults."""
    try:
        finetune(**given_settings(parser.parse_args(), FinetuneSettings))
    except torch.OutOfMemoryError as error:
        raise InputError("the device is out of memory; lower --batch-size or --img-size") from error


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, FinetuneSettings)
    in_one_line(train, "interrupted; the same command with --resume continues")(parser)


if __name__ == "__main__":
    main()
