"""The portable implementation."""

from __future__ import annotations

from tests.attention_suite import AttentionSuite


class TestXla(AttentionSuite):
    implementation = "xla"
