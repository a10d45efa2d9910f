"""Jumps of the data: from training step `at_step` on, a run that went back reads samples `steps` further on.

Training step and data step differ by the jumps up to it, so that the order of samples stays arithmetic. `jumps.json`
in the run folder holds them, and is written before anything is undone: a run that is killed at any moment starts
again with the same jumps.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import CheckpointError, complete_checkpoints, read_meta, write_atomically

FILE = "jumps.json"


class Jump(NamedTuple):
    at_step: int
    steps: int
    reason: str


def data_step(step: int, jumps: Sequence[Jump]) -> int:
    """The step of the data that a training step reads."""
    return step + sum(jump.steps for jump in jumps if jump.at_step <= step)


def last_step(steps: int, data_steps: int | None, jumps: Sequence[Jump]) -> int:
    """Training steps in all: `steps`, or fewer where the data have an end (data_steps) and jumps leave too few."""
    if data_steps is None:
        return steps
    last, jumped = min(steps, data_steps), 0
    for jump in sorted(jumps):
        jumped += jump.steps
        last = min(last, max(jump.at_step, data_steps - jumped))
    return last


def jump_back(jumps: Sequence[Jump], present: int, target: int, reason: str) -> tuple[Jump, ...]:
    """The jumps of a run that goes back from step `present` to `target`: from there on its data are those of
    `present`. Jumps after the target belong to steps that are undone."""
    kept = tuple(jump for jump in jumps if jump.at_step <= target)
    return (*kept, Jump(target, data_step(present, jumps) - data_step(target, kept), reason))


def jumps_of(folder: Path) -> tuple[Jump, ...]:
    """The jumps of a run folder: those of its jumps.json, else those that its newest checkpoint knows."""
    path, entries = folder / FILE, None
    try:
        if path.is_file():
            entries = [Jump(**entry) for entry in json.loads(path.read_text())]
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f'{path} cannot be read ({error}): expected [{{"at_step": ..., "steps": ..., "reason": ...}}], or no such '
            "file, which leaves the jumps to the newest checkpoint"
        ) from None
    if entries is None:
        checkpoints = complete_checkpoints(folder / "checkpoints")
        entries = [Jump(*entry) for entry in read_meta(checkpoints[-1]).get("jumps", [])] if checkpoints else []
    return tuple(entries)


def write_jumps(folder: Path, jumps: Sequence[Jump]) -> None:
    write_atomically(folder / FILE, json.dumps([jump._asdict() for jump in jumps], indent=1) + "\n")


def follow(batches: Callable[[int], Iterator[tuple[int, Any]]], wanted: Callable[[], int]) -> Iterator[Any]:
    """What `batches` (first data step -> (data step, its micro-batches)) gives for the data step that is wanted,
    endless; it seeks where that is not the next one."""
    while True:
        for number, micro_batches in batches(wanted()):
            yield micro_batches
            if wanted() != number + 1:
                break
