"""The tensors in the files of torch's distributed checkpoint, each as torch.save writes it, read without torch.load.

torch.save writes a zip file with the numbers and a pickle that says how they make up a tensor. The pickle is read as
records. The zip file may come from a stranger, so no more is read of it than the tensor's own bytes: torch.load, even
with weights_only, would unpack whatever else it claims to hold.
"""

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Sequence
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .dcp_index import Chunk
from .records import Record, read_records

_REBUILD = "torch._utils._rebuild_tensor_v2"
_MOST_BYTES = 1 << 14  # of the pickle, and of each other small member
_HEADER = struct.Struct("<26xHH")  # of a member: the lengths of its name and of the extra field, which follow


def read_chunk(file: IO[bytes], chunk: Chunk) -> Tensor:
    """The tensor that lies at a chunk's place in an open file, on the CPU. Raises CheckpointError where it is damaged,
    or has not the shape and the type that the index gives."""
    try:
        return _read(_Window(file, chunk.offset, chunk.length), chunk)
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = error
    except (zipfile.BadZipFile, pickle.UnpicklingError, struct.error, NotImplementedError) as error:
        reason = error
    raise CheckpointError(
        f"{file.name} holds no tensor of shape {list(chunk.size)} at byte {chunk.offset}: {str(reason)[:200]}"
    )


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, (0, self._at, self._length)[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue] (of a file opened as "rb")
        self._at += count
        return count


def _read(window: _Window, chunk: Chunk) -> Tensor:
    with zipfile.ZipFile(window) as archive:  # pyright: ignore[reportArgumentType] (it reads, seeks and tells)
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise ValueError("it is compressed")
        small = [members[name] for name in ("data.pkl", "byteorder") if name in members]
        if any(info.file_size > _MOST_BYTES for info in small):
            raise ValueError("it says too much about itself")
        said = [archive.read(info) for info in small]
    if said[1:] not in ([], [sys.byteorder.encode()]):
        raise ValueError("its bytes are in the order of another kind of machine")
    root = read_records(said[0], lambda kind: kind in (_REBUILD, "collections.OrderedDict") or kind.endswith("Storage"))
    if not isinstance(root, Record) or root.kind != _REBUILD:
        raise ValueError("it is no tensor")
    storage, start, size, strides = root.args[:4]
    numbers = members[f"data/{storage[2]}"]
    count = numbers.file_size // chunk.dtype.itemsize
    if tuple(size) != chunk.size or len(strides) != len(size) or not _fits(start, size, strides, count):
        raise ValueError(f"it has the shape {size}")
    window.seek(numbers.header_offset)
    window.seek(sum(_HEADER.unpack(window.read(_HEADER.size))), io.SEEK_CUR)
    if numbers.file_size > chunk.length:
        raise ValueError("it claims more bytes than there are")
    flat = torch.empty(count, dtype=chunk.dtype)
    if count and window.readinto(flat.view(torch.uint8).numpy()) != flat.nbytes:
        raise ValueError("it is cut off")
    return flat.as_strided(size, strides, start)


def _fits(start: int, size: Sequence[int], strides: Sequence[int], count: int) -> bool:
    """Whether a strided tensor lies within `count` numbers."""
    numbers = (start, *size, *strides)
    if not all(type(number) is int and number >= 0 for number in numbers):
        return False
    last = start + sum((length - 1) * stride for length, stride in zip(size, strides, strict=True))
    return 0 in size or last < count
