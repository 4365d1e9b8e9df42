"""Text to pattern and back: repr() is an expression that parse() reads, and nothing else is read or run."""

from __future__ import annotations

import base64
import inspect
import json
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import splat
from splat.errors import ParseError, PatternError, SplatError
from splat.pattern import Pattern
from splat.pattern.parse import CONSTRUCTORS
from tests.strategies import Case, cases, more


@more(4)
@given(cases())
def test_round_trip(case: Case) -> None:
    text = repr(case.pattern)
    assert splat.parse(text) == case.pattern
    assert repr(splat.parse(text)) == text
    assert splat.parse(f"  ({text})\n") == case.pattern


@given(st.lists(cases(max_len=8, depth=1), min_size=1, max_size=4))
def test_round_trip_per_head(drawn: list[Case]) -> None:
    pattern = splat.per_head([case.pattern for case in drawn])
    assert splat.parse(repr(pattern)) == pattern


def test_long_arrays_stay_readable() -> None:
    """Up to 64 numbers are shown; more are packed, so that a plan's text stays short."""
    short, long = splat.segments(range(64)), splat.segments(range(65))
    assert repr(short) == f"segments({list(range(64))})"
    assert len(repr(long)) < 64
    mask = splat.from_mask((splat.window(9) | splat.strided(16)).to_dense(2000))
    assert len(repr(mask)) < 1000
    assert splat.parse(repr(long)) == long
    assert splat.parse(repr(mask)) == mask


def test_empty_arrays() -> None:
    for pattern in (splat.segments([]), splat.segments(lengths=[]), splat.from_mask(np.zeros((3, 4), bool))):
        assert splat.parse(repr(pattern)) == pattern


def test_pattern_of_no_rows() -> None:
    pattern = splat.from_mask(np.zeros((0, 3), bool))
    assert splat.parse(repr(pattern)) == pattern


W, S, C = splat.window(1), splat.strided(2), splat.causal()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("causal() | window(1) & strided(2)", C | (W & S)),
        ("causal() & window(1) | strided(2)", (C & W) | S),
        ("causal() & window(1) - strided(2)", C & (W - S)),
        ("causal() - window(1) & strided(2)", (C - W) & S),
        ("causal() - window(1) - strided(2)", (C - W) - S),
        ("causal() - (window(1) - strided(2))", C - (W - S)),
        ("~causal() & window(1)", (~C) & W),
        ("~(causal() & window(1))", ~(C & W)),
        ("~~causal()", C),
        ("~causal().T", ~(C.T)),
        ("(~causal()).T", (~C).T),
        ("(causal() | window(1)).T.T", C | W),
        ("((causal()))", C),
        ("per_head([causal(), window(1) | strided(2)]) & causal()", splat.per_head([C & C, (W | S) & C])),
        ("causal() - per_head((window(1),))", splat.per_head([C - W])),
    ],
)
def test_operators_bind_as_in_python(text: str, pattern: Pattern) -> None:
    assert splat.parse(text) == pattern
    assert splat.parse(repr(pattern)) == pattern


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ((C & W) | S, "causal() & window(1) | strided(2)"),
        (C & (W | S), "causal() & (window(1) | strided(2))"),
        (C | (W | S), "causal() | (window(1) | strided(2))"),
        (C - W - S, "causal() - window(1) - strided(2)"),
        (C - (W - S), "causal() - (window(1) - strided(2))"),
        (~(C | W), "~(causal() | window(1))"),
        ((~C).T, "(~causal()).T"),
        (~(C.T), "~causal().T"),
        (splat.window(2, 5), "window(2, 5)"),
        (splat.window(2, 2), "window(2)"),
        (splat.window(0, 0), "window(0)"),
        (splat.sliding_window(4), "sliding_window(4)"),
        (splat.dilated_window(1, 2, 3), "dilated_window(1, 2, 3)"),
        (splat.lattice_columns(4), "lattice_columns(4)"),
        (splat.lattice_columns(4, -1), "lattice_columns(4, offset=3)"),
        (splat.blocked(8, 1), "blocked(8, before=1)"),
        (splat.blocked(8, 0, 2), "blocked(8, after=2)"),
        (splat.global_columns(3), "sink(3)"),
        (splat.global_tokens(3), "global_tokens(3)"),
        (splat.random_blocks(8, 3, seed=1), "random_blocks(8, 3, 1)"),
        (splat.neighborhood(9, 3), "neighborhood((9,), (3,))"),
        (
            splat.neighborhood((6, 9), 3, 2, (True, False)),
            "neighborhood((6, 9), (3, 3), dilation=2, causal=(True, False))",
        ),
        (splat.segments(lengths=[2, 3]), "segments(lengths=[2, 3])"),
        (splat.segments([0, 0, -1]), "segments([0, 0, -1])"),
        (splat.from_runs([0, 1], 2, [1, 1], kv_len=4), "from_runs([[0, 1]], [2], [[1, 1]], kv_len=4)"),
        (splat.per_head([C, W]), "per_head([causal(), window(1)])"),
    ],
)
def test_repr_is_what_a_person_would_write(pattern: Pattern, text: str) -> None:
    assert repr(pattern) == text
    assert splat.parse(text) == pattern


def test_ways_to_write_arguments() -> None:
    assert splat.parse("window(left=3)") == splat.window(3)
    assert splat.parse("window(3, right=None)") == splat.window(3)
    assert splat.parse("blocked(4 * 32, after=0x1)") == splat.blocked(128, 0, 1)
    assert splat.parse("random_blocks(1_6, 2, 3,)") == splat.random_blocks(16, 2, 3)
    assert splat.parse("lattice_columns(4, -3 * 5)") == splat.lattice_columns(4, -15)
    assert splat.parse("segments((0, 0, 1))") == splat.segments([0, 0, 1])
    assert splat.parse("causal()  # as in decoders") == splat.causal()


GARBAGE = [
    ("", "invalid syntax"),
    ("   ", "invalid syntax"),
    ("window(2", "'(' was never closed"),
    ("window(2))", "unmatched ')'"),
    ("causal() window(2)", "invalid syntax"),
    ("causal() +", "invalid syntax"),
    ("causal() + window(2)", "only pattern constructors, & | - ~ .T, integers and lists are understood"),
    ("causal() and window(2)", "write &"),
    ("not causal()", "write ~"),
    ("causal() ^ window(1)", "only pattern constructors"),
    ("causal() if True else full()", "only pattern constructors"),
    ("-causal()", "only pattern constructors"),
    ("causal", "only pattern constructors"),
    ("causal().runs", "only pattern constructors"),
    ("causal()[0]", "only pattern constructors"),
    ("().__class__.__bases__", "only pattern constructors"),
    ("window(9**9**9)", "only pattern constructors"),
    ("window(1.5)", "only pattern constructors"),
    ("window(1 << 3)", "only pattern constructors"),
    ("segments({0: 1})", "only pattern constructors"),
    ("segments([0 for _ in [1]])", "only pattern constructors"),
    ("f'{causal()}'", "only pattern constructors"),
    ("window(*[1])", "only pattern constructors"),
    ("window(**[])", "** is not understood"),
    ("3", "a pattern was expected here, such as window(256), but 3 was found"),
    ("causal() | 3", "a pattern was expected here, such as window(256), but 3 was found"),
    ("[causal()]", "a pattern was expected here"),
    ("~True", "a pattern was expected here, such as window(256), but True was found"),
    ("segments([0] * 9)", "an integer was expected here, but [0] was found"),
    ("window(2 * True)", "an integer was expected here, but True was found"),
    ("windw(3)", "there is no pattern named 'windw'; did you mean window?"),
    ("from_mask([[True]])", "there is no pattern named 'from_mask'"),
    ("print('x')", "there is no pattern named 'print'; "),
    ("eval('1')", "there is no pattern named 'eval'; "),
    ("__import__('os')", "there is no pattern named '__import__'; the vocabulary is: blocked, causal, "),
    ("__import__('os').system('true')", "only named constructors can be called"),
    ("(lambda: causal())()", "only named constructors can be called"),
    ("window(1)(2)", "only named constructors can be called"),
    ("window()", "missing a required argument: 'left'"),
    ("window(1, 2, 3)", "too many positional arguments"),
    ("window(1, width=3)", "got an unexpected keyword argument 'width'"),
    ("segments([0, [1]])", "segments refused its arguments"),
    ("causal()\x00", "null bytes"),
    ("window(" + "9" * 5000 + ")", "4300 digits"),
]


@pytest.mark.parametrize(("text", "message"), GARBAGE, ids=[repr(text)[:40] for text, _ in GARBAGE])
def test_garbage_is_refused(text: str, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        splat.parse(text)
    assert str(caught.value).startswith("cannot read this pattern: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 500 + "causal()" + ")" * 500,
        "~" * 5000 + "causal()",
        " & ".join(["causal()"] * 3000),
        "sink(" + "-" * 9999,
    ],
    ids=["parentheses", "complements", "intersections", "signs"],
)
def test_deep_nesting_is_refused(text: str) -> None:
    """By whichever limit of Python's it meets first; never a RecursionError or a crash."""
    with pytest.raises(ParseError, match="cannot read this pattern: "):
        splat.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("window(-1)", "window: left must be in [0, 1073741824], but -1 was given"),
        ("window(True)", "window: left must be an int, but True of type bool was given"),
        ("window((1, 2))", "window: left must be an int, but (1, 2) of type tuple was given"),
        ("window(99999999999999999999)", "but 99999999999999999999 was given"),
        ("causal() & sink(causal())", "sink: n must be an int, but causal() of type Causal was given"),
        ("per_head([])", "per_head: patterns must name at least one head"),
        ("per_head([causal(), 3])", "per_head: patterns[1] must be a pattern for one head, but 3 was given"),
        ("segments('abc')", "the text 'abc' is not an array as repr() of a pattern writes it"),
        ("segments('3:!!!')", "is not an array as repr() of a pattern writes it"),
        ("segments(lengths='2:eJx')", "is not an array as repr() of a pattern writes it"),
        ("segments(full())", "segments: ids must be integers of rank 1"),
        ("from_runs(full(), 1, 1)", "from_runs: start must be integers"),
    ],
)
def test_bad_arguments_are_the_constructors_to_refuse(text: str, message: str) -> None:
    with pytest.raises(PatternError) as caught:
        splat.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", [3, None, b"causal()", splat.causal()])
def test_only_text_is_read(text: object) -> None:
    with pytest.raises(ParseError, match=f"parse: text must be a str, but {type(text).__name__} was given"):
        splat.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("windw(3)", 0),
        ("causal() & windw(3)", 11),
        ("causal() | (sink(2) - wndow(3))", 22),
        ("  causal() + sink(1)", 0),
        ("per_head([causal(), sink(x)])", 25),
        ("causal() & window(2", 17),
    ],
)
def test_errors_point_at_the_place(text: str, column: int) -> None:
    with pytest.raises(ParseError) as caught:
        splat.parse(text)
    _, shown, mark = str(caught.value).split("\n")
    assert shown == "  " + text.strip()
    assert mark == "  " + " " * column + "^"


@pytest.mark.parametrize(
    ("text", "word", "operator", "column"),
    [
        ("window(3) and causal()", "and", "&", 10),
        ("causal() & (sink(1) or (full()) or full())", "or", "|", 20),
        ("window(4) and windw(3)", "and", "&", 10),
        ("per_head([not causal()])", "not", "~", 10),
        ("window(1 and 2)", "and", "&", 9),
    ],
)
def test_words_of_python_are_told_their_operator(text: str, word: str, operator: str, column: int) -> None:
    with pytest.raises(ParseError) as caught:
        splat.parse(text)
    message, shown, mark = str(caught.value).split("\n")
    assert message == f"cannot read this pattern: {word!r} is for truth values, not for patterns; write {operator}"
    assert shown == "  " + text
    assert mark == "  " + " " * column + "^"


def test_a_word_on_a_line_of_its_own() -> None:
    with pytest.raises(ParseError, match="write &\n  full\\(\\)\\)\n  \\^$"):
        splat.parse("(causal()\nand\nfull())")


def test_lines_may_end_anywhere() -> None:
    expected = splat.causal() & splat.window(3) | splat.sink(2)
    assert splat.parse("causal()\n  & window(3)\n| sink(2)") == expected
    assert splat.parse("causal() & window(3) \\\n | sink(2)") == expected
    assert splat.parse("(causal()  # itself and before\n & window(3) | sink(2))") == expected
    with pytest.raises(ParseError, match="named 'wndow'; did you mean window"):
        splat.parse("causal()\n  & wndow(3)")


def test_expressions_as_programs_have_them() -> None:
    assert splat.parse("splat.causal() & ~splat.window(3).T") == splat.causal() & ~splat.window(3).T
    with pytest.raises(ParseError, match="only named constructors can be called"):
        splat.parse("np.causal()")


def test_an_argument_given_twice() -> None:
    with pytest.raises(ParseError, match="left"):
        splat.parse("window(left=3, left=4)")


def test_array_text_cannot_exhaust_memory() -> None:
    """What is unpacked is bounded by the shape that the text names, and by its own length."""
    bomb = base64.b85encode(zlib.compress(bytes(64 << 20), 9)).decode()
    text = f'segments("4:{bomb}")'
    assert len(text) < 100_000
    tracemalloc.start()
    with pytest.raises(PatternError, match="is not an array"):
        splat.parse(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@more(8)
@given(
    st.one_of(
        st.text(max_size=40),
        st.text(st.sampled_from("~&|-()[],.T=:'\"0123456789 \n"), max_size=40),
        st.lists(
            st.sampled_from([*CONSTRUCTORS, "(", ")", "[", "]", ",", "&", "|", "-", "~", ".T", "1", "7", "=", "'"])
        ).map("".join),
        st.tuples(cases(max_len=8).map(lambda case: repr(case.pattern)), st.integers(0, 40), st.text(max_size=3)).map(
            lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + 1 :]
        ),
    )
)
def test_any_text_is_a_pattern_or_a_named_error(text: str) -> None:
    try:
        pattern = splat.parse(text)
    except SplatError:
        return
    assert splat.parse(repr(pattern)) == pattern


#: Reads texts from stdin with a hook that sees every execution of code, import, file and process.
WATCHED = """
import json, sys
import splat
texts = json.load(sys.stdin)
for text in texts:  # whatever parsing imports the first time
    try: splat.parse(text)
    except splat.SplatError: pass
seen, watching = [], True
def hook(event, args):
    if watching and event in {"exec", "import", "open", "os.system", "subprocess.Popen", "code.__new__"}:
        seen.append([event, repr(args)])
sys.addaudithook(hook)
for text in texts:
    try: splat.parse(text)
    except splat.SplatError: pass
watching = False
print(json.dumps(seen))
"""


def test_nothing_is_evaluated() -> None:
    texts = [text for text, _ in GARBAGE if "\x00" not in text]
    texts += ["segments([__import__('os').getpid()])", "window(open('/etc/passwd').read())", "window(exit())"]
    texts += ["causal() & window(512) | sink(4)", repr(splat.segments(range(80)))]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        check=True,
        input=json.dumps(texts),
        env={"PYTHONPATH": str(Path(splat.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == []


def test_every_constructor_can_be_named() -> None:
    public = {name for name in splat.__all__ if inspect.isfunction(getattr(splat, name))}
    tools = {"attention", "build", "dot_product_attention", "emit", "parse", "plan"}
    tools |= {"sddmm", "softmax", "spmm", "spmm_transposed"}
    needs_arrays = {"from_mask", "from_csr"}  # their text is from_runs(...)
    assert set(CONSTRUCTORS) == {name for name in public if name.islower()} - tools - needs_arrays
