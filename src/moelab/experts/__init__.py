"""One function, many ways: the feed-forward of a Mixture of Experts."""

from moelab.experts.mlp import Availability, backends, check_backend, expert_mlp

__all__ = ["Availability", "backends", "check_backend", "expert_mlp"]
