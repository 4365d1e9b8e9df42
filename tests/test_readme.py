"""The Python blocks of README.md run, in their order and in one namespace, as a reader would type them.

A block that cannot run in a test has ``<!-- not run: reason -->`` on the line before it (blank lines may lie between).
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

import splat
from splat.cli import app

ROOT = Path(__file__).parents[1]

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)$")
NOT_RUN = re.compile(r"^\s*<!--\s*not run:(?P<reason>.*?)-->\s*$")
ALMOST_PYTHON = {"py", "python3", "pycon", "pytb"}  # rendered as Python, but would be passed over here


class Block(NamedTuple):
    line: int  # of its first line of code, from 1
    source: str
    not_run: str | None  # the reason, where it is exempt


def python_blocks(text: str) -> list[Block]:
    """The Python blocks of a Markdown text. Raises ValueError for one that is unclosed or misnamed."""
    blocks = []
    lines = text.splitlines()
    reason: str | None = None
    at = 0
    while at < len(lines):
        opening, exempt = FENCE.match(lines[at]), NOT_RUN.match(lines[at])
        at += 1
        if exempt:
            reason = exempt["reason"].strip()
            if not reason:
                raise ValueError(f"line {at}: `not run:` without a reason")
        elif opening:
            first = at
            closing = re.compile(rf"^ *{opening['fence'][0]}{{{len(opening['fence'])},}}\s*$")
            while at < len(lines) and not closing.match(lines[at]):
                at += 1
            if at == len(lines):
                raise ValueError(f"line {first}: this block has no end")
            language = (opening["info"].split() or [""])[0]
            if language.lower() in ALMOST_PYTHON or (language != "python" and language.lower() == "python"):
                raise ValueError(f"line {first}: write ```python, not ```{language}, so that the block is run")
            if language == "python":
                blocks.append(Block(first + 1, dedent("\n".join(lines[first:at])) + "\n", reason))
            at += 1
            reason = None
        elif lines[at - 1].strip():
            reason = None
    return blocks


def run_blocks(path: Path) -> tuple[int, int]:
    """Execute a Markdown file's Python blocks; how many ran, and how many are exempt."""
    blocks = python_blocks(path.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.not_run is None:
            # Leading newlines give tracebacks the line numbers of the file.
            exec(compile("\n" * (block.line - 1) + block.source, str(path), "exec"), namespace)
    exempt = sum(block.not_run is not None for block in blocks)
    return len(blocks) - exempt, exempt


def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran, exempt = run_blocks(ROOT / "README.md")
    print(f"README.md: {ran} Python blocks ran, {exempt} are marked as not run")
    assert ran > 0, "README.md has no Python block that runs"


def text_of(before: str) -> str:
    """The first block of README.md after the words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split(before, 1)[1].split("```", 2)[1].split("\n", 1)[1]


def in_order(wanted: list[str], text: str) -> None:
    """The lines are lines of the text, one after the other; `[...]` and `...` stand for what is left out."""
    lines = iter(text.splitlines())
    for line in filter(None, wanted):
        if line.strip() != "...":
            assert any(given.startswith(line.removesuffix(" [...]")) for given in lines), (
                f"not there, or earlier: {line}"
            )


def test_the_plan_that_it_shows() -> None:
    plan = splat.plan(splat.causal() & splat.window(512) | splat.sink(4), q_len=16384, num_q_heads=8)
    in_order(text_of("print(plan)\n```\n").splitlines(), str(plan))


def test_the_kernel_that_it_shows() -> None:
    made = splat.emit("causal() & window(512) | sink(4)", 4096, target="cpp", kernel="fwd")
    in_order(text_of("--target cpp --kernel fwd`):").splitlines(), made)


def test_the_commands_that_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but compilation for a GPU, which tests of the command line show."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("    splat ")]
    assert len(commands) >= 6
    for command in commands:
        if "ptx" not in command:
            done = CliRunner().invoke(app, command)
            assert done.exit_code == 0, (command, done.output)
            assert done.output.strip()
    assert (tmp_path / "pattern.png").stat().st_size > 10_000


def test_readme_describes_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project.get("readme") == "README.md", 'pyproject.toml: [project] lacks readme = "README.md"'


def test_the_wheel_has_headers_and_types() -> None:
    """Hatch packs the whole folder but for what .gitignore names."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build == {"targets": {"wheel": {"packages": ["src/splat"]}}}
    package = ROOT / "src" / "splat"
    headers = list((package / "codegen" / "cpp" / "include" / "splat").glob("*.hpp"))
    assert {"run.hpp", "values.hpp"} <= {path.name for path in headers}
    needed = [package / "py.typed", *headers]
    assert needed[0].is_file()
    if (ROOT / ".git").exists() and shutil.which("git"):
        asked = ["git", "check-ignore", "--no-index", *map(str, needed)]
        assert subprocess.run(asked, cwd=ROOT, capture_output=True, check=False).returncode == 1, "some are ignored"


SAMPLE = """\
# Title

```python
x = 1
```

```bash
exit 1  # ```python in here is no block
```

- in a list

  ```python
  if x:
      y = x + 1
  ```

<!-- not run: needs a GPU -->

```python
raise RuntimeError
```

````markdown
```python
raise RuntimeError
```
````

```python title="after the exempt one"
z = x + y
assert z == 3
```
"""


def test_blocks_are_found_in_order() -> None:
    blocks = python_blocks(SAMPLE)
    assert [block.line for block in blocks] == [4, 14, 21, 31]
    assert [block.not_run for block in blocks] == [None, None, "needs a GPU", None]
    assert blocks[1].source == "if x:\n    y = x + 1\n"


def test_blocks_run_in_one_namespace(tmp_path: Path) -> None:
    path = tmp_path / "sample.md"
    path.write_text(SAMPLE, encoding="utf-8")
    assert run_blocks(path) == (3, 1)


def test_a_failing_block_fails_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "sample.md"
    path.write_text("text\n\n```python\nx = 1\nassert x == 2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError) as failure:
        run_blocks(path)
    assert failure.traceback[-1].lineno + 1 == 5  # pytest counts from 0


def test_an_exemption_holds_for_the_next_block_only() -> None:
    text = "<!-- not run: slow -->\n\nwords between\n\n```python\nx\n```\n"
    assert python_blocks(text) == [Block(6, "x\n", None)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nx = 1\n", "line 1: this block has no end"),
        ("\n```py\nx\n```\n", "line 2: write ```python, not ```py"),
        ("```Python\nx\n```\n", "line 1: write ```python, not ```Python"),
        ("<!-- not run: -->\n```python\nx\n```\n", "line 1: `not run:` without a reason"),
    ],
)
def test_a_block_is_not_passed_over_silently(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        python_blocks(text)
