"""The files of a checkpoint: their checksums, and which checkpoints a run folder keeps."""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.files import file_digest

from ..errors import CheckpointError

META = "meta.json"
_READ = (".distcp", ".metadata", ".pt")  # how the names of files end that an engine reads
_THREADS = 8  # that compute checksums: files of a network file system come faster side by side
_WRITER = re.compile(r"(?:__|rank_)(\d+)_")  # in names such as "__3_0.distcp": the rank that wrote the file


def digest_files(folder: Path, rank: int = 0, size: int = 1) -> dict[str, dict[str, Any]]:
    """{path inside folder: {"bytes", "sha256"}} of the files that fall to `rank` of `size`: those that it wrote."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: _digest(paths[name]) for name in sorted(paths) if _rank_of(name, size) == rank}


def bytes_of(folder: Path) -> int:
    """What the files of a checkpoint take on the disk."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def verify_files(folder: Path, files: Mapping[str, Mapping[str, Any]], rank: int = 0, size: int = 1) -> None:
    """Compare the files that fall to `rank` with what digest_files said of them.

    Raises CheckpointError that names the first damaged one, or one that an engine would read though it is not among
    them. Sizes first: a cut file is found without reading all.
    """
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(_READ)}
    if rank == 0 and (unlisted := sorted(found - files.keys())):
        raise CheckpointError(f"{folder / unlisted[0]} is not among the files that {META} lists: remove it")
    mine = sorted(name for name in files if _rank_of(name, size) == rank)
    for name in mine:
        path, expected = folder / name, files[name]["bytes"]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{path} is a link out of the checkpoint: copy the file itself there")
        if (found_size := path.stat().st_size) != expected:
            raise CheckpointError(f"{path} is damaged: {found_size} bytes, {expected} were written")
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        for name, error in zip(mine, threads.map(lambda name: _damage(folder / name, files[name]), mine), strict=True):
            if error is not None:
                raise CheckpointError(f"{folder / name} {error}")


def _damage(path: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        found = _digest(path)["sha256"]
    except OSError as error:
        return f"cannot be read: {error}"
    return None if found == expected["sha256"] else f"is damaged: its SHA-256 is {found}, not that in {META}"


def superseded(steps: Sequence[int], keep_last: int, keep_every: int, healthy_before: int | None = None) -> list[int]:
    """Which of the ascending `steps` to clear: not the newest keep_last, not multiples of keep_every (0: no such).

    healthy_before: checkpoints from this step on may hold weights with which no step can be taken; so the newest
    keep_last - 1 of the others stay as well, and at least one. None: all are healthy.
    """
    healthy = [step for step in steps if healthy_before is None or step < healthy_before]
    kept = {*steps[-keep_last:], *healthy[-max(1, keep_last - 1) :]}
    return [step for step in steps if step not in kept and (keep_every == 0 or step % keep_every)]


def _rank_of(name: str, size: int) -> int:
    """Who reads a file: whose page cache is likely to hold it, as its name tells, else rank 0."""
    writer = _WRITER.search(name)
    return int(writer[1]) % size if writer else 0


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}
