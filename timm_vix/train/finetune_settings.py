"""The settings of ``finetune``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from .._checks import InputError, check_at_most_one
from .._names import check_model
from .._weights import check_weights
from ..conversion.freeze import PARTS
from .settings import (
    ABOVE_0,
    ABOVE_0_TO_1,
    BETWEEN_0_AND_1,
    FROM_0,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    Settings,
    check_folder,
    local_folder,
    one_of,
    setting,
)

# What stands in for an argument that is None: digits are learnt from scratch, a folder is usually fine-tuned.
DIGITS = dict(model="vix_nystrom_cifar", img_size=32, batch_size=16, epochs=9, lr=1e-3, flip=0.0)
FOLDER = dict(batch_size=32, epochs=5, lr=2e-4, flip=0.5)


def by_data(meaning: str, name: str) -> str:
    """The meaning of a setting whose default depends on the images."""
    return f"{meaning}; default: {FOLDER.get(name, 'that of the model')}, for the digits {DIGITS[name]}"


@dataclass
class FinetuneSettings(Settings):
    """The keywords of ``finetune``; ``None`` is replaced by what suits the images."""

    model: str = setting(
        None,
        "name in timm's registry, or local-dir:DIR or hf-hub:USER/NAME, which have weights; only digits have a default",
    )
    model_kwargs: Optional[dict[str, Any]] = setting(  # noqa: RUF009  (a field, not a shared default)
        None, "further keywords of the model, plain values"
    )
    pretrained: bool = setting(False, "start from the weights that timm knows for the name")
    checkpoint: Optional[str] = setting(
        None,
        "start from this .safetensors or .pth file (a state dict; nothing else is unpickled)",
        may_change=True,
        alias="--weights",
    )
    train_only: Optional[str] = setting(
        None, "train this part and freeze the rest; what changed becomes delta.safetensors", one_of(*PARTS)
    )
    data_dir: Optional[str] = setting(
        None,
        "class folders, or train/ and val/ (validation/, valid/, test/) with class folders, or a data set of timm's "
        "factory such as hfds/NAME; None: the 1,797 handwritten digits of scikit-learn",
        may_change=True,
    )
    val_dir: Optional[str] = setting(None, "validation folder of class folders, where it is elsewhere", may_change=True)
    held_out: float = setting(
        0.2, "share of every class that is held out for validation, if there are no validation images", BETWEEN_0_AND_1
    )
    img_size: Optional[int] = setting(None, by_data("side of the images in pixels", "img_size"), ABOVE_0)
    in_chans: Optional[int] = setting(None, "channels of the images: 1 (grey) or 3 (RGB)", ABOVE_0)
    batch_size: int = setting(None, by_data("images a step", "batch_size"), ABOVE_0)
    epochs: int = setting(None, by_data("passes over the images", "epochs"), ABOVE_0)
    lr: float = setting(None, by_data("highest learning rate of AdamW", "lr"), ABOVE_0)
    warmup: float = setting(0.1, "share of all steps in which the learning rate rises", FROM_0_BELOW_1)
    schedule: str = setting(
        "cosine", "whether the learning rate then falls to zero or stays", one_of("cosine", "constant")
    )
    keep: str = setting(
        "last", "epoch whose weights are returned; best: that of the highest top-1", one_of("last", "best")
    )
    weight_decay: float = setting(0.05, "weight decay of AdamW", FROM_0)
    layer_decay: Optional[float] = setting(
        None, "factor on the learning rate from each layer to the one below", ABOVE_0_TO_1
    )
    drop_path: float = setting(0.0, "stochastic depth: share of skipped blocks", FROM_0_BELOW_1)
    mixup: float = setting(0.0, "alpha of mixup's beta distribution; 0 is off", FROM_0)
    label_smoothing: float = setting(0.1, "share of a label that is spread over all classes", FROM_0_BELOW_1)
    augment: str = setting("light", "light: crop and flip; rand: RandAugment as well", one_of("none", "light", "rand"))
    flip: float = setting(None, by_data("probability of a mirrored image", "flip"), FROM_0_TO_1)
    seed: int = setting(0, "seed of the order of images, of their augmentation and of new weights", FROM_0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps", may_change=True)
    amp: str = setting("auto", "auto: bfloat16 where the processor has it", one_of("auto", "off", "bfloat16"))
    compile: bool = setting(
        False, "train with torch.compile, which pays in long runs; dropout draws other numbers", may_change=True
    )
    threads: Optional[int] = setting(None, "CPU threads; None: torch's number", ABOVE_0, may_change=True)
    workers: int = setting(0, "processes that load images", FROM_0, may_change=True)
    out: str = setting("finetuned", "folder for the results", may_change=True)
    checkpoint_every: int = setting(200, "steps between checkpoints inside an epoch", ABOVE_0, may_change=True)
    resume: bool = setting(False, "continue the run in out", may_change=True)
    overwrite: bool = setting(False, "replace the run in out", may_change=True)
    license: str = setting("other", "licence of the model, for its card", may_change=True)
    data_root: Optional[str] = setting(None, "folder of the files of a data set of timm's factory", may_change=True)
    tract: Optional[float] = setting(
        None, "lambda of TrAct, which changes the gradient of the first layer; the paper has 0.1, None is off", ABOVE_0
    )

    def __post_init__(self) -> None:
        if self.data_dir is None and not self.model:
            self.model_kwargs = {"patch_size": 4, "num_landmarks": 16, **(self.model_kwargs or {})}
        for name, value in (DIGITS if self.data_dir is None else FOLDER).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not self.model:  # None, where there is no default
            raise InputError(
                "model is missing: with data_dir it is a name of timm.list_models(), such as vix_nystrom_tiny"
            )
        super().__post_init__()
        if self.mixup and self.batch_size % 2:
            raise InputError(f"batch_size={self.batch_size}: mixup pairs images; allowed is an even number")
        check_model(self.model)
        if not self.resume:  # an earlier version took both, and such a run may be continued
            check_at_most_one(checkpoint=self.checkpoint, pretrained=self.pretrained)
            check_weights("checkpoint", self.checkpoint)  # a continued run has its weights in its own checkpoint
        starts = dict(model=local_folder(self.model), checkpoint=self.checkpoint)
        check_folder(Path(self.out), self.resume, self.overwrite, **starts)
