"""Token mixers by name."""

from .atrous import AtrousAttention
from .fourier import FourierMixing
from .linformer import LinformerAttention
from .mlp_mixer import TokenMlp
from .nystrom import NystromAttention
from .performer import PerformerAttention
from .softmax import SoftmaxAttention

MIXERS = {
    "softmax": SoftmaxAttention,
    "linformer": LinformerAttention,
    "performer": PerformerAttention,
    "nystrom": NystromAttention,
    "atrous": AtrousAttention,
    "fnet": FourierMixing,
    "mixer": TokenMlp,
}
