"""Skipped ranges of the data: a run that went back to a checkpoint leaves out the samples that it had read since.

From training step `at_step` on, such a run reads the data `steps` further on. So the step of the data is the training
step plus the lengths of the ranges before it, and the order of samples stays arithmetic. `jumps.json` in the run folder
holds the ranges. It is written before anything is undone: a run that is killed at any moment of a rollback starts again
with the same ranges.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.files import parse_json

from ..checkpoint.find import complete_checkpoints
from ..checkpoint.meta import read_meta
from ..errors import CheckpointError
from ..files import write_atomically

FILE = "jumps.json"


class SkippedRange(NamedTuple):
    """`steps` steps of the data that are left out between training steps at_step - 1 and at_step."""

    at_step: int
    steps: int
    reason: str


def data_step(step: int, skipped_ranges: Sequence[SkippedRange]) -> int:
    """The step of the data that training step `step` reads."""
    return step + sum(skipped.steps for skipped in skipped_ranges if skipped.at_step <= step)


def skipped_before(skipped_ranges: Sequence[SkippedRange], step: int) -> int:
    """Steps of the data that are left out before a stage that begins at training step `step`. A range right at its
    beginning is its own, since it came of a rollback within the stage."""
    return sum(skipped.steps for skipped in skipped_ranges if skipped.at_step < step)


def last_step(steps: int, data_steps: int | None, skipped_ranges: Sequence[SkippedRange]) -> int:
    """How many training steps there are: `steps`, or fewer if the data end after data_steps steps, of which the skipped
    ranges leave too few. data_steps: None where the data have no end."""
    if data_steps is None:
        return steps
    last, skipped_before = min(steps, data_steps), 0
    for skipped in sorted(skipped_ranges):
        skipped_before += skipped.steps
        last = min(last, max(skipped.at_step, data_steps - skipped_before))
    return last


def skip_back(
    skipped_ranges: Sequence[SkippedRange], present: int, target: int, reason: str
) -> tuple[SkippedRange, ...]:
    """The skipped ranges of a run that goes back from step `present` to step `target`: from `target` on it reads what
    it would have read from `present` on. Ranges after the target belong to steps that are undone, and are dropped."""
    kept = tuple(skipped for skipped in skipped_ranges if skipped.at_step <= target)
    return (*kept, SkippedRange(target, data_step(present, skipped_ranges) - data_step(target, kept), reason))


def read_skipped_ranges(folder: Path) -> tuple[SkippedRange, ...]:
    """The skipped ranges of a run folder: those of its jumps.json, else those that its newest checkpoint knows, of
    those that can be read.

    Raises CheckpointError where jumps.json cannot be read.
    """
    path, entries = folder / FILE, None
    try:
        if path.is_file():
            entries = [SkippedRange(**entry) for entry in parse_json(path.read_text())]
            if not all(type(e.at_step) is type(e.steps) is int and isinstance(e.reason, str) for e in entries):
                raise ValueError("a number is no integer, or a reason no text")
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f'{path} cannot be read ({error}): expected [{{"at_step": ..., "steps": ..., "reason": ...}}], or no such '
            "file; then the skipped ranges are those that the newest checkpoint knows"
        ) from None
    for checkpoint in reversed(complete_checkpoints(folder / "checkpoints")) if entries is None else ():
        with contextlib.suppress(CheckpointError):  # a damaged one is passed over, as a resume does
            return tuple(SkippedRange(*entry) for entry in read_meta(checkpoint).get("jumps", []))
    return tuple(entries or ())


def write_skipped_ranges(folder: Path, skipped_ranges: Sequence[SkippedRange]) -> None:
    entries = [skipped._asdict() for skipped in skipped_ranges]
    write_atomically(folder / FILE, json.dumps(entries, indent=1) + "\n")
