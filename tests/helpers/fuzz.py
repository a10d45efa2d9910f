"""Settings of tests that make their cases by chance: few and always the same, or FUZZ_FACTOR times as many new ones
(benchmarks/fuzz.py)."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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


READ, REFUSED = "read", "refused in one message"
OUTCOMES = Counter[str]()
"""Cases of the running test by how they ended; tests/conftest.py writes them into its report."""


@contextlib.contextmanager
def counted(*refusals: type[Exception]) -> Iterator[None]:
    """A case that ends well, or is refused by one of these errors, whose message it counts with."""
    try:
        yield
    except refusals:
        OUTCOMES[REFUSED] += 1
    else:
        OUTCOMES[READ] += 1


def count_samples(reasons: Iterable[str | None]) -> None:
    """Samples by their hole's reason; None is none."""
    OUTCOMES.update("sample" if reason is None else f"hole, {reason.partition(':')[0]}" for reason in reasons)
