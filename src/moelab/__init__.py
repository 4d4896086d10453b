"""Does a Mixture-of-Experts GPT beat the dense GPT it replaces, at your size, on your data, for your budget?"""

from moelab.config import ModelConfig, MoEConfig, uncollected

with uncollected():
    from moelab.experts import Availability, backends, expert_mlp
    from moelab.model import GPT
    from moelab.training import load

__all__ = ["GPT", "Availability", "MoEConfig", "ModelConfig", "backends", "expert_mlp", "load"]
