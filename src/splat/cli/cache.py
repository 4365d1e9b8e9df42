"""`splat cache`: the compiled kernels on disk."""

from __future__ import annotations

from datetime import UTC, datetime

import typer

from splat.cli.errors import reported

NAME = "cache"

app = typer.Typer(
    help="The compiled kernels on disk: list or remove them.", epilog="Example: splat cache ls", no_args_is_help=True
)


def ls() -> None:
    """List the compiled kernels: name, size, age, compiler and the start of the key."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from splat import config
    from splat.codegen import cache

    console, entries = Console(), cache.ls()
    if entries:
        now = datetime.now(UTC)
        table = Table("name", "size", "age", "compiler", "key", box=None, pad_edge=False, header_style="bold")
        table.columns[1].justify = table.columns[2].justify = "right"
        for entry in entries:
            age = spell_age((now - entry.created).total_seconds())
            compiler = entry.info.get("compiler", "")
            cells = (entry.name, spell_bytes(entry.size_bytes), age, compiler, entry.key[:12])
            table.add_row(*map(Text, cells))
        console.print(table)
    total = spell_bytes(sum(entry.size_bytes for entry in entries))
    console.print(f"{spell_count(len(entries))}, {total}: {config.cache_dir()}", highlight=False, markup=False,
                  soft_wrap=True)  # fmt: skip


def clear() -> None:
    """Remove the compiled kernels, and what interrupted or failed compilations have left."""
    from splat import config
    from splat.codegen import cache

    done = cache.clear()
    text = f"removed {spell_count(done.entries)}, {spell_bytes(done.freed_bytes)} freed: {config.cache_dir()}"
    typer.echo(text + (f" ({len(done.busy)} left, being compiled now)" if done.busy else ""))


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
