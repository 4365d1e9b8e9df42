"""PyTorch's: scaled_dot_product_attention with a mask, FlexAttention, and CSR matrices. Imports torch when called."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from splat.bench import flex as masks
from splat.bench.peers.base import Contender, Kind, Layout, Ready, as_numpy
from splat.bench.problem import Problem
from splat.bench.timing import Enqueued

#: Bytes that `create_block_mask` needs for each pair of positions, measured.
BLOCK_MASK_BYTES = 19

#: And a mask of SDPA, as booleans and as what is added to scores.
SDPA_BYTES = 6


def _on(problem: Problem, array: np.ndarray) -> Any:
    import torch

    # In memory of PyTorch's own, which lies at whole lines; NumPy's need not.
    return torch.from_numpy(np.ascontiguousarray(array)).clone().to(problem.device)


def _call(problem: Problem, function: Callable[[], Any]) -> Callable[[], Any]:
    """With gradients for training alone; returns when the result is there. Enqueued on a GPU."""
    import torch

    def call() -> Any:
        with torch.set_grad_enabled(problem.op == "training"):
            return function()

    def wait(out: Any) -> Any:
        torch.cuda.synchronize()
        return out

    return Enqueued(call, wait) if problem.device == "cuda" else call


def _read(result: Any) -> np.ndarray:
    return result.detach().float().cpu().numpy()


def _stacked(results: list[Any]) -> np.ndarray:
    return np.stack([_read(one) for one in results])


def _batch_of_one(problem: Problem) -> list[Any]:
    """query, key, value and d_out [1, heads, positions, head dim] in the problem's dtype: its own layout."""
    import torch

    return [_on(problem, x[None]).to(getattr(torch, problem.dtype)) for x in problem.inputs[:4]]


# -- attention ---------------------------------------------------------------------------------------------------------


def _attending(problem: Problem, attention: Callable[..., Any]) -> Ready:
    """Of `attention(query, key, value)`; of training with its gradients."""
    import torch

    query, key, value, d_out = _batch_of_one(problem)
    if problem.op != "training":
        return Ready(_call(problem, lambda: attention(query, key, value)), Layout.ROWS, lambda out: _read(out[0]))
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def both() -> list[Any]:
        out = attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, d_out)]

    return Ready(_call(problem, both), Layout.GRADIENTS, lambda results: _stacked([one[0] for one in results]))


def _sdpa(problem: Problem) -> Ready:
    import torch

    mask = _on(problem, problem.pattern.to_dense(problem.q_len))
    return _attending(problem, functools.partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=mask))


def _flex(problem: Problem) -> Ready:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    mask = masks.block_mask(problem.text, problem.q_len, problem.device)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return _attending(problem, functools.partial(compiled, block_mask=mask))


def _flex_refuses(problem: Problem) -> str | None:
    if problem.op == "training" and problem.device == "cpu":
        return "FlexAttention has no backward on CPUs"
    return None


def _flex_planning(problem: Problem) -> Ready:
    masks.block_mask("causal()", 256, problem.device)  # what the first call loads is not the mask's
    call = _call(problem, lambda: masks.block_mask(problem.text, problem.q_len, problem.device))
    return Ready(call.__call__, Layout.PLAN, as_numpy)  # one at a time: who plans waits for it


# -- torch.sparse ------------------------------------------------------------------------------------------------------


def _csr(problem: Problem) -> list[Any]:
    """One CSR matrix a head."""
    import torch

    at = [_on(problem, x.astype(np.int32)) for x in (problem.pairs.indptr, problem.pairs.column)]  # faster than int64
    size = (problem.q_len, problem.q_len)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return [
            torch.sparse_csr_tensor(*at, _on(problem, one), size=size, check_invariants=False) for one in problem.data
        ]


def _csr_sddmm(problem: Problem) -> Ready:
    import torch

    matrices = _csr(problem)
    query, key = (_on(problem, x) for x in problem.inputs[:2])

    def run() -> list[Any]:
        return [
            torch.sparse.sampled_addmm(matrix, q, k.T, beta=0.0)
            for matrix, q, k in zip(matrices, query, key, strict=True)
        ]

    return Ready(_call(problem, run), Layout.CSR, lambda out: _stacked([one.values() for one in out]))


def _csr_spmm(problem: Problem) -> Ready:
    matrices, value = _csr(problem), _on(problem, problem.inputs.value)
    call = _call(problem, lambda: [matrix @ v for matrix, v in zip(matrices, value, strict=True)])
    return Ready(call, Layout.ROWS, _stacked)


def _coo_softmax(problem: Problem) -> Ready:
    import torch

    matrices = [matrix.to_sparse_coo().coalesce() for matrix in _csr(problem)]
    call = _call(problem, lambda: [torch.sparse.softmax(matrix, dim=1) for matrix in matrices])
    return Ready(call, Layout.CSR, lambda out: _stacked([one.values() for one in out]))


SDPA = Contender(
    "sdpa",
    "PyTorch scaled_dot_product_attention with a mask",
    Kind.ATTENTION,
    {"attention": _sdpa, "training": _sdpa, "composed": _sdpa},
    packages=("torch",),
    needs_bytes=lambda problem: SDPA_BYTES * problem.q_len**2,
)
FLEX = Contender(
    "flex",
    "PyTorch FlexAttention, compiled; create_block_mask for planning",
    Kind.ATTENTION,
    {"attention": _flex, "training": _flex, "planning": _flex_planning},
    packages=("torch",),
    needs_bytes=lambda problem: BLOCK_MASK_BYTES * problem.q_len**2,
    refuses=_flex_refuses,
    slow_to_prepare=True,
)
TORCH_SPARSE = Contender(
    "torch-sparse",
    "torch.sparse: CSR sampled_addmm, CSR @ dense, softmax of COO",
    Kind.SPARSE,
    {"sddmm": _csr_sddmm, "spmm": _csr_spmm, "softmax": _coo_softmax},
    packages=("torch",),
    needs_bytes=lambda problem: problem.nnz * (32 + 16 * problem.heads),
)
