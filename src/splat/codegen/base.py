"""The contract of an implementation, and the request that it may refuse."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from splat.planning import Plan


@dataclasses.dataclass(frozen=True)
class Request:
    """What an implementation must be able to serve: static facts of a call.

    Attributes:
      platform: where arrays live or the target's kind: "cpu", "gpu", "tpu".
      dtype, head_dim: of query, key and value.
      named: whether the implementation was asked for by name.
      elsewhere: whether nothing is to be run here, so that what is installed does not matter.
      blocks: (block_q, block_kv) that are asked for; None: any.
    """

    platform: str
    dtype: str
    head_dim: int
    named: bool = False
    elsewhere: bool = False
    blocks: tuple[int | None, int | None] = (None, None)


class Missing(str):
    """A refusal that would be none if something were installed: said once where it changes what None chooses."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Options:
    """Static arguments of one attention call."""

    scale: float
    logits_soft_cap: float | None = None


class Implementation(Protocol):
    """One code generator. Implementations are stateless; importing one must not touch a device."""

    name: str

    def refusal(self, request: Request) -> str | None:
        """Why this implementation cannot serve the request, as one sentence with the remedy; None if it can."""
        ...

    def target(self) -> str:
        """The planning target that JAX's default device is."""
        ...

    def attention(self, plan: Plan, options: Options, query: Any, key: Any, value: Any, kv_lengths: Any) -> Any:
        """(output in the query's dtype [B, T, N, H], log-sum-exp float32 or float64 [B, T, N]); differentiable."""
        ...

    def emit(self, plan: Plan, options: Options, kernel: str | None = None) -> str:
        """The generated program's text: one kernel of it where `kernel` names one."""
        ...

    def assembly(self, plan: Plan, options: Options, kernel: str | None = None) -> str:
        """What a device's own compiler made of it, as text."""
        ...
