"""Geometry: how rows are grouped into tiles, and what a tile's rows touch."""

from splat.geometry.alignment import RowTiles, align_by_step, align_rows_of, next_power_of_two
from splat.geometry.spans import Spans, analyze, is_aligned

__all__ = ["RowTiles", "Spans", "align_by_step", "align_rows_of", "analyze", "is_aligned", "next_power_of_two"]
