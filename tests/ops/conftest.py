"""Failing assertions of the suite show their values, as those of test files do."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.attention_suite")
