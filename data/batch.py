"""What a reader hands to the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .config import Bucket


@dataclass
class Batch:
    """One micro-batch of b rows; every rank sees the same b in every micro-batch.

    images: uint8 [b, 3, height, width], or None where latents come with the data.
    latents: float [b, C, h, w], or None; with `logvar` they are the means of posteriors.
    captions: b texts after caption dropout ("" where dropped, and for rows of weight 0).
    full_captions: b texts before caption dropout.
    text_states: float [b, L, D] with zeros where text_mask is False, or None.
    text_mask: bool [b, L], True at real tokens, or None.
    labels: int64 [b], class of each row, or the number of classes where it was dropped; -1 where there is none.
    keys: int64 [b], hash of (seed, position): all of a row's randomness.
    weight: float32 [b], 1, or 0 for holes, fill-up rows and rows past the end of the data.
    names: b strings "shard/key"; "" for fill-up rows and rows past the end of the data.
    holes: one reason for each unreadable sample of this batch, e.g. "image: truncated".
    read: samples attempted, readable or not.
    logvar: float [b, C, h, w], log variances of precomputed latents, or None.
    sizes: int32 [b, 2], height and width of the images in pixels before they were cropped, 0 where there is none.
    bucket: of the step, in a run of several.
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

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t.pin_memory() for n, t in tensors.items() if isinstance(t, torch.Tensor)})


def concatenate(parts: Sequence[Batch]) -> Batch:
    """The rows of several batches of one kind, in one."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for field in fields(Batch):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], torch.Tensor):
            joined[field.name] = torch.cat(values)
        elif isinstance(values[0], list):
            joined[field.name] = [item for value in values for item in value]
        else:
            joined[field.name] = sum(values) if field.name == "read" else values[0]
    return Batch(**joined)


def split(batch: Batch, rows: int) -> list[Batch]:
    """A reader's batch in micro-batches of `rows` rows each."""
    parts, holes = [], iter(batch.holes)
    for first in range(0, len(batch.names), rows):
        cut = slice(first, first + rows)
        values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        part = {name: value[cut] for name, value in values.items() if isinstance(value, torch.Tensor | list)}
        read = [bool(name) for name in part["names"]]
        unread = sum(was_read and not weight for was_read, weight in zip(read, batch.weight[cut].tolist(), strict=True))
        parts.append(replace(batch, **part | {"holes": [next(holes) for _ in range(unread)], "read": sum(read)}))
    return parts
