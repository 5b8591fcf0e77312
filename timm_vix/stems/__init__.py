"""Patch embeddings (stems) by name, in ``STEMS``."""

from timm.layers import PatchEmbed

from .convolution_pooling import ConvolutionPoolingStem
from .convolutional import ConvolutionalStem, LinearConvolutionalStem
from .hierarchical_mlp import HierarchicalMlpStem
from .sequential_overlapping import SequentialOverlappingStem
from .tokens_to_token import TokensToTokenStem

STEMS = {
    "linear": PatchEmbed,
    "conv": ConvolutionalStem,
    "conv_linear": LinearConvolutionalStem,
    "conv_pool": ConvolutionPoolingStem,
    "hmlp": HierarchicalMlpStem,
    "sope": SequentialOverlappingStem,
    "t2t": TokensToTokenStem,
}
# for models that embed patches as a map: the last normalisation of the hierarchical MLP is for tokens
MAP_STEMS = tuple(name for name in STEMS if name != "hmlp")
