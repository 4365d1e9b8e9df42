"""Attention in generated C++ on this CPU, against its peers: `python -m benchmarks.run --suite cpu [--only NAME ...]`.

Columns of the tables: "clean" counts rounds whose threads hardly waited for a processor, of all rounds; medians are
over those where there are enough. "foreign" is the share of the processors that others had.
"""

from __future__ import annotations

#: What `--only` takes.
NAMES = (
    *("forward", "share", "causal", "strided", "backward", "first", "overhead", "threads", "linear", "decode"),
    "scores",
)
