"""How GPU kernels are compiled: the one table of configurations, per architecture, kernel, head dim and dtype.

A configuration is here because it was compiled and looked at: tensor-core instructions present and not serialised,
shared memory within the device's limit, and no more spilled bytes than the row says (`benchmarks/sweep.py` makes the
survey, `tests/codegen/triton/test_configs.py` compiles every row). Rows of one entry are in order of preference; the
cost model chooses among them by tile size.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Tile sizes and compiler options of one kernel.

    Attributes:
      block_q: rows that a program accumulates for; key positions in "d_key_value".
      block_kv: lattice columns a step of its loops.
      num_warps, num_stages: Triton's.
      descriptors: whether lattices are read through tensor memory descriptors where the binding can.
      spilled_bytes: of registers to memory, per thread, as the compiler reports it; what a test allows.
    """

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    spilled_bytes: int = 0


KERNELS = ("forward", "d_query", "d_key_value")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

_C = KernelConfig

#: (architecture, kernel, bytes of an element) -> largest head dim (padded to a power of two) -> configurations.
_TABLE: dict[tuple[str, str, int], dict[int, tuple[KernelConfig, ...]]] = {
    ("sm_80", "forward", 2): {
        64: (_C(64, 64, 4, 2),),
        128: (_C(64, 64, 4, 2),),
        256: (_C(64, 32, 4, 2),),
    },
    ("sm_80", "d_query", 2): {64: (_C(64, 64, 4, 2),), 128: (_C(64, 64, 4, 2),), 256: (_C(64, 32, 8, 1),)},
    ("sm_80", "d_key_value", 2): {64: (_C(64, 64, 4, 2),), 128: (_C(64, 32, 4, 2),), 256: (_C(32, 32, 8, 1),)},
    ("sm_90", "forward", 2): {
        64: (_C(128, 128, 8, 2, True), _C(64, 128, 4, 2, True)),
        128: (_C(128, 128, 8, 2, True), _C(128, 64, 8, 3, True), _C(64, 64, 4, 2, True)),
        256: (_C(64, 64, 8, 2, True), _C(128, 32, 8, 2, True)),
    },
    ("sm_90", "d_query", 2): {
        64: (_C(128, 64, 8, 2, True), _C(64, 64, 4, 2, True)),
        128: (_C(128, 64, 8, 2, True),),
        256: (_C(64, 32, 8, 2, True),),
    },
    ("sm_90", "d_key_value", 2): {
        64: (_C(128, 64, 8, 2, True), _C(128, 32, 8, 2, True)),
        128: (_C(128, 32, 8, 3, True), _C(64, 64, 8, 2, True)),
        256: (_C(64, 32, 8, 1),),
    },
    ("sm_100", "forward", 2): {
        64: (_C(128, 128, 8, 2, True),),
        128: (_C(128, 128, 8, 2, True),),
        256: (_C(64, 64, 8, 2, True),),
    },
    ("sm_100", "d_query", 2): {64: (_C(128, 64, 8, 2, True),), 128: (_C(128, 64, 8, 2, True),),
                               256: (_C(64, 32, 8, 2, True),)},
    ("sm_100", "d_key_value", 2): {64: (_C(128, 64, 8, 2, True),), 128: (_C(128, 64, 8, 2, True),),
                                   256: (_C(64, 32, 8, 1),)},
    ("gfx942", "forward", 2): {64: (_C(128, 64, 4, 1), _C(64, 64, 4, 1)), 128: (_C(128, 64, 4, 1), _C(64, 64, 4, 1)),
                               256: (_C(64, 32, 4, 1),)},
    ("gfx942", "d_query", 2): {64: (_C(64, 64, 4, 1),), 128: (_C(64, 32, 4, 1),), 256: (_C(64, 32, 8, 1),)},
    ("gfx942", "d_key_value", 2): {64: (_C(64, 32, 4, 1),), 128: (_C(64, 32, 4, 1),), 256: (_C(32, 32, 4, 1),)},
}  # fmt: skip

#: float32: products at full precision have no tensor cores; tiles are small so that nothing spills.
_SINGLE: dict[str, dict[int, tuple[KernelConfig, ...]]] = {
    "forward": {64: (_C(64, 32, 4, 2),), 128: (_C(32, 32, 4, 2),), 256: (_C(32, 32, 8, 1),)},
    "d_query": {64: (_C(32, 32, 4, 2),), 128: (_C(32, 32, 4, 1),), 256: (_C(32, 16, 8, 1),)},
    "d_key_value": {64: (_C(32, 32, 4, 1),), 128: (_C(32, 16, 4, 1),), 256: (_C(16, 16, 8, 1),)},
}


def kernel_configs(arch: str, kernel: str, head_dim: int, dtype: str) -> tuple[KernelConfig, ...]:
    """The configurations to choose from; empty for an architecture without any (a CPU)."""
    if arch == "interpreter":
        return (_C(16, 16, 4, 1), _C(32, 16, 4, 1, descriptors=True))
    known = _SINGLE[kernel] if dtype in ("float32", "float64") else _TABLE.get((arch, kernel, 2), {})
    if not arch:
        return ()
    return next((known[width] for width in sorted(known) if head_dim <= width), ())


def find_config(arch: str, kernel: str, head_dim: int, dtype: str, block_q: int, block_kv: int) -> KernelConfig:
    """How a kernel with these tile sizes is compiled; for sizes outside the table, by rule."""
    known = kernel_configs(arch, kernel, head_dim, dtype)
    for config in known:
        if (config.block_q, config.block_kv) == (block_q, block_kv):
            return config
    warps = 8 if block_q * block_kv >= 128 * 128 or block_q * head_dim > 128 * 128 else 4
    return KernelConfig(block_q, block_kv, warps, 1 if arch.startswith("gfx") else 2)
