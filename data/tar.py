"""The members of a tar file by its headers alone: their names, offsets and sizes. Written for hostile files.

Every step goes forward in the file and every allocation is bounded, so no content makes it hang or fill memory;
Python's tarfile, on which webdataset builds, trusts the sizes in extended headers. POSIX 1003.1 (ustar, pax) and GNU's
long names are understood.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
_MAX_EXTENSION = 1 << 20  # the most bytes of a long name, or of the pax records of a member
_MAX_OFFSET = 1 << 62
_MAX_PADDING, _PIECE = 1 << 20, 1 << 16  # bytes behind the end mark that are looked at, and so many at once
_REGULAR = (b"0", b"\0", b"7")
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: no bytes follow, whatever the size
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class TarError(ValueError):
    """The file is no tar, or is damaged from some byte on."""


class Bytes(Protocol):
    """Something that can be read at an offset."""

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes at an offset; fewer only at the end of the file."""
        ...


class Member(NamedTuple):
    """A regular file in a tar: bytes offset ... offset + size."""

    name: str
    offset: int
    size: int


def members(file: Bytes) -> Iterator[Member]:
    """The regular files of a tar, in order. Links, devices, folders and sparse files are left out.

    An empty file has none. Raises TarError where a header is damaged, the file ends without an end mark or another tar
    follows it, after it has yielded what came before.
    """
    offset, extended, name = 0, dict[bytes, bytes](), None
    while True:
        header = file.read_at(offset, BLOCK)
        if not header and not offset:
            return
        if len(header) < BLOCK:
            raise TarError("no end mark" if offset and not header else "a header is cut off")
        if not header.strip(b"\0"):
            if (another := _header_after(file, offset)) is not None:
                raise TarError(f"another tar begins behind its end, at byte {another}: join tars by tar -A, not by cat")
            return
        if not _is_header(header):
            raise TarError(f"no header at byte {offset}")
        kind, size, data = header[156:157], _number(header[124:136]), offset + BLOCK
        # Pax records and the long name of the next member; global records and long links, which are skipped.
        if kind in (b"x", b"L", b"g", b"K"):
            if size > _MAX_EXTENSION:
                raise TarError(f"an extended header of {size} bytes at byte {offset}")
            if kind == b"x":
                extended = _pax(file.read_at(data, size))
            elif kind == b"L":
                name = _text(file.read_at(data, size))
        else:
            if (claimed := extended.get(b"size", b"").decode("ascii", "replace")).isdecimal() and len(claimed) < 19:
                size = int(claimed)
            if kind in _NO_DATA:
                size = 0
            path = _text(extended[b"path"]) if b"path" in extended else name or _name(header)
            sparse = any(record.startswith(b"GNU.sparse.") for record in extended)
            if kind in _REGULAR and not sparse and not (kind == b"\0" and path.endswith("/")):
                yield Member(path, data, size)
            extended, name = {}, None
        offset = data + -(-size // BLOCK) * BLOCK
        if offset > _MAX_OFFSET:
            raise TarError(f"a member of {size} bytes at byte {data}")


def _is_header(block: bytes) -> bool:
    """Whether a block has the checksum of a header; TarError where it is no number."""
    return _number(block[148:156]) == sum(block) - sum(block[148:156]) + 8 * 0x20


def _header_after(file: Bytes, offset: int) -> int | None:
    """Where a header follows the end mark at an offset, behind zeros alone, as where tars were joined by `cat`."""
    for start in range(offset, offset + _MAX_PADDING, _PIECE):
        data = file.read_at(start, _PIECE)
        zeros = (len(data) - len(data.lstrip(b"\0"))) // BLOCK * BLOCK
        if zeros < len(data):
            with contextlib.suppress(TarError):
                return start + zeros if _is_header(data[zeros : zeros + BLOCK]) else None
        if zeros < _PIECE:
            return None
    return None


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    """The name in a ustar header, with its prefix."""
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _number(field: bytes) -> int:
    """A size or checksum: octal digits, or a big-endian number after a byte 0x80 (GNU)."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not re.fullmatch(rb"[0-7]*", digits):
        raise TarError(f"{field!r} is no number")
    return int(digits or b"0", 8)


def _pax(data: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH key=value\\n" of an extended header, up to the first one that is damaged."""
    records, start = {}, 0
    while match := _PAX_RECORD.match(data, start):
        end = start + int(match[1])
        if end <= match.end() or data[end - 1 : end] != b"\n":
            break
        records[match[2]] = data[match.end() : end - 1]
        start = end
    return records
