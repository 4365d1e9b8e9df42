"""JAX's own: dense matrix products and attention, BCOO, and cuDNN's window on GPUs."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

from splat.bench.peers.base import Contender, Kind, Layout, Ready, as_numpy
from splat.bench.peers.ours import attending, jitted
from splat.bench.problem import Problem


def _scattered(problem: Problem) -> np.ndarray:
    """The values as a dense matrix [heads, positions, positions], zeros elsewhere."""
    out = np.zeros((problem.heads, problem.q_len, problem.q_len), np.float32)
    out[:, problem.pairs.row, problem.pairs.column] = problem.data
    return out


# -- dense -------------------------------------------------------------------------------------------------------------


def _dense_sddmm(problem: Problem) -> Ready:
    query, key, *_ = problem.inputs
    return Ready(jitted(lambda q, k: q @ k.swapaxes(1, 2), query, key), Layout.DENSE, as_numpy)


def _dense_softmax(problem: Problem) -> Ready:
    import jax

    mask = problem.pattern.to_dense(problem.q_len)
    call = jitted(lambda x, m: jax.nn.softmax(x, axis=-1, where=m), _scattered(problem), mask)
    return Ready(call, Layout.DENSE, as_numpy)


def _dense_spmm(problem: Problem) -> Ready:
    return Ready(jitted(lambda x, v: x @ v, _scattered(problem), problem.inputs.value), Layout.ROWS, as_numpy)


def _dense_attention(problem: Problem) -> Ready:
    import jax

    mask = problem.pattern.to_dense(problem.q_len)[None, None]
    return attending(problem, lambda q, k, v, m: jax.nn.dot_product_attention(q, k, v, mask=m), mask)


def _dense_bytes(problem: Problem) -> float:
    """Scores and weights; of training also what the gradients of both need."""
    return (28 if problem.op == "training" else 12) * problem.heads * problem.q_len**2


# -- BCOO --------------------------------------------------------------------------------------------------------------


def _coordinates(problem: Problem) -> np.ndarray:
    return np.stack([problem.pairs.row, problem.pairs.column], axis=1)


def _bcoo_sddmm(problem: Problem) -> Ready:
    from jax.experimental import sparse

    def one(q: Any, k: Any, at: Any) -> Any:
        return sparse.bcoo_dot_general_sampled(q, k.T, at, dimension_numbers=(((1,), (0,)), ((), ())))

    def all_heads(q: Any, k: Any, at: Any) -> Any:
        import jax.numpy as jnp

        return jnp.stack([one(q[n], k[n], at) for n in range(problem.heads)])

    query, key, *_ = problem.inputs
    return Ready(jitted(all_heads, query, key, _coordinates(problem)), Layout.CSR, as_numpy)


def _bcoo_spmm(problem: Problem) -> Ready:
    from jax.experimental import sparse

    def one(data: Any, at: Any, v: Any) -> Any:
        shape = (problem.q_len, problem.q_len)
        return sparse.BCOO((data, at), shape=shape, indices_sorted=True, unique_indices=True) @ v

    def all_heads(data: Any, at: Any, v: Any) -> Any:
        import jax.numpy as jnp

        return jnp.stack([one(data[n], at, v[n]) for n in range(problem.heads)])

    arrays = (problem.data, _coordinates(problem), problem.inputs.value)
    return Ready(jitted(all_heads, *arrays), Layout.ROWS, as_numpy)


# -- cuDNN -------------------------------------------------------------------------------------------------------------


def _window_of(problem: Problem) -> tuple[int, int] | None:
    """(left, right) where the pattern is one window; None else."""
    match ast.parse(problem.text, mode="eval").body:
        case ast.Call(func=ast.Name(id="window"), args=[ast.Constant(value=int(left))]):
            return left, left
        case ast.Call(func=ast.Name(id="window"), args=[ast.Constant(value=int(left)), ast.Constant(value=int(right))]):
            return left, right
        case ast.Call(func=ast.Name(id="sliding_window"), args=[ast.Constant(value=int(n))]):
            return n - 1, 0
    return None


def _cudnn(problem: Problem) -> Ready:
    import jax
    import jax.numpy as jnp

    window = _window_of(problem)
    assert window is not None, "`refuses` has seen to it"

    def attention(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, local_window_size=window, implementation="cudnn")

    return attending(problem, attention)


def _cudnn_refuses(problem: Problem) -> str | None:
    return None if _window_of(problem) else "the pattern is no window"


DENSE = Contender(
    "dense",
    "JAX dense: matrix product, softmax and attention with a mask",
    Kind.DENSE,
    {
        "sddmm": _dense_sddmm,
        "softmax": _dense_softmax,
        "spmm": _dense_spmm,
        "attention": _dense_attention,
        "training": _dense_attention,
        "composed": _dense_attention,
    },
    needs_bytes=_dense_bytes,
)
BCOO = Contender(
    "bcoo",
    "JAX BCOO: bcoo_dot_general_sampled; BCOO @ dense",
    Kind.SPARSE,
    {"sddmm": _bcoo_sddmm, "spmm": _bcoo_spmm},
    needs_bytes=lambda problem: problem.nnz * (24 + 8 * problem.head_dim) * problem.heads,
)
CUDNN = Contender(
    "cudnn",
    "cuDNN's window through JAX, bfloat16 (untested)",
    Kind.ATTENTION,
    {"attention": _cudnn},
    devices=("cuda",),
    refuses=_cudnn_refuses,
)
