"""Tiling: which tiles a pass computes."""

from splat.tiling.cover import Phase, Test, Walk, cover

__all__ = ["Phase", "Test", "Walk", "cover"]
