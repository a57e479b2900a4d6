"""Benchmarks: ratios against peers, and percentages of a copy, measured in the same run."""
