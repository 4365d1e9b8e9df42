"""SPLAT with an optimisation switched off: what the suite `ablation` compares with SPLAT as it is.

A variant is a name and a context manager, under which its kernels are planned, compiled and first called. Timed calls
come after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from splat.bench.peers import ours
from splat.bench.peers.base import Contender, Kind


@dataclasses.dataclass(frozen=True)
class Variant:
    """An optimisation off.

    Attributes:
      name: short, such as "no-poset".
      title: what is off.
      switch: the context in which it is.
      ops: the operations that it can make a difference to.
    """

    name: str
    title: str
    switch: Callable[[], AbstractContextManager[Any]]
    ops: tuple[str, ...] = ("sddmm", "spmm", "composed")


def _without(specialisation: str) -> AbstractContextManager[None]:
    from splat.ops.values import without

    return without(specialisation)


#: In the order of tables.
VARIANTS: list[Variant] = [
    Variant("no-spans", "without span specialisation", lambda: _without("spans")),
    Variant("no-posets", "without poset tiling", lambda: _without("posets")),
    Variant("no-alignment", "without transformation alignment", lambda: _without("alignment"), ("sddmm", "spmm")),
    Variant("in-rows", "values handed over in rows, not in tiles", lambda: ours.laid_out("rows"), ("composed",)),
]


def contenders(base: Contender) -> list[Contender]:
    """Every variant of an implementation."""
    return [
        dataclasses.replace(
            base,
            name=f"{base.name} {variant.name}",
            title=f"{base.title}: {variant.title}",
            kind=Kind.VARIANT,
            make={op: make for op, make in base.make.items() if op in variant.ops},
            under=variant.switch,
        )
        for variant in VARIANTS
    ]
