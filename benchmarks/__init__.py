"""Benchmarks of the runtime, beside the machine's floors and Python's own pools: `python -m benchmarks`."""
