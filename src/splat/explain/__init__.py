"""Pictures and text of a plan: which pairs a pattern has, which tiles compute them, and what they compute for nothing.

    save_picture(plan, "pattern.png")           one plan: overview, and a part where pairs can be told apart
    save_strip([plan, ...], "strip.png")        several plans side by side
    console.print(Drawing(plan))                the same in a terminal (rich), with the numbers
    rasterize(plan.forward, (400, 400))         the shares behind all of them

matplotlib and rich are imported when something is drawn.
"""

from splat.explain.picture import save_picture, save_strip
from splat.explain.raster import Raster, rasterize
from splat.explain.text import Drawing, expression, numbers, summary

__all__ = ["Drawing", "Raster", "expression", "numbers", "rasterize", "save_picture", "save_strip", "summary"]
