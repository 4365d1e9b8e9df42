"""Public operations."""

from splat.ops.attention import attention, dot_product_attention
from splat.ops.inspect import emit, plan
from splat.ops.values import sddmm, softmax, spmm, spmm_transposed

__all__ = ["attention", "dot_product_attention", "emit", "plan", "sddmm", "softmax", "spmm", "spmm_transposed"]
