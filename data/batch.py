"""What a reader hands to the training loop, and how the rows of a step become micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .config import Bucket

NO_LABEL = -1


@dataclass
class Batch:
    """One micro-batch of b rows. All ranks have the same b in each micro-batch.

    images: uint8 [b, 3, height, width], or None where latents come with the data.
    latents: float [b, C, h, w], or None; with `logvar` they are the means of posteriors.
    captions: b texts after caption dropout ("" where dropped, and for rows of weight 0).
    full_captions: b texts before caption dropout.
    text_states: float [b, L, D] with zeros where text_mask is False, or None.
    text_mask: bool [b, L], True at real tokens, or None.
    text_pooled: float [b, P], precomputed pooled vectors of the captions, or None.
    labels: int64 [b], the class of each row, the number of classes where it was dropped, NO_LABEL where it has none.
    keys: int64 [b], the hash of (seed, position), from which all randomness of a row follows.
    weight: float32 [b], 1, or 0 for holes, fill-up rows and rows past the end of the data.
    names: b strings "shard/key"; "" for fill-up rows and rows past the end of the data.
    holes: one reason per unreadable sample of this batch, e.g. "image: truncated".
    read: the number of samples that were tried, readable or not.
    sizes: int32 [b, 2], height and width of the images in pixels before they were cropped (0 without one), or None.
    logvar: float [b, C, h, w], log variances of precomputed latents, or None.
    bucket: that of the step, in a run of several buckets; else None.
    features: float [b, N, F], precomputed features of the images at each of N tokens, or None.
    """

    images: torch.Tensor | None
    latents: torch.Tensor | None
    captions: list[str]
    full_captions: list[str]
    text_states: torch.Tensor | None
    text_mask: torch.Tensor | None
    labels: torch.Tensor
    keys: torch.Tensor
    weight: torch.Tensor
    names: list[str]
    holes: list[str]
    read: int
    logvar: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    bucket: Bucket | None = None
    features: torch.Tensor | None = None
    text_pooled: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Those of its fields that are tensors."""
        return [each for each in vars(self).values() if isinstance(each, torch.Tensor)]

    def unreadable(self) -> list[tuple[str, str]]:
        """(name, reason) of each hole."""
        names = [name for name, weight in zip(self.names, self.weight.tolist(), strict=True) if name and not weight]
        return list(zip(names, self.holes, strict=True))

    @classmethod
    def empty(cls, keys: torch.Tensor, bucket: Bucket | None = None, **content: Any) -> Batch:
        """A batch of one row per key, all of weight 0 and without a sample. content: the fields that are not empty."""
        rows = len(keys)
        values: dict[str, Any] = {
            "images": None,
            "latents": None,
            "captions": [""] * rows,
            "full_captions": [""] * rows,
            "text_states": None,
            "text_mask": None,
            "labels": torch.full((rows,), NO_LABEL),
            "keys": keys,
            "weight": torch.zeros(rows),
            "names": [""] * rows,
            "holes": [],
            "read": 0,
            "sizes": torch.zeros(rows, 2, dtype=torch.int32),
            "bucket": bucket,
        }
        return cls(**values | content)


def concatenate(parts: Sequence[Batch], pinned: bool = False) -> Batch:
    """The rows of several batches of one kind, copied into one.

    pinned: into page-locked memory, from which a GPU copies while the host goes on.
    """
    joined: dict[str, Any] = {}
    for field in fields(Batch):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], torch.Tensor):
            shape = (sum(map(len, values)), *values[0].shape[1:])
            joined[field.name] = torch.cat(values, out=torch.empty(shape, dtype=values[0].dtype, pin_memory=pinned))
        elif isinstance(values[0], list):
            joined[field.name] = [item for value in values for item in value]
        else:
            joined[field.name] = sum(values) if field.name == "read" else values[0]
    return Batch(**joined)


def split(batch: Batch, rows: int) -> list[Batch]:
    """A batch cut into micro-batches of `rows` rows each."""
    parts, holes = [], iter(batch.holes)
    for first in range(0, len(batch.names), rows):
        cut = slice(first, first + rows)
        values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        part = {name: value[cut] for name, value in values.items() if isinstance(value, torch.Tensor | list)}
        read = [bool(name) for name in part["names"]]
        unread = sum(was_read and not weight for was_read, weight in zip(read, batch.weight[cut].tolist(), strict=True))
        parts.append(replace(batch, **part | {"holes": [next(holes) for _ in range(unread)], "read": sum(read)}))
    return parts


def micro_batch_shape(global_batch_size: int, world: int, micro_batch_size: int) -> tuple[int, int]:
    """(micro-batches per step, rows per micro-batch) of each rank, the same on all ranks.

    A rank has at most ceil(global_batch_size / world) samples of a step, and micro_batch_size of a micro-batch.
    """
    largest = -(-global_batch_size // world)
    count = -(-largest // micro_batch_size)
    return count, -(-largest // count)


def step_shapes(
    buckets: Mapping[Bucket, int] | None, global_batch_size: int, world: int, micro_batch_size: int
) -> tuple[list[Bucket | None], list[tuple[int, int]]]:
    """(the buckets, [None] in a run of one; for a step of each bucket its micro_batch_shape).

    buckets: each with the most rows of a micro-batch; None is one bucket, with micro_batch_size.
    """
    most = buckets or {None: micro_batch_size}
    shapes = [micro_batch_shape(global_batch_size, world, rows) for rows in most.values()]
    return [None] if len(shapes) == 1 else [*(buckets or ())], shapes
