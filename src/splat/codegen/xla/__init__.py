"""The portable implementation: pure `jax.lax`, wherever XLA runs."""

from splat.codegen.xla.emit import IMPLEMENTATION

__all__ = ["IMPLEMENTATION"]
