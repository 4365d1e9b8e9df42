"""Code generators: one folder each, behind one contract."""

from splat.codegen.base import Implementation, Options, Request
from splat.codegen.registry import NAMES, choose, load, refusals

__all__ = ["NAMES", "Implementation", "Options", "Request", "choose", "load", "refusals"]
