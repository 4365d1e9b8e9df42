"""The one registry of patterns that tests, tuning and benchmarks share.

| suite | its patterns |
|---|---|
| `paper` | windowed, blocked and strided, with 10 to 50 % non-zeros: SPLAT, arXiv 2407.16847 |
| `sas` | the six patterns of SAS, EuroSys '26, doi 10.1145/3767295.3769364 |
| `models` | patterns of published models |
| `planning` | cheap and dear predicates, a union, and the worst case of block masks |
| `scaling` | a window: work that grows with the length, not with its square |
| `figures` | what the project promises numbers for |
| `vocabulary` | every constructor |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

import splat
from splat import Pattern

#: The densities of the paper's suite.
PAPER_PERCENT = (10, 20, 30, 40, 50)

Text = str | Callable[[int], str]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A number to meet: `measure` at `q_len` positions; `value` is the limit.

    "waste" is scores computed over non-zeros, at most; "speedup" that of float32 attention over dense JAX, at least.
    """

    measure: str
    q_len: int
    value: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A pattern to measure.

    Attributes:
      name, suite: unique together.
      text: the pattern's expression, or how it depends on the number of positions.
      bars: what it must reach.
      longest: the most positions it can be written down for (None: any).
    """

    name: str
    suite: str
    text: Text
    bars: tuple[Bar, ...] = ()
    longest: int | None = None

    def expression(self, q_len: int) -> str:
        """The pattern's text for `q_len` positions."""
        return self.text if isinstance(self.text, str) else self.text(q_len)

    def patterns(self, q_len: int) -> tuple[Pattern, ...]:
        """The patterns to plan: one, or one for each distinct head."""
        pattern = splat.parse(self.expression(q_len))
        groups = getattr(pattern, "groups", None)
        return tuple(groups()) if groups else (pattern,)

    def serves(self, q_len: int) -> bool:
        return self.longest is None or q_len <= self.longest

    def bar(self, measure: str, q_len: int) -> float | None:
        """The limit of `measure` at this length, if there is one."""
        return next((bar.value for bar in self.bars if (bar.measure, bar.q_len) == (measure, q_len)), None)


def _waste(limit: float) -> tuple[Bar, ...]:
    return (Bar("waste", 16384, limit),)


def _grid(q_len: int, dims: int) -> tuple[int, ...]:
    """`q_len`, a power of two, as the sides of a grid that is as square as possible."""
    bits = q_len.bit_length() - 1
    if q_len != 1 << bits:
        raise ValueError(f"a grid is made for powers of two only, but {q_len} positions were asked for")
    return tuple(1 << (bits + d) // dims for d in range(dims))


def _document_lengths(q_len: int) -> list[int]:
    """Lengths of packed documents, unequal, adding up to `q_len`."""
    cuts = np.array([0, 0.03, 0.11, 0.3, 0.42, 0.75, 0.8, 1]) * q_len
    return np.diff(cuts.astype(int)).tolist()


def _segment_ids(q_len: int) -> str:
    lengths = _document_lengths(q_len)
    return repr(splat.segments(np.repeat(np.arange(len(lengths)), lengths)))


def _band(q_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, stop) of every row of a band that widens and narrows, as no constructor has it."""
    row = np.arange(q_len)
    reach = 8 + row // 64 % 8
    return np.maximum(row - reach, 0), np.minimum(row + reach + 1, q_len)


def _from_runs(q_len: int) -> str:
    start, stop = _band(q_len)
    return repr(splat.from_runs(start, 1, stop - start))


def _from_csr(q_len: int) -> str:
    start, stop = _band(q_len)
    indptr = np.concatenate([[0], np.cumsum(stop - start)])
    indices = np.arange(indptr[-1]) - np.repeat(indptr[:-1] - start, stop - start)
    return repr(splat.from_csr(indptr, indices, (q_len, q_len)))


def _from_mask(q_len: int) -> str:
    start, stop = _band(q_len)
    col = np.arange(q_len)
    return repr(splat.from_mask((col >= start[:, None]) & (col < stop[:, None])))


def _longnet(q_len: int) -> str:
    """LongNet's mixture for one head: segments that quadruple, with strides that do."""
    scales = [(2048 << 2 * n, 4**n) for n in range(4) if n == 0 or 2048 << 2 * n <= q_len]
    parts = [f"blocked({width}) & strided({stride})" if stride > 1 else f"blocked({width})" for width, stride in scales]
    return f"causal() & ({' | '.join(parts)})"


def window_of(q_len: int, density: float) -> int:
    """The p for which |i - j| <= p holds for that share of the pairs, as nearly as an integer can."""
    p = np.arange(q_len, dtype=np.int64)
    return _nearest(p, q_len * (2 * p + 1) - p * (p + 1), q_len, density)


def block_of(q_len: int, density: float) -> int:
    """The p for which a block of p positions and the one before it hold that share of the pairs, or nearly."""
    p = np.arange(1, q_len + 1, dtype=np.int64)
    whole, rest = q_len // p, q_len % p
    return _nearest(p, p * p * (2 * whole - 1) + rest * (p + rest), q_len, density)


def _nearest(parameter: np.ndarray, nnz: np.ndarray, q_len: int, density: float) -> int:
    return int(parameter[np.argmin(np.abs(nnz - density * q_len * q_len))])


FIGURES = (
    Case("window 256", "figures", "window(256)", (*_waste(1.15), Bar("speedup", 4096, 7.0))),
    Case("causal 512", "figures", "sliding_window(512)", _waste(1.15)),
    Case("causal window 512", "figures", "causal() & window(512, 0)"),
    Case("strided 64", "figures", "strided(64)", (*_waste(1.05), Bar("speedup", 4096, 30.0))),
    Case("strided 128", "figures", "strided(128)", _waste(1.05)),
    Case("blocked 128", "figures", "blocked(128, 1)", _waste(1.02)),
    Case("window and stride", "figures", "window(128) | strided(128)", _waste(1.3)),
    Case("window and global", "figures", "window(128) | global_tokens(16)", _waste(1.5)),
    Case("dense causal", "figures", "causal()"),
)

VOCABULARY = (
    Case("full", "vocabulary", "full()"),
    Case("causal", "vocabulary", "causal()"),
    Case("window", "vocabulary", "window(256)"),
    Case("window, two sides", "vocabulary", "window(384, 128)"),
    Case("sliding_window", "vocabulary", "sliding_window(512)"),
    Case("dilated_window", "vocabulary", "dilated_window(64, 64, 4)"),
    Case("strided", "vocabulary", "strided(64)"),
    Case("lattice_columns", "vocabulary", "lattice_columns(64, 63)"),
    Case("blocked", "vocabulary", "blocked(128, 1, 1)"),
    Case("sink", "vocabulary", "sink(4)"),
    Case("global_columns", "vocabulary", "global_columns(16)"),
    Case("global_rows", "vocabulary", "global_rows(16)"),
    Case("global_tokens", "vocabulary", "global_tokens(16)"),
    Case("segments, lengths", "vocabulary", lambda n: f"segments(lengths={_document_lengths(n)})"),
    Case("segments, ids", "vocabulary", _segment_ids),
    Case("random_blocks", "vocabulary", "random_blocks(64, 3, 0)"),
    Case("neighborhood, 1-D", "vocabulary", lambda n: f"neighborhood({n}, 129)"),
    Case("neighborhood, 2-D", "vocabulary", lambda n: f"neighborhood({_grid(n, 2)}, 7)"),
    Case("neighborhood, 3-D", "vocabulary", lambda n: f"neighborhood({_grid(n, 3)}, 3)"),
    Case("from_runs", "vocabulary", _from_runs),
    Case("from_csr", "vocabulary", _from_csr),
    Case("from_mask", "vocabulary", _from_mask, longest=16384),
    Case("per_head", "vocabulary", "per_head([causal() & window(256), causal() & strided(64)])"),
    Case("intersection, union", "vocabulary", "causal() & window(512) | sink(4)"),
    Case("difference", "vocabulary", "causal() - window(128)"),
    Case("complement", "vocabulary", "~window(128)"),
    Case("transpose", "vocabulary", "(causal() & window(256)).T"),
)

PAPER = (
    *(Case(f"windowed, {d} %", "paper", lambda n, d=d: f"window({window_of(n, d / 100)})") for d in PAPER_PERCENT),
    *(Case(f"blocked, {d} %", "paper", lambda n, d=d: f"blocked({block_of(n, d / 100)}, 1)") for d in PAPER_PERCENT),
    # No stride has 30 or 40 % of the columns: 25 and 33 % stand for them.
    *(Case(f"strided, {100 // stride} %", "paper", f"strided({stride})") for stride in (10, 5, 4, 3, 2)),
)

SAS = (
    Case("StreamingLLM", "sas", "causal() & sink(32) | sliding_window(1024)"),
    Case("block-local", "sas", "causal() & blocked(128, 2)"),
    Case("sliding window", "sas", "sliding_window(1024)"),
    Case("OpenAI strided", "sas", "sliding_window(512) | causal() & strided(512)"),
    Case("OpenAI fixed", "sas", "causal() & (blocked(256) | lattice_columns(256, 255))", _waste(1.5)),
    Case("LongNet", "sas", "causal() & blocked(256) & strided(4)", _waste(2.0)),
)

MODELS = (
    Case("Longformer", "models", "window(256) | global_tokens(1)"),
    Case("BigBird", "models", "blocked(64, 1, 1) | global_tokens(64) | random_blocks(64, 3, 0)"),
    Case("Sparse Transformer, strided", "models", "causal() & (window(128) | strided(128))"),
    Case("Sparse Transformer, fixed", "models", "causal() & (blocked(128) | lattice_columns(128, 127))"),
    Case("Mistral", "models", "sliding_window(4096)"),
    Case("Gemma, local", "models", "sliding_window(1024)"),
    Case("Gemma, global", "models", "causal()"),
    Case("LongNet, mixture", "models", _longnet),
    Case("neighbourhood 13x13", "models", lambda n: f"neighborhood({_grid(n, 2)}, 13)"),
    Case("neighbourhood 13x13, dilated", "models", lambda n: f"neighborhood({_grid(n, 2)}, 13, dilation=2)"),
)

PLANNING = (
    Case("window", "planning", "window(256)"),
    Case("causal", "planning", "causal()"),
    Case("strided", "planning", "strided(64)"),
    Case("window and stride", "planning", "window(128) | strided(128)"),
)

SCALING = (Case("window 256", "scaling", "window(256)"),)

CASES: tuple[Case, ...] = FIGURES + VOCABULARY + PAPER + SAS + MODELS + PLANNING + SCALING
SUITES: tuple[str, ...] = tuple(dict.fromkeys(case.suite for case in CASES))


def of(*suites: str) -> tuple[Case, ...]:
    """The cases of these suites, in the registry's order."""
    return tuple(case for case in CASES if case.suite in suites)


def named(suite: str, *names: str) -> tuple[Case, ...]:
    """These cases of a suite, in this order. Raises KeyError for names that are none."""
    known = {case.name: case for case in of(suite)}
    return tuple(known[name] for name in names)
