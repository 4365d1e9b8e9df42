"""Score modification as Triton's text: what it looks like, that it compiles, and functions that Triton has no word for.

`tests/ops/test_attention_triton.py` runs it behind JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special

pytest.importorskip("triton", reason="triton is not installed: score modifications in Triton are untested here")

from splat.codegen.jaxprs import modification
from splat.codegen.triton import interpret
from splat.codegen.triton.launch import Launch, Output
from splat.codegen.triton.offline import Compiled, Job, compile_all
from splat.codegen.triton.score_mod import text
from splat.codegen.triton.source import load
from tests.codegen.triton.score_mods import of_elements, options

HERE = "tests.codegen.triton.score_mods"


def test_text() -> None:
    """One line for each step, and what lies in registers is named in the order of the program."""
    mod = options("ALiBi").score_mod
    assert mod is not None
    made = modification(mod, "bfloat16")
    value = list(text(made, "value"))
    assert value[:2] == ["@triton.jit", "def modify(score, row, column, place):"]
    found = [line.strip() for line in value[2:] if line]
    assert found[0] == "head = place[1]"
    assert found[-1].startswith("return tl.broadcast_to(x")
    assert any("tl.load(place[3] + " in line for line in found)
    assert list(text(made, "with_slope"))[-3].count("tl.broadcast_to(") == 2


@pytest.mark.parametrize(
    ("name", "kernel", "arch"),
    [("nonlinear", "d_key_value", "sm_90"), ("bits", "d_query", "gfx942"), ("all", "forward", "sm_90")],
)
def test_compiled(name: str, kernel: str, arch: str) -> None:
    [found] = compile_all([Job(f"{HERE}:sample", dict(name=name, kernel=kernel, arch=arch), arch, name=name)])
    assert isinstance(found, Compiled), found
    assert found.tensor_core, "products stay on matrix units"


def run(function: str, *given: np.ndarray) -> np.ndarray:
    """A function of the library, interpreted."""
    if not interpret.is_interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    size = given[0].size
    launch = Launch(
        load("one", of_elements([function], len(given))),
        1,
        given,
        (),
        (Output((1, size), "float32"),),
        {"SIZE": size},
        4,
        1,
    )
    with np.errstate(all="ignore"):
        return interpret.launch(launch)[0][0]


def of_both_signs(rng: np.random.Generator, least: float, most: float) -> np.ndarray:
    """Numbers of every size between."""
    size = np.exp(rng.uniform(np.log(least), np.log(most), 512))
    return np.concatenate([size, -size]).astype(np.float32)


ANY = (1e-30, 1e30)
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[float, float]]] = {
    "exp_real": (np.exp, (1e-6, 80)),
    "exp2_real": (np.exp2, (1e-6, 100)),
    "tanh_real": (np.tanh, (1e-20, 50)),
    "logistic": (scipy.special.expit, (1e-6, 80)),
    "expm1": (np.expm1, (1e-30, 80)),
    "sinh": (np.sinh, (1e-30, 80)),
    "cosh": (np.cosh, (1e-30, 80)),
    "cbrt": (np.cbrt, ANY),
    "sin": (np.sin, (1e-6, 100)),
    "cos": (np.cos, (1e-6, 1)),
    "tan": (np.tan, (1e-6, 1)),
    "atan": (np.arctan, ANY),
    "asinh": (np.arcsinh, ANY),
    "erf": (scipy.special.erf, (1e-6, 10)),
    "log1p": (np.log1p, (1e-30, 0.99)),
    "asin": (np.arcsin, (1e-30, 0.99)),
    "acos": (np.arccos, (1e-30, 0.9)),
    "atanh": (np.arctanh, (1e-30, 0.99)),
    "floor": (np.floor, (1e-6, 1e6)),
    "ceil": (np.ceil, (1e-6, 1e6)),
    "rint": (np.rint, (1e-6, 1e7)),
    "sign_real": (np.sign, ANY),
    "absolute": (np.abs, ANY),
}
OF_POSITIVE: dict[str, tuple[Callable[..., Any], tuple[float, float]]] = {
    "log_real": (np.log, (2.0, 1e30)),
    "log1p": (np.log1p, ANY),
    "root": (np.sqrt, ANY),
    "acosh": (np.arccosh, (1.01, 1e30)),
    "round": (lambda x: np.floor(x + 0.5), (1e-6, 1e6)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, rng: np.random.Generator) -> None:
    exact, (least, most) = FUNCTIONS[name]
    x = of_both_signs(rng, least, most)
    np.testing.assert_allclose(run(name, x), exact(np.float64(x)), rtol=4e-6)


@pytest.mark.parametrize("name", OF_POSITIVE)
def test_functions_of_positive_numbers(name: str, rng: np.random.Generator) -> None:
    exact, (least, most) = OF_POSITIVE[name]
    x = np.abs(of_both_signs(rng, least, most))
    np.testing.assert_allclose(run(name, x), exact(np.float64(x)), rtol=4e-6)


def test_functions_of_two(rng: np.random.Generator) -> None:
    a, b = of_both_signs(rng, 1e-5, 1e5), rng.permutation(of_both_signs(rng, 1e-3, 8))
    powers = np.power(np.abs(np.float64(a)), np.float64(b))
    np.testing.assert_allclose(run("pow", np.abs(a), b), powers, rtol=2e-5)
    whole = rng.integers(-5, 6, a.size).astype(np.float32)
    np.testing.assert_allclose(run("pow", a, whole), np.power(np.float64(a), np.float64(whole)), rtol=2e-5)
    np.testing.assert_allclose(run("atan2", a, b), np.arctan2(np.float64(a), np.float64(b)), rtol=4e-6)
    near = rng.uniform(-50, 50, a.size).astype(np.float32)
    by = (b + np.sign(b)).astype(np.float32)
    np.testing.assert_allclose(run("fmod", near, by), np.fmod(near, by), atol=1e-4)


def test_where_functions_end() -> None:
    """Zeros, infinities and what is no number."""
    inf, nan = np.inf, np.nan
    x = np.array([0, inf, -inf, nan], np.float32)
    for name, expected in {
        "exp_real": [1, inf, 0, nan],
        "tanh_real": [0, 1, -1, nan],
        "logistic": [0.5, 1, 0, nan],
        "expm1": [0, inf, -1, nan],
        "log_real": [-inf, inf, nan, nan],
        "log1p": [0, inf, nan, nan],
        "cbrt": [0, inf, -inf, nan],
        "atan": [0, np.pi / 2, -np.pi / 2, nan],
        "sign_real": [0, 1, -1, nan],
    }.items():
        np.testing.assert_allclose(run(name, x), expected, rtol=1e-6, err_msg=name)
    a, b = np.array([0, 0, 2, 2, -2, nan, 1, inf], np.float32), np.array([0, 2, 0, inf, 0.5, 0, nan, -1], np.float32)
    np.testing.assert_array_equal(run("pow", a, b), [1, 0, 1, inf, nan, 1, 1, 0])


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_library_compiles(arch: str) -> None:
    """All functions: few modifications use one that the interpreter alone has seen."""
    of_one = [*FUNCTIONS, *(name for name in OF_POSITIVE if name not in FUNCTIONS), "erfc"]
    jobs = [Job(f"{HERE}:library", dict(functions=of_one, arrays=1), arch)]
    jobs.append(Job(f"{HERE}:library", dict(functions=["pow", "atan2", "fmod"], arrays=2), arch))
    for found in compile_all(jobs):
        assert isinstance(found, Compiled), found
