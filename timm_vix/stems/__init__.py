"""Patch embeddings by name."""

from timm.layers import PatchEmbed

from .convolutional import ConvolutionalStem, LinearConvolutionalStem

STEMS = {"linear": PatchEmbed, "conv": ConvolutionalStem, "conv_linear": LinearConvolutionalStem}
