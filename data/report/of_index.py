"""What the index says of all samples: sizes, shapes, buckets and lengths of captions. Nothing is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..buckets import assign, merged
from ..config import Bucket
from ..index import ImageTextIndex
from .counts import Bins, Counts

_ROWS = 1 << 16  # that are read together
_LARGEST_SIDE, _LONGEST_CAPTION = 1 << 16, 100_000
_OCTAVES, _BINS_PER_OCTAVE = 3, 6  # of width / height, on either side of the square


class Taken:
    """What a bucket takes of the images of known size. upscaled: images that are enlarged. cut: the sum of the shares
    of their areas that are cropped away."""

    def __init__(self) -> None:
        self.samples = self.upscaled = 0
        self.cut = 0.0


@dataclass
class OfIndex:
    """Of all samples of an index. sides: shorter sides in pixels. characters: of the longest caption of each sample
    that has one. pixels and bytes: of all images. buckets: of a config, those that take samples. joined: how many of
    its buckets have fewer samples than a batch, and join another."""

    samples: int
    shards: int
    sides: Counts = field(default_factory=lambda: Counts(_LARGEST_SIDE))
    characters: Counts = field(default_factory=lambda: Counts(_LONGEST_CAPTION))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(2 * _OCTAVES * _BINS_PER_OCTAVE + 1, np.int64))
    unknown_size: int = 0
    labelled: int = 0
    pixels: int = 0
    bytes: int = 0
    buckets: dict[Bucket, Taken] = field(default_factory=dict)
    joined: int = 0

    def aspect_bins(self) -> Bins:
        """Of width / height; the square has the bin in the middle, the outermost ones hold what lies beyond."""
        steps = np.arange(len(self.aspects) + 1) - len(self.aspects) / 2
        return Bins(2.0 ** (steps / _BINS_PER_OCTAVE), self.aspects, True)


def read_index(
    index: ImageTextIndex, buckets: Sequence[Bucket], characters_per_token: float, global_batch_size: int
) -> OfIndex:
    """Read all rows of an index, some at a time. buckets: of a config; none where there is no config."""

    def chosen(rows: np.ndarray) -> np.ndarray:
        return assign(rows["width"], rows["height"], rows["caption_length"], buckets, characters_per_token)

    found, taken, joins = OfIndex(len(index), len(index.paths)), [Taken() for _ in buckets], np.empty(0, np.int64)
    if buckets:
        counts = sum(np.bincount(chosen(rows), minlength=len(buckets)) for rows in _blocks(index))
        joins = np.array(merged(np.asarray(counts).tolist(), buckets, global_batch_size))
        found.joined = int((joins != np.arange(len(buckets))).sum())
    for rows in _blocks(index):
        width, height, characters = rows["width"], rows["height"], rows["caption_length"]
        known = (width > 0) & (height > 0)
        found.unknown_size += int((~known).sum())
        found.labelled += int((rows["label"] >= 0).sum())
        found.bytes += int(rows["image_size"].sum(dtype=np.int64))
        found.characters.add(characters[characters > 0])
        if buckets:
            _take(taken, buckets, joins[chosen(rows)][known], width[known], height[known])
        width, height = width[known].astype(np.int64), height[known].astype(np.int64)
        found.pixels += int((width * height).sum())
        found.sides.add(np.minimum(width, height))
        middle = len(found.aspects) // 2
        step = np.round(np.log2(width / height) * _BINS_PER_OCTAVE).astype(np.int64)
        found.aspects += np.bincount(np.clip(step, -middle, middle) + middle, minlength=len(found.aspects))
    found.buckets = {bucket: one for bucket, one in zip(buckets, taken, strict=True) if one.samples}
    return found


def _blocks(index: ImageTextIndex) -> Iterator[np.ndarray]:
    """Some neighbouring rows of the index at a time."""
    for shard, size in enumerate(index.shard_sizes):
        for first in range(0, size, _ROWS):
            yield index.rows(shard, np.arange(first, min(first + _ROWS, size)))


def _take(
    taken: Sequence[Taken], buckets: Sequence[Bucket], chosen: np.ndarray, width: np.ndarray, height: np.ndarray
) -> None:
    """chosen: the place of each image's bucket; width, height: of the image in pixels; all [n]."""
    size = np.array([bucket[:2] for bucket in buckets], np.float64)[chosen]  # [n, 2]: height, width
    scale = np.maximum(size[:, 0] / height, size[:, 1] / width)
    kept = size.prod(axis=1) / (scale**2 * width * height)
    for number, one in enumerate(taken):
        mine = chosen == number
        one.samples += int(mine.sum())
        one.upscaled += int((scale[mine] > 1).sum())
        one.cut += float((1 - kept[mine]).sum())
