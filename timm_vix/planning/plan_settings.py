"""The settings of ``timm-vix plan``."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Optional, Union

from .._checks import InputError, check_at_most_one, check_choice
from ..conversion.scaling import ScaleLogits
from ..mixers import MIXERS
from ..mixers._keywords import check_keywords
from ..train.settings import ABOVE_0, ABOVE_0_TO_1, Range, Settings, check_keywords_are_plain, one_of, setting
from ..train.teacher import check_teacher

# besides mixers, what a plan may choose
MERGE = "merge"
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    name: list(mixer_class.candidates) for name, mixer_class in MIXERS.items() if mixer_class.candidates
}
FROM_1 = Range("1 or more", lambda value: value >= 1)
FROM_2 = Range("2 or more, since one half chooses and the other reports", lambda value: value >= 2)


def parse_scale(text: str) -> ScaleLogits:
    """``scale_logits`` from a command line: a number, or a word for ``convert`` to read."""
    return int(text) if text.isdecimal() else text


@dataclass
class PlanSettings(Settings):
    """The keywords of ``plan_layers``."""

    source: str = setting(MISSING, "timm model, a VisionTransformer or Eva")
    data_dir: str = setting(MISSING, "folder of images, also in folders below it")
    mixer: Optional[Union[list, tuple, dict]] = setting(  # noqa: RUF009  (a field, not a shared default)
        None,
        f"what to choose from, of {', '.join(CANDIDATES)} and {MERGE}, the merging of tokens; None: everything",
        nargs="+",
    )
    keep: Optional[float] = setting(
        None,
        "the fastest model whose predictions stay the same on this share of the images, or without a classifier, whose "
        "output tokens have this mean cosine to those of the source; None: 0.99, unless there is a speedup or a budget",
        ABOVE_0_TO_1,
    )
    labels: bool = setting(
        False,
        "keep is a share of the source's top-1 instead; data_dir holds class folders, or labels.csv, whose first two "
        "columns are a file, there or in images/, and the number of its class",
    )
    speedup: Optional[float] = setting(
        None, "instead of keep: the most faithful model that is at least so many times as fast as softmax", FROM_1
    )
    budget_gflops: Optional[float] = setting(
        None,
        "instead of keep: the most faithful model of at most so many GFLOPs per image, a multiply-add counted as two",
        ABOVE_0,
    )
    scale_logits: Optional[Union[str, int]] = setting(
        None,
        "log, or the number of tokens in training: the logits of the source are scaled, and those of the plan, see "
        "timm_vix.convert; 0: they stay as they are; None: with labels they are scaled if that raises the top-1. "
        "Agreement is measured with the scaled source; with labels keep is a share of the unscaled source's top-1",
        parse=parse_scale,
    )
    source_kwargs: Optional[dict[str, Any]] = setting(  # noqa: RUF009
        None, "further keywords of the source, plain values"
    )
    weights: Optional[str] = setting(
        None, "file with the source's weights, .safetensors or .pth (a state dict; nothing else is unpickled)"
    )
    pretrained: bool = setting(False, "take timm's weights of the source instead")
    img_size: Optional[int] = setting(None, "side of the images in pixels; None: the source's own", ABOVE_0)
    images: int = setting(
        200, "how many, spread over the folder: one half chooses the plan, the other tells what it keeps", FROM_2
    )
    batch_size: int = setting(25, "images a forward pass, where agreement is measured", ABOVE_0)
    latency_batch: int = setting(1, "images a forward pass, where time is measured", ABOVE_0)
    dtype: str = setting("float32", "of weights and images", one_of("float32", "bfloat16"))
    minutes: float = setting(
        15.0,
        "time limit of the search, after which the best plan so far is written, or an error says that none will do",
        ABOVE_0,
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    threads: Optional[int] = setting(None, "CPU threads; None: torch's number", ABOVE_0)
    out: str = setting("plan.json", "the plan, .json; figure and table have the same name with .png and .csv")

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = dict(keep=self.keep, speedup=self.speedup, budget_gflops=self.budget_gflops)
        check_at_most_one(**targets)
        if all(value is None for value in targets.values()):
            self.keep = 0.99
        if self.mixer is not None and not (isinstance(self.mixer, (list, tuple, Mapping)) and self.mixer):
            raise InputError(f"mixer={self.mixer!r}: expected names, such as ['axial', 'merge']")
        for name in self.mixer or ():
            check_choice("mixer", name, (*CANDIDATES, MERGE))
        for name, tried in self.mixer.items() if isinstance(self.mixer, Mapping) else ():
            if not isinstance(tried, (list, tuple)) or not all(isinstance(keywords, Mapping) for keywords in tried):
                raise InputError(f"mixer: {name}={tried!r}: expected a list of mappings from keywords to values")
            if not tried and name != MERGE:
                raise InputError(
                    f"mixer: {name}=[] tries nothing; expected at least one mapping, such as {name}=[{{}}]"
                )
            for keywords in tried:
                if name == MERGE:
                    raise InputError(f"mixer: {MERGE} takes no keywords; allowed is {MERGE}=[]")
                check_keywords(name, keywords)
                check_keywords_are_plain(f"mixer: {name}", keywords)
        check_teacher(self)
        if Path(self.out).suffix != ".json":
            raise InputError(f"out={self.out}: expected a name that ends in .json")

    def candidates(self) -> list[dict[str, Any]]:
        """What is tried in a layer besides softmax: "mixer" and its keywords."""
        chosen = self.mixer if isinstance(self.mixer, Mapping) else {n: CANDIDATES.get(n, []) for n in self.names()}
        return [{"mixer": name, **keywords} for name, all_own in chosen.items() for keywords in all_own]

    def names(self) -> list[str]:
        """What to choose from."""
        return list(dict.fromkeys(self.mixer or (*CANDIDATES, MERGE)))
