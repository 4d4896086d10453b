"""Training one model: batches, optimizer, checkpoints, meters and the loop."""

from moelab.training.checkpoint import load
from moelab.training.loop import train

__all__ = ["load", "train"]
