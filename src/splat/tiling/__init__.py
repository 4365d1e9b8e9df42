"""Tiling: which tiles a pass computes."""

from splat.tiling.cover import Phase, Test, Walk, chains, count_tiles, cover

__all__ = ["Phase", "Test", "Walk", "chains", "count_tiles", "cover"]
