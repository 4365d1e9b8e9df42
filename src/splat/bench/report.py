"""A run as one file that needs no other: HTML with its tables and pictures in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from splat.bench import summary, tables
from splat.bench.baseline import Comparison
from splat.bench.plots import Plot, plots
from splat.bench.record import Run
from splat.bench.suites import SUITES
from splat.bench.tables import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
p.dim, figcaption, li { color: #57606a; } code { background: #f3f4f6; padding: .1rem .3rem; border-radius: 3px; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e7eb; }
th { border-bottom: 1.5px solid #8c959f; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tr.sum td { font-weight: 600; border-top: 1.5px solid #8c959f; } .bad { color: #b42318; font-weight: 600; }
.headline { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.headline div { border: 1px solid #d0d7de; border-radius: 8px; padding: .6rem .9rem; }
.headline b { display: block; font-size: 1.35rem; }
details summary { cursor: pointer; color: #57606a; }
"""

_HOW = (
    "Every contender's result is compared with float64: all rows of SPLAT's at a small size against the dense mask, "
    "and a sample of rows of everyone's at the measured size.",
    "Everyone takes turns. A turn lasts {turn_ms:g} ms at least; where it has several calls, the first does not count. "
    "A sample is the median call of a turn; the numbers are medians of the samples, ± half the distance between the "
    "quartiles. Rounds in which threads had to wait for a processor do not count where enough others are left.",
    "“first” is the first call, compilation included; “prepare” makes a format or a mask. Neither is in the time.",
    "FLOP are counted over non-zeros only: 2·nnz·H for sddmm and spmm, 4·nnz·H for attention, 14·nnz·H for training "
    "(forward and backward), for each head. "
    "“of peak” is of the best float32 matrix product seen during this run.",
    "“peak MB” is what one warm call held beyond what the process held before.",
)


def report(run: Run, comparison: Comparison | None = None) -> str:
    """The whole page."""
    parts = [_head(run), _headline(run)]
    if comparison is not None:
        parts += ["<h2>Against the baseline</h2>", _table(tables.comparison(comparison))]
    pictures = plots(run)
    for task in run.tasks:
        parts += [f"<h2>{html.escape(task)}</h2>", *(_figure(plot) for plot in pictures if plot.task == task)]
        slopes = tables.slopes(run, task)
        if slopes is not None:
            parts.append(_table(slopes))
        parts += [_table(tables.speedups(run, task)), _folded(tables.everyone(run, task))]
    if run.records:
        waste = [plot for plot in pictures if plot.task is None]
        parts += ["<h2>Waste and metadata</h2>", *map(_figure, waste), _folded(tables.structure(run))]
    parts += [_conditions(run)]
    title = html.escape(SUITES[run.suite].title if run.suite in SUITES else run.suite)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>SPLAT: {title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _head(run: Run) -> str:
    facts = run.machine
    title = SUITES[run.suite].title if run.suite in SUITES else run.suite
    quick = ' <span class="bad">--quick: a rehearsal, its numbers mean nothing.</span>' if run.settings["quick"] else ""
    where = facts["gpu"]["name"] if facts["gpu"] and run.settings["device"] == "cuda" else facts["cpu"]
    return (
        f"<h1>{html.escape(title)}</h1>\n<p class=dim>{html.escape(where)}, {run.settings['threads']} threads, "
        f"{html.escape(facts['date'])}.{quick}<br><code>{html.escape(run.command)}</code></p>"
    )


def _headline(run: Run) -> str:
    """Geometric means in boxes: the answer first."""
    boxes = []
    for task in run.tasks:
        rivals = summary.rivals(run, task)
        for rival in rivals:
            mean = summary.geomean(run, task, rival)
            if mean is not None and (rival == summary.BEST_SPARSE or rival not in run.sparse or len(rivals) < 3):
                cases = f"{mean[1]} case{'s' if mean[1] != 1 else ''}"
                boxes.append(
                    f"<div>{html.escape(task)} over {html.escape(rival)}<b>{mean[0]:.2f}x</b>"
                    f"geometric mean of {cases}</div>"
                )
    return f"<div class=headline>{''.join(boxes)}</div>" if boxes else ""


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.svg().encode("utf-8")).decode("ascii")
    caption = html.escape(plot.caption)
    return (
        f'<figure id="{html.escape(plot.name)}"><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str, name: str = "") -> str:
        return f"<tr{name}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = [row(cells, "td", " class=sum" if n in table.bold else "") for n, cells in enumerate(table.rows)]
    head = row(table.columns, "th")
    return f"<p class=dim>{html.escape(table.title)}</p><div class=wide><table>{head}{''.join(body)}</table></div>"


def _folded(table: Table) -> str:
    return f"<details><summary>{html.escape(table.title)}</summary>{_table(table)}</details>"


def _conditions(run: Run) -> str:
    """Who took part, how it was measured, on what."""
    who = [f"<li><b>{html.escape(name)}</b>: {html.escape(what)}</li>" for name, what in run.contenders.items()]
    notes = [f"<li>{html.escape(note)}</li>" for note in tables.notes(run)]
    how = [f"<li>{html.escape(text.format(**run.settings))}</li>" for text in _HOW]
    packages = ", ".join(f"{name} {version}" for name, version in run.machine["packages"].items() if version)
    facts = f"{run.machine['system']}, Python {run.machine['python']}, {packages}"
    return (
        f"<h2>Who took part</h2><ul>{''.join(who)}{''.join(notes)}</ul>"
        f"<h2>How it was measured</h2><ul>{''.join(how)}<li>{html.escape(facts)}</li></ul>"
    )
