"""The command ``timm-vix``: it lists, measures, compares, converts, exports, uploads and serves models.

A subcommand is a module with a docstring, ``add_arguments(parser)`` and ``main(arguments)``, which is imported when it
is the one that runs.
"""

import argparse
import importlib
import io
import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Optional

import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import __version__, models
from ._checks import InputError
from ._names import near_names
from .measure.flops import count_flops
from .measure.job import tokens_of
from .measure.process import explain

# commands that, once stopped, go on when they are called again
CONTINUING = ("cost", "compare", "plan")
COMMANDS = dict(
    cost=("benchmark.cost", "latency, memory and FLOPs of any timm models, beside softmax"),
    advise=("benchmark.advise", "which mixer is fastest here, and from how many tokens"),
    compare=("benchmark.compare", "train several models by one recipe: accuracy beside cost"),
    plan=("planning.plan", "which layers of a trained ViT to convert, and to what, for a wanted agreement or cost"),
    transfer=("train.transfer", "convert a trained ViT and distil the original into it, without labels"),
    export=("deploy.export_command", "write a model as ONNX, OpenVINO or torch file, also in int8, and check it"),
    push=("deploy.push", "check the folder of a run, and upload it to the Hugging Face Hub"),
    serve=("deploy.serve", "a page in the browser on which a trained model classifies pictures"),
    report=("benchmark.report", "a page and figures from the tables of cost and compare"),
)


def matching_names(pattern: str) -> list[str]:
    """Our registered names that match a pattern with wildcards."""
    found = timm.list_models(pattern, module=models.__all__)
    if not found:
        near = near_names(pattern, timm.list_models(module=models.__all__))
        raise argparse.ArgumentTypeError(f"no model matches {pattern!r}; near names: {near}")
    return found


def script_file(path: str) -> str:
    """The path of a script, for ``argparse``; an error if there is no such file."""
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"{path!r} is no file; expected a Python script such as timm's validate.py")
    return path


def list_models(arguments: argparse.Namespace) -> None:
    """Print parameters, cost, tokens and default weights of our models."""
    width = max(map(len, arguments.names))
    print(f"{'name':{width}}  params (M)  GFLOPs  tokens  default weights")
    for name in arguments.names:
        parameters, flops, tokens = size_of(name)
        weights = timm.get_pretrained_cfg(name).hf_hub_id or "-"
        shown = "-" if tokens is None else tokens
        print(f"{name:{width}}  {parameters / 1e6:10.2f}  {flops / 1e9:6.2f}  {shown:>6}  {weights}", flush=True)
    print(
        "\nGFLOPs: forward pass of one image at the default size, a multiply-add counted as two. Convolutions, matrix\n"
        "products, attention and Fourier transforms are counted; element-wise operations are not.\n"
        "Tokens: of the first stage where a model has several; -: it sees maps of features.\n"
        "Default weights: the softmax model of the same size, from which fine-tuning starts; -: none."
    )


def size_of(name: str) -> tuple[int, int, Optional[int]]:
    """Parameters, floating-point operations of one image and tokens of a registered model at its default size.

    On the meta device, where nothing is computed: all our models take seconds.
    """
    # torch's counter can't follow a weight that is handed from module to module while gradients are off
    model = timm.create_model(name, device="meta").eval().requires_grad_(False)
    # attention as its two matrix products: the meta device has no fused kernel
    image = torch.zeros(1, *model.pretrained_cfg["input_size"], device="meta")
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        flops = count_flops(lambda: model(image))
    return sum(p.numel() for p in model.parameters()), flops, tokens_of(model)


def run_script(arguments: argparse.Namespace) -> None:
    """Run a script as ``python SCRIPT ARGS`` would; our names are registered, since this package was imported."""
    sys.argv = [arguments.script, *arguments.arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments.script)))
    runpy.run_path(arguments.script, run_name="__main__")


def in_one_line(
    command: Callable[[argparse.Namespace], None], interrupted: str = "interrupted; the same command continues"
) -> Callable[[argparse.Namespace], None]:
    """The command, with one line for wrong input, for a file that can't be written and for Ctrl-C.

    The exit codes are 2, 2 and 130; 1 without a line where the reader of the output, such as ``head``, wants no more.
    Any other exception is a defect, and keeps its traceback.

    Args:
        interrupted: the line for Ctrl-C, where the command has none of its own.
    """

    def call(arguments: argparse.Namespace) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has another
            sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are no text
        try:
            command(arguments)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python writes at its end
            sys.exit(1)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except (MemoryError, RuntimeError) as error:
            reason = explain(error)
            if not reason.startswith("out of memory"):
                raise
            print(f"error: {reason}; fewer or smaller images need less", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as interrupt:
            print(str(interrupt) or interrupted, file=sys.stderr)
            sys.exit(130)

    return call


def main() -> None:
    """Run the subcommand that the command line names."""
    parser = argparse.ArgumentParser(
        prog="timm-vix", description="Vision transformers with efficient attention, for timm."
    )
    parser.add_argument("--version", action="version", version=f"timm_vix {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="our models: parameters, GFLOPs, tokens, default weights")
    command.add_argument(
        "names",
        nargs="?",
        default="*",
        type=matching_names,
        metavar="PATTERN",
        help="e.g. 'vix_nystrom_*'; default: all",
    )
    command.set_defaults(function=in_one_line(list_models, "interrupted"))

    command = commands.add_parser("run", help="run one of timm's scripts, unmodified, with our names registered")
    command.add_argument("script", type=script_file, metavar="SCRIPT", help="e.g. validate.py")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="what the script is given")
    command.set_defaults(function=run_script)

    # the docstrings hold formulas and lists, which the default formatter would run together
    raw = argparse.RawDescriptionHelpFormatter
    for name, (path, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, formatter_class=raw)
        if sys.argv[1:2] == [name]:
            module = importlib.import_module(f".{path}", __package__)
            command.description = module.__doc__
            module.add_arguments(command)
            main_of = in_one_line(module.main) if name in CONTINUING else in_one_line(module.main, "interrupted")
            command.set_defaults(function=main_of)

    arguments = parser.parse_args()
    # so that what is half written is removed, as after Ctrl-C
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments.function(arguments)
