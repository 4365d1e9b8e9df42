"""Errors on the command line: one line and exit code 2 instead of a traceback."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer

from splat.errors import ArgumentError, SplatError

_state = {"debug": False}

#: Package -> the extra that brings it.
EXTRAS = {"torch": "torch", "triton": "kernels", "jax_triton": "kernels", "scipy": "bench"}


def install(extra: str) -> str:
    """The command that brings an extra."""
    return f"pip install 'splat-attention[{extra}]'"


def show_tracebacks(wanted: bool) -> None:
    """Whether errors are raised as they are (`--debug`, `SPLAT_DEBUG=1`)."""
    _state["debug"] = wanted


def reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command`, with SPLAT's errors, what cannot be written and missing packages told in a line on stderr."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            result = command(*args, **kwargs)
            sys.stdout.flush()  # what cannot be written is to be told here, not when the interpreter ends
            return result
        except SplatError as error:
            _report(str(error), error)
        except ImportError as error:
            package = (error.name or "").partition(".")[0]
            if package == "splat":
                raise
            remedy = f"{install(EXTRAS[package])}, or see" if package in EXTRAS else "See"
            _report(f"this command needs a package that cannot be imported: {error}. {remedy} `splat doctor`.", error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # who reads has had enough: typer ends quietly
                raise
            _report_system(error)

    return run


def run_reported(app: Callable[[], None]) -> None:
    """The whole command line: what is no command's, such as `--help`, too; with streams that may be closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if os.environ.get("COLUMNS") == "0":  # a terminal without a size: rich would print nothing
        del os.environ["COLUMNS"]
    try:
        app()
    except OSError as error:
        try:
            _report_system(error)
        except typer.Exit as ended:
            sys.exit(ended.exit_code)


def _report_system(error: OSError) -> NoReturn:
    where = "" if error.filename is None else f"{error.filename}: "
    _forget_output()
    _report(f"{where}{error.strerror or error}", error)


def _forget_output() -> None:
    """What stdout still holds and cannot write is not tried again when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _report(message: str, error: Exception) -> NoReturn:
    if _state["debug"]:
        raise error
    first, *rest = message.splitlines() or [type(error).__name__]
    typer.secho(f"error: {first}", fg="red", err=True)
    for line in rest:
        typer.echo(line, err=True)
    raise typer.Exit(2)


def check_out(path: Path | None, *, picture: bool = False) -> None:
    """Raises ArgumentError where a file (or picture) cannot be put there: said before the work, not after it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ArgumentError(f"--out must lie in a folder that exists, but {path.parent} is none. Create it first.")
    if path.is_dir():
        raise ArgumentError(f"--out must name a file, but {path} is a folder")
    if picture:
        from splat.explain.picture import picture_format

        picture_format(path)
