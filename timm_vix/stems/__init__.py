"""Patch embeddings by name."""

from timm.layers import PatchEmbed

from .convolution_pooling import ConvolutionPoolingStem
from .convolutional import ConvolutionalStem, LinearConvolutionalStem
from .hierarchical_mlp import HierarchicalMlpStem

STEMS = {
    "linear": PatchEmbed,
    "conv": ConvolutionalStem,
    "conv_linear": LinearConvolutionalStem,
    "conv_pool": ConvolutionPoolingStem,
    "hmlp": HierarchicalMlpStem,
}
