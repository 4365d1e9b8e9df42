"""The portable implementation."""

from __future__ import annotations

from tests.attention_suite import AttentionSuite
from tests.sharding_suite import ShardingSuite


class TestXla(AttentionSuite, ShardingSuite):
    implementation = "xla"
    splits = False  # XLA splits what it sees as it sees fit
