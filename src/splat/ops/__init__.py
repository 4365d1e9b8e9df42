"""Public operations."""

from splat.ops.attention import attention, dot_product_attention
from splat.ops.inspect import emit, plan

__all__ = ["attention", "dot_product_attention", "emit", "plan"]
