"""Comparisons: a plan of arms and seeds, what they found, and the report."""

from moelab.compare.comparison import run_comparison
from moelab.compare.plan import Comparison
from moelab.compare.report import write_report
from moelab.compare.table import print_table

__all__ = ["Comparison", "print_table", "run_comparison", "write_report"]
