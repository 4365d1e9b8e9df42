"""The affine-compressed-sparse-row format: what a pattern becomes for given lengths."""

from splat.acsr.build import build, build_transposed
from splat.acsr.convert import Pairs
from splat.acsr.format import ACSR, NOWHERE, Component

__all__ = ["ACSR", "NOWHERE", "Component", "Pairs", "build", "build_transposed"]
