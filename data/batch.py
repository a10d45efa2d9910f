"""What a reader hands to the training loop."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass
class Batch:
    """One micro-batch of b rows; every rank sees the same b in every micro-batch.

    images: uint8 [b, 3, R, R], or None where latents come with the data.
    latents: float [b, C, h, w], or None.
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

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (the DataLoader calls this when pinning is on)."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t.pin_memory() for n, t in tensors.items() if isinstance(t, torch.Tensor)})
