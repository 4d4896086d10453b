"""Timings of one layer with every backend that gives right answers, and of whole steps of training (`bench.step`)."""

from moelab.bench.layer import LayerBench, bench_layer

__all__ = ["LayerBench", "bench_layer"]
