"""Pictures and numbers say what the schedule does: every cell and every class of tile, against the tiles themselves."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

import splat
from splat.errors import ArgumentError, PatternError
from splat.explain import Drawing, expression, numbers, rasterize, save_picture, save_strip, summary
from splat.explain import picture as picture_module
from splat.explain import raster as raster_module
from splat.explain.raster import FULL, LABELS, PARTIAL, WASTED
from splat.planning import Plan, Schedule
from splat.tiling import Phase

CASES = [
    ("causal() & window(40) | sink(5)", 150, 150, 0),
    ("window(12) | strided(16)", 128, 128, 0),
    ("window(8) | global_tokens(5)", 101, 97, 0),
    ("causal() & dilated_window(9, 0, 4)", 90, 130, 40),
    ("blocked(16, 1) | random_blocks(16, 2, 3)", 96, 112, 0),
    ("neighborhood([9, 9], 3)", 81, 81, 0),
    ("lattice_columns(7, 3) & causal()", 64, 64, 0),
    ("full() - full()", 33, 20, 0),
    ("causal()", 1, 70, 69),
]


def make(pattern: str, q_len: int, kv_len: int | None = None, offset: int = 0, block: int = 16) -> Plan:
    return splat.plan(pattern, q_len, kv_len, query_offset=offset, block_q=block, block_kv=block)


def means(dense: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """The mean of every cell."""
    sums = np.add.reduceat(np.add.reduceat(dense.astype(float), rows[:-1], axis=0), cols[:-1], axis=1)
    return sums / np.outer(np.diff(rows), np.diff(cols))


def computed(schedule: Schedule, full: bool) -> np.ndarray:
    """How often tiles of a class compute each pair of the matrix, from the tiles one by one."""
    num_rows, num_cols = schedule.acsr.shape
    counts = np.zeros(schedule.acsr.shape, int)
    for row, col, phase, _ in schedule.each_tile():
        if (phase is Phase.FULL) == full:
            counts[np.ix_(row[row < num_rows], col[col < num_cols])] += 1
    return counts


@pytest.mark.parametrize(("pattern", "q_len", "kv_len", "offset"), CASES)
@pytest.mark.parametrize("cells", [(1000, 1000), (13, 9), (1, 1)])
def test_cells_are_means_of_mask_and_tiles(
    pattern: str, q_len: int, kv_len: int, offset: int, cells: tuple[int, int]
) -> None:
    plan = make(pattern, q_len, kv_len, offset)
    raster = rasterize(plan.forward, cells)
    edges = raster.row_edges, raster.col_edges
    assert raster.pairs.shape == (min(cells[0], q_len), min(cells[1], kv_len))
    mask = splat.parse(pattern).to_dense(q_len, kv_len, query_offset=offset)
    np.testing.assert_allclose(raster.pairs, means(mask, *edges), atol=1e-12)
    np.testing.assert_allclose(raster.full, means(computed(plan.forward, True), *edges), atol=1e-12)
    np.testing.assert_allclose(raster.partial, means(computed(plan.forward, False), *edges), atol=1e-12)
    assert raster.wasted.min(initial=0) > -1e-12


@pytest.mark.parametrize(("pattern", "q_len", "kv_len", "offset"), CASES)
def test_part_is_cut_from_the_whole(pattern: str, q_len: int, kv_len: int, offset: int) -> None:
    plan = make(pattern, q_len, kv_len, offset)
    rows, cols = (q_len // 3, q_len // 3 + q_len // 2 + 1), (kv_len // 4, kv_len // 2)
    whole, part = rasterize(plan.forward, (1000, 1000)), rasterize(plan.forward, (1000, 1000), rows, cols)
    for name in ("pairs", "full", "partial"):
        np.testing.assert_allclose(getattr(part, name), getattr(whole, name)[slice(*rows), slice(*cols)], atol=1e-12)


def test_sampled_rows_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = make("strided(16) | window(30)", 4096).forward
    exact = rasterize(schedule, (8, 8))
    monkeypatch.setattr(raster_module, "MAX_COUNTS", 72 * 100)  # 100 of a cell's 512 rows
    sampled = rasterize(schedule, (8, 8))
    assert not np.array_equal(sampled.pairs, exact.pairs)
    np.testing.assert_allclose(sampled.pairs, exact.pairs, atol=2e-3)
    np.testing.assert_allclose(sampled.partial, exact.partial, atol=2e-3)


def test_large_matrix_is_rasterised_without_a_mask() -> None:
    raster = rasterize(splat.plan("causal() & (window(128) | strided(1024))", 1 << 20).forward, (64, 64))
    upper = np.triu(np.ones((64, 64), bool), 1)
    assert raster.pairs[upper].max() == 0
    np.testing.assert_allclose(raster.pairs[np.tril(upper.T, -2)], 1 / 1024, rtol=1e-6)


def test_colors_of_single_pairs() -> None:
    colors = rasterize(make("causal()", 64, block=32).forward, (64, 64)).colors()

    def at(row: int, col: int) -> str:
        return "#" + "".join(f"{channel:02x}" for channel in colors[row, col])

    assert [at(40, 3), at(3, 1), at(3, 9), at(3, 40)] == [FULL, PARTIAL, WASTED, "#ffffff"]


@pytest.mark.parametrize(("pattern", "q_len", "kv_len", "offset"), CASES)
def test_outlines_are_the_dense_tiles(pattern: str, q_len: int, kv_len: int, offset: int) -> None:
    schedule = make(pattern, q_len, kv_len, offset).forward
    outlines = picture_module.find_outlines(schedule, picture_module.Part((0, q_len), (0, kv_len)))
    expected, lattices = [], []
    for row, col, _, _ in schedule.each_tile():
        rows, cols = row[row < q_len], col[0]
        if np.ptp(rows) + 1 == rows.size and (cols.size == 1 or cols[1] - cols[0] == 1):
            expected.append((int(cols[0]), int(rows[0]), cols.size, row.shape[0]))
        else:
            lattices.append({(r, c) for r in rows.tolist() for c in cols[cols < kv_len].tolist()})
    assert sorted(outlines.boxes) == sorted(expected)
    assert bool(lattices) == bool(outlines.lattice.size)
    if lattices:
        assert set(map(tuple, outlines.lattice.tolist())) in lattices


def test_numbers_are_the_plans() -> None:
    plan = make("window(12) | strided(16)", 128)
    known = numbers(plan)
    tiles = list(plan.forward.each_tile())
    full = sum(phase is Phase.FULL for _, _, phase, _ in tiles)
    assert known["tiles"] == str(len(tiles))
    assert (known["full"], known["partial"]) == (str(full), str(len(tiles) - full))
    assert known["non-zeros"] == f"{plan.problem.pattern.to_dense(128).sum():,}"
    assert known["waste"] == f"{sum(keep.size for *_, keep in tiles) / plan.nnz:.3f}"
    assert f"waste {known['waste']}, 2 passes" in summary(plan)
    assert expression(make(f"segments(lengths={[1] * 60})", 60), 40).endswith("...")


def pixels(path: Path) -> set[str]:
    """The colours of a PNG, as #rrggbb."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(np.uint8)
    return {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(image.reshape(-1, 3), axis=0)}


@pytest.mark.parametrize("q_len", [256, 4096])
def test_picture_shows_every_class(tmp_path: Path, q_len: int) -> None:
    path = tmp_path / "p.png"
    save_picture(make("causal() & window(200) | strided(64) & causal()", q_len, block=64), path)
    assert {FULL, PARTIAL, WASTED, "#ffffff"} <= pixels(path)


@pytest.mark.sampled(1 / 2)
@pytest.mark.parametrize(("pattern", "q_len", "kv_len", "offset"), [*CASES, ("causal()", 2, 5000, 4998)])
def test_every_case_can_be_drawn(tmp_path: Path, pattern: str, q_len: int, kv_len: int, offset: int) -> None:
    path = tmp_path / "p.png"
    save_picture(make(pattern, q_len, kv_len, offset), path)
    assert "#ffffff" in pixels(path)


def test_strip_with_parts_and_times(tmp_path: Path) -> None:
    plans = [make("window(40)", 256, block=32), make("window(128) | global_tokens(16)", 4096, block=64)]
    path = tmp_path / "strip.png"
    save_strip(plans, path, zoom=True, times_ms={"SPLAT": [1, 2], "dense": [30, 40]})
    with_bars = matplotlib.image.imread(path).shape
    assert {FULL, PARTIAL, WASTED} <= pixels(path)
    save_strip(plans, path)
    assert matplotlib.image.imread(path).shape[0] < with_bars[0]


@pytest.mark.parametrize(
    ("suffix", "begins"), [("", b"\x89PNG"), (".PNG", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_picture_is_what_its_name_says(tmp_path: Path, suffix: str, begins: bytes) -> None:
    path = tmp_path / f"p{suffix}"
    for save in (save_picture, lambda plan, path: save_strip([plan], path)):
        save(make("window(9)", 64), path)
        assert path.read_bytes().startswith(begins)
    with pytest.raises(ArgumentError, match=r"written as .png, .svg, .pdf, but the file p.jpeg ends in .jpeg"):
        save_picture(make("window(9)", 64), tmp_path / "p.jpeg")


def drawn(plan: Plan, encoding: str = "utf-8", width: int = 120, **kwargs) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    Console(file=file, width=width, **kwargs).print(Drawing(plan))
    file.seek(0)
    return file.read()


def test_terminal_without_colour_has_a_character_a_class() -> None:
    text = drawn(make("causal()", 256, block=64), no_color=True)
    assert "\x1b" not in text
    picture = text.split("└")[0]
    assert all(glyph in picture for glyph in "█▓░")
    assert all(label in text for label in LABELS.values())
    assert "non-zeros       32,896" in text


def test_terminal_with_ascii_only() -> None:
    text = drawn(make("causal()", 256, block=64), encoding="ascii", no_color=True)
    assert all(glyph in text for glyph in "#+-")


def test_terminal_with_colour() -> None:
    plan = make("window(32) | strided(16)", 96)
    text = drawn(plan, force_terminal=True, color_system="truecolor")
    assert "▀" in text
    assert "\x1b[38;2;" in text
    assert "waste" in text


@pytest.mark.parametrize("width", [20, 60, 200])
def test_terminal_keeps_its_width(width: int) -> None:
    lines = drawn(make("window(300) | sink(3)", 2000, 700, block=64), width=width, no_color=True).splitlines()
    assert max(map(len, lines)) <= width


def test_run_time_patterns_are_refused() -> None:
    import jax.numpy as jnp

    plan = splat.plan(splat.segments(jnp.zeros(32, jnp.int32)), 32)
    with pytest.raises(PatternError, match="cannot be drawn"):
        rasterize(plan.forward)
