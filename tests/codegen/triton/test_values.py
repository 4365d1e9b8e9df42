"""The paper's three operations by Triton kernels: interpreted against float64, and compiled without a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from tests.attention_suite import MODELS, SPARSE_SUITE, VOCABULARY

pytest.importorskip("triton", reason="triton is not installed: the interpreted kernels are untested here")

from tests.codegen.triton.numpy_values import check, draw, matrix

#: One component and two, in one launch and in several; strides; rows without columns.
FEW = [
    "causal() & (sink(2) | window(9, 0))",
    "window(3) | strided(4)",
    "dilated_window(4, 4, 3)",
    "window(2) & segments([" + "0, " * 20 + "-1, " * 9 + "1, " * 31 + "])",
]


@pytest.mark.parametrize("text", [*VOCABULARY, *SPARSE_SUITE.values(), *MODELS.values()], ids=lambda text: text[:32])
def test_patterns(text: str, rng: np.random.Generator) -> None:
    m = matrix(text, 40 if text in VOCABULARY else 48)
    check(m, *draw(rng, m, batch=1))
