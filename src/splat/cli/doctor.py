"""`splat doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from splat.cli.errors import EXTRAS, install

NAME = "doctor"

#: Run in a process of its own: a broken jax may raise anything, end the process, or wait for a device that is busy.
PROBE = """
import json, jax, jaxlib
devices = [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]
print(json.dumps({"jax": jax.__version__, "jaxlib": jaxlib.__version__, "platform": jax.default_backend(),
                  "devices": devices}))
"""
PROBE_S = 120
#: Linux grants AMX's registers to a process that asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA). This one
#: asks in a process of its own, so that nothing of this one changes.
AMX_PROBE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
done = libc.syscall(ctypes.c_long(158), ctypes.c_long(0x1023), ctypes.c_long(18))
print("granted" if done == 0 else "refused (" + os.strerror(ctypes.get_errno()) + ")")
"""

DTYPES = ("float32", "bfloat16", "float16", "float64")
#: CPU features that code generators can use, as /proc/cpuinfo spells them (x86 and Arm).
FEATURES = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_bf16", "amx_int8", "neon", "asimd", "asimdhp", "bf16", "sve", "sve2", "sme",
)  # fmt: skip
#: How kernels multiply bfloat16.
BFLOAT16_BY = {
    "matrix tiles": "on matrix tiles (AMX)",
    "pairs": "in pairs (AVX512-BF16)",
    "float32": "as float32: this processor has nothing faster that the kernels know",
}
OPTIONAL = {
    "torch": "PyTorch front end, benchmarks' peers",
    "triton": "GPU kernels",
    "jax-triton": "GPU kernels from JAX",
    "scipy": "benchmarks' peers, tests",
}
MISSING = "not installed"
#: Settings of others that change what SPLAT does; its own are in splat.config.
SETTINGS = ("CXX", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "PJRT_NPROC", "NPROC",
            "CUDA_VISIBLE_DEVICES", "NO_COLOR")  # fmt: skip


def command() -> None:
    """Say what this machine can run, and why not the rest. The exit code is 0 whatever is missing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    import splat

    console = Console()
    jax = probe_jax()

    def section(title: str, rows: dict[str, str]) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=16)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(Text(f"  {name}"), Text(value))
        console.print(Text(title, "bold"))
        console.print(table)

    section("versions", {"splat": splat.__version__, "python": _python(), "numpy": _version("numpy"), **_jax_rows(jax)})
    section("machine", machine())
    compiled = cpp()
    section("C++ kernels", compiled)
    section("implementations", implementations(jax, "problem" not in compiled))
    section("optional packages", {name: _optional(name, use) for name, use in OPTIONAL.items()})
    section("settings", settings())


def probe_jax(timeout_s: float = PROBE_S) -> dict[str, Any]:
    """Versions, platform and devices of JAX; or {"error": a sentence}."""
    if importlib.util.find_spec("jax") is None:
        return {"error": "not installed: pip install jax"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"gave no answer within {timeout_s:.0f} s; a device may be busy (try JAX_PLATFORMS=cpu)"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        said = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"does not work (exit code {done.returncode}): {said[-1]}", "crashed": done.returncode < 0}


def implementations(jax: dict[str, Any], compiles: bool = True) -> dict[str, str]:
    """For each implementation the dtypes it serves here, or why it serves none. `compiles`: C++ has been tried."""
    from splat.codegen import registry
    from splat.codegen.base import Request

    if jax.get("crashed"):
        return dict.fromkeys(registry.NAMES, "not asked: importing jax ends the process")
    reasons: dict[str, dict[str, str | None]] = {name: {} for name in registry.NAMES}
    for dtype in DTYPES:
        try:
            answers = registry.refusals(Request(jax.get("platform", "cpu"), dtype, 64))
        except Exception as error:  # whatever a broken installation raises
            answers = dict.fromkeys(registry.NAMES, f"{type(error).__name__}: {error}")
        if not compiles:
            answers["cpp"] = answers["cpp"] or "the C++ compiler does not work: see C++ kernels, problem"
        for name, reason in answers.items():
            reasons[name][dtype] = reason
    out = {}
    for name, known in reasons.items():
        served = [dtype for dtype, reason in known.items() if reason is None]
        refused = list(dict.fromkeys(reason for reason in known.values() if reason))
        parts = [f"serves {', '.join(served)}"] if served else ["no"]
        out[name] = ": ".join(parts) + (("; " if served else ": ") + " / ".join(refused) if refused else "")
    return out


def machine() -> dict[str, str]:
    """Processor, threads, and whether an NVIDIA or AMD driver is there."""
    from splat.codegen.cpp import threads

    cpuinfo = _read("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    known = {key.strip().lower(): value.strip() for key, value in fields.items()}
    has = set((known.get("flags") or known.get("features") or "").split())
    features = [name for name in FEATURES if name in has]
    drivers = [name for name, path in (("NVIDIA", "/proc/driver/nvidia/version"), ("AMD", "/dev/kfd"))
               if Path(path).exists()]  # fmt: skip
    rows = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": known.get("model name") or platform.processor() or "unknown",
        "instruction sets": ", ".join(features) if features else "unknown: /proc/cpuinfo names none",
    }
    if "amx_tile" in has:
        rows["AMX"] = f"{probe_amx()} by the kernel"
    return rows | {
        "threads": f"{threads.usable()} usable of {os.cpu_count()}",
        "GPU drivers": ", ".join(drivers) or "none",
    }


def probe_amx() -> str:
    """Whether a process that asks for AMX gets it: "granted", or "refused" and why."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", AMX_PROBE], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "not known to be granted"
    return done.stdout.strip()


def cpp() -> dict[str, str]:
    """The C++ compiler, its flags and what is wrong with them, how many threads kernels use, where they are kept."""
    from splat import config
    from splat.cli.cache import spell_bytes, spell_count
    from splat.codegen import cache
    from splat.codegen.cpp import compiler, threads
    from splat.errors import SplatError

    rows = {}
    try:
        found = compiler.find()
        rows["compiler"] = f"{shlex.join(found.command)}: {found.version}"
        rows["flags"] = shlex.join(compiler.flags(found))
        if problem := compiler.trial(found):
            rows["problem"] = problem
        elif by := compiler.bfloat16_by(found):
            refused = by == "matrix tiles" and probe_amx() != "granted"
            rows["bfloat16"] = BFLOAT16_BY["float32" if refused else by]
    except SplatError as error:
        rows["compiler"] = str(error)
    except OSError as error:
        rows["not tried"] = f"no temporary files: {error.strerror or error}; set TMPDIR to a folder that can be written"
    rows["threads"] = str(threads.count())
    try:
        entries = cache.ls()
        kept = f"{spell_count(len(entries))}, {spell_bytes(sum(entry.size_bytes for entry in entries))}"
        rows["kept in"] = f"{config.cache_dir()} ({kept})"
    except OSError as error:
        rows["kept in"] = f"nowhere: {error.filename}: {error.strerror}; set SPLAT_CACHE_DIR"
    return rows


def settings() -> dict[str, str]:
    """Environment variables that change what SPLAT or JAX does: SPLAT's own, and those of others that are set."""
    from splat import config

    rows = {}
    for setting in config.SETTINGS:
        value = config.get(setting.name) or "not set"
        rows[setting.name] = f"{value} ({setting.meaning}; default: {setting.default})"
    rows |= {name: f"{os.environ[name]} (not a setting of SPLAT: misspelt?)" for name in config.unknown()}
    return rows | {name: os.environ[name] for name in SETTINGS if name in os.environ}


def _jax_rows(jax: dict[str, Any]) -> dict[str, str]:
    if "error" in jax:
        return {"jax": jax["error"]}
    rows = {"jax": jax["jax"], "jaxlib": jax["jaxlib"], "devices": ", ".join(jax["devices"])}
    if jax["platform"] == "cpu" and Path("/proc/driver/nvidia/version").exists():
        rows["devices"] += f" (an NVIDIA driver is here, but jax sees no GPU: {install('jax-cuda')})"
    return rows


def _python() -> str:
    return f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def _optional(package: str, use: str) -> str:
    version, extra = _version(package), EXTRAS[package.replace("-", "_")]
    return f"{version} ({use})" + (f": {install(extra)}" if version == MISSING else "")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
