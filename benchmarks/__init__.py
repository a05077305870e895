"""Correctness on the device first, then speed: `python -m benchmarks.run`. See README.md."""
