"""Fine-tune any model that timm knows, on a folder of images or, without one, on scikit-learn's handwritten digits.

    python examples/finetune.py                                    # digits: above 95 %, within two minutes on two cores
    python examples/finetune.py --model vix_nystrom_tiny --pretrained --data-dir photos --out runs/photos

``photos`` holds one folder per class, or train/ and val/ with such folders. The run leaves checkpoint.pt, history.csv,
curve.png and hub/, which ``timm.create_model("local-dir:runs/photos/hub", pretrained=True)`` loads. After a crash or
Ctrl-C, the same command with --resume continues with the numbers of a run that was never stopped.
"""

import argparse
from pathlib import Path
from typing import NoReturn, Optional

import torch

from timm_vix._checks import InputError
from timm_vix.cli import in_one_line
from timm_vix.train.finetune import finetune
from timm_vix.train.finetune_settings import FinetuneSettings
from timm_vix.train.settings import add_settings, given_settings


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # one line, as for every other wrong input


def time_of(file: Path) -> Optional[int]:
    """When a file was written, in ns; None if it isn't there."""
    return file.stat().st_mtime_ns if file.is_file() else None


def train(parser: argparse.ArgumentParser) -> None:
    """Fine-tune with what was given; what was not given stays with its defaults."""
    given = given_settings(parser.parse_args(), FinetuneSettings)
    checkpoint = Path(given.get("out", FinetuneSettings.out)) / "checkpoint.pt"
    former = time_of(checkpoint)
    try:
        finetune(**given)
    except KeyboardInterrupt as interrupt:
        if str(interrupt):  # says what was saved
            raise
        written = time_of(checkpoint)
        if written is None or (given.get("overwrite") and written == former):  # that of the run to be replaced
            raise KeyboardInterrupt("interrupted before the first checkpoint") from None
        option = "--resume instead of --overwrite" if given.get("overwrite") else "--resume"
        raise KeyboardInterrupt(f"interrupted; the same command with {option} continues") from None
    except torch.OutOfMemoryError as error:
        raise InputError("the device is out of memory; lower --batch-size or --img-size") from error


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, FinetuneSettings)
    in_one_line(train, "interrupted")(parser)


if __name__ == "__main__":
    main()
