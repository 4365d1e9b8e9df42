"""Exchange: structure and values survive every other format, exactly, and padding is never read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, reject, settings
from jax.experimental.sparse import BCOO, BCSR

import splat
from splat.acsr import ACSR, Component, build
from splat.errors import ArgumentError, IrregularPatternError, UnsupportedError
from tests.strategies import Case, cases
from tests.test_readme import run_blocks

#: Several components, strides above 1, rows without a run, more rows than columns and the reverse.
PATTERNS = {
    "window_sink": (splat.causal() & splat.window(3) | splat.sink(2), 12, 12),
    "strided": (splat.causal() & splat.strided(3), 10, 14),
    "dilated": (splat.dilated_window(2, 1, 3) - splat.sink(4), 15, 9),
}


def build_case(case: Case) -> ACSR:
    return build(case.pattern, case.q_len, case.kv_len, case.query_offset)


def random_dense(mask: np.ndarray, lead: tuple[int, ...] = (), dtype: Any = np.float32) -> np.ndarray:
    """[*lead, rows, cols]: 1, 2, ... at the pairs, some of them 0, and nothing elsewhere."""
    numbers = np.arange(np.prod((*lead, *mask.shape), dtype=int)).reshape(*lead, *mask.shape) % 97
    return np.where(mask, numbers, 0).astype(dtype)


def poisoned(acsr: ACSR, dense: Any) -> Any:
    """The values of `dense`, with NaN in padding."""
    return np.where(acsr.has_value(), acsr.values_of(dense), np.nan).astype(dense.dtype)


def assert_same(found: Any, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(found), expected)


def if_regular(function: Any, *arguments: Any) -> Any:
    """Patterns in closed form may be regular where their pairs alone, or these by columns, are not."""
    try:
        return function(*arguments)
    except IrregularPatternError:
        reject()


def recovered(convert: Any, matrix: Any) -> tuple[ACSR, Any]:
    acsr, values = if_regular(convert, matrix)
    acsr.validate()
    assert not np.asarray(values)[..., ~acsr.has_value()].any()
    return acsr, values


# -- values and dense arrays -------------------------------------------------------------------------------------------


@given(cases())
def test_values_lie_where_the_format_says(case: Case) -> None:
    acsr, everything = build_case(case), np.ones(case.mask.shape, bool)
    dense = random_dense(everything, (2,), np.int32)
    values = acsr.values_of(dense)
    assert values.shape == (2, acsr.shape[0], acsr.width)
    expected = np.zeros_like(values)
    for offset, one in zip(acsr.offsets, acsr.components, strict=True):
        for i in range(acsr.shape[0]):
            for t in range(one.count[i]):
                expected[:, i, offset + t] = dense[:, i, one.start[i] + one.stride * t]
    assert_same(values, expected)
    assert_same(acsr.to_dense(values), np.where(case.mask, dense, 0))


@given(cases())
def test_pairs_are_those_of_csr(case: Case) -> None:
    acsr = build_case(case)
    row, column = np.nonzero(case.mask)
    assert_same(acsr.pairs.row, row.astype(np.int32))
    assert_same(acsr.pairs.column, column.astype(np.int32))
    assert_same(acsr.pairs.indptr, scipy.sparse.csr_array(case.mask).indptr.astype(np.int32))
    assert_same(acsr.columns()[acsr.pairs.row, acsr.pairs.slot], acsr.pairs.column)
    assert_same(acsr.pairs.place[acsr.pairs.row, acsr.pairs.slot], np.arange(acsr.nnz, dtype=np.int32))
    assert np.unique(acsr.pairs.place).size == acsr.pairs.place.size


@given(cases())
def test_dense_round_trip(case: Case) -> None:
    dense = random_dense(case.mask)
    acsr, values = recovered(ACSR.from_dense, dense)
    assert_same(acsr.to_dense(), dense != 0)
    assert_same(acsr.to_dense(poisoned(acsr, dense)), dense)
    assert_same(acsr.to_dense(values), dense)


def test_every_bit_is_kept() -> None:
    dense = np.array([[np.nan, -0.0, 5e-324, 0.0], [0.0, np.inf, -np.inf, -1e308]])
    acsr, values = ACSR.from_dense(dense)
    assert acsr.nnz == 5  # NaN is not zero, -0.0 is
    assert_same(acsr.to_dense(values), dense)
    stored = scipy.sparse.csr_array((np.array([-0.0, np.nan]), ([0, 1], [1, 2])), shape=(2, 4))
    acsr, values = ACSR.from_scipy(stored)
    assert acsr.nnz == 2
    assert np.signbit(acsr.to_scipy(values).data[0])


@pytest.mark.parametrize("dtype", ["bool", "int8", "float16", "bfloat16", "float32", "complex64"])
def test_dtypes_are_kept(dtype: str) -> None:
    mask = PATTERNS["window_sink"][0].to_dense(12, 12)
    for dense in (random_dense(mask, dtype=jnp.dtype(dtype)), jnp.asarray(random_dense(mask), dtype)):
        acsr, values = ACSR.from_dense(dense)
        expected = np.asarray(dense)
        assert_same(acsr.to_dense(values), expected)
        assert_same(acsr.transpose().to_dense(acsr.transpose_values(values)), expected.T)
        for convert, stored in ((ACSR.from_bcoo, acsr.to_bcoo(values)), (ACSR.from_bcsr, acsr.to_bcsr(values))):
            assert_same(acsr.to_dense(convert(stored)[1]), expected)
            if dtype != "bool":  # which JAX stores but does not make dense
                assert_same(stored.todense(), expected)
        if dtype not in ("float16", "bfloat16"):
            assert_same(acsr.to_scipy(values).toarray(), expected)
            assert_same(acsr.to_dense(ACSR.from_scipy(acsr.to_scipy(values))[1]), expected)


# -- SciPy -------------------------------------------------------------------------------------------------------------


@given(cases())
def test_scipy_round_trip(case: Case) -> None:
    acsr, dense = build_case(case), random_dense(case.mask)
    values = poisoned(acsr, dense)
    by_rows, by_columns = np.nonzero(case.mask)[1], np.nonzero(case.mask.T)[1]
    for format, indices in (("csr", by_rows), ("coo", by_rows), ("csc", by_columns)):
        matrix = acsr.to_scipy(values, format)
        assert type(matrix) is getattr(scipy.sparse, f"{format}_array")
        np.testing.assert_array_equal(matrix.col if format == "coo" else matrix.indices, indices)  # zeros stored, too
        assert matrix.has_canonical_format
        assert_same(matrix.toarray(), dense)
        again, found = recovered(ACSR.from_scipy, matrix)
        assert_same(again.to_dense(), case.mask)
        assert_same(again.to_dense(found), dense)


def test_scipy_matrices_in_any_order() -> None:
    """Unsorted and repeated entries, stored zeros, old matrices and other formats."""
    row, column, data = [2, 0, 0, 2, 2, 1], [1, 3, 0, 0, 1, 2], [1, 2, 3, 0, 4, -2]
    coo = scipy.sparse.coo_array((np.array(data, np.int8), (row, column)), shape=(3, 4))
    expected = np.array([[3, 0, 0, 2], [0, 0, -2, 0], [0, 5, 0, 0]], np.int8)
    for matrix in (coo, coo.tocsr(), coo.tocsc(), scipy.sparse.csr_matrix(coo), coo.tolil()):
        acsr, values = ACSR.from_scipy(matrix)
        assert acsr.nnz == 5
        assert_same(acsr.to_dense(values), expected)
    parts = np.array([1.0, 2.0, 4.0]), np.array([3, 0, 3]), np.array([0, 3, 3, 3])
    unsorted = scipy.sparse.csr_array(parts, shape=(3, 4))
    acsr, values = ACSR.from_scipy(unsorted)
    assert_same(acsr.to_dense(values), np.array([[2, 0, 0, 5.0], [0] * 4, [0] * 4]))
    assert unsorted.nnz == 3  # as it was


def test_maps_are_remembered_and_not_changed() -> None:
    acsr = build(*PATTERNS["window_sink"])
    matrix = acsr.to_scipy(np.zeros((12, acsr.width)))
    matrix.eliminate_zeros()
    assert_same(acsr.to_scipy(acsr.has_value()).toarray(), acsr.to_dense())
    assert acsr.pairs is acsr.pairs
    assert acsr.transposition is acsr.transposition
    assert acsr.transpose() is acsr.transpose()
    with pytest.raises(ValueError, match="read-only"):
        acsr.pairs.column[0] = 1


# -- jax.experimental.sparse -------------------------------------------------------------------------------------------


@settings(max_examples=max(settings().max_examples // 3, 1))  # each compiles
@given(cases(max_len=24))
def test_jax_sparse_round_trip(case: Case) -> None:
    acsr, dense = build_case(case), random_dense(case.mask)
    values = jnp.asarray(poisoned(acsr, dense))
    for matrix, convert in ((acsr.to_bcoo(values), ACSR.from_bcoo), (acsr.to_bcsr(values), ACSR.from_bcsr)):
        assert matrix.nse == acsr.nnz
        assert matrix.indices_sorted
        assert matrix.unique_indices
        assert_same(matrix.todense(), dense)
        again, found = recovered(convert, matrix)
        assert isinstance(found, jax.Array)
        assert_same(again.to_dense(), case.mask)
        assert_same(again.to_dense(found), dense)


@pytest.mark.parametrize("lead", [(3,), (2, 1)])
def test_batches(lead: tuple[int, ...]) -> None:
    acsr = build(*PATTERNS["dilated"])
    dense = random_dense(acsr.to_dense(), lead)
    values = poisoned(acsr, dense)
    for matrix, convert in ((acsr.to_bcoo(values), ACSR.from_bcoo), (acsr.to_bcsr(values), ACSR.from_bcsr)):
        assert matrix.n_batch == len(lead)
        assert matrix.indices.shape[: len(lead)] == (1,) * len(lead)  # once for all
        assert_same(matrix.todense(), dense)
        again, found = convert(matrix)
        assert_same(again.to_dense(found), dense)
    matrix = acsr.to_bcoo(values)
    once = BCOO((matrix.data[:1], matrix.indices), shape=matrix.shape)
    again, found = ACSR.from_bcoo(once)
    assert_same(again.to_dense(found), np.broadcast_to(dense[:1], dense.shape))


def test_jax_sparse_in_any_order() -> None:
    """Repeated entries, and the padding of more stored entries than there are."""
    expected = np.array([[0, 5, 0], [2, 0, 0]], np.float32)
    indices = jnp.array([[1, 0], [0, 1], [2, 3], [0, 1], [2, 3]], jnp.int32)
    matrix = BCOO((jnp.array([2, 1, 7, 4, 7], jnp.float32), indices), shape=(2, 3))
    padded = [kind.fromdense(jnp.asarray(expected), nse=4) for kind in (BCOO, BCSR)]
    for convert, stored in zip((ACSR.from_bcoo, ACSR.from_bcoo, ACSR.from_bcsr), (matrix, *padded), strict=True):
        acsr, values = convert(stored)
        assert acsr.nnz == 2
        assert_same(acsr.to_dense(values), expected)
    acsr, values = ACSR.from_bcoo(BCOO((matrix.data != 0, indices), shape=(2, 3)))
    assert_same(acsr.to_dense(values), expected != 0)


def test_gradients_reach_the_data_of_a_bcoo() -> None:
    indices = jnp.array([[1, 0], [0, 1], [0, 1]], jnp.int32)

    def loss(data: jax.Array) -> jax.Array:
        acsr, values = ACSR.from_bcoo(BCOO((data, indices), shape=(2, 2)))
        return (acsr.to_dense(values) * jnp.array([[1, 2], [3, 4]])).sum()

    assert_same(jax.grad(loss)(jnp.ones(3)), np.array([3, 2, 2], np.float32))


# -- transposition, JAX's transformations ------------------------------------------------------------------------------


@given(cases())
def test_transposition(case: Case) -> None:
    acsr, dense = build_case(case), random_dense(case.mask, (2,))
    across = if_regular(acsr.transpose)
    found = acsr.transpose_values(poisoned(acsr, dense))
    assert_same(found, across.values_of(dense.swapaxes(1, 2)))  # 0 in padding, too
    assert_same(across.to_dense(found), dense.swapaxes(1, 2))


@pytest.mark.parametrize("name", PATTERNS)
def test_derivatives(name: str, rng: np.random.Generator) -> None:
    """All three are linear; what they give back for a cotangent is known from the other direction."""
    acsr = build(*PATTERNS[name])
    across, mask = acsr.transpose(), acsr.to_dense()
    dense, other = (rng.standard_normal((2, *acsr.shape), np.float32) for _ in range(2))
    values, cotangent = poisoned(acsr, dense), jnp.asarray(poisoned(across, other.swapaxes(1, 2)))
    found = jax.vjp(acsr.to_dense, jnp.asarray(values))[1](jnp.asarray(other))[0]
    assert_same(found, acsr.values_of(other))
    found = jax.vjp(acsr.values_of, jnp.asarray(dense))[1](jnp.asarray(poisoned(acsr, other)))[0]
    assert_same(found, np.where(mask, other, 0))
    found = jax.vjp(acsr.transpose_values, jnp.asarray(values))[1](cotangent)[0]
    assert_same(found, acsr.values_of(other))
    for stored in (acsr.to_bcoo, acsr.to_bcsr):
        found = jax.grad(lambda x, to=stored: (to(x).todense() * other).sum())(jnp.asarray(values))
        assert_same(found, acsr.values_of(other))


def test_values_may_be_traced(rng: np.random.Generator) -> None:
    acsr = build(*PATTERNS["dilated"])
    dense = rng.standard_normal((3, *acsr.shape), np.float32)
    values = poisoned(acsr, dense)
    for function, argument in (
        (acsr.to_dense, values),
        (acsr.values_of, dense),
        (acsr.transpose_values, values),
        (lambda x: acsr.to_bcoo(x).todense(), values),
        (lambda x: acsr.to_bcsr(x).todense(), values),
    ):
        expected = np.asarray(function(argument))
        assert_same(jax.jit(function)(argument), expected)
        assert_same(jax.vmap(function)(jnp.asarray(argument)), expected)
        assert_same(jax.jvp(function, (jnp.zeros_like(argument),), (jnp.asarray(argument),))[1], expected)
    assert_same(jax.jit(acsr.to_bcoo)(values).todense(), np.where(acsr.to_dense(), dense, 0))


# -- edges and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (3, 5)])
def test_matrices_without_non_zeros(shape: tuple[int, int]) -> None:
    for dense in (np.zeros(shape, np.float32), jnp.zeros(shape)):
        acsr, values = ACSR.from_dense(dense)
        assert (acsr.shape, values.shape) == (shape, (shape[0], 0))
        assert_same(acsr.to_dense(values), np.zeros(shape, np.float32))
        assert acsr.transpose_values(values).shape == (shape[1], 0)
        for name in ("bcoo", "bcsr", "scipy"):
            again, found = getattr(ACSR, f"from_{name}")(getattr(acsr, f"to_{name}")(values))
            assert (again, found.shape) == (acsr, values.shape)


def test_irregular_structure_is_refused(rng: np.random.Generator) -> None:
    dense = (rng.random((20, 400)) < 0.5).astype(np.float32)
    sparse = scipy.sparse.csr_array(dense)
    jax_sparse = (ACSR.from_bcoo, BCOO.from_scipy_sparse(sparse)), (ACSR.from_bcsr, BCSR.from_scipy_sparse(sparse))
    for convert, matrix in ((ACSR.from_dense, dense), (ACSR.from_scipy, sparse), *jax_sparse):
        with pytest.raises(
            IrregularPatternError, match=r"row \d+ is not regular: it needs \d+ arithmetic progressions"
        ):
            convert(matrix, max_components=8)
    with pytest.raises(IrregularPatternError, match="raise max_components"):
        ACSR.from_dense(np.array([[1, 1, 0, 1]]), max_components=1)


WINDOW = build(*PATTERNS["window_sink"])  # 12 x 12, width 6
VALUES = np.zeros((12, 6), np.float32)
SCIPY, EYE = scipy.sparse.eye_array(3), BCOO.fromdense(jnp.eye(3))
TWO = BCOO.fromdense(jnp.stack([jnp.eye(2), jnp.ones((2, 2))]), n_batch=1)
NEGATIVE = BCOO((jnp.ones(1), jnp.array([[0, -1]])), shape=(2, 3))
BENT = BCSR((jnp.ones(2), jnp.zeros(2, int), jnp.array([0, 2, 1])), shape=(2, 3))
WIDE = ACSR((2**20, 2**12), (Component(1, np.zeros(2**20, np.int32), np.full(2**20, 2**12, np.int32)),))
TWICE = ACSR((3, 3), (Component(1, np.zeros(3, np.int32), np.ones(3, np.int32)),) * 2)
RUNTIME = build(splat.segments(jnp.zeros(4, jnp.int32)), 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ACSR.from_dense(np.array([["a"]])), "matrix must be of numbers or booleans, but its dtype is <U1"),
        (lambda: ACSR.from_dense(np.array([[1, None]])), "of numbers or booleans, but its dtype is object"),
        (
            lambda: ACSR.from_dense(np.zeros((1, 1), "M8[s]")),
            "of numbers or booleans, but its dtype is datetime64[s]",
        ),
        (lambda: ACSR.from_dense(np.zeros((1, 1), [("a", int)])), "of numbers or booleans, but its dtype is"),
        (
            lambda: ACSR.from_dense(jax.random.key(0).reshape(1, 1)),
            r"of numbers or booleans, but its dtype is key<fry>",
        ),
        (lambda: ACSR.from_dense(np.ma.masked_array(np.ones((2, 2)))), "matrix must not be a masked array"),
        (lambda: ACSR.from_dense([[1, 0]]), "matrix must be a NumPy or JAX array [rows, cols], but list was given"),
        (lambda: ACSR.from_dense(SCIPY), "given; from_scipy, from_bcoo and from_bcsr take sparse ones."),
        (lambda: ACSR.from_dense(np.ones((2, 3, 4))), "matrix must have shape [rows, cols], but [2, 3, 4] was given"),
        (lambda: jax.jit(ACSR.from_dense)(jnp.ones((2, 2))), "matrix must be known now, but a traced JAX array was"),
        (lambda: ACSR.from_scipy(np.eye(3)), "2-D sparse array or matrix of SciPy, but ndarray of shape [3, 3] was"),
        (lambda: ACSR.from_scipy(scipy.sparse.coo_array(np.ones(3))), "2-D sparse array or matrix of SciPy, but coo"),
        (lambda: ACSR.from_bcoo(SCIPY), "matrix must be a BCOO of jax.experimental.sparse, but dia_array of shape"),
        (lambda: ACSR.from_bcoo(BENT), "from_scipy SciPy's, from_bcsr a BCSR."),
        (lambda: ACSR.from_bcsr(EYE), "matrix must be a BCSR of jax.experimental.sparse, but BCOO of shape [3, 3]"),
        (lambda: ACSR.from_bcoo(BCOO.fromdense(jnp.ones((2, 3, 3)))), "n_sparse = 3, n_dense = 0 was given. Make it"),
        (lambda: ACSR.from_bcoo(BCOO.fromdense(jnp.eye(3), n_dense=1)), "n_sparse = 1, n_dense = 1 was given. Make it"),
        (lambda: ACSR.from_bcoo(TWO), "with the same indices, but different ones were given. Convert them one at a"),
        (lambda: ACSR.from_bcoo(NEGATIVE), "matrix must have no negative index, but has some."),
        (lambda: ACSR.from_bcsr(BENT), "goes up from 0 to at most 2, the stored entries, but [0, 2, 1] was given"),
        (lambda: jax.jit(ACSR.from_bcoo)(EYE), "matrix.indices must be known now, but a traced JAX array was given"),
        (lambda: WINDOW.to_dense(VALUES[:, 1:]), "values must have shape [..., rows, width], here [..., 12, 6], but"),
        (lambda: WINDOW.to_dense(VALUES[0]), "here [..., 12, 6], but [6] was given. `acsr.values_of(dense)` makes"),
        (lambda: WINDOW.to_dense(VALUES.tolist()), "values must be a NumPy or JAX array [..., rows, width], but list"),
        (lambda: WINDOW.values_of(VALUES), "dense must have shape [..., rows, cols], here [..., 12, 12], but [12, 6]"),
        (lambda: WINDOW.transpose_values(VALUES[1:]), "values must have shape [..., rows, width], here [..., 12, 6]"),
        (lambda: WINDOW.to_scipy(VALUES, "bsr"), "format must be one of csr, csc, coo, but 'bsr' was"),
        (lambda: WINDOW.to_scipy(VALUES[None]), "values must have shape [rows, width] = [12, 6], because SciPy's"),
        (lambda: jax.jit(WINDOW.to_scipy)(VALUES), "values must be known now, but a traced JAX array was given"),
        (lambda: TWICE.to_scipy(np.ones((3, 2))), "names a pair more than once: its components are not disjoint"),
        (lambda: RUNTIME.values_of(np.ones((4, 4))), "the width of this ACSR's values is not known yet"),
    ],
)
def test_arguments_are_checked(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WINDOW.to_scipy(jnp.asarray(VALUES, "bfloat16")), "but bfloat16 was given. Convert them first, with"),
        (lambda: WINDOW.to_scipy(VALUES.astype("float16")), "but float16 was given. Convert them first, with values."),
        (lambda: WINDOW.to_bcoo(VALUES.astype("float64")), "but float64 was given, of which it makes float32. Set jax"),
        (lambda: WIDE.pairs, "one by one up to 2**30 of them, but this ACSR has 1048576 rows x 4096. Convert fewer"),
    ],
)
def test_what_cannot_be_held_is_refused(call: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        call()


# -- size, documentation -----------------------------------------------------------------------------------------------


SINGLE = """
full(); causal(); window(64); window(4096, 0); sliding_window(129); blocked(128); blocked(64, before=2); strided(128);
causal() & strided(32); dilated_window(80, 80, 4); lattice_columns(128); sink(128); segments(lengths=[9000, 7384])
"""


@pytest.mark.parametrize("text", [" ".join(one.split()) for one in SINGLE.split(";")])
def test_metadata_is_a_fiftieth_of_csrs(text: str) -> None:
    """One component is 8 bytes a row; CSR's int32 indices and indptr are 4 * 128 + 4 with 128 non-zeros: 1.55 %."""
    n = 16_384
    acsr = build(splat.parse(text), n, n)
    assert len(acsr.components) == 1
    assert acsr.nnz >= 128 * n
    assert acsr.metadata_bytes == 8 * n
    assert acsr.metadata_bytes <= 0.02 * 4 * (acsr.nnz + n + 1)


def test_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran, exempt = run_blocks(Path(__file__).parents[2] / "docs/acsr.md")
    assert (ran, exempt) == (1, 0)
