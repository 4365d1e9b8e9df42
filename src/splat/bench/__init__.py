"""Benchmarks behind a green correctness gate: `splat bench SUITE`. One registry of cases, raw samples kept."""
