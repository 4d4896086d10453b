"""Comparisons: a plan of arms and seeds, what they found, and the report."""

from moelab.compare.arms import parse_arm
from moelab.compare.comparison import run_comparison, with_one_micro_batch
from moelab.compare.plan import Comparison
from moelab.compare.report import write_report
from moelab.compare.sweep import parse_sweep
from moelab.compare.table import print_table

__all__ = [
    "Comparison",
    "parse_arm",
    "parse_sweep",
    "print_table",
    "run_comparison",
    "with_one_micro_batch",
    "write_report",
]
