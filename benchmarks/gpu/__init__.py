"""Measurements on a GPU: one process a pattern, checked before it is timed. `python -m benchmarks.run --device cuda`.

jobs     what is measured, most important first       pool      processes: prepare together, measure one by one
worker   the process of a job                          check     outputs and gradients against dense float64
attention, flex   ours and PyTorch's peers             jax_side  JAX: our binding checked, cuDNN timed
masks    preparing a pattern beside block masks        tune      every configuration of every kernel
report   tables and bars from what jobs said           model     what to expect, without a GPU
"""
