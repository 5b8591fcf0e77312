"""Random draws as a function of what they are for, so that a training that stops can go on with the same draws."""

import random

import numpy as np
import torch

ORDER, SAMPLE, STEP = range(3)  # what is drawn: the first word of every seed


def seed_of(*key: int) -> int:
    """One well mixed 32-bit seed for a tuple of numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def reseed(*key: int) -> None:
    """Make every draw that follows a function of the key, on the CPU."""
    random.seed(seed := seed_of(*key))
    np.random.seed(seed)  # noqa: NPY002 (timm's mixup and RandAugment draw from this one)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every backend: 0.2 ms, too slow for each image
