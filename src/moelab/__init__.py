"""Does a Mixture-of-Experts GPT beat the dense GPT it replaces, at your size, on your data, for your budget?"""

import gc

_collecting = gc.isenabled()
gc.disable()  # what imports make stays: looking for garbage among it takes a fifth of their time
try:
    from moelab.config import ModelConfig, MoEConfig
    from moelab.experts import Availability, backends, expert_mlp
    from moelab.model import GPT
    from moelab.training import load
finally:
    if _collecting:
        gc.enable()

__all__ = ["GPT", "Availability", "MoEConfig", "ModelConfig", "backends", "expert_mlp", "load"]
