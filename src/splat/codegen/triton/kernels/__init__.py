"""The kernels' library: ordinary Triton functions that the generated kernels are made of."""

import inspect

from splat.codegen.triton.kernels import backward
from splat.codegen.triton.launch import Kernel

SPLAT_DELTA = Kernel("splat_delta", inspect.getsource(backward.splat_delta.fn), backward.splat_delta)
