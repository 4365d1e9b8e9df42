"""CPU tensors: the generated C++ kernels, called where the tensors lie."""

from __future__ import annotations

import contextlib
import ctypes
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from splat.codegen.base import Options
from splat.codegen.cpp.call import Prepared, prepare, prepare_decode
from splat.codegen.cpp.generate import forward_kernel, gradient_kernels
from splat.planning import Plan, Problem, make_plan
from splat.remembered import Remembered
from splat.torch.positions import runs_at
from splat.torch.static import Static, pattern_in
from splat.torch.validate import name_of

#: Calls of fewer floating-point operations stay on their thread: others take about 5 microseconds, and 50 where they
#: have to be made first.
SMALL_FLOPS, SMALL_FLOPS_ALONE = 1_000_000, 10_000_000


def forward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, static: Static
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output [B, N, T, H], log-sum-exp [B, N, T])."""
    batch, heads, q_len, width = query.shape
    row = heads * width
    out = query.new_empty_strided((batch, heads, q_len, width), (q_len * row, width, row, 1))
    lse = query.new_empty((batch, heads, q_len), dtype=torch.promote_types(query.dtype, torch.float32))
    arrays = {"query": query, "key": key, "value": value, "out": out, "lse": lse}
    kernel = forward_kernel(q_len, name_of(query.dtype))
    if not _run(kernel, arrays, lengths, static, _num_threads(query, key, static)):
        return out.zero_(), lse.fill_(-math.inf)
    return out, lse


def takes_offsets(query: Tensor) -> bool:
    """Whether `forward` takes sequences at different positions: the kernel for few queries does."""
    return forward_kernel(query.shape[2], name_of(query.dtype)) == "decode"


def backward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, out: Tensor, lse: Tensor,
    d_out: Tensor | None, d_lse: Tensor | None, static: Static, wanted: tuple[bool, bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients: of query [B, N, T, H]; of key and value [B, K, S, H]."""
    d_out = torch.zeros_like(out) if d_out is None else d_out.to(out.dtype)
    arrays = {"query": query, "key": key, "value": value, "out": out, "lse": lse, "d_out": d_out}
    if d_lse is not None:
        arrays["d_lse"] = d_lse.to(lse.dtype)
    results = {name: like for name, like, here in (("d_query", query, wanted[0]), ("d_key", key, wanted[1]),
                                                   ("d_value", value, wanted[1])) if here}  # fmt: skip
    made = {name: like.new_empty(like.transpose(1, 2).shape).transpose(1, 2) for name, like in results.items()}
    dtype = name_of(query.dtype)
    threads = _num_threads(query, key, static)
    kernels = gradient_kernels(dtype, query.shape[0] * key.shape[1], threads)
    if not all(wanted):
        kernels = ("d_query",) if wanted[0] else ("d_key_value",)
    for kernel in kernels:
        names = {"d_query": ["d_query"], "d_key_value": ["d_key", "d_value"]}.get(kernel, list(made))
        if not _run(kernel, arrays | {name: made[name] for name in names}, lengths, static, threads):
            for name in names:
                made[name].zero_()
    return list(made.values())


def _run(kernel: str, arrays: dict[str, Tensor], lengths: Tensor | None, static: Static, threads: int) -> bool:
    """Runs a kernel; False where the plan has no pair at all."""
    query, key = arrays["query"], arrays["key"]
    batch, num_q_heads, q_len, width = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    call = kernel, static, q_len, kv_len, width, name_of(query.dtype), lengths is not None
    prepared = _prepared(call, lambda: _prepare(*call))
    if prepared is None:
        return False
    placed, copies = {}, []
    for name, x in arrays.items():
        stride = x.stride()
        if len(stride) == 4 and stride[3] != 1 and x.shape[3] != 1:
            x = x.contiguous()
            stride = x.stride()
            copies.append(x)
        placed[name] = x.data_ptr(), stride[0], stride[2], stride[1]
    sizes = (batch, q_len, kv_len, num_q_heads, num_kv_heads)
    prepared(placed, None if lengths is None else lengths.data_ptr(), sizes, threads, _team())
    return True


def _num_threads(query: Tensor, key: Tensor, static: Static) -> int:
    batch, num_q_heads, q_len, width = query.shape
    of = static, q_len, key.shape[2], width, name_of(query.dtype)
    flops = 4 * _pairs(of, lambda: _count(*of)) * width * num_q_heads * batch
    return torch.get_num_threads() if flops > (SMALL_FLOPS if _team() else SMALL_FLOPS_ALONE) else 1


@cache
def _team() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP runtime that PyTorch runs on: its threads do our work as well.

    None where there is none to be found, as on other systems than Linux.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if "omp" in line and "/" in line}
    runtimes = [path for path in map(Path, paths) if path.name.startswith(("libgomp", "libiomp5", "libomp"))]
    own = Path(torch.__file__).parent
    for path in sorted(runtimes, key=lambda path: not path.is_relative_to(own)):
        with contextlib.suppress(OSError):  # a file that is there no more, as after an upgrade
            entry = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
            if entry is not None:
                return ctypes.cast(entry, ctypes.c_void_p).value
    return None


def _prepare(
    kernel: str, static: Static, q_len: int, kv_len: int, head_dim: int, dtype: str, lengths: bool
) -> Prepared | None:
    _, scale, cap, _ = static
    options = Options(1 / math.sqrt(head_dim) if scale is None else scale, cap)
    if kernel == "decode":
        runs = runs_at(static, q_len, kv_len)
        return prepare_decode(runs, options, dtype=dtype, head_dim=head_dim, lengths=lengths)
    return prepare(_plan(static, q_len, kv_len, head_dim, dtype), options, kernel, lengths=lengths)


_prepared = Remembered(entries=512, nbytes=1 << 28)


def _count(static: Static, q_len: int, kv_len: int, head_dim: int, dtype: str) -> float:
    """Non-zeros of a sequence, on average."""
    if forward_kernel(q_len, dtype) == "forward":
        return _plan(static, q_len, kv_len, head_dim, dtype).nnz
    counts = runs_at(static, q_len, kv_len)[..., 2::3]
    return float(counts.sum()) / len(counts)


_pairs = Remembered(entries=1024, nbytes=1 << 27)


def _plan(static: Static, q_len: int, kv_len: int, head_dim: int, dtype: str) -> Plan:
    problem = Problem.of_any_heads(pattern_in(static), q_len, kv_len, head_dim, dtype)
    return make_plan(problem, implementation="cpp", query_offset=static[3])
