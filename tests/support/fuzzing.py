"""Random inputs that are the same in every run: few in the fast tests, many in the slow ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy


def examples(few: int, many: int) -> Any:
    """Parametrise a test with `count`: `few` examples in the fast tests, `many` in the slow ones."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def for_each(strategy: SearchStrategy[Any], count: int, check: Callable[[Any], None]) -> None:
    """Call `check` with `count` values of `strategy` until one fails."""

    @settings(
        max_examples=count,
        phases=[Phase.generate],  # A run of seconds per example is too much to search for a smaller one.
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(strategy)
    def run(value: Any) -> None:
        check(value)

    run()


def assert_sentence(text: str, *parts: str) -> None:
    """Check that an error message is one line and holds the parts."""
    assert text
    assert "\n" not in text
    for part in parts:
        assert part in text
