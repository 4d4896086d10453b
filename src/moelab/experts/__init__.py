"""One function, many ways: the feed-forward of a Mixture of Experts."""

from moelab.experts.mlp import Availability, backend_of, backends, check_backend, expert_mlp

__all__ = ["Availability", "backend_of", "backends", "check_backend", "expert_mlp"]
