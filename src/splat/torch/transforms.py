"""The operations under `torch.func`'s transforms (grad, vjp, jacrev, vmap).

Mapped over, a call is one of a larger batch. Derivatives of a custom op are none to `torch.func`; what is transformed
goes through an `autograd.Function` instead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from splat.torch import validate
from splat.torch.operation import LIBRARY, attend, attend_backward, differentiate, refuse, save


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is under way; inside `torch.compile`, which has rules of its own, never."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class Attend(torch.autograd.Function):
    """`splat::attention`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return attend(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Any) -> Any:
        return differentiate(ctx, *d_outputs, backward=_AttendBackward.apply)

    @staticmethod
    def jvp(*_: Any) -> Any:
        validate.refuse_tangents()


class _AttendBackward(torch.autograd.Function):
    """`splat::attention_backward`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return attend_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *d_outputs: Any) -> Any:
        return refuse(ctx, *d_outputs)

    @staticmethod
    def jvp(*_: Any) -> Any:
        validate.refuse_tangents()


def _mapped(
    operation: Any, num_tensors: int, info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[Any, Any]:  # fmt: skip
    """(results, their mapped axes) of many calls, made as one. The first `num_tensors` arguments have a batch."""
    query, dim, size = arguments[0], in_dims[0], info.batch_size
    batch = query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]
    tensors = [_fold(x, dim, size) for x, dim in zip(arguments[:num_tensors], in_dims[:num_tensors], strict=True)]
    results = operation(*tensors, *arguments[num_tensors:])
    # Gradients that nobody wants, [0], have no batch.
    return (
        tuple(x.unflatten(0, (size, batch)) if x.ndim > 1 else x for x in results),
        tuple(0 if x.ndim > 1 else None for x in results),
    )


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped axis of [batch, ...] as part of the batch; what is not mapped over is repeated."""
    if x is None:
        return None
    each = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return each.flatten(0, 1)


torch.library.register_vmap("splat::attention", partial(_mapped, attend, 5), lib=LIBRARY)
torch.library.register_vmap("splat::attention_backward", partial(_mapped, attend_backward, 9), lib=LIBRARY)
