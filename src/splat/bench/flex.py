"""FlexAttention's view of our patterns: the same pairs as a `mask_mod`, and its block mask.

`mask_formula` reads a pattern's text, not its classes, so that the peer is asked for exactly what was written down.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

import splat

#: Two integer arrays (NumPy or PyTorch), broadcast against each other, to booleans.
Formula = Callable[[Any, Any], Any]

#: FlexAttention's default tile.
FLEX_BLOCK = 128

_FORMULAS: dict[str, Callable[..., Formula]] = {
    "full": lambda: lambda q, k: q + k >= 0,
    "causal": lambda: lambda q, k: k <= q,
    "window": lambda left, right=None: lambda q, k: (q - k <= left) & (k - q <= (left if right is None else right)),
    "sliding_window": lambda n: lambda q, k: (q - k < n) & (k <= q),
    "dilated_window": lambda left, right, dilation: (
        lambda q, k: (q - k <= left * dilation) & (k - q <= right * dilation) & ((q - k) % dilation == 0)
    ),
    "strided": lambda stride: lambda q, k: (q - k) % stride == 0,
    "lattice_columns": lambda stride, offset=0: lambda q, k: (k % stride == offset) & (q >= 0),
    "blocked": lambda block, before=0, after=0: (
        lambda q, k: (k // block >= q // block - before) & (k // block <= q // block + after)
    ),
    "sink": lambda n: lambda q, k: (k < n) & (q >= 0),
    "global_columns": lambda n: lambda q, k: (k < n) & (q >= 0),
    "global_rows": lambda n: lambda q, k: (q < n) & (k >= 0),
    "global_tokens": lambda n: lambda q, k: (q < n) | (k < n),
}

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.Sub: lambda a, b: a & ~b,
}


def mask_formula(text: str, q_len: int, as_array: Callable[[np.ndarray], Any] = np.asarray) -> Formula:
    """The pattern's pairs as a formula of positions; what has no formula is looked up in a dense mask.

    `as_array` makes the looked-up tables arrays of the peer's kind.
    """

    def read(node: ast.expr) -> Formula:
        match node:
            case ast.BinOp(left=left, op=op, right=right):
                combine, first, second = _BINARY[type(op)], read(left), read(right)
                return lambda q, k: combine(first(q, k), second(q, k))
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                inner = read(operand)
                return lambda q, k: ~inner(q, k)
            case ast.Attribute(value=value, attr="T"):
                swapped = read(value)
                return lambda q, k: swapped(k, q)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _FORMULAS:
                named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
                return _FORMULAS[name](*(ast.literal_eval(arg) for arg in args), **named)
            case _:
                table = as_array(splat.parse(ast.unparse(node)).to_dense(q_len))
                return lambda q, k: table[q, k]

    return read(ast.parse(text, mode="eval").body)


def block_counts(
    formula: Formula, q_len: int, block: int, as_array: Callable[[np.ndarray], Any] = np.asarray
) -> list[Any]:
    """Non-zeros of every square block, one row of blocks a list entry. Holds `block` rows of the mask at a time."""
    columns = -(-q_len // block)
    k = as_array(np.minimum(np.arange(columns * block), q_len - 1)[None, :])
    inside = as_array((np.arange(columns * block) < q_len)[None, :])
    rows = []
    for at in range(0, q_len, block):
        q = as_array(np.arange(at, min(at + block, q_len))[:, None])
        rows.append((formula(q, k) & inside).sum(0).reshape(columns, block).sum(1))
    return rows


def has_flex() -> bool:
    return importlib.util.find_spec("torch") is not None


def block_mask(text: str, q_len: int, device: str = "cpu") -> Any:
    """FlexAttention's block mask of a pattern, made on the device."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    formula = mask_formula(text, q_len, lambda table: torch.from_numpy(table).to(device))
    return create_block_mask(
        lambda b, h, q, k: formula(q, k), None, None, q_len, q_len, device=device, BLOCK_SIZE=FLEX_BLOCK
    )


def flex_area(text: str, q_len: int) -> int:
    """Scores that FlexAttention computes: all of every block that its mask does not skip."""
    mask = block_mask(text, q_len)
    blocks = int(mask.kv_num_blocks.sum())
    if mask.full_kv_num_blocks is not None:
        blocks += int(mask.full_kv_num_blocks.sum())
    return blocks * FLEX_BLOCK * FLEX_BLOCK
