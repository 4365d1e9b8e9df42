"""C++ for CPUs: generated from the plan, compiled on first use, called from JAX through the XLA FFI."""
