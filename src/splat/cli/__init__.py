"""The command line, `splat`: one file a command. A command imports what it needs when it runs; `--help` little."""

from __future__ import annotations

from typing import Annotated

import typer

from splat import __version__
from splat.cli import bench, cache, demo, doctor, emit, plan, show
from splat.cli.errors import reported, run_reported, show_tracebacks

app = typer.Typer(
    name="splat",
    help="SPLAT, a compiler for regular sparse attention: look at patterns, their tiles and the programs they become.",
    epilog='Example: splat show "causal() & window(512) | sink(4)" --q-len 4096',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"splat {__version__}")
        raise typer.Exit()


@app.callback()
def _settings(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SPLAT_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    show_tracebacks(debug)


for _module, _example in (
    (demo, "splat demo --q-len 4096 --out demo.png"),
    (show, 'splat show "window(128) | strided(128)" --q-len 16384 --out pattern.png'),
    (plan, 'splat plan "causal() & window(512)" --q-len 16384 --num-q-heads 32 --num-kv-heads 8 --target h100'),
    (emit, 'splat emit "causal() & window(64)" --q-len 256 --target xla'),
    (bench, "splat bench paper --quick --out results"),
    (doctor, "splat doctor"),
):
    app.command(_module.NAME, epilog=f"Example: {_example}")(reported(_module.command))
app.add_typer(cache.app, name=cache.NAME)


def main() -> None:
    """What the `splat` script runs."""
    run_reported(app)
