"""The contract of an implementation, and the request that it may refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, Protocol

from splat.acsr import ACSR
from splat.errors import ArgumentError
from splat.planning import Plan, check_blocks
from splat.remembered import Remembered

if TYPE_CHECKING:  # it imports jax
    from splat.codegen.score_mod import Place, ScoreMod


@dataclasses.dataclass(frozen=True)
class Request:
    """What an implementation must be able to serve: static facts of a call.

    Attributes:
      platform: where arrays live or the target's kind: "cpu", "gpu", "tpu".
      dtype, head_dim: of query, key and value.
      named: whether the implementation was asked for by name.
      elsewhere: whether nothing is to be run here, so that what is installed does not matter.
      blocks: (block_q, block_kv) that are asked for; None: any.
      score_mod: what becomes of scores, by the arguments `score_mod` and `bias`; None: nothing.
    """

    platform: str
    dtype: str
    head_dim: int
    named: bool = False
    elsewhere: bool = False
    blocks: tuple[int | None, int | None] = (None, None)
    score_mod: ScoreMod | None = None


def refused_blocks(name: str, request: Request) -> str | None:
    """Why an implementation has no kernels for the tile sizes asked for; asked for by name, planning says so."""
    if request.named:
        return None
    try:
        check_blocks(name, *request.blocks)
    except ArgumentError as error:
        return str(error)
    return None


class Missing(str):
    """A refusal that would be none if something were installed: said once where it changes what None chooses."""

    __slots__ = ()


def accumulator(dtype: Any) -> str:
    """The dtype that scores, values and sums have for arrays of a dtype: float64 for float64, else float32."""
    return "float64" if str(dtype) == "float64" else "float32"


@dataclasses.dataclass(frozen=True)
class Options:
    """Static arguments of one attention call: scores are scaled, modified and then capped."""

    scale: float
    logits_soft_cap: float | None = None
    score_mod: ScoreMod | None = None


#: Float32 has the numbers that kernels take, also times log2(e).
LEAST_NUMBER, MOST_NUMBER = 1e-37, 1e37


def check_scale(scale: float) -> float:
    """The scale, or an ArgumentError where float32 cannot have it."""
    if not abs(scale) <= MOST_NUMBER:
        raise ArgumentError(f"scale must be in [{-MOST_NUMBER:g}, {MOST_NUMBER:g}] or None, but {scale} was given")
    return scale


def check_soft_cap(cap: float) -> float:
    """The soft cap, or an ArgumentError where it is not positive, or float32 cannot have it."""
    if not LEAST_NUMBER <= cap <= MOST_NUMBER:
        raise ArgumentError(
            f"logits_soft_cap must be in [{LEAST_NUMBER:g}, {MOST_NUMBER:g}] or None, but {cap} was given"
        )
    return cap


@dataclasses.dataclass(frozen=True)
class How:
    """How operations on values are made: what the paper's specialisations save can be switched off, for comparison.

    Attributes:
      layout: of values: "rows", row-compressed with its padding, which everyone understands; or "tiles", in the order
        of an implementation's own tiles, which only its own operations do.
      spans: span specialisation: only columns from a row tile's first to its last are visited.
      posets: poset tiling: tiles begin where rows do, and hold what they have; else those of a fixed grid, whole.
      alignment: transformation alignment: rows of one residue together, on a lattice that is dense; else neighbours.
    """

    layout: str = "rows"
    spans: bool = True
    posets: bool = True
    alignment: bool = True

    @property
    def specialised(self) -> bool:
        return self.spans and self.posets and self.alignment


#: The operations on values, by their methods' names.
OPERATIONS = ("sddmm", "softmax", "spmm", "spmm_transposed")


def operands(operation: str, rows: Any, columns: Any, values: Any) -> tuple[Any, ...]:
    """What an operation takes beside the matrix: dense arrays of its rows and columns, and values."""
    return ((rows, columns), (values,), (values, columns), (values, rows))[OPERATIONS.index(operation)]


#: What operations do where nothing is said.
USUAL = How()


def kept_with_plan(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`make(call)`, once for equal calls (dataclasses): kept as long as `call.plan` is; where that is None, a while."""
    of_any_plan = lru_cache(maxsize=256)(make)

    @wraps(make)
    def made(call: Any) -> Any:
        if call.plan is None:
            return of_any_plan(call)
        others = (value for name, value in vars(call).items() if name != "plan")
        return call.plan.remembered((type(call), *others), lambda: make(call))

    return made


#: How many matrices are remembered at least and at most, and about how large those beyond the least may be together.
LEAST_MATRICES, MOST_MATRICES, NBYTES = 32, 128, 1 << 28


class _OfMatrix(Remembered):
    """What is made of a matrix: tables, and the programs of operations on values, which hold tables too."""

    def __init__(self, acsr: ACSR):
        super().__init__(entries=64)
        self.nbytes = 16 * acsr.metadata_bytes  # about, in the end: four operations, of one dtype and shape


_matrices = Remembered(least=LEAST_MATRICES, entries=MOST_MATRICES, nbytes=NBYTES)


def made_of(acsr: ACSR) -> Remembered:
    """What is made of a matrix and of those equal to it, kept while it is one of those used last."""
    return _matrices(acsr.digest, lambda: _OfMatrix(acsr))


def kept_with_matrix(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make(acsr, *others)`, once for equal arguments: see `made_of`."""

    @wraps(make)
    def made(acsr: ACSR, *others: Any) -> Any:
        return made_of(acsr)((make, *others), lambda: make(acsr, *others))

    return made


class Implementation(Protocol):
    """One code generator. Implementations are stateless; importing one must not touch a device."""

    name: str

    #: Whether it calls kernels, which XLA cannot look into, and so not split over devices by itself.
    opaque: bool

    def refusal(self, request: Request) -> str | None:
        """Why this implementation cannot serve the request, as one sentence with the remedy; None if it can."""
        ...

    def target(self) -> str:
        """The planning target that JAX's default device is."""
        ...

    def attention(
        self, plan: Plan, options: Options, query: Any, key: Any, value: Any, kv_lengths: Any,
        place: Place | None = None,
    ) -> Any:  # fmt: skip
        """(output in the query's dtype [B, T, N, H], log-sum-exp float32 or float64 [B, T, N]); differentiable.

        `place` is given with `options.score_mod`: its operands.
        """
        ...

    # Operations on values. `acsr` is static; arrays have one batch axis, of any length; values have the accumulation
    # dtype of the other arrays' dtype (`accumulator`), [batch, rows, acsr.width] or, in tiles, [batch, num_values].
    # What lies in padding is not read, and written as 0. Nothing here is differentiable: `splat.ops.values` makes it
    # so. `how` is left out where it is the usual.

    def num_values(self, acsr: ACSR, how: How) -> int:
        """Of one batch entry, padding counted. Raises UnsupportedError where it has no such layout or switches."""
        ...

    def sddmm(self, acsr: ACSR, rows: Any, columns: Any, how: How = USUAL) -> Any:
        """Values: the dot products of rows [B, T, H] and columns [B, S, H], for the pairs of the matrix."""
        ...

    def softmax(self, acsr: ACSR, values: Any, how: How = USUAL) -> Any:
        """Values: each row's exponentials over their sum."""
        ...

    def spmm(self, acsr: ACSR, values: Any, dense: Any, how: How = USUAL) -> Any:
        """The matrix of the values times dense [B, S, H]: [B, T, H] in dense's dtype."""
        ...

    def spmm_transposed(self, acsr: ACSR, values: Any, dense: Any, how: How = USUAL) -> Any:
        """The transposed matrix of the values times dense [B, T, H]: [B, S, H] in dense's dtype."""
        ...

    def emit(self, plan: Plan, options: Options, kernel: str | None = None) -> str:
        """The generated program's text: one kernel of it where `kernel` names one."""
        ...

    def assembly(self, plan: Plan, options: Options, kernel: str | None = None) -> str:
        """What a device's own compiler made of it, as text."""
        ...
