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
    "score_mod": (
        "absolute", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil",
        "choose_condition", "clamp_real", "clamp_whole", "cos", "cosh", "erf", "erfc", "exp2_real",
        "exp_real", "expm1", "floor", "fmod", "least_real", "least_whole", "log1p", "log_real", "logistic",
        "minus", "most_real", "most_whole", "negated", "plus", "pow", "power_real", "power_whole",
        "quotient", "remainder", "rint", "root", "round", "shift_left", "shift_right", "sign_real",
        "sign_whole", "sin", "sinh", "tan", "tanh_real", "times", "to_real", "to_whole_int16",
        "to_whole_int32", "to_whole_int8", "to_whole_uint16", "to_whole_uint8", "where_of", "wrapped_int16",
        "wrapped_int8", "wrapped_uint16", "wrapped_uint8",
    ),
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
