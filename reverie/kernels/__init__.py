"""Fast operators, each with a plain twin in PyTorch that gives the same result within rounding.

`attention`, `convolution`, `gated`, `group_norm` and `linear` choose between the two by what a call can be served with;
`dispatch` says which are in use. The environment variable REVERIE_KERNELS decides otherwise: "plain" for PyTorch alone,
"fast" to be refused where the library was not built.
"""

from reverie.kernels.attention import attention, self_attention
from reverie.kernels.convolution import convolution
from reverie.kernels.gate import gated
from reverie.kernels.layer_norm import layer_norm
from reverie.kernels.linear import linear
from reverie.kernels.norm import ACTIVATIONS, group_norm
from reverie.kernels.normal import fill

__all__ = [
    "ACTIVATIONS",
    "attention",
    "convolution",
    "fill",
    "gated",
    "group_norm",
    "layer_norm",
    "linear",
    "self_attention",
]
