"""What a trained model is worth: losses over a whole split, and samples."""

from moelab.evaluation.routing import routing
from moelab.evaluation.sample import sample
from moelab.evaluation.score import Score, score

__all__ = ["routing", "Score", "sample", "score"]
