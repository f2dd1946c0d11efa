"""Benchmarks of the family on a model: read, ask, judge, report."""
