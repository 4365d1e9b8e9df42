"""R-SDDMM, R-softmax and R-SpMM: launches of `kernels.values`, for any binding, and for JAX.

Values are float32: [B, rows, acsr.width], or in layout "tiles" [B, acsr.nnz]. A tile is then one row, so that nothing
is padded: a row's components lie one after the other, and so do rows. Products are made in the dtype of the dense
arrays, with float32 sums: R-SpMM rounds values to bfloat16 or float16 first, as attention kernels do (with float16 they
must lie within 65504).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from splat import __version__
from splat.acsr import ACSR, build
from splat.codegen.base import OPERATIONS, USUAL, How, operands
from splat.codegen.triton import record
from splat.codegen.triton.kernels import values as kernels
from splat.codegen.triton.launch import Kernel, Launch, Launcher, Output
from splat.codegen.triton.offline import Job
from splat.codegen.triton.offline_model import ARCHITECTURES
from splat.codegen.triton.values_lower import Spmm, has_holes, lower_sddmm, lower_spmm
from splat.codegen.triton.values_tiles import Phases, row_begins
from splat.errors import ArgumentError, UnsupportedError
from splat.pattern import parse
from splat.pattern.core import ceil_div
from splat.planning.kernels import DTYPES, INTERPRETER, MAX_HEAD_DIM, KernelConfig

Array = Any

_C = KernelConfig

_WIDE_ROWS, _SQUARE, _SMALL = _C(128, 32, 8, 2), _C(64, 64, 8, 2), _C(32, 32, 4, 2)

_SDDMM = {256: (_WIDE_ROWS, _SQUARE, _SMALL)}
_SPMM = {64: (_C(128, 64, 8, 2), _SQUARE, _SMALL), 128: (_WIDE_ROWS, _SQUARE, _SMALL), 256: (_C(64, 32, 8, 2), _SMALL)}
_TRANSPOSED = {128: (_WIDE_ROWS, _SQUARE, _SMALL), 256: (_C(64, 32, 8, 2), _SMALL)}
_AMD = (_C(64, 64, 4, 1), _C(32, 32, 4, 1))
_AMD_SPMM = {128: (_C(128, 64, 4, 1), *_AMD), 256: (_C(128, 32, 4, 1), *_AMD)}

#: Of arrays of 16 bits: architecture -> operation -> largest head dim (padded to a power of two) -> configurations to
#: choose from. As in `splat.planning.kernels`, each was compiled and looked at: tensor-core instructions, at most 8
#: bytes spilled with any of four patterns.
_TABLE: dict[str, dict[str, dict[int, tuple[KernelConfig, ...]]]] = {
    "sm_80": {"sddmm": _SDDMM, "spmm": _SPMM, "spmm_transposed": _TRANSPOSED},
    "sm_90": {"sddmm": _SDDMM, "spmm": _SPMM, "spmm_transposed": _TRANSPOSED},
    "sm_100": {
        "sddmm": _SDDMM,
        "spmm": {64: (_C(128, 64, 4, 2), _SQUARE, _SMALL), 128: (_WIDE_ROWS, _SQUARE, _SMALL), 256: (_SQUARE, _SMALL)},
        "spmm_transposed": {128: (_WIDE_ROWS, _SQUARE, _SMALL), 256: (_SQUARE, _SMALL)},
    },
    "gfx942": {
        "sddmm": {256: (_C(128, 32, 4, 1), *_AMD)},
        "spmm": _AMD_SPMM,
        "spmm_transposed": _AMD_SPMM,
    },
}

#: float32, on every architecture: without tensor cores (but AMD's), at most 12 bytes spilled.
_SINGLE: dict[int, tuple[KernelConfig, ...]] = {
    64: (_C(64, 32, 8, 1), _C(32, 32, 4, 1)),
    128: (_C(32, 32, 8, 1),),
    256: (_C(32, 16, 8, 1),),
}

#: Elements of a program of R-softmax, and the longest row that it reads as a whole.
_SOFTMAX_ELEMENTS, _SOFTMAX_WHOLE = 4096, 8192


def configs_of(arch: str, operation: str, head_dim: int, dtype: str) -> tuple[KernelConfig, ...]:
    """The configurations to choose from. Raises UnsupportedError for a head dim that there are none for."""
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"the triton implementation serves head dims up to {MAX_HEAD_DIM}, not {head_dim}. Use "
            "implementation='xla'."
        )
    if arch == INTERPRETER:
        return (_C(32, 16, 4, 1), _C(16, 16, 4, 1))
    known = _SINGLE if dtype == "float32" else _TABLE[arch][operation]
    return next(known[width] for width in sorted(known) if head_dim <= width)


def num_values(acsr: ACSR, how: How) -> int:
    """See `splat.codegen.base.Implementation.num_values`."""
    if how.layout == "rows":
        return acsr.shape[0] * acsr.width
    if acsr.nnz >= 1 << 31:
        raise UnsupportedError(
            "the triton implementation serves up to 2**31 - 1 values of a batch entry in layout 'tiles', but this "
            f"ACSR has {acsr.nnz:,}. Use layout 'rows'."
        )
    return acsr.nnz


@lru_cache
def _kernel(name: str) -> Kernel:
    function = getattr(kernels, name)
    return Kernel(name, inspect.getsource(function.fn), function)


@dataclasses.dataclass(frozen=True)
class Operations:
    """The operations of `splat.codegen.base.Implementation` on arrays of some framework.

    Attributes:
      arch: what the kernels are for.
      launch: carries out a launch.
      table: a NumPy int32 table as an array of the framework.
      allow_tf32: whether float32 matrix products may round their inputs to tf32.
      configs: to choose from, instead of the table's.
      how: the layout, and without which specialisations; R-softmax has none of them.
    """

    arch: str
    launch: Launcher
    table: Callable[[np.ndarray], Any]
    allow_tf32: bool = False
    configs: tuple[KernelConfig, ...] = ()
    how: How = USUAL

    @property
    def is_packed(self) -> bool:
        return self.how.layout == "tiles"

    def values_of(self, acsr: ACSR, batch: int) -> Output:
        """What values are like."""
        shape = (num_values(acsr, self.how),) if self.is_packed else (acsr.shape[0], acsr.width)
        return Output((batch, *shape), "float32")

    def sddmm(self, acsr: ACSR, rows: Array, columns: Array) -> Array:
        self._check(rows, columns)
        (batch, num_rows, head_dim), num_cols = rows.shape, columns.shape[1]
        lowered = lower_sddmm(acsr, self._configs("sddmm", rows), self.how)
        constants = self._constants(acsr, lowered.config, lowered.phases, head_dim)
        return self._launch(
            "splat_sddmm", lowered.num_slots * batch, (rows, columns, *map(self.table, lowered.tables)),
            (lowered.num_slots, num_rows, num_cols, self._width(acsr)), self.values_of(acsr, batch),
            constants | dict(
                STRIDE=lowered.stride, HOPS=lowered.hops, PADDED=lowered.padded, RAGGED=lowered.ragged
            ), lowered.config,
        )  # fmt: skip

    def softmax(self, acsr: ACSR, values: Array) -> Array:
        self._check(values)
        batch, num_rows = values.shape[0], acsr.shape[0]
        width = int(acsr.row_nnz.max(initial=0)) if self.is_packed else acsr.width
        whole = width <= _SOFTMAX_WHOLE
        block = max(16, 1 << (width - 1).bit_length()) if whole else _SOFTMAX_ELEMENTS
        if self.arch == INTERPRETER:  # so that small problems show both forms
            whole = width <= 64
            block = 64
        rows = max(1, _SOFTMAX_ELEMENTS // block)
        blocks = ceil_div(num_rows, rows)
        counts = np.stack([np.broadcast_to(c.count, (num_rows,)) for c in acsr.components])
        tables = (acsr.row_nnz[None], row_begins(acsr)) if self.is_packed else (counts, np.array(acsr.offsets))
        return self._launch(
            "splat_softmax", blocks * batch,
            (values, *(self.table(one.astype(np.int32)) for one in tables)),
            (blocks, num_rows, width, num_values(acsr, self.how)), self.values_of(acsr, batch),
            dict(COMPONENTS=len(tables[0]), ROWS=rows, BLOCK=block, WHOLE=whole, PLACES=self._places(acsr)),
            _C(0, 0, 4, 1),
        )  # fmt: skip

    def spmm(self, acsr: ACSR, values: Array, dense: Array) -> Array:
        return self._spmm(acsr, values, dense, transposed=False)

    def spmm_transposed(self, acsr: ACSR, values: Array, dense: Array) -> Array:
        return self._spmm(acsr, values, dense, transposed=True)

    def _spmm(self, acsr: ACSR, values: Array, dense: Array, *, transposed: bool) -> Array:
        self._check(dense)
        operation = "spmm_transposed" if transposed else "spmm"
        groups = lower_spmm(acsr, self._configs(operation, dense), transposed, self.how)
        guard = has_holes(acsr, transposed, self.how)
        result = None
        for group in groups:
            dtype = str(dense.dtype) if group is groups[-1] else "float32"
            result = self._add(acsr, group, (values, dense, result), dtype, transposed=transposed, guard=guard)
        return result

    def _add(self, acsr: ACSR, group: Spmm, arrays: Any, dtype: str, *, transposed: bool, guard: bool) -> Array:
        """The sum of one group of components and of what earlier ones made, in the order of the groups."""
        values, dense, earlier = arrays
        batch, num_in, head_dim = dense.shape
        num_out = acsr.shape[1 if transposed else 0]
        constants = self._constants(acsr, group.config, group.phases, head_dim)
        constants |= dict(
            STEP=group.step, STRIDE=group.stride, VALUE_STRIDE=group.value_stride, TRANSPOSED=transposed,
            WALKS=group.num_walks, UNROLL=group.is_unrolled, RESUME=earlier is not None, GUARD=guard,
            TILE_ROWS=group.tile_rows, RAGGED=group.ragged,
        )  # fmt: skip
        read = (values, dense, values if earlier is None else earlier, *map(self.table, group.tables))
        return self._launch(
            "splat_spmm", group.num_slots * batch, read, (group.num_slots, num_out, num_in, self._width(acsr)),
            Output((batch, num_out, head_dim), dtype), constants, group.config,
        )  # fmt: skip

    # -- one launch ----------------------------------------------------------------------------------------------------

    def _configs(self, operation: str, array: Array) -> tuple[KernelConfig, ...]:
        return self.configs or configs_of(self.arch, operation, array.shape[-1], str(array.dtype))

    def _constants(self, acsr: ACSR, config: KernelConfig, phases: Phases, head_dim: int) -> dict[str, Any]:
        return dict(
            LEFT=phases.left, FULL=phases.full, RIGHT=phases.right, BLOCK_Q=config.block_q, BLOCK_KV=config.block_kv,
            HEAD_DIM=head_dim, WIDTH=max(16, 1 << (head_dim - 1).bit_length()),
            WIDE=head_dim * max(acsr.shape) >= 1 << 31, PLACES=self._places(acsr),
            PRECISION="tf32" if self.allow_tf32 else "ieee",
        )  # fmt: skip

    def _places(self, acsr: ACSR) -> str:
        if self.is_packed:
            return "packed"
        return "far rows" if num_values(acsr, self.how) >= 1 << 30 else "rows"

    def _width(self, acsr: ACSR) -> int:
        return num_values(acsr, self.how) if self.is_packed else acsr.width

    def _launch(
        self, name: str, programs: int, arrays: Any, scalars: Any, output: Output, constants: Any, config: KernelConfig
    ) -> Array:
        one = Launch(
            _kernel(name), programs, arrays, scalars, (output,), constants, config.num_warps, config.num_stages
        )
        return self.launch(one)[0]

    @staticmethod
    def _check(*arrays: Array) -> None:
        """What `refusal` tells whoever asks it first."""
        for array in arrays:
            if str(array.dtype) not in DTYPES:
                raise UnsupportedError(
                    f"the triton implementation serves {', '.join(DTYPES)}, not {array.dtype}. Convert the inputs, or "
                    "use implementation='xla'."
                )


# -- to look at --------------------------------------------------------------------------------------------------------


def launches(
    acsr: ACSR, operation: str, *, arch: str = "sm_90", head_dim: int = 64, dtype: str = "bfloat16", batch: int = 1,
    config: tuple[int, int, int, int] | None = None, how: Mapping[str, Any] | None = None,
) -> list[Launch]:  # fmt: skip
    """What an operation would launch; arrays are stand-ins: `Output` values.

    Args:
      config: block_q, block_kv, num_warps and num_stages, instead of the table's choice.
      how: fields of `How` that are not the usual.
    """
    if operation not in OPERATIONS:
        raise ArgumentError(f"operation must be one of {', '.join(OPERATIONS)}, but {operation!r} was given")
    made: list[Launch] = []

    def launch(one: Launch) -> tuple[Output, ...]:
        made.append(one)
        return one.outputs

    operations = Operations(
        arch, launch, lambda table: Output(table.shape, "int32"), configs=() if config is None else (_C(*config),),
        how=How(**(how or {})),
    )  # fmt: skip
    rows, columns = (Output((batch, length, head_dim), dtype) for length in acsr.shape)
    values = operations.values_of(acsr, batch)
    getattr(operations, operation)(acsr, *operands(operation, rows, columns, values))
    return made


def sample(
    operation: str, pattern: str, length: int = 8192, kv_length: int | None = None, query_offset: int = 0,
    number: int = -1, **sizes: Any,
) -> Launch:  # fmt: skip
    """An operation's launch of a number, for compiling it in another process; arguments as `launches`."""
    return launches(build(parse(pattern), length, kv_length, query_offset), operation, **sizes)[number]


def source(acsr: ACSR, operation: str, **sizes: Any) -> str:
    """The text of an operation's kernels, headed by what is compiled into them; arguments as `launches`."""
    texts: dict[str, str] = {}
    for one in launches(acsr, operation, **sizes):
        used = ", ".join(f"{name}={value}" for name, value in one.constants.items())
        facts = f"# {one.programs} programs, {one.num_warps} warps, {one.num_stages} stages: {used}\n"
        texts[one.kernel.source] = texts.get(one.kernel.source, "") + facts
    lines = [f"splat {__version__}: Triton kernels of {operation}", *str(acsr).splitlines()]
    about = "".join(f"# {line}\n" for line in lines)
    library = inspect.getsource(kernels)
    return about + "".join(texts.values()) + "\n" + library


def assembly(
    operation: str, pattern: str, q_len: int, kv_len: int, query_offset: int, *, arch: str, dtype: str, **sizes: Any
) -> str:
    """What a device's own compiler makes of an operation's launches, one after the other; arguments as `launches`."""
    if arch not in ARCHITECTURES:
        raise ArgumentError(f"PTX is made for GPUs ({', '.join(ARCHITECTURES)}), but {arch!r} was given.")
    acsr = build(parse(pattern), q_len, kv_len, query_offset)
    sizes |= dict(arch=arch, dtype=dtype)
    named = dict(operation=operation, pattern=pattern, length=q_len, kv_length=kv_len, query_offset=query_offset)
    jobs = [
        Job("splat.codegen.triton.values:sample", dict(named, number=n, **sizes), arch)
        for n in range(len(launches(acsr, operation, **sizes)))
    ]
    needs = operation != "softmax" and (dtype != "float32" or arch.startswith("gfx"))
    return "\n\n".join(record.assembly(job, f"{operation}\n{acsr}", needs_tensor_core=needs) for job in jobs)


__all__ = ["OPERATIONS", "Operations", "assembly", "configs_of", "launches", "sample", "source"]
