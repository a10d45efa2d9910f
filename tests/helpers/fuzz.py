"""Settings of tests that make their cases by chance: few and always the same, or FUZZ_FACTOR times as many new ones
(benchmarks/fuzz.py)."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, settings

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))


def fuzz(examples: int, **more: Any) -> Callable[[Any], Any]:
    """For a slow test that tries `examples` cases; more: other options of hypothesis' settings."""
    phases = [Phase.generate] if FACTOR == 1 else [Phase.generate, Phase.shrink]
    options = {"deadline": None, "derandomize": FACTOR == 1, "database": None, "phases": phases, **more}
    chosen = settings(max_examples=examples * FACTOR, **options)
    return lambda test: pytest.mark.slow(chosen(test))
