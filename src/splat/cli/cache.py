"""`splat cache`: the compiled kernels on disk."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from splat.cli.errors import reported
from splat.errors import ArgumentError

NAME = "cache"

app = typer.Typer(
    help="The compiled kernels on disk: list or remove them.", epilog="Example: splat cache ls", no_args_is_help=True
)


def ls() -> None:
    """List the compiled kernels: name, size, age, time since the last use, compiler and the start of the key."""
    from splat.codegen import cache

    folder, entries = cache_folder(), cache.ls()
    rows = [("name", "size", "age", "unused", "compiler", "key")]
    for entry in entries:
        age = (datetime.now(UTC) - entry.created).total_seconds()
        sizes = (spell_bytes(entry.size_bytes), spell_age(age), spell_age(entry.unused_s))
        rows.append((entry.name, *sizes, entry.info.get("compiler", ""), entry.key[:12]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = (str.ljust, str.rjust, str.rjust, str.rjust, str.ljust, str.ljust)
    for row in rows if entries else ():
        cells = (to(cell, width) for to, cell, width in zip(align, row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
    total = spell_bytes(sum(entry.size_bytes for entry in entries))
    typer.echo(f"{spell_count(len(entries))}, {total}: {folder}")


def clear(
    unused: Annotated[
        int | None,
        typer.Option(min=0, metavar="DAYS", help="Remove only those that no process has looked up for so many days."),
    ] = None,
) -> None:
    """Remove the compiled kernels, and what interrupted or failed compilations have left."""
    from splat.codegen import cache

    folder = cache_folder()
    done = cache.clear(None if unused is None else unused * 86400.0)
    text = f"removed {spell_count(done.entries)}, {spell_bytes(done.freed_bytes)} freed: {folder}"
    typer.echo(text + (f" ({len(done.busy)} left, being compiled now)" if done.busy else ""))


def cache_folder() -> Path:
    """The folder of compiled kernels, which need not exist. Raises ArgumentError where a file is in its place."""
    from splat import config

    folder = config.cache_dir()
    found = next(path for path in (folder, *folder.parents) if path.exists())
    if not found.is_dir():
        raise ArgumentError(
            f"compiled kernels are kept in the folder {folder}, but {found} is a file. Set SPLAT_CACHE_DIR to a "
            "folder, or remove the file."
        )
    return folder


def spell_count(kernels: int) -> str:
    """ "1 compiled kernel"."""
    return f"{kernels:,} compiled kernel{'' if kernels == 1 else 's'}"


def spell_bytes(size: int) -> str:
    """Bytes for people, such as "212 KB"; the units are powers of 1000."""
    number = float(size)
    for unit, digits in (("B", 0), ("KB", 0), ("MB", 1)):
        if round(number, digits) < 1000:
            return f"{number:.{digits}f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def spell_age(seconds: float) -> str:
    """Seconds for people, such as "3 h", rounded down."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


for _command in (ls, clear):
    app.command(_command.__name__)(reported(_command))
