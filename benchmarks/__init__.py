"""Measurements: one registry of cases, interleaved timings, raw samples kept. `python -m benchmarks.run`."""
