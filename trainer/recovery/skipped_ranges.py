"""Jumps of the data: from training step `at_step` on, a run that went back reads samples `steps` further on.

Training step and data step differ by the skipped_ranges up to it, so that the order of samples stays arithmetic.
`jumps.json`
in the run folder holds them, and is written before anything is undone: a run that is killed at any moment starts
again with the same skipped_ranges.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.find import complete_checkpoints, read_meta
from ..errors import CheckpointError
from ..files import write_atomically

FILE = "jumps.json"


class SkippedRange(NamedTuple):
    at_step: int
    steps: int
    reason: str


def data_step(step: int, skipped_ranges: Sequence[SkippedRange]) -> int:
    """The step of the data that a training step reads."""
    return step + sum(skipped_range.steps for skipped_range in skipped_ranges if skipped_range.at_step <= step)


def last_step(steps: int, data_steps: int | None, skipped_ranges: Sequence[SkippedRange]) -> int:
    """Training steps in all: `steps`, or fewer where the data have an end (data_steps) and skipped_ranges leave too
    few."""
    if data_steps is None:
        return steps
    last, jumped = min(steps, data_steps), 0
    for skipped_range in sorted(skipped_ranges):
        jumped += skipped_range.steps
        last = min(last, max(skipped_range.at_step, data_steps - jumped))
    return last


def skip_back(
    skipped_ranges: Sequence[SkippedRange], present: int, target: int, reason: str
) -> tuple[SkippedRange, ...]:
    """The skipped_ranges of a run that goes back from step `present` to `target`: from there on its data are those of
    `present`. Skipped ranges after the target belong to steps that are undone."""
    kept = tuple(skipped_range for skipped_range in skipped_ranges if skipped_range.at_step <= target)
    return (*kept, SkippedRange(target, data_step(present, skipped_ranges) - data_step(target, kept), reason))


def read_skipped_ranges(folder: Path) -> tuple[SkippedRange, ...]:
    """The skipped_ranges of a run folder: those of its jumps.json, else those that its newest checkpoint knows."""
    path, entries = folder / FILE, None
    try:
        if path.is_file():
            entries = [SkippedRange(**entry) for entry in json.loads(path.read_text())]
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f'{path} cannot be read ({error}): expected [{{"at_step": ..., "steps": ..., "reason": ...}}], or no such '
            "file, which leaves the skipped_ranges to the newest checkpoint"
        ) from None
    if entries is None:
        checkpoints = complete_checkpoints(folder / "checkpoints")
        entries = [SkippedRange(*entry) for entry in read_meta(checkpoints[-1]).get("jumps", [])] if checkpoints else []
    return tuple(entries)


def write_skipped_ranges(folder: Path, skipped_ranges: Sequence[SkippedRange]) -> None:
    write_atomically(
        folder / FILE, json.dumps([skipped_range._asdict() for skipped_range in skipped_ranges], indent=1) + "\n"
    )


def follow(batches: Callable[[int], Iterator[tuple[int, Any]]], wanted: Callable[[], int]) -> Iterator[Any]:
    """What `batches` (first data step -> (data step, its micro-batches)) gives for the data step that is wanted,
    endless; it seeks where that is not the next one."""
    while True:
        for number, micro_batches in batches(wanted()):
            yield micro_batches
            if wanted() != number + 1:
                break
