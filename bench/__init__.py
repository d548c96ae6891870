"""Benchmarks: one harness (`bench.timing`), one module per suite, results kept by version."""
