"""The settings of ``transfer``."""

import os
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Optional, Union

from .._checks import InputError
from ..conversion.layers import Layers
from .settings import ABOVE_0, ABOVE_0_TO_1, FROM_0, Settings, check_folder, local_folder, one_of, setting
from .teacher import check_teacher


def parse_layers(text: str) -> Layers:
    """Layers from a command line: "0,3,5" is a list of indices, anything else is for ``transfer`` to read."""
    return [int(part) for part in text.split(",") if part] if text.replace(",", "").isdecimal() else text


@dataclass
class TransferSettings(Settings):
    """The keywords of ``transfer``."""

    source: str = setting(MISSING, "timm model, a VisionTransformer or Eva, e.g. deit_tiny_patch16_224")
    data_dir: Union[str, list[str]] = setting(  # noqa: RUF009
        MISSING,
        "folder of images, also in folders below it, or several folders; no labels are needed",
        may_change=True,
        nargs="+",
    )
    mixer: Optional[str] = setting(
        None,
        "name of a mixer, as for timm_vix.convert; None: nystrom, or with only merge or scale_logits in "
        "mixer_kwargs the attention that each layer has",
    )
    layers: Layers = setting(  # noqa: RUF009  (a field, not a shared default)
        "all", "all, first-6, last-6, every-2, 0,3,5 or the .json file of a plan", parse=parse_layers
    )
    mixer_kwargs: Optional[dict[str, Any]] = setting(  # noqa: RUF009
        None, "keywords of the mixer, e.g. num_landmarks=64; also merge=0.3 and scale_logits=197, see timm_vix.convert"
    )
    source_kwargs: Optional[dict[str, Any]] = setting(  # noqa: RUF009
        None, "further keywords of the source, plain values"
    )
    weights: Optional[str] = setting(
        None,
        "file with the source's weights, .safetensors or .pth (a state dict; nothing else is unpickled)",
        may_change=True,
    )
    pretrained: bool = setting(False, "take timm's weights of the source instead", may_change=True)
    img_size: Optional[int] = setting(None, "side of the images in pixels; None: the source's own", ABOVE_0)
    block_steps: int = setting(300, "steps of stage 1, block by block; 0 leaves it out", FROM_0)
    distill_steps: int = setting(100, "steps of stage 2, the whole model; 0 leaves it out", FROM_0)
    block_lr: float = setting(1e-3, "highest learning rate of stage 1; it follows a cosine to zero", ABOVE_0)
    distill_lr: float = setting(5e-5, "highest learning rate of stage 2; it follows a cosine to zero", ABOVE_0)
    distill_part: str = setting(
        "attention", "what stage 2 trains: the replaced attention, or the whole network", one_of("attention", "all")
    )
    layer_decay: float = setting(
        1.0, "factor of the learning rate from each layer to the one below, with distill_part=all", ABOVE_0_TO_1
    )
    pass_through: float = setting(
        0.0,
        "weight in stage 1 of the error of the original's output with one of its blocks replaced by the converted one",
        FROM_0,
    )
    mean_free: float = setting(
        0.0, "weight of the error of the tokens minus its mean over them, in both stages", FROM_0
    )
    start: Optional[str] = setting(
        None, "folder of an earlier transfer, whose weights this one starts from", may_change=True
    )
    batch_size: int = setting(16, "images a step, over all processes", ABOVE_0)
    seed: int = setting(0, "seed of the order and cropping of the images", FROM_0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps", may_change=True)
    amp: str = setting("auto", "auto: bfloat16 where the processor has it", one_of("auto", "off", "bfloat16"))
    threads: Optional[int] = setting(None, "CPU threads; None: torch's number", ABOVE_0, may_change=True)
    workers: int = setting(0, "processes that load images", FROM_0, may_change=True)
    out: str = setting("transferred", "folder for the results", may_change=True)
    checkpoint_every: int = setting(50, "steps between checkpoints", ABOVE_0, may_change=True)
    resume: bool = setting(False, "continue the run in out", may_change=True)
    overwrite: bool = setting(False, "replace the run in out", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if own := {"model", "mixer", "layers"} & (self.mixer_kwargs or {}).keys():
            raise InputError(f"mixer_kwargs: {', '.join(sorted(own))} is no keyword of a mixer; it is a setting itself")
        if isinstance(self.data_dir, (list, tuple)):
            self.data_dir = [os.fspath(f) if isinstance(f, os.PathLike) else f for f in self.data_dir]
        folders = [self.data_dir] if isinstance(self.data_dir, str) else self.data_dir
        if not isinstance(folders, (list, tuple)) or not folders or not all(isinstance(f, str) for f in folders):
            raise InputError(f"data_dir={self.data_dir!r}: expected a folder, or a list of folders")
        if self.mixer is not None and str(self.layers).endswith(".json"):
            raise InputError(f"mixer={self.mixer!r}: a plan names the mixer of each layer; allowed is None")
        if self.mixer is None and not {"merge", "scale_logits"} & (self.mixer_kwargs or {}).keys():
            self.mixer = "nystrom"
        check_teacher(self)
        starts = dict(source=local_folder(self.source), weights=self.weights, start=self.start)
        check_folder(Path(self.out), self.resume, self.overwrite, **starts)

    @property
    def folders(self) -> list[Path]:
        """The folders of images."""
        return [Path(folder) for folder in ([self.data_dir] if isinstance(self.data_dir, str) else self.data_dir)]
