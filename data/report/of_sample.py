"""What has to be decoded to be known, of random samples: perceptual hashes, lengths of captions, holes, pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..config import DataConfig
from ..errors import SampleError
from ..images import load_rgb
from ..index import ImageTextIndex
from ..reader import start_worker
from ..samples import SampleFiles, captions_of
from .duplicates import HASH_SIDE, fingerprint

_TOGETHER = 64  # samples that a worker reads before it hands them over


class Pair(NamedTuple):
    """A sample to be looked at. more: captions that it has beside the first. label: ABSENT where it has none."""

    name: str
    image: Image.Image
    caption: str
    more: int
    label: int


@dataclass
class OfSample:
    """Of the samples that were decoded. rows: int64 [n], of the readable ones in the index; hashes: uint64 [n];
    colours: uint32 [n]; lengths and characters: int32 [m], of their captions, in tokens (or words) and characters.
    reasons: how often each made a hole; examples: for each a sample. of: how many were tried."""

    rows: np.ndarray
    hashes: np.ndarray
    colours: np.ndarray
    lengths: np.ndarray
    characters: np.ndarray
    reasons: Counter[str]
    examples: dict[str, str]
    of: int


class _Read(NamedTuple):
    row: int
    captions: list[str]
    hash: int = 0
    colour: int = 0
    hole: str = ""


class SampleReader:
    """Reads single samples of an index as a run would, but whole. classes: as of data.reader."""

    def __init__(self, index: ImageTextIndex, cfg: DataConfig, classes: int | None) -> None:
        self.index, self._cfg, self._classes = index, cfg, classes
        self._files = SampleFiles(index, cfg, images_only=classes is not None)

    def load(self, row: int, at_least: int) -> tuple[Image.Image, list[str], int]:
        """(image, captions, label) of a sample; at_least: pixels of its shorter side that are needed. SampleError."""
        sample = self._files.sample(*self.index.locate(row))
        captions = captions_of(self.index, sample).texts if self._classes is None else []
        label = sample.label(self._classes)
        return load_rgb(sample.member("image"), self._cfg.max_image_pixels, at_least), captions, label

    def pair(self, row: int, side: int) -> Pair:
        """A sample whose image has at most `side` pixels along its longer side. Raises SampleError."""
        image, captions, label = self.load(row, side)
        image.thumbnail((side, side), reducing_gap=2.0)
        name, first, more = self.index.name(*self.index.locate(row)), (captions or [""])[0], max(0, len(captions) - 1)
        return Pair(name, image, first, more, label)


class _Chunks(Dataset[list[_Read]]):
    """The samples at rows of the index, some at a time."""

    def __init__(self, reader: SampleReader, rows: np.ndarray) -> None:
        self._reader, self._rows = reader, rows

    def __len__(self) -> int:
        return -(-len(self._rows) // _TOGETHER)

    def __getitem__(self, chunk: int) -> list[_Read]:
        return [self._read(int(row)) for row in self._rows[chunk * _TOGETHER : (chunk + 1) * _TOGETHER]]

    def _read(self, row: int) -> _Read:
        try:
            image, captions, _ = self._reader.load(row, HASH_SIDE)
        except SampleError as error:
            return _Read(row, [], hole=str(error))
        return _Read(row, captions, *fingerprint(image))


def random_rows(index: ImageTextIndex, count: int, seed: int) -> np.ndarray:
    """int64: `count` rows of the index (all, where there are fewer), in a random order."""
    return np.random.default_rng(seed).choice(len(index), min(count, len(index)), replace=False)


def read_samples(
    reader: SampleReader, rows: np.ndarray, workers: int, lengths_of: Callable[[list[str]], Sequence[int]]
) -> OfSample:
    """Decode samples in worker processes (0: in this one). lengths_of: the length of each caption."""
    seen, hashes, colours, lengths, characters = (list[int]() for _ in range(5))
    reasons, examples = Counter[str](), dict[str, str]()
    for chunk in _chunks(reader, np.sort(rows), workers):  # in the order of the shards, as they are read fastest
        texts = [text for read in chunk for text in read.captions]
        lengths += lengths_of(texts) if texts else []
        characters += map(len, texts)
        for read in chunk:
            if read.hole:
                reasons[read.hole] += 1
                if read.hole not in examples:
                    examples[read.hole] = reader.index.name(*reader.index.locate(read.row))
                continue
            seen.append(read.row)
            hashes.append(read.hash)
            colours.append(read.colour)
    return OfSample(
        np.array(seen, np.int64), np.array(hashes, np.uint64), np.array(colours, np.uint32),
        np.array(lengths, np.int32), np.array(characters, np.int32), reasons, examples, len(rows),
    )  # fmt: skip


def _chunks(reader: SampleReader, rows: np.ndarray, workers: int) -> Iterator[list[_Read]]:
    yield from DataLoader(
        _Chunks(reader, rows),
        batch_size=None,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=start_worker if workers else None,
        multiprocessing_context="fork" if workers else None,  # as of data.reader
    )
