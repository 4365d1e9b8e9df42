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
      cycles: of one multiprocessor for one score in a full tile, modelled from the compiled loop's instructions
        (`splat.codegen.triton.offline_model`); it ranks configurations. 0: not modelled.
      descriptors: whether lattices are read through tensor memory descriptors where the binding can.
      spilled_bytes: of registers to memory, per thread, as the compiler reports it, the most with grouped query heads
        or without; what a test allows.
      grouped: only for query heads that share key heads (True), or that have their own (False); None: for both.
    """

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    cycles: float = 0.0
    descriptors: bool = False
    spilled_bytes: int = 0
    grouped: bool | None = None


#: What there are kernels for.
DTYPES = ("float32", "bfloat16", "float16")
MAX_HEAD_DIM = 256

#: The oldest NVIDIA generation that kernels are made for: Ampere, the first with bfloat16.
OLDEST_CAPABILITY = 8.0

#: The planning target, and architecture, of interpreted kernels.
INTERPRETER = "interpreter"

KERNELS = ("forward", "d_query", "d_key_value")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

_C = KernelConfig

#: "sm_80" also serves 8.6, 8.9 and 12.x, whose programs have 99 KB of shared memory: its rows stay below that.
#: (architecture, kernel, bytes of an element) -> largest head dim (padded to a power of two) -> configurations.
_TABLE: dict[tuple[str, str, int], dict[int, tuple[KernelConfig, ...]]] = {
    ("sm_80", "forward", 2): {
        64: (
            _C(128, 64, 8, 2, 0.206),
            _C(64, 64, 4, 2, 0.209),
        ),
        128: (
            _C(128, 64, 8, 3, 0.378),
            _C(64, 64, 4, 2, 0.419, spilled_bytes=16),
        ),
        256: (
            _C(64, 64, 8, 1, 0.815),
            _C(32, 64, 4, 2, 0.768),
        ),
    },
    ("sm_80", "d_query", 2): {
        64: (
            _C(128, 64, 8, 2, 0.269),
            _C(64, 64, 4, 2, 0.273),
        ),
        128: (
            _C(128, 32, 8, 2, 0.507),
            _C(64, 32, 4, 2, 0.529),
        ),
        256: (
            _C(64, 32, 8, 1, 1.192, spilled_bytes=16),
            _C(32, 32, 4, 1, 1.064),
        ),
    },
    ("sm_80", "d_key_value", 2): {
        64: (
            _C(128, 32, 8, 2, 0.367),
            _C(64, 32, 4, 2, 0.372, spilled_bytes=8),
        ),
        128: (
            _C(64, 64, 8, 2, 0.699, spilled_bytes=8),
            _C(64, 32, 4, 1, 0.695, spilled_bytes=28),
        ),
        256: (_C(32, 32, 8, 2, 1.668),),
    },
    ("sm_90", "forward", 2): {
        64: (
            _C(128, 128, 8, 2, 0.127, True),
            _C(64, 128, 4, 2, 0.127, True),
        ),
        128: (
            _C(128, 128, 8, 2, 0.19, True),
            _C(128, 64, 8, 3, 0.206, True),
            _C(64, 64, 4, 2, 0.206, True),
        ),
        256: (
            _C(64, 64, 8, 2, 0.47, True),
            _C(128, 32, 8, 2, 0.43, True),
        ),
    },
    ("sm_90", "d_query", 2): {
        64: (
            _C(128, 64, 8, 2, 0.158, True),
            _C(64, 64, 4, 2, 0.156, True),
        ),
        128: (
            _C(128, 64, 8, 2, 0.258, True),
            _C(64, 64, 4, 2, 0.259, True),
        ),
        256: (_C(64, 32, 8, 2, 0.847, True),),
    },
    ("sm_90", "d_key_value", 2): {
        64: (
            _C(128, 64, 8, 2, 0.205, True),
            _C(128, 32, 8, 2, 0.231, True),
        ),
        128: (
            _C(128, 32, 8, 3, 0.379, True, spilled_bytes=36),
            _C(64, 64, 8, 2, 0.466, True),
        ),
        256: (
            _C(64, 32, 8, 2, 1.031, True, spilled_bytes=192),
            _C(64, 16, 8, 2, 1.399, True, spilled_bytes=68),
        ),
    },
    ("sm_100", "forward", 2): {
        64: (
            _C(128, 64, 4, 2, 0.095, True),
            _C(64, 64, 4, 2, 0.108, True),
        ),
        128: (
            _C(128, 64, 8, 2, 0.15, True),
            _C(64, 64, 4, 2, 0.149, True),
        ),
        256: (
            _C(64, 64, 4, 2, 0.233, True, spilled_bytes=16),
            _C(128, 32, 8, 2, 0.31, True),
        ),
    },
    ("sm_100", "d_query", 2): {
        64: (
            _C(128, 64, 4, 2, 0.109, True),
            _C(64, 64, 4, 2, 0.115, True),
        ),
        128: (
            _C(128, 64, 4, 2, 0.156, True),
            _C(64, 64, 4, 2, 0.168, True),
        ),
        256: (_C(64, 32, 4, 2, 0.379, True),),
    },
    ("sm_100", "d_key_value", 2): {
        64: (
            _C(128, 64, 4, 2, 0.129, True, spilled_bytes=16),
            _C(64, 64, 4, 2, 0.153, True),
        ),
        128: (
            _C(64, 64, 4, 2, 0.223, True),
            _C(128, 32, 8, 2, 0.268, True, spilled_bytes=16),
        ),
        256: (
            # With a loop over heads this takes more tensor memory than there is; the other uses none, but mma.sync.
            _C(64, 32, 4, 2, 0.475, True, spilled_bytes=16, grouped=False),
            _C(32, 64, 8, 2, 0.608, True, grouped=True),
        ),
    },
    ("gfx942", "forward", 2): {
        64: (
            _C(128, 64, 4, 1, 0.334),
            _C(128, 128, 4, 1, 0.322),
            _C(64, 64, 4, 1, 0.598),
        ),
        128: (
            _C(128, 64, 4, 1, 0.498),
            _C(64, 64, 4, 1, 0.798),
        ),
        256: (
            _C(128, 32, 4, 1, 0.904),
            _C(64, 64, 4, 1, 1.21),
        ),
    },
    ("gfx942", "d_query", 2): {
        64: (
            _C(128, 64, 4, 1, 0.396),
            _C(64, 64, 4, 1, 0.68),
        ),
        128: (
            _C(128, 32, 4, 1, 0.642),
            _C(64, 64, 4, 1, 0.968),
        ),
        256: (
            _C(128, 32, 4, 1, 1.168),
            _C(64, 32, 4, 1, 1.625),
        ),
    },
    ("gfx942", "d_key_value", 2): {
        64: (
            _C(128, 32, 4, 1, 0.77),
            _C(64, 32, 4, 1, 1.221),
        ),
        128: (_C(64, 32, 4, 1, 1.531),),
        256: (_C(64, 16, 4, 1, 1.871),),
    },
}

#: float32, on every architecture: products at full precision are made without tensor cores (but AMD's), and tiles are
#: small, so that little spills (the most of any architecture is given).
_SINGLE: dict[str, dict[int, tuple[KernelConfig, ...]]] = {
    "forward": {64: (_C(64, 16, 4, 1),), 128: (_C(32, 16, 8, 1, spilled_bytes=16),), 256: (_C(16, 16, 8, 1),)},
    "d_query": {
        64: (_C(32, 16, 4, 2, spilled_bytes=32),),
        128: (_C(32, 16, 8, 2),),
        256: (_C(16, 16, 8, 2, spilled_bytes=32),),
    },
    "d_key_value": {
        64: (_C(64, 16, 8, 2),),
        128: (_C(32, 16, 8, 1, spilled_bytes=12),),
        256: (_C(16, 16, 8, 1, spilled_bytes=560),),
    },
}


def kernel_configs(
    arch: str, kernel: str, head_dim: int, dtype: str, grouped: bool | None = None
) -> tuple[KernelConfig, ...]:
    """The configurations to choose from; empty for an architecture without any (a CPU).

    `grouped`: whether query heads share key heads; None: those for either.
    """
    if arch == INTERPRETER:
        return (_C(16, 16, 4, 1), _C(32, 16, 4, 1, descriptors=True))
    known = _SINGLE[kernel] if dtype in ("float32", "float64") else _TABLE.get((arch, kernel, 2), {})
    if not arch:
        return ()
    found = next((known[width] for width in sorted(known) if head_dim <= width), ())
    return tuple(one for one in found if None in (grouped, one.grouped) or one.grouped == grouped)


def find_config(arch: str, kernel: str, head_dim: int, dtype: str, block_q: int, block_kv: int) -> KernelConfig:
    """How a kernel with these tile sizes is compiled; for sizes outside the table, by rule."""
    known = kernel_configs(arch, kernel, head_dim, dtype)
    for config in known:
        if (config.block_q, config.block_kv) == (block_q, block_kv):
            return config
    warps = 8 if block_q * block_kv >= 128 * 128 or block_q * head_dim > 128 * 128 else 4
    return KernelConfig(block_q, block_kv, warps, 1 if arch.startswith("gfx") else 2)
