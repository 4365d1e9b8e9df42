"""Operations on values against dense ones, in a process of its own: `python -m tests.codegen.cpp.values_check SEED`."""

from __future__ import annotations

import sys

import numpy as np

import splat
from tests.values_suite import ValuesSuite


class Cpp(ValuesSuite):
    implementation = "cpp"


def main() -> None:
    seed = int(sys.argv[1])
    suite, rng = Cpp(), np.random.default_rng(seed)
    for text, sizes, head_dim, dtype in (
        ("window(40, 30) | strided(7)", (210, 213), 20, "float32"),
        ("causal() & window(9) | sink(3)", (70, 70), 64, "float32"),
        ("random_blocks(5, 2, 1)", (45, 40), 8, "bfloat16"),
    ):
        acsr = splat.build(splat.parse(text), *sizes)
        suite.check(acsr, rng, head_dim, dtype)
        query, key, _ = suite.draw(rng, acsr, head_dim, dtype)
        for layout in ("rows", "tiles"):
            made = suite.attention(query, key, key, acsr, layout)
            assert np.isfinite(np.asarray(made, np.float32)).all()


if __name__ == "__main__":
    main()
