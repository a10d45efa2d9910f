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


class BucketRow:
    """What becomes of the samples of a bucket. upscaled: images that are enlarged. cut: the sum of the shares of their
    areas that are cropped away. joins: the bucket that they join, where they are fewer than a batch."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.joins = bucket, bucket
        self.samples = self.upscaled = 0
        self.cut = 0.0


@dataclass
class OfIndex:
    """Of all samples of an index. sides: shorter sides in pixels. characters: of the longest caption of each sample
    that has one. pixels and bytes: of all images. buckets: of a config, without those that are empty."""

    samples: int
    shards: int
    sides: Counts = field(default_factory=lambda: Counts(_LARGEST_SIDE))
    characters: Counts = field(default_factory=lambda: Counts(_LONGEST_CAPTION))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(2 * _OCTAVES * _BINS_PER_OCTAVE + 1, np.int64))
    unknown_size: int = 0
    labelled: int = 0
    pixels: int = 0
    bytes: int = 0
    buckets: list[BucketRow] = field(default_factory=list)

    def aspect_bins(self) -> Bins:
        """Of width / height; the square has the bin in the middle, the outermost ones hold what lies beyond."""
        steps = np.arange(len(self.aspects) + 1) - len(self.aspects) / 2
        return Bins(2.0 ** (steps / _BINS_PER_OCTAVE), self.aspects, True)


def read_index(
    index: ImageTextIndex, buckets: Sequence[Bucket], characters_per_token: float, global_batch_size: int
) -> OfIndex:
    """Read all rows of an index, some at a time. buckets: of a config; none where there is no config."""
    found = OfIndex(len(index), len(index.paths), buckets=[BucketRow(bucket) for bucket in buckets])
    for rows in _blocks(index):
        width, height, characters = rows["width"], rows["height"], rows["caption_length"]
        known = (width > 0) & (height > 0)
        found.unknown_size += int((~known).sum())
        found.labelled += int((rows["label"] >= 0).sum())
        found.bytes += int(rows["image_size"].sum(dtype=np.int64))
        found.characters.add(characters[characters > 0])
        if buckets:
            chosen = assign(width, height, characters, buckets, characters_per_token)
            _add_to_buckets(found.buckets, chosen[known], width[known], height[known])
        width, height = width[known].astype(np.int64), height[known].astype(np.int64)
        found.pixels += int((width * height).sum())
        found.sides.add(np.minimum(width, height))
        middle = len(found.aspects) // 2
        step = np.round(np.log2(width / height) * _BINS_PER_OCTAVE).astype(np.int64)
        found.aspects += np.bincount(np.clip(step, -middle, middle) + middle, minlength=len(found.aspects))
    joins = merged([row.samples for row in found.buckets], buckets, global_batch_size)
    for row, into in zip(found.buckets, joins, strict=True):
        row.joins = buckets[into]
    found.buckets = [row for row in found.buckets if row.samples]
    return found


def _blocks(index: ImageTextIndex) -> Iterator[np.ndarray]:
    """Some neighbouring rows of the index at a time."""
    for shard, size in enumerate(index.shard_sizes):
        for first in range(0, size, _ROWS):
            yield index.rows(shard, np.arange(first, min(first + _ROWS, size)))


def _add_to_buckets(rows: Sequence[BucketRow], chosen: np.ndarray, width: np.ndarray, height: np.ndarray) -> None:
    """chosen: the place of each image's bucket in `rows`; width, height: of the image in pixels; all [n]."""
    size = np.array([row.bucket[:2] for row in rows], np.float64)[chosen]  # [n, 2]
    scale = np.maximum(size[:, 0] / height, size[:, 1] / width)
    kept = (size[:, 0] * size[:, 1]) / (scale**2 * width * height)
    counts = np.bincount(chosen, minlength=len(rows))
    upscaled = np.bincount(chosen, scale > 1, minlength=len(rows))
    cut = np.bincount(chosen, 1 - kept, minlength=len(rows))
    for row, *numbers in zip(rows, counts, upscaled, cut, strict=True):
        row.samples, row.upscaled, row.cut = (
            row.samples + int(numbers[0]),
            row.upscaled + int(numbers[1]),
            row.cut + float(numbers[2]),
        )
