"""Token mixers by name. ``MIXERS[name].keywords()`` are the keywords of one."""

from ._mechanism import Mixer
from .atrous import AtrousAttention
from .axial import AxialAttention
from .fourier import FourierMixing
from .glu import GatedLinearUnit
from .gpsa import GatedPositionalAttention
from .hyena import HyenaConvolution
from .latent import LatentAttention
from .legendre import LegendreMemory
from .linformer import LinformerAttention
from .mlp_mixer import TokenMlp
from .nystrom import NystromAttention
from .performer import PerformerAttention
from .pool import Pooling
from .relu import ReluAttention
from .retention import Retention
from .scattering import WaveletScattering
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
    "retention": Retention,
    "gpsa": GatedPositionalAttention,
    "glu": GatedLinearUnit,
    "latent": LatentAttention,
    "scattering": WaveletScattering,
    "hyena": HyenaConvolution,
    "legendre": LegendreMemory,
    "relu": ReluAttention,
}
