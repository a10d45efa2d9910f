"""Seeded latents and text states of the configured shape, so that any config runs before its data is there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np
import torch

from .batch import NO_LABEL, Batch, step_shapes
from .buckets import Schedule
from .config import AutoencoderConfig, Bucket, DataConfig, TextEncoderConfig
from .order import mix, position_keys, share_of, uniforms
from .stages import Begin


class SyntheticReader:
    """One rank's batches of seeded latents and text states (or labels) of the configured shape, for runs without data.

    A row depends on its key and its bucket alone: latents ~ N(0, 1) [C, height / downsample, width / downsample]; text
    states ~ N(0, 1) of a true length that varies, and one fixed state of length 1 where the caption is dropped. With
    `classes`, the number of classes, uniform labels take the place of text states. buckets, begin: as of
    ImageTextReader; each bucket is as frequent as the others.
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
        buckets: Mapping[Bucket, int] | None = None,
        begin: Begin | None = None,
    ) -> None:
        self._classes, self._label_dropout = classes, cfg.label_dropout
        self._base = Bucket(cfg.resolution, cfg.resolution, text.total_length)
        self._channels, self._downsample = autoencoder.channels, autoencoder.downsample
        self._text, self._seed, self._batch = text, seed, global_batch_size
        self._slots = share_of(rank, world, global_batch_size)  # some ranks have none where a bank is small
        self._buckets, self._shapes = step_shapes(buckets, global_batch_size, world, micro_batch_size)
        self._schedule = Schedule(seed, [Fraction(1)] * len(self._buckets))
        self._begin = begin or Begin()

    def batches(self, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches of this rank) from first_step on, endless."""
        for step in itertools.count(first_step):
            bucket = self._schedule.at(step).bucket if len(self._buckets) > 1 else 0
            count, rows = self._shapes[bucket]
            position = self._begin.position_of(step, self._batch)
            positions = [position + slot for slot in self._slots]
            positions += [-1] * (count * rows - len(positions))
            chunks = [positions[i * rows : (i + 1) * rows] for i in range(count)]
            yield step, [self._make(chunk, self._buckets[bucket]) for chunk in chunks]

    def _make(self, positions: list[int], bucket: Bucket | None) -> Batch:
        """The rows of one micro-batch. positions: -1 for rows that fill it up."""
        keys, rows = position_keys(self._seed, np.array(positions, np.int64)), len(positions)
        height, width, text_length = bucket or self._base
        real = np.array(positions) >= 0
        shape = (self._channels, height // self._downsample, width // self._downsample)
        latents = torch.zeros(rows, *shape)
        for i in np.flatnonzero(real):
            latents[i] = torch.randn(shape, generator=torch.Generator().manual_seed(int(keys[i])))
        names = [f"synthetic/{p}" if p >= 0 else "" for p in positions]
        batch = Batch.empty(
            torch.from_numpy(keys),
            bucket,
            latents=latents,
            captions=list(names),
            full_captions=names,
            weight=torch.from_numpy(real).float(),
            names=list(names),
            read=int(real.sum()),
            sizes=torch.tensor([height, width], dtype=torch.int32).expand(rows, 2).clone(),
        )
        if self._classes is None:
            self._add_text(batch, keys, real, text_length)
        else:
            dropped = uniforms(keys, "label dropout") < self._label_dropout
            labels = (uniforms(keys, "label") * self._classes).astype(np.int64)
            labels = np.where(dropped, self._classes, labels)
            batch.labels = torch.from_numpy(np.where(real, labels, NO_LABEL))
        return batch

    def _add_text(self, batch: Batch, keys: np.ndarray, real: np.ndarray, most: int) -> None:
        """Add text states of at most `most` tokens, and drop captions."""
        dropped = uniforms(keys, "caption dropout") < self._text.dropout
        lengths = 1 + (uniforms(keys, "length") * most).astype(np.int64)
        lengths[dropped] = 1
        batch.text_states = torch.zeros(len(keys), most, self._text.total_width)
        batch.text_mask = torch.arange(most) < torch.from_numpy(lengths)[:, None]
        for i in np.flatnonzero(real):
            text_seed = 0 if dropped[i] else int(mix(int(keys[i]), 1).view(np.int64))
            generator = torch.Generator().manual_seed(text_seed)
            batch.text_states[i, : lengths[i]] = torch.randn(
                int(lengths[i]), self._text.total_width, generator=generator
            )
        batch.captions = ["" if d else name for d, name in zip(dropped, batch.captions, strict=True)]
