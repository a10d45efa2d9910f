"""The segments of a JPEG and the chunks of a PNG, counted before anything decodes them. Written for hostile files.

PIL walks over them in Python, and libjpeg decodes the whole image once per scan: a file of a few hundred kB may hold
scans for minutes. What libwebp does is bounded by the size of the image alone.
"""

from __future__ import annotations

import re
import zlib

import numpy as np

from .errors import SampleError

_MOST_SEGMENTS = 4096  # before the pixels; one holds 64 kB at most, so that this allows 256 MB of profiles and previews
_MOST_EXIF = 64  # places that may be EXIF, whose checksum is computed
_MOST_CHUNKS = 65536  # encoders write the pixels of a PNG in chunks of 8 kB or more
# A marker of a JPEG: not the zero that follows a 0xff among the pixels, nor one that restarts them.
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN, _TEMPORARY = 0xD8, 0xD9, 0xDA, 0x01


def check_parts(data: bytes) -> None:
    """Raise SampleError where an image file has more parts than encoders write. data: the file, or its beginning."""
    if data[:2] == b"\xff\xd8":
        _count_scans(data, at_most=1)
    elif data[:4] == b"\x89PNG":
        at = 8
        for _ in range(_MOST_CHUNKS):
            if at >= len(data):
                return
            at += 12 + int.from_bytes(data[at : at + 4], "big")  # length, name and checksum
        raise SampleError("image: too many parts")


def exif_at_end(data: bytes) -> bytes:
    """The EXIF in the last bytes of a PNG; b"" where they hold none. PNG allows it behind the pixels, where PIL finds
    it by decoding them all."""
    at = len(data)
    for _ in range(_MOST_EXIF):
        if (at := data.rfind(b"eXIf", 4, at)) < 0:
            break
        end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
        if end + 4 <= len(data) and zlib.crc32(data[at:end]) == int.from_bytes(data[end : end + 4], "big"):
            return data[at + 4 : end]
    return b""


def has_more_scans(data: bytes, than: int) -> bool:
    """Whether a JPEG has more than so many scans, each of which libjpeg decodes for all pixels."""
    if _count_scans(data, at_most=2) < 2:  # so it is with nearly all files, and their pixels need not be searched
        return False
    # These two bytes occur among pixels only as the start of a scan, but by chance in an appended film or depth map.
    # By numpy, because bytes.count takes a third of the time in which the image is decoded.
    values = np.frombuffer(data, np.uint8)
    after = np.flatnonzero(values[:-1] == 0xFF) + 1
    return int(np.count_nonzero(values[after] == _START_OF_SCAN)) > than and _count_scans(data, than + 1) > than


def _count_scans(data: bytes, at_most: int) -> int:
    at, scans, segments, components = 2, 0, 0, b""
    while scans < at_most and (match := _MARKER.search(data, at)):
        kind, at = match[1][0], match.end()
        if kind == _END_OF_IMAGE:
            break
        if kind in (_START_OF_IMAGE, _TEMPORARY):
            continue
        if kind in _SEQUENTIAL_FRAMES:
            components = data[at + 7 : at + 8]
        if kind == _START_OF_SCAN:
            scans += 1
            if components and data[at + 2 : at + 3] == components:
                break  # it has all pixels: libjpeg reads no further
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
        if (segments := segments + 1) > _MOST_SEGMENTS:
            raise SampleError("image: too many parts")
    return scans
