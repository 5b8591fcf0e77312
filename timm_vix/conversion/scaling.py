"""Logits that grow with the number of tokens, for a model that sees more of them than it was trained on.

    Y = softmax(s Q K^T / sqrt(D)) V          s = max(1, log N / log N_train)

The more tokens there are, the flatter softmax attention gets; logits that grow with the log of their number make up for
it (Chiang & Cholak 2022, arXiv 2202.12172, section 5; Jin et al. 2023, arXiv 2306.08645, for images of other sizes). A
model at the size of its training or below computes what it did: s = 1.

The slot multiplies the queries, so all mechanisms with logits take part, and learned parameters stay as they are.
Merged tokens count as the patches for which they stand.
"""

from typing import Union

from torch import nn

from .._checks import InputError, is_integer
from .._names import weights_config
from ..slots.attention_slot import AttentionSlot
from ..slots.model import slots_of

ScaleLogits = Union[str, int]
FORMS = "expected 'log', or the number of tokens with which the model was trained, at least 2; 0 takes the scaling away"


def scaled_for(model: nn.Module) -> int:
    """N_train, the tokens with which a model was trained, if its logits are scaled; 0 if they aren't."""
    return max((slot.trained_tokens for slot in slots_of(model).values() if isinstance(slot, AttentionSlot)), default=0)


def trained_tokens(model: nn.Module, scale_logits: ScaleLogits) -> int:
    """N_train for a value of ``scale_logits``: with "log" that of the size in the model's ``pretrained_cfg``.

    "log" assumes that the model was trained with its present patch size, as ``pretrained_cfg`` doesn't hold it. A model
    whose patch embedding was resampled needs the number of tokens.

    Raises:
        ValueError: for another value, or a model that doesn't tell its size.
    """
    if isinstance(scale_logits, str) and scale_logits == "log":
        size = weights_config(model).get("input_size")
        if not size:
            raise InputError(
                f"scale_logits='log': {type(model).__name__} has no pretrained_cfg that tells the size with which it "
                f"was trained; {FORMS}"
            )
        (height, width), (rows, columns) = size[-2:], model.patch_embed.feat_ratio(as_scalar=False)
        return model.num_prefix_tokens + (height // rows) * (width // columns)
    number = scale_logits
    if not is_integer(number) or (number != 0 and number < 2):
        raise InputError(f"scale_logits={scale_logits!r}: {FORMS}")
    return number


def check_scaling(attention: dict[str, nn.Module], number: int) -> None:
    """Raise ValueError for attention, by path, that has no logits which could be scaled."""
    for path, module in attention.items() if number else ():
        if not (isinstance(module, AttentionSlot) and module.core.has_logits):
            raise InputError(
                f"scale_logits={number}: {path} has {type(module.core).__name__}, which computes no logits to scale; "
                "allowed is 0, or a mixer with logits such as softmax or nystrom"
            )
