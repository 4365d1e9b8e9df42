"""Triton kernels for GPUs, generated from the plan."""
