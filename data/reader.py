"""Readers: positions of the order -> micro-batches, with or without worker processes."""

from __future__ import annotations

import os
import signal
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .batch import Batch
from .config import AutoencoderConfig, DataConfig, TextEncoderConfig
from .images import SampleError, decode_image
from .index import ABSENT, UNREADABLE, ImageTextIndex, caption_from_bytes, read_member
from .order import END_OF_DATA, Order, Position, mix, position_keys, share_of, slots_of, uniforms

_FILL_UP = Position(step=-1, slot=-1, position=-1, shard=END_OF_DATA, sample=END_OF_DATA)
_MAX_OPEN_FILES = 128  # far below the usual limit of 1024 descriptors a process
_VALIDATION_SEED = 0x5EED  # fixed: the validation bank must not change with the run's seed


def micro_batch_shape(global_batch_size: int, world: int, micro_batch_size: int) -> tuple[int, int]:
    """(micro-batches a step, rows a micro-batch), the same on every rank."""
    largest = -(-global_batch_size // world)
    count = -(-largest // micro_batch_size)
    return count, -(-largest // count)


def _micro_batches(order: Order, first_step: int, slots: range, count: int, rows: int) -> Iterator[list[Position]]:
    """Positions of one micro-batch after the other, `count` a step, filled up to `rows`."""
    for _, positions in order.steps(first_step, slots):
        positions += [_FILL_UP] * (count * rows - len(positions))
        for i in range(count):
            yield positions[i * rows : (i + 1) * rows]


class _Files:
    """Open shards of this process, least recently used closed first."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a member; SampleError where shard or bytes are gone."""
        if shard not in self._open:
            try:
                self._open[shard] = os.open(self._paths[shard], os.O_RDONLY)
            except OSError as error:
                raise SampleError("shard: cannot be opened") from error
            if len(self._open) > _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return read_member(self._open[shard], offset, size)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class _ImageTextSamples(Dataset[Batch]):
    """Map from a list of positions to a Batch; failures of samples become holes.

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
        self._files = _Files(index.paths)

    def __getitem__(self, positions: list[Position]) -> Batch:
        size, rows = self._cfg.resolution, len(positions)
        keys = position_keys(self._seed, np.array([p.position for p in positions], np.int64))
        flip = uniforms(keys, "flip") < self._flip
        dropped = uniforms(keys, "caption dropout" if self._classes is None else "label dropout") < self._dropout
        crop_x, crop_y = uniforms(keys, "crop x"), uniforms(keys, "crop y")

        batch = Batch(
            images=torch.zeros(rows, 3, size, size, dtype=torch.uint8),
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
        )
        assert batch.images is not None
        for i, position in enumerate(positions):
            if position.shard == END_OF_DATA:
                continue
            batch.read += 1
            batch.names[i] = self._index.name(position.shard, position.sample)
            try:
                row = self._index.row(position.shard, position.sample)
                caption = self._caption(position.shard, row) if self._classes is None else ""
                label = self._label(row)
                crop = (float(crop_x[i]), float(crop_y[i])) if self._crop else None
                pixels = self._pixels(position.shard, row, crop, bool(flip[i]))
            except SampleError as error:
                batch.holes.append(str(error))
                continue
            batch.images[i] = torch.from_numpy(pixels)
            batch.full_captions[i] = caption
            batch.captions[i] = "" if dropped[i] else caption
            batch.labels[i] = label if self._classes is None or not dropped[i] else self._classes
            batch.weight[i] = 1.0
        return batch

    def _caption(self, shard: int, row: int) -> str:
        index = self._index
        if index.caption_offset[row] == ABSENT:
            raise SampleError("caption: missing")
        data = self._files.read(shard, int(index.caption_offset[row]), int(index.caption_size[row]))
        return caption_from_bytes(data, bool(index.caption_is_json[row]))

    def _label(self, row: int) -> int:
        label = int(self._index.label[row])
        if self._classes is None:
            return max(label, ABSENT)
        if label == ABSENT:
            raise SampleError("label: missing")
        if label == UNREADABLE:
            raise SampleError("label: not a number")
        if label >= self._classes:
            raise SampleError(f"label: not below model.num_classes {self._classes}")
        return label

    def _pixels(self, shard: int, row: int, crop: tuple[float, float] | None, flip: bool) -> np.ndarray:
        index, cfg = self._index, self._cfg
        if index.image_offset[row] == ABSENT:
            raise SampleError("image: missing")
        data = self._files.read(shard, int(index.image_offset[row]), int(index.image_size[row]))
        return decode_image(data, cfg.resolution, cfg.max_image_pixels, crop, flip)


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
    position holds.
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
    ) -> None:
        self._slots = slots_of(rank, world, global_batch_size)
        self._order = Order(seed, index.shard_sizes, global_batch_size, cfg.epochs)
        dropout = caption_dropout if classes is None else cfg.label_dropout
        self._samples = _ImageTextSamples(index, cfg, seed, cfg.flip, dropout, crop=True, classes=classes)
        self._workers = cfg.num_workers
        self.micro_batches, self.rows = micro_batch_shape(global_batch_size, world, micro_batch_size)
        self.fingerprint = index.fingerprint

    def batches(self, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches of this rank) from first_step on, endless.

        Rows past the end of the data (data.epochs) have weight 0 and are no holes.
        """
        workers = self._workers
        loader = DataLoader(
            self._samples,
            sampler=_PositionSampler(self._order, first_step, self._slots, self.micro_batches, self.rows),
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,
            prefetch_factor=2 if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker if workers else None,
            generator=torch.Generator(),  # else the loader draws its seed from the trainer's generator
        )
        iterator = iter(loader)
        step = first_step
        while True:
            yield step, [next(iterator) for _ in range(self.micro_batches)]
            step += 1


class _PositionSampler:
    """Sampler whose elements are whole micro-batches of positions."""

    def __init__(self, order: Order, first_step: int, slots: range, count: int, rows: int) -> None:
        self._arguments = (order, first_step, slots, count, rows)

    def __iter__(self) -> Iterator[list[Position]]:
        return _micro_batches(*self._arguments)


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
    hashes = mix(_VALIDATION_SEED, np.arange(len(index)))
    bank = np.argsort(hashes, kind="stable")[:count]
    samples = _ImageTextSamples(index, cfg, _VALIDATION_SEED, flip=0.0, dropout=0.0, crop=False, classes=classes)
    positions = [
        Position(0, number, number, *index.locate(int(bank[number]))) for number in share_of(rank, world, len(bank))
    ]
    largest = -(-len(bank) // world)
    batches = -(-largest // batch_rows)
    positions += [_FILL_UP] * (batches * batch_rows - len(positions))
    for i in range(batches):
        yield samples[positions[i * batch_rows : (i + 1) * batch_rows]]


class SyntheticReader:
    """Seeded latents and text states (or labels) of the configured shape, for runs without data.

    A row depends on its key alone: latents ~ N(0, 1) [C, R / downsample, R / downsample], text states
    ~ N(0, 1) of a varying true length, and one fixed state of length 1 where the caption is dropped. With `classes`
    uniform labels take the place of text states.
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
    ) -> None:
        self._classes, self._label_dropout = classes, cfg.label_dropout
        side = cfg.resolution // autoencoder.downsample
        self._latent_shape = (autoencoder.channels, side, side)
        self._text, self._seed, self._batch = text, seed, global_batch_size
        self._slots = slots_of(rank, world, global_batch_size)
        self.micro_batches, self.rows = micro_batch_shape(global_batch_size, world, micro_batch_size)

    def batches(self, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches of this rank) from first_step on, endless."""
        step = first_step
        while True:
            positions = [step * self._batch + slot for slot in self._slots]
            positions += [-1] * (self.micro_batches * self.rows - len(positions))
            chunks = [positions[i * self.rows : (i + 1) * self.rows] for i in range(self.micro_batches)]
            yield step, [self._make(chunk) for chunk in chunks]
            step += 1

    def _make(self, positions: list[int]) -> Batch:
        keys, rows = position_keys(self._seed, np.array(positions, np.int64)), len(positions)
        real = np.array(positions) >= 0
        latents = torch.zeros(rows, *self._latent_shape)
        for i in np.flatnonzero(real):
            latents[i] = torch.randn(self._latent_shape, generator=torch.Generator().manual_seed(int(keys[i])))
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
        )
        if self._classes is None:
            self._add_text(batch, keys, real)
        else:
            dropped = uniforms(keys, "label dropout") < self._label_dropout
            labels = (uniforms(keys, "label") * self._classes).astype(np.int64)
            labels = np.where(dropped, self._classes, labels)
            batch.labels = torch.from_numpy(np.where(real, labels, ABSENT))
        return batch

    def _add_text(self, batch: Batch, keys: np.ndarray, real: np.ndarray) -> None:
        """Text states, and empty captions where they are dropped."""
        dropped = uniforms(keys, "caption dropout") < self._text.dropout
        lengths = 1 + (uniforms(keys, "length") * self._text.max_length).astype(np.int64)
        lengths[dropped] = 1
        batch.text_states = torch.zeros(len(keys), self._text.max_length, self._text.width)
        batch.text_mask = torch.arange(self._text.max_length) < torch.from_numpy(lengths)[:, None]
        for i in np.flatnonzero(real):
            text_seed = 0 if dropped[i] else int(mix(int(keys[i]), 1).view(np.int64))
            generator = torch.Generator().manual_seed(text_seed)
            batch.text_states[i, : lengths[i]] = torch.randn(int(lengths[i]), self._text.width, generator=generator)
        batch.captions = ["" if d else name for d, name in zip(dropped, batch.captions, strict=True)]
