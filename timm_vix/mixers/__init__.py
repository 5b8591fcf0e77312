"""Token mixers by name. ``MIXERS[name].keywords()`` are the keywords of one."""

from ._mechanism import Mixer
from .atrous import AtrousAttention
from .axial import AxialAttention
from .fourier import FourierMixing
from .linformer import LinformerAttention
from .mlp_mixer import TokenMlp
from .nystrom import NystromAttention
from .performer import PerformerAttention
from .pool import Pooling
from .relu import ReluAttention
from .softmax import SoftmaxAttention

MIXERS: dict[str, type[Mixer]] = {
    "softmax": SoftmaxAttention,
    "linformer": LinformerAttention,
    "performer": PerformerAttention,
    "nystrom": NystromAttention,
    "atrous": AtrousAttention,
    "axial": AxialAttention,
    "fnet": FourierMixing,
    "mixer": TokenMlp,
    "pool": Pooling,
    "relu": ReluAttention,
}
