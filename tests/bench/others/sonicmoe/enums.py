"""What SonicMoE 0.1.2 has under this name."""

from enum import Enum


class ActivationType(Enum):
    SWIGLU = "swiglu"
    GEGLU = "geglu"
    REGLU = "reglu"
    RELU_SQ = "relu_sq"
    RELU = "relu"
    GELU = "gelu_tanh_approx"
    SILU = "silu"
