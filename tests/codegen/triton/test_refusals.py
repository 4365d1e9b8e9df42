"""What the Triton implementation cannot serve, it says in a sentence or two, with the remedy."""

from __future__ import annotations

import pytest

from splat.codegen import Request, refusals
from tests.attention_suite import in_subprocess

GPU = Request("gpu", "bfloat16", 128)

#: Hides packages from `importlib.util.find_spec`, as if they were not installed.
HIDE = """
    import importlib.util
    found = importlib.util.find_spec
    hidden = {hidden!r}
    importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else found(name, *rest)
"""


def reason(request: Request) -> str:
    return refusals(request)["triton"] or "none"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (
            Request("gpu", "float64", 128),
            "the triton implementation serves float32, bfloat16, float16, not float64. Convert the inputs, or use "
            "implementation='xla'.",
        ),
        (
            Request("gpu", "bfloat16", 257),
            "the triton implementation serves head dims up to 256, not 257. Use implementation='xla'.",
        ),
        (
            Request("tpu", "bfloat16", 128),
            "the triton implementation needs a GPU, and this is for a tpu. Use implementation='xla', or None for the "
            "best that can serve.",
        ),
    ],
)
def test_reasons(request_: Request, expected: str) -> None:
    assert reason(request_) == expected


def test_plans_for_other_machines_need_nothing_installed() -> None:
    printed = in_subprocess(
        HIDE.format(hidden={"jax_triton", "triton"})
        + """
    import splat
    plan = splat.plan("causal()", 1024, head_dim=128, dtype="bfloat16", target="h200")
    print(plan.implementation)
    """
    )
    assert printed.strip() == "triton"


@pytest.mark.parametrize(
    ("hidden", "expected"),
    [
        ({"jax_triton"}, "jax-triton is not installed: `pip install splat-attention[jax-cuda]`."),
        ({"jax_triton", "triton"}, "triton and jax-triton are not installed: `pip install splat-attention[jax-cuda]`."),
    ],
)
def test_missing_extras(hidden: set[str], expected: str) -> None:
    """On a GPU; and the portable implementation goes on, and says so."""
    printed = in_subprocess(
        HIDE.format(hidden=hidden)
        + """
    import warnings
    from splat.codegen import Request, choose, refusals
    request = Request("gpu", "bfloat16", 128)
    print(refusals(request)["triton"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        print(choose(request).name)
    print(*(one.message for one in said))
    try:
        choose(request, "triton")
    except NotImplementedError as error:
        print(error)
    """,
        TRITON_INTERPRET="0",
    )
    first, chosen, said, named = printed.splitlines()
    assert first == expected
    assert chosen == "xla"
    assert said.startswith(f"implementation='xla' serves; 'triton' would be faster: {expected} To go on without it")
    assert named == f"implementation='triton' cannot serve this call: {expected}"


def test_a_processor_is_no_gpu() -> None:
    """Without the interpreter; and nobody gets the interpreter without asking by name."""
    printed = in_subprocess(
        """
        import jax.numpy as jnp, splat
        x = jnp.ones((1, 8, 1, 8))
        try:
            splat.attention(x, x, x, splat.causal(), implementation="triton")
        except NotImplementedError as error:
            print(error)
        """,
        TRITON_INTERPRET="0",
    )
    assert printed.strip() == (
        "implementation='triton' cannot serve this call: the triton implementation needs a GPU, and this is for a cpu. "
        "Use implementation='xla', or None for the best that can serve."
    )
    assert "needs a GPU" in reason(Request("cpu", "float32", 64))
