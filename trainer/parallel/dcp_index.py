"""The index file `.metadata` of torch's distributed checkpoint: which tensors there are, and where their chunks lie.

It is a pickle and may come from a stranger. It is read as records, and the index is built anew from them: of tensors
alone, each of them whole, in files of the folder that are long enough. So nothing is allocated on its word, and the
objects that torch would load by a pickle without restriction (BytesStorageMetadata) are refused.
"""

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import CheckpointError
from .records import Record, read_records

INDEX = ".metadata"
MOST_BYTES = 1 << 30  # about 7 million chunks
_WRAPPING_BYTES = 1 << 16  # of a chunk in its file, at most; today 1.5 KiB
_FILE = re.compile(r"__\d+_\d+\.distcp")
_DCP = "torch.distributed.checkpoint"
_KINDS = {
    *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *(f"{_DCP}.metadata.{name}StorageMetadata" for name in ("Chunk", "Tensor", "Bytes")),
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
}


class Chunk(NamedTuple):
    """Where a chunk lies: `length` bytes from `offset` of a file in the folder; and what it is."""

    file: str
    offset: int
    length: int
    size: tuple[int, ...]
    dtype: torch.dtype


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint; its storage_data are Chunks. Raises CheckpointError where there is none, or one that
    is damaged or that names anything but whole tensors in files of the folder."""
    path = folder / INDEX
    try:
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, more than {MOST_BYTES}")
        return _Index(path).build(read_records(path.read_bytes(), _is_known))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is no index of tensors: {error}") from None
    except Exception as error:  # records of other kinds, or in another form, than torch writes
        raise CheckpointError(f"{path} is no index of tensors: {type(error).__name__}: {error}") from None


def _is_known(kind: str) -> bool:
    return kind in _KINDS or _dtype(kind) is not None


def _dtype(kind: str) -> torch.dtype | None:
    module, _, name = kind.rpartition(".")
    found = getattr(torch, name, None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


class _Index:
    """From the records of an index to torch's Metadata."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes: dict[str, int] = {}  # of each file

    def build(self, root: Any) -> Metadata:
        said = self._fields(root, "metadata.Metadata")
        found: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
        for key, info in said["storage_data"].items():
            index = self._fields(key, "metadata.MetadataIndex")
            if index.get("offset") is not None:
                found[str(index["fqn"]), _size(index["offset"])] = self._fields(info, "filesystem._StorageInfo")
        index, where = Metadata({}, storage_data={}, storage_meta=StorageMeta()), dict[MetadataIndex, Chunk]()
        for name, entry in said["state_dict_metadata"].items():
            if not isinstance(entry, Record) or entry.kind != f"{_DCP}.metadata.TensorStorageMetadata":
                kind = entry.kind if isinstance(entry, Record) else type(entry).__name__
                self._refuse(f"{name!r} is a {kind.rpartition('.')[2]}, which would run code when it is loaded")
            tensor, chunks = self._tensor(name, entry)
            index.state_dict_metadata[name] = tensor
            for number, (offset, size) in enumerate(chunks):
                place = MetadataIndex(name, offset, number)
                where[place] = self._chunk(name, size, tensor.properties.dtype, found.get((name, offset)))
        index.storage_data = where
        return index

    def _tensor(
        self, name: str, entry: Record
    ) -> tuple[TensorStorageMetadata, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
        """The tensor, and offset and size of each of its chunks."""
        said = self._fields(entry, "metadata.TensorStorageMetadata")
        properties, size = said["properties"], _size(said["size"])
        dtype = _dtype(properties.state[0].kind)
        if dtype is None:
            self._refuse(f"{name!r} has no type of numbers")
        parts = [self._fields(chunk, "metadata.ChunkStorageMetadata") for chunk in said["chunks"]]
        chunks = [(_size(part["offsets"]), _size(part["sizes"])) for part in parts]
        if not _are_tiles(size, chunks):
            self._refuse(f"the chunks of {name!r} do not make up a tensor of shape {list(size)}")
        kept = [ChunkStorageMetadata(torch.Size(offset), torch.Size(part)) for offset, part in chunks]
        return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), kept), chunks

    def _chunk(self, name: str, size: tuple[int, ...], dtype: torch.dtype, info: Mapping[str, Any] | None) -> Chunk:
        if info is None:
            self._refuse(f"it does not say where {name!r} lies")
        file, offset, length = str(info["relative_path"]), int(info["offset"]), int(info["length"])
        if not _FILE.fullmatch(file):
            self._refuse(f"{name!r} lies in {file!r}, which is no file of a checkpoint")
        if file not in self._bytes:
            path = self._path.with_name(file)
            if path.is_symlink():
                raise CheckpointError(f"{path} is a link: copy the file itself there")
            self._bytes[file] = path.stat().st_size
        needed = math.prod(size) * dtype.itemsize
        if offset < 0 or not needed <= length <= needed + _WRAPPING_BYTES or offset + length > self._bytes[file]:
            self._refuse(
                f"{name!r} of {needed} bytes lies at bytes {offset} to {offset + length} of {file}, which has "
                f"{self._bytes[file]}"
            )
        if info.get("transform_descriptors"):
            self._refuse(f"{name!r} is compressed")
        return Chunk(file, offset, length, size, dtype)

    def _fields(self, record: Any, kind: str) -> Mapping[str, Any]:
        if not isinstance(record, Record) or record.kind != f"{_DCP}.{kind}":
            self._refuse(f"expected a {kind}, got {record.kind if isinstance(record, Record) else type(record)}")
        return record.state

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path} is no index of tensors: {reason[:300]}")


def _size(record: Any) -> tuple[int, ...]:
    """The numbers of a torch.Size."""
    if not isinstance(record, Record) or record.kind != "torch.Size":
        raise TypeError("expected a torch.Size")
    (numbers,) = record.args or ((),)
    if len(numbers) > 8 or not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise ValueError("no shape of a tensor")
    return tuple(numbers)


def _are_tiles(size: Sequence[int], chunks: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether chunks (offset, size) cover a tensor, each number once. They are cut along its first dimension alone."""
    if any(len(offset) != len(size) or len(part) != len(size) for offset, part in chunks):
        return False
    if not size:
        return len(chunks) == 1
    if 0 in size:
        return all(0 in part for _, part in chunks)
    row = 0
    for offset, part in sorted(chunks):
        if 0 in part:  # of a rank that has no rows
            continue
        if offset[0] != row or any(offset[1:]) or list(part[1:]) != list(size[1:]):
            return False
        row += part[0]
    return row == size[0]
