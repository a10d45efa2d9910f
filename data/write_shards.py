"""Write samples as WebDataset shards with their indexes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from webdataset.writer import TarWriter

from .errors import DataError
from .shard_index import index_path, load_index

# Key, image file, its extension, caption, and where there is one the class label.
Sample = tuple[str, bytes, str, str] | tuple[str, bytes, str, str, int]


def write_shards(samples: Iterable[Sample], prefix: Path, per_shard: int) -> list[Path]:
    """Write samples to PREFIX-000000.tar ... and index each shard.

    The same samples give the same bytes. Shards carry temporary names until all are complete, so a failure,
    also one of the iterable, leaves nothing. Returns the paths. Raises DataError where the folder already
    holds shards of this prefix (a shorter set would mix with the rest of the older one).
    """
    if per_shard < 1:
        raise DataError(f"--per-shard must be at least 1, got {per_shard}")
    existing = sorted(prefix.parent.glob(f"{prefix.name}-*.tar")) if prefix.parent.is_dir() else []
    if existing:
        raise DataError(f"{existing[0]} exists: remove the older shards or choose another output prefix")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{prefix.parent} cannot be made ({error}): choose another output prefix") from error

    written: list[tuple[Path, Path]] = []
    iterator = iter(samples)
    try:
        for number in itertools.count():
            first = next(iterator, None)
            if first is None:
                break
            path = prefix.with_name(f"{prefix.name}-{number:06d}.tar")
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            written.append((temporary, path))
            with (
                open(temporary, "wb") as file,
                TarWriter(file, user="mudit", group="mudit", mode=0o644, mtime=0) as tar,
            ):
                for sample in itertools.chain([first], itertools.islice(iterator, per_shard - 1)):
                    key, image, extension, caption, *label = sample
                    members = {"cls": str(label[0])} if label else {}
                    tar.write({"__key__": key, extension: image, "txt": caption, **members})
        for temporary, path in written:
            index_path(path).unlink(missing_ok=True)
            os.replace(temporary, path)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
    paths = [path for _, path in written]
    for path in paths:
        load_index(path)
    return paths
