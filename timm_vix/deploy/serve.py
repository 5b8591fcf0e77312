"""A page on which a trained model names what is on pictures, with the time that it takes.

    timm-vix serve runs/nystrom/hub --softmax

The page can be reached from this machine only, and sends nothing to other machines. With --softmax the same model
with softmax attention answers beside it: a converted model with the attention that it had, one of ours with the same
weights as far as they fit. Times are medians of several passes of one picture, in turn.
"""

import argparse
import socket
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Optional

import numpy as np
import torch
from timm.models import get_model_args
from torch import nn

from .._checks import InputError, check_integer
from ..measure.job import time_interleaved
from ..slots.model import hosts_of, mixer_name
from .baseline import softmax_baseline
from .classifier import Classifier
from .exported import ExportedModel

SHOWN = 5  # classes
ROUNDS = 7  # passes of each model for its time, after one that isn't timed
FONT = ["system-ui", "sans-serif"]  # of the machine, not of a server of fonts
CSS = """
.gradio-container, .gradio-container main { width: 100% !important; }
.gradio-container main { max-width: 1120px !important; margin: 0 auto !important; }
.confidence-set { font-family: var(--font) !important; }
.answer h3 { margin: 0; }
.answer { font-variant-numeric: tabular-nums; }
#verdict { font-size: 1.2em; }
"""
WELCOME = "Drop a picture, and the model names what is on it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a run or in examples/checkpoints, hf-hub:USER/NAME, a timm model, a file of timm-vix export; "
        "or 'MODEL key=value ...'",
    )
    parser.add_argument("--weights", help="file with the weights of a name, .safetensors or .pth (a state dict)")
    parser.add_argument("--delta", metavar="FILE", help="a file of timm_vix.save_delta, put onto the weights")
    parser.add_argument("--softmax", action="store_true", help="show the same model with softmax attention beside it")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's number")
    parser.add_argument("--port", type=int, default=7860, help="port of the page on 127.0.0.1; default: 7860")


def main(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        check_integer("threads", arguments.threads, 1)
        torch.set_num_threads(arguments.threads)
    page = open_page(arguments.model, arguments.softmax, arguments.port, arguments.weights, arguments.delta)
    print(f"{page.local_url} shows {arguments.model}; Ctrl-C ends it", flush=True)
    page.block_thread()


def open_page(
    model: str, softmax: bool = False, port: int = 7860, weights: Optional[str] = None, delta: Optional[str] = None
) -> Any:
    """Serve the page, and return it, a ``gradio.Blocks``, while it goes on in the background.

    Raises:
        InputError: for a model that can't be loaded or has no softmax model beside it, a port in use, no Gradio.
    """
    if find_spec("gradio") is None:
        raise InputError("the page needs Gradio; install timm-vix[serve]")
    check_port(port)
    answers = Answers(Classifier(model, weights, delta), softmax)
    page, style = build_page(import_module("gradio"), answers)
    page.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True, **style)
    return page


def check_port(port: int) -> None:
    """Raise InputError for a port that is not available."""
    check_integer("port", port, 1, 65535)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port={port} is not available: {error.strerror}; choose another with --port") from error


class Answers:
    """What a classifier, and the softmax model beside it, say of a picture, and how long they take.

    Raises:
        InputError: where softmax is wanted beside a model that has no other attention.
    """

    def __init__(self, classifier: Classifier, softmax: bool) -> None:
        self.classifier = classifier
        self.softmax: Optional[nn.Module] = None
        self.softmax_counts = False
        if softmax:
            self.softmax, self.softmax_counts = softmax_baseline(classifier.net)
            if self.softmax is None:
                exported = isinstance(classifier.net, ExportedModel)
                kind = "an exported file" if exported else "a model without efficient attention"
                raise InputError(
                    f"--softmax: model={classifier.name} is {kind}; expected one with a mixer other than softmax"
                )

    def of(self, picture: Any) -> tuple[list[dict[str, float]], list[float]]:
        """The likeliest classes with their shares, and the milliseconds, of the model and then of softmax."""
        pixels = self.classifier.prepare(picture)
        models = [model for model in (self.classifier.net, self.softmax) if model is not None]
        return [self.classifier.best(pixels, SHOWN, model) for model in models], times(models, pixels)

    def verdict(self, best: list[dict[str, float]], milliseconds: list[float]) -> str:
        """The answer in a sentence, and how the two compare."""
        first = [next(iter(shares)) for shares in best]
        if self.softmax is None:
            return f"**{first[0]}**"
        ratio = milliseconds[1] / milliseconds[0]
        speed = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"{1 / ratio:.2f} times the time of"
        agrees = self.softmax_counts and first[0] == first[1]
        return f"{'Both say ' if agrees else ''}**{first[0]}** · {speed} softmax attention"


@torch.inference_mode()
def times(models: list[nn.Module], pixels: torch.Tensor) -> list[float]:
    """Median milliseconds of each model for one picture, timed in turn."""
    seconds = time_interleaved(
        [partial(model, pixels) for model in models], dict(device="cpu", rounds=ROUNDS, seconds=0)
    )
    return (1e3 * np.median(seconds, axis=0)).tolist()


def title_of(model: nn.Module) -> str:
    """timm's name of a model; of a converted one that of its source."""
    return get_model_args(model).get("source") or model.pretrained_cfg["architecture"]


def number_of_parameters(model: nn.Module) -> int:
    """As many as the model has, or had before it was exported."""
    return model.num_parameters if isinstance(model, ExportedModel) else sum(p.numel() for p in model.parameters())


def mixers_in(model: nn.Module) -> str:
    """The names of what mixes the tokens of a model of ours or a converted one, for the title of its answers."""
    names = dict.fromkeys(mixer_name(host) for host in hosts_of(model).values())
    return ", ".join(name for name in names if name != "softmax") or "answer"


def note_of(answers: Answers) -> str:
    """What there is to know about the weights of the model, and of softmax where it is shown."""
    if answers.softmax is None:
        return answers.classifier.note
    if answers.softmax_counts:
        return f"{answers.classifier.note} Softmax attention has the weights of the model and was not trained again."
    return f"{answers.classifier.note} Softmax attention has weights that were not trained: only its time counts."


def build_page(gradio: Any, answers: Answers) -> tuple[Any, dict[str, Any]]:
    """The page, and what ``launch`` is given for its looks."""

    titles = [mixers_in(answers.classifier.net), *(["softmax"] if answers.softmax else [])]

    def answer(given: Any) -> list[Any]:
        nothing = [part for title in titles for part in (f"### {title}", None)]
        if given is None:
            return [WELCOME, *nothing]
        try:
            if isinstance(given, Exception):
                raise InputError("This file cannot be read as a picture.") from given
            best, milliseconds = answers.of(given)
        except InputError as error:
            return [f"**{error}**", *nothing]
        columns = zip(titles, best, milliseconds)
        parts = [part for title, shares, ms in columns for part in (f"### {title}\n**{ms:.1f} ms**", shares)]
        return [answers.verdict(best, milliseconds), *parts]

    def picture_or_error(payload: Any) -> Any:
        try:
            return gradio.Image.preprocess(picture, payload)
        except Exception as error:  # a damaged file raises as PIL's readers like
            return error

    net = answers.classifier.net
    size = " x ".join(map(str, answers.classifier.size))
    facts = f"{number_of_parameters(net) / 1e6:.1f} M parameters · {size} px · {net.num_classes} classes"
    # pictures that were dropped here are deleted after an hour
    options: dict[str, Any] = dict(analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600))
    with gradio.Blocks(title=f"{title_of(net)} · timm_vix", **options) as page:
        gradio.Markdown(f"# {title_of(net)}\n{facts} · {torch.get_num_threads()} CPU threads")
        with gradio.Row():
            with gradio.Column(scale=4):
                picture = gradio.Image(
                    type="pil", image_mode=None, sources=["upload", "clipboard"], label="Picture", height=380
                )
                picture.preprocess = picture_or_error
            with gradio.Column(scale=5):
                outputs = [gradio.Markdown(WELCOME, elem_id="verdict")]
                with gradio.Row():
                    for i, title in enumerate(titles):
                        with gradio.Column(min_width=200):
                            time_of = gradio.Markdown(f"### {title}", elem_id=f"time{i}", elem_classes="answer")
                            best = gradio.Label(
                                show_label=False, num_top_classes=SHOWN, show_heading=False, elem_id=f"best{i}"
                            )
                            outputs += [time_of, best]
                gradio.Markdown(note_of(answers))
        picture.change(answer, picture, outputs, api_name=False, show_progress="hidden")
    theme = gradio.themes.Soft(font=FONT, font_mono=["ui-monospace", "monospace"])
    return page, dict(theme=theme, css=CSS, footer_links=[])
