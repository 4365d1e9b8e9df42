"""Parts: a launch of few programs is divided among more of them, each with a part of every row tile's tiles.

That is "split KV", or flash-decoding: one query and a long cache are one row tile a head, and would leave most of a GPU
without work. What parts find is merged exactly through their log-sum-exp, as what passes find is.
"""

from __future__ import annotations

from splat.pattern.core import ceil_div

#: Programs of a divided launch to a multiprocessor, at most. (These numbers are by reasoning, not by measurement.)
PER_UNIT = 2

#: Tiles of a part on average, at least: launching one more kernel, which merges, takes about as long as these.
LEAST_TILES = 8

#: Parts at most: they are merged one after the other.
MOST_PARTS = 64


def parts_of(programs: int, tiles: int, units: int, resident: int) -> int:
    """How many parts a launch is divided into; 1 where every multiprocessor has a program, or nothing is gained.

    Args:
      programs: of the launch, over all heads and batch entries.
      tiles: of the longest row tile; at most, where it is not known yet.
      units: multiprocessors of the target.
      resident: programs that a multiprocessor runs at once.
    """
    if not 0 < programs < units:
        return 1
    parts = min(PER_UNIT * units // programs, tiles // LEAST_TILES, MOST_PARTS)
    # One part after the other on the same multiprocessors would take as long as the whole.
    return parts if ceil_div(programs * parts, units * resident) < parts else 1


__all__ = ["parts_of"]
