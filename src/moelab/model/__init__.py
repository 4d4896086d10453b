"""The GPT, dense or with Mixtures of Experts."""

from moelab.model.attention import KVCache
from moelab.model.gpt import GPT, Output

__all__ = ["GPT", "KVCache", "Output"]
