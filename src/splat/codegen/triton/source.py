"""From a generated text to a function that Triton compiles."""

from __future__ import annotations

import hashlib
import linecache
import re
import textwrap
from typing import Any

from splat.codegen.triton.launch import Kernel

#: Where the texts' functions come from; a text imports those it calls.
_LIBRARY = {
    "backward": ("d_key_value", "d_query", "zeros"),
    "combine": ("merged_lse", "partial_lse", "partial_rows", "resume", "share", "slots_of"),
    "forward": ("attend", "finish", "start"),
    "tiles": (
        "LOG2E", "bound", "cut", "head_of", "lattice", "load_rows", "locate", "rows_by_map", "rows_in_steps", "skip",
        "span", "store_rows",
    ),
}  # fmt: skip

#: Lines of a text are broken there.
_LINE = 116


def load(name: str, body: str) -> Kernel:
    """The function that a text defines. Triton reads its source again, so it is known to `linecache` under a name."""
    body = "\n".join(_wrap(line) for line in body.split("\n"))
    source = f"{_imports(body)}\n\n\n{body}"
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    file = f"<splat {name} {digest}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    namespace: dict[str, Any] = {"__name__": f"splat.codegen.triton.generated.{name}_{digest}"}
    exec(compile(source, file, "exec"), namespace)
    return Kernel(name, source, namespace[name])


def _imports(body: str) -> str:
    words = set(re.findall(r"\w+", body))
    lines = ["import triton", "import triton.language as tl", ""]
    for module, names in _LIBRARY.items():
        if used := [name for name in names if name in words]:
            lines.append(f"from splat.codegen.triton.kernels.{module} import {', '.join(used)}")
    return "\n".join(lines)


def _wrap(line: str) -> str:
    """A long line in several: it is a call or a signature, so that any blank is a place to break."""
    if len(line) <= _LINE:
        return line
    hanging = " " * (len(line) - len(line.lstrip()) + 4)
    kept = line.replace(": ", ":\0").replace(", None]", ",\0None]")  # annotations and indices stay together
    return "\n".join(textwrap.wrap(kept, _LINE, subsequent_indent=hanging, break_long_words=False)).replace("\0", " ")
