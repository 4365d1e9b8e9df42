"""A file imports only from layers above its own in `LAYERS`, and the front end imports nothing but NumPy.

Imports inside functions and under ``if TYPE_CHECKING:`` count: a late import hides a cycle, it does not undo it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

SRC = Path(__file__).parents[1] / "src"

# Top-level modules and packages of splat, the earliest first. Those of one line may not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("config", "files", "locks"),
    ("remembered",),
    ("reference",),
    ("pattern",),
    ("acsr",),
    ("geometry",),
    ("tiling",),
    ("planning",),
    ("codegen",),
    ("ops",),
    ("nn", "torch"),
    ("explain",),
    ("splat",),  # the public face, `import splat`: its __init__ is exempt, and only what comes below may use it
    ("bench",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

FRONT_END_THIRD_PARTY = {"numpy"}  # allowed up to and including `planning`
EXCHANGE = {"acsr/convert.py": {"jax", "scipy"}}  # inside the functions that make matrices of these packages
LAZY = {"torch", "triton"}  # imported at import time in these folders only
LAZY_EXEMPT = ("torch/", "codegen/triton/")
FREE_NAMES = {"__version__"}  # of splat itself, allowed everywhere


class Import(NamedTuple):
    line: int
    module: str  # absolute; for `from a import b`, "a.b"
    eager: bool  # executed when the file is imported


def imports(source: str, path: str) -> list[Import]:
    """All imports of a file; `path` is relative to src/splat, such as "pattern/core.py"."""
    package = ["splat", *PurePosixPath(path).parent.parts]
    return list(_imports(ast.parse(source).body, package, eager=True))


def _imports(nodes: list[ast.stmt] | list[ast.AST], package: list[str], eager: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, eager)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(node.lineno, prefix if alias.name == "*" else f"{prefix}.{alias.name}", eager)
        elif isinstance(node, ast.Call) and _is_import_call(node):
            module = node.args[0]
            if isinstance(module, ast.Constant) and isinstance(module.value, str):
                level = len(module.value) - len(module.value.lstrip("."))
                base = package[: len(package) - level + 1] if level else []
                yield Import(node.lineno, ".".join([*base, module.value.lstrip(".")]), eager)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(list(ast.iter_child_nodes(node)), package, eager=False)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            yield from _imports(node.body, package, eager=False)
            yield from _imports(node.orelse, package, eager)
        else:
            yield from _imports(list(ast.iter_child_nodes(node)), package, eager)


def _is_import_call(node: ast.Call) -> bool:
    return bool(node.args) and ast.unparse(node.func) in {"__import__", "import_module", "importlib.import_module"}


def violations(source: str, path: str) -> list[str]:
    """What is wrong with a file's imports, one readable line each; `path` as for `imports`."""
    own = PurePosixPath(path).parts[0].removesuffix(".py")
    if own not in RANK:
        return [f"src/splat/{path}: `{own}` is in no layer; give it a place in LAYERS"]
    found = []
    for line, module, eager in imports(source, path):
        top, _, rest = module.partition(".")
        where = f"src/splat/{path}:{line}"
        if top == "splat":
            name = rest.partition(".")[0]
            if rest in FREE_NAMES:
                continue
            target = name if name in RANK else "splat"
            if target != own and RANK[target] >= RANK[own]:
                found.append(f"{where}: {own} imports {module}, but {target} is not an earlier layer")
        else:
            allowed = FRONT_END_THIRD_PARTY | sys.stdlib_module_names | (set() if eager else EXCHANGE.get(path, set()))
            if RANK[own] <= RANK["planning"] and top not in allowed:
                found.append(
                    f"{where}: {own} imports {module}; up to planning only NumPy and the standard library serve"
                )
            if eager and top in LAZY and not path.startswith(LAZY_EXEMPT):
                found.append(f"{where}: {module} is optional; import it inside the function that needs it")
            if own == "torch" and top in {"jax", "jaxlib"}:
                found.append(f"{where}: PyTorch users need not have JAX; splat.torch imports no {top}")
    return found


def test_sources_keep_the_layers() -> None:
    files = sorted((SRC / "splat").rglob("*.py"))
    assert files, f"no Python file under {SRC / 'splat'}"
    found = []
    for file in files:
        path = file.relative_to(SRC / "splat").as_posix()
        if path != "__init__.py":
            found += violations(file.read_text(encoding="utf-8"), path)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("errors.py", "from splat.config import x", "config is not an earlier layer"),
        ("pattern/core.py", "import splat.planning.target", "planning is not an earlier layer"),
        ("pattern/core.py", "from ..planning import target", "pattern imports splat.planning.target"),
        ("pattern/core.py", "from .. import acsr", "acsr is not an earlier layer"),
        ("acsr/build.py", "def f():\n    from splat.geometry import spans", "build.py:2: acsr imports"),
        ("acsr/build.py", "def f():\n    importlib.import_module('splat.ops')", "ops is not an earlier layer"),
        ("acsr/build.py", "import importlib\nimportlib.import_module('..ops', __package__)", "ops is not an"),
        ("ops/attention.py", "import splat", "splat is not an earlier layer"),
        ("ops/attention.py", "from splat import causal", "splat is not an earlier layer"),
        ("nn/attention.py", "import splat.torch", "torch is not an earlier layer"),
        ("planning/cost.py", "def f():\n    import jax.numpy as jnp", "planning imports jax.numpy; up to planning"),
        ("acsr/convert.py", "import scipy.sparse", "acsr imports scipy.sparse; up to planning"),
        (
            "pattern/core.py",
            "if TYPE_CHECKING:\n    from jax import Array",
            "pattern imports jax.Array; up to planning",
        ),
        ("codegen/base.py", "import torch", "torch is optional"),
        ("codegen/base.py", "try:\n    import triton.language as tl\nexcept ImportError:\n    pass", "is optional"),
        ("codegen/xla/emit.py", "class A:\n    import torch", "torch is optional"),
        ("torch/ops.py", "def f():\n    import jax", "splat.torch imports no jax"),
        ("surprise.py", "", "`surprise` is in no layer"),
    ],
)
def test_checker_finds(path: str, source: str, complaint: str) -> None:
    found = violations(source, path)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pattern/core.py", "from __future__ import annotations\nimport math, numpy as np\nfrom splat import errors"),
        ("pattern/core.py", "from .algebra import intersect\nfrom . import library\nfrom ..errors import SplatError"),
        ("planning/plan.py", "from splat.tiling import cover\nfrom splat.pattern.core import Pattern"),
        ("acsr/convert.py", "def f():\n    import scipy.sparse\n    from jax.experimental.sparse import BCOO"),
        ("codegen/base.py", "import jax\nfrom splat import __version__\ndef f():\n    import torch"),
        ("codegen/base.py", "if TYPE_CHECKING:\n    import torch"),
        ("codegen/triton/kernels.py", "import triton\nimport triton.language as tl"),
        ("torch/ops.py", "import torch\nfrom splat.codegen import registry"),
        ("cli/bench.py", "import splat\nfrom splat.bench import run"),
        ("__main__.py", "from splat.cli import main"),
    ],
)
def test_checker_accepts(path: str, source: str) -> None:
    assert violations(source, path) == []
