"""Readers: positions of the order -> micro-batches, with or without worker processes."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .batch import Batch, concatenate, split
from .buckets import CellOrder, Schedule
from .config import AutoencoderConfig, Cell, DataConfig, TextEncoderConfig
from .fetch import Raw, SampleFiles
from .images import SampleError, decode_image
from .index import ImageTextIndex
from .order import mix, position_keys, share_of, slots_of, uniforms
from .precomputed import PrecomputedDecoder
from .samples import captions_of, label_of, member
from .shard_index import ABSENT

_FILL_UP = -1  # position of a row that fills up the micro-batch of a short rank
_BLOCK = 1 << 20  # samples of a set that are looked at together
_VALIDATION_SEED = 0x5EED  # fixed: the validation bank must not change with the run's seed


def micro_batch_shape(global_batch_size: int, world: int, micro_batch_size: int) -> tuple[int, int]:
    """(micro-batches a step, rows a micro-batch), the same on every rank."""
    largest = -(-global_batch_size // world)
    count = -(-largest // micro_batch_size)
    return count, -(-largest // count)


def _step_shapes(
    cells: Mapping[Cell, int] | None, global_batch_size: int, world: int, micro_batch_size: int
) -> tuple[list[Cell | None], list[tuple[int, int]]]:
    """The cells (None in a run of one), and (micro-batches, rows of one) of a step of each."""
    shapes = [
        micro_batch_shape(global_batch_size, world, most) for most in (cells or {None: micro_batch_size}).values()
    ]
    return [None] if len(shapes) == 1 else [*(cells or ())], shapes


class _Decoder:
    """Raw samples at positions of the run -> a Batch; failures of samples become holes.

    dropout: of captions, or of labels where `classes` is given: the model's number of classes. Then a sample needs
    a label and no caption is read; else it needs a caption.
    """

    def __init__(
        self,
        index: ImageTextIndex,
        cfg: DataConfig,
        seed: int,
        flip: float,
        dropout: float,
        crop: bool,
        classes: int | None,
    ) -> None:
        self._index, self._cfg, self._seed = index, cfg, seed
        self._flip, self._dropout, self._crop, self._classes = flip, dropout, crop, classes
        self.files = SampleFiles(index, cfg, images_only=classes is not None)

    def batch(self, positions: Sequence[int], samples: Sequence[Raw | None], cell: Cell | None = None) -> Batch:
        """A row a position; None is a row without a sample. cell: None is the square of data.resolution."""
        size, rows = cell[:2] if cell else (self._cfg.resolution, self._cfg.resolution), len(positions)
        keys = position_keys(self._seed, np.array(positions, np.int64))
        flip = uniforms(keys, "flip") < self._flip
        dropped = uniforms(keys, "caption dropout" if self._classes is None else "label dropout") < self._dropout
        crop_x, crop_y = uniforms(keys, "crop x"), uniforms(keys, "crop y")
        choice = uniforms(keys, "caption choice")

        batch = Batch(
            images=torch.zeros(rows, 3, *size, dtype=torch.uint8),
            latents=None,
            captions=[""] * rows,
            full_captions=[""] * rows,
            text_states=None,
            text_mask=None,
            labels=torch.full((rows,), ABSENT),
            keys=torch.from_numpy(keys),
            weight=torch.zeros(rows),
            names=[""] * rows,
            holes=[],
            read=0,
            sizes=torch.zeros(rows, 2, dtype=torch.int32),
            cell=cell,
        )
        assert batch.images is not None
        assert batch.sizes is not None
        for i, sample in enumerate(samples):
            if sample is None:
                continue
            batch.read += 1
            batch.names[i] = f"{self._index.names[sample.shard]}/{self._index.key(sample.row)}"
            try:
                caption = ""
                if self._classes is None:
                    captions = captions_of(self._index, sample)
                    caption = captions.texts[captions.pick(float(choice[i]))]
                label = label_of(sample, self._classes)
                crop = (float(crop_x[i]), float(crop_y[i])) if self._crop else None
                data = member(sample, "image")
                pixels = decode_image(data, size, self._cfg.max_image_pixels, crop, bool(flip[i]))
            except SampleError as error:
                batch.holes.append(str(error))
                continue
            batch.images[i] = torch.from_numpy(pixels)
            batch.sizes[i, 0], batch.sizes[i, 1] = int(sample.row["height"]), int(sample.row["width"])
            batch.full_captions[i] = caption
            batch.captions[i] = "" if dropped[i] else caption
            batch.labels[i] = label if self._classes is None or not dropped[i] else self._classes
            batch.weight[i] = 1.0
        return batch


def _decoder(
    index: ImageTextIndex,
    cfg: DataConfig,
    seed: int,
    flip: float,
    dropout: float,
    crop: bool,
    classes: int | None,
    features: bool = False,
) -> _Decoder | PrecomputedDecoder:
    """What turns samples of this index into batches."""
    if index.dataset is not None:
        return PrecomputedDecoder(index, index.dataset, cfg, seed, flip, dropout, classes, features)
    return _Decoder(index, cfg, seed, flip, dropout, crop, classes)


class _Rows(IterableDataset[Batch]):
    """A rank's rows of each step from first_step on, those of this worker; endless.

    Worker w owns a contiguous part of the rows, so that a chunk is read by one process. rows: those of a rank, in a
    step of each cell.
    """

    def __init__(
        self,
        decoder: _Decoder | PrecomputedDecoder,
        order: CellOrder,
        cells: Sequence[Cell | None],
        rows: Sequence[int],
        global_batch_size: int,
        first_step: int,
        slots: range,
    ) -> None:
        self._decoder, self._order, self._cells, self._rows = decoder, order, cells, rows
        self._batch, self._first_step, self._slots = global_batch_size, first_step, slots

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        streams: dict[int, list[Iterator[Raw | None]]] = {}  # by cell, begun at the first step that reads it
        for step in itertools.count(self._first_step):
            at = self._order.at(step)
            rows = share_of(info.id if info else 0, info.num_workers if info else 1, self._rows[at.cell])
            slots = self._slots[rows.start : rows.stop]
            fill_up = len(rows) - len(slots)
            if at.cell not in streams:
                queues = self._order.queues(at, slots)
                streams[at.cell] = self._decoder.files.streams(queues, sets=len(self._order.cells))
            positions = [*(step * self._batch + slot for slot in slots), *[_FILL_UP] * fill_up]
            samples = [*(next(stream) for stream in streams[at.cell]), *[None] * fill_up]
            yield self._decoder.batch(positions, samples, self._cells[at.cell])


def _start_worker(_: int) -> None:
    """Make a reader process quiet: one thread, and stops only when the trainer says so.

    Its own process group keeps Ctrl-C and torchrun's signals to the trainer's group away: the trainer saves
    first and then ends its workers. A worker whose trainer was killed notices within seconds by itself.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()


def _same(batch: Any) -> Any:
    """Collate function: the dataset returns whole batches already."""
    return batch


class ImageTextReader:
    """One rank's training batches of images and captions, or class labels.

    index: of the shards. seed: of the run. caption_dropout: probability of the empty caption. classes: of a model
    that is conditioned on labels. The world size and num_workers change which process reads a sample, never what a
    position holds. cells: those of the steps, each with the most rows of a micro-batch; None: one, the square of
    cfg.resolution, with micro_batch_size. features: batches of precomputed shards have the images' features.
    Raises DataError where there are more ranks than samples in the global batch.
    """

    def __init__(
        self,
        index: ImageTextIndex,
        cfg: DataConfig,
        seed: int,
        global_batch_size: int,
        caption_dropout: float,
        rank: int,
        world: int,
        micro_batch_size: int,
        classes: int | None = None,
        cells: Mapping[Cell, int] | None = None,
        features: bool = False,
    ) -> None:
        self._batch, self._slots = global_batch_size, slots_of(rank, world, global_batch_size)
        self._cells, self._shapes = _step_shapes(cells, global_batch_size, world, micro_batch_size)
        known = [cell or Cell(cfg.resolution, cfg.resolution, 0) for cell in self._cells]
        self._order = CellOrder(seed, index, known, global_batch_size, cfg.epochs, cfg.characters_per_token)
        dropout = caption_dropout if classes is None else cfg.label_dropout
        self._decoder = _decoder(index, cfg, seed, cfg.flip, dropout, cfg.crop == "random", classes, features)
        self._workers = cfg.num_workers
        self.fingerprint = index.fingerprint

    def batches(self, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches of this rank) from first_step on, endless.

        Rows past the end of the data (data.epochs) have weight 0 and are no holes.
        """
        workers = self._workers
        loader = DataLoader(
            _Rows(
                self._decoder,
                self._order,
                self._cells,
                [count * rows for count, rows in self._shapes],
                self._batch,
                first_step,
                self._slots,
            ),
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,
            prefetch_factor=2 if workers else None,
            worker_init_fn=_start_worker if workers else None,
            # They share the index's open files. From Python 3.14 on the default is another.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # else the loader draws its seed from the trainer's generator
        )
        iterator = iter(loader)  # hands out the workers' rows in turn
        for step in itertools.count(first_step):
            batch = concatenate([next(iterator) for _ in range(max(1, workers))])
            batch = batch.pin_memory() if torch.cuda.is_available() else batch
            _, rows = self._shapes[self._order.at(step).cell]
            yield step, split(batch, rows)


def validation_batches(
    index: ImageTextIndex,
    cfg: DataConfig,
    count: int,
    rank: int,
    world: int,
    batch_rows: int,
    classes: int | None = None,
) -> Iterator[Batch]:
    """This rank's part of a fixed bank of `count` samples (all, where there are fewer) spread over the index.

    Centre crop, no flip, no dropout; a sample's key depends on its number in the bank alone. All ranks yield
    the same number of batches of batch_rows rows, filled up with weight 0.
    """
    bank = _bank(len(index), count)
    decoder = _decoder(index, cfg, _VALIDATION_SEED, flip=0.0, dropout=0.0, crop=False, classes=classes)
    numbers = [*share_of(rank, world, len(bank))]
    largest = -(-len(bank) // world)
    numbers += [_FILL_UP] * (-(-largest // batch_rows) * batch_rows - len(numbers))
    for i in range(0, len(numbers), batch_rows):
        rows = numbers[i : i + batch_rows]
        located = [index.locate(int(bank[number])) if number != _FILL_UP else None for number in rows]
        yield decoder.batch(rows, [decoder.files.sample(*place) if place else None for place in located])


def _bank(samples: int, count: int) -> np.ndarray:
    """int64: the `count` samples with the smallest hashes, in the order of these."""
    best, hashes = np.empty(0, np.int64), np.empty(0, np.uint64)
    for first in range(0, samples, _BLOCK):
        block = np.arange(first, min(first + _BLOCK, samples))
        best, hashes = np.concatenate([best, block]), np.concatenate([hashes, mix(_VALIDATION_SEED, block)])
        smallest = np.argsort(hashes, kind="stable")[:count]
        best, hashes = best[smallest], hashes[smallest]
    return best


class SyntheticReader:
    """Seeded latents and text states (or labels) of the configured shape, for runs without data.

    A row depends on its key and cell alone: latents ~ N(0, 1) [C, height / downsample, width / downsample], text states
    ~ N(0, 1) of a varying true length, and one fixed state of length 1 where the caption is dropped. With `classes`
    uniform labels take the place of text states. `cells` as of ImageTextReader; all of them are as frequent.
    """

    fingerprint = "synthetic"

    def __init__(
        self,
        cfg: DataConfig,
        text: TextEncoderConfig,
        autoencoder: AutoencoderConfig,
        seed: int,
        global_batch_size: int,
        rank: int,
        world: int,
        micro_batch_size: int,
        classes: int | None = None,
        cells: Mapping[Cell, int] | None = None,
    ) -> None:
        self._classes, self._label_dropout = classes, cfg.label_dropout
        self._base = Cell(cfg.resolution, cfg.resolution, text.max_length)
        self._channels, self._downsample = autoencoder.channels, autoencoder.downsample
        self._text, self._seed, self._batch = text, seed, global_batch_size
        self._slots = share_of(rank, world, global_batch_size)  # none on some ranks where a bank is small
        self._cells, self._shapes = _step_shapes(cells, global_batch_size, world, micro_batch_size)
        self._schedule = Schedule(seed, [Fraction(1)] * len(self._cells))

    def batches(self, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches of this rank) from first_step on, endless."""
        for step in itertools.count(first_step):
            cell = self._schedule.at(step).cell if len(self._cells) > 1 else 0
            count, rows = self._shapes[cell]
            positions = [step * self._batch + slot for slot in self._slots]
            positions += [-1] * (count * rows - len(positions))
            chunks = [positions[i * rows : (i + 1) * rows] for i in range(count)]
            yield step, [self._make(chunk, self._cells[cell]) for chunk in chunks]

    def _make(self, positions: list[int], cell: Cell | None) -> Batch:
        keys, rows = position_keys(self._seed, np.array(positions, np.int64)), len(positions)
        height, width, text_length = cell or self._base
        real = np.array(positions) >= 0
        shape = (self._channels, height // self._downsample, width // self._downsample)
        latents = torch.zeros(rows, *shape)
        for i in np.flatnonzero(real):
            latents[i] = torch.randn(shape, generator=torch.Generator().manual_seed(int(keys[i])))
        names = [f"synthetic/{p}" if p >= 0 else "" for p in positions]
        batch = Batch(
            images=None,
            latents=latents,
            captions=list(names),
            full_captions=names,
            text_states=None,
            text_mask=None,
            labels=torch.full((rows,), ABSENT),
            keys=torch.from_numpy(keys),
            weight=torch.from_numpy(real).float(),
            names=list(names),
            holes=[],
            read=int(real.sum()),
            sizes=torch.tensor([height, width], dtype=torch.int32).expand(rows, 2).clone(),
            cell=cell,
        )
        if self._classes is None:
            self._add_text(batch, keys, real, text_length)
        else:
            dropped = uniforms(keys, "label dropout") < self._label_dropout
            labels = (uniforms(keys, "label") * self._classes).astype(np.int64)
            labels = np.where(dropped, self._classes, labels)
            batch.labels = torch.from_numpy(np.where(real, labels, ABSENT))
        return batch

    def _add_text(self, batch: Batch, keys: np.ndarray, real: np.ndarray, most: int) -> None:
        """Text states, and empty captions where they are dropped."""
        dropped = uniforms(keys, "caption dropout") < self._text.dropout
        lengths = 1 + (uniforms(keys, "length") * most).astype(np.int64)
        lengths[dropped] = 1
        batch.text_states = torch.zeros(len(keys), most, self._text.width)
        batch.text_mask = torch.arange(most) < torch.from_numpy(lengths)[:, None]
        for i in np.flatnonzero(real):
            text_seed = 0 if dropped[i] else int(mix(int(keys[i]), 1).view(np.int64))
            generator = torch.Generator().manual_seed(text_seed)
            batch.text_states[i, : lengths[i]] = torch.randn(int(lengths[i]), self._text.width, generator=generator)
        batch.captions = ["" if d else name for d, name in zip(dropped, batch.captions, strict=True)]
