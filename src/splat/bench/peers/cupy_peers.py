"""cuSPARSE through CuPy: its product of a CSR matrix and a dense one. Untested: no GPU was there."""

from __future__ import annotations

from typing import Any

from splat.bench.peers.base import Contender, Kind, Layout, Ready
from splat.bench.problem import Problem
from splat.bench.timing import Enqueued


def _spmm(problem: Problem) -> Ready:
    import cupy
    import cupyx.scipy.sparse

    indptr, indices, data = (cupy.asarray(x) for x in (problem.pairs.indptr, problem.pairs.column, problem.data))
    shape = (problem.q_len, problem.q_len)
    matrices = [cupyx.scipy.sparse.csr_matrix((one, indices, indptr), shape=shape) for one in data]
    value = cupy.asarray(problem.inputs.value)

    def call() -> Any:
        return cupy.stack([a @ v for a, v in zip(matrices, value, strict=True)])

    def wait(out: Any) -> Any:
        cupy.cuda.get_current_stream().synchronize()
        return out

    return Ready(Enqueued(call, wait), Layout.ROWS, lambda out: out.get())


CUSPARSE = Contender(
    "cusparse",
    "cuSPARSE through CuPy: CSR @ dense (untested)",
    Kind.SPARSE,
    {"spmm": _spmm},
    packages=("cupy",),
    devices=("cuda",),
)
