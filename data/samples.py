"""What a sample's members hold, decoded but for the image; SampleError where it cannot be used."""

from __future__ import annotations

from .errors import SampleError
from .fetch import Raw
from .index import ImageTextIndex
from .shard_index import ABSENT, MAX_MEMBER_BYTES, UNREADABLE, CaptionChoice, captions_from_bytes


def member(sample: Raw, kind: str) -> bytes:
    """Bytes of the sample's "image" or "caption"."""
    offset, size = int(sample.row[f"{kind}_offset"]), int(sample.row[f"{kind}_size"])
    if offset == ABSENT:
        raise SampleError(f"{kind}: missing")
    if size > MAX_MEMBER_BYTES:
        raise SampleError("shard: member too large")
    return sample.read(offset, size)


def captions_of(index: ImageTextIndex, sample: Raw) -> CaptionChoice:
    """The sample's captions, from its own member or from the file beside the shards."""
    if sample.row["caption_beside"] and sample.row["caption_offset"] != ABSENT:
        return captions_from_bytes(index.caption_beside(sample.row), is_json=False)
    return captions_from_bytes(member(sample, "caption"), bool(sample.row["caption_is_json"]))


def label_of(sample: Raw, classes: int | None) -> int:
    """The sample's class, ABSENT where there is none; a model of `classes` classes needs one."""
    label = int(sample.row["label"])
    if classes is None:
        return max(label, ABSENT)
    if label == ABSENT:
        raise SampleError("label: missing")
    if label == UNREADABLE:
        raise SampleError("label: not a number")
    if label >= classes:
        raise SampleError(f"label: not below model.num_classes {classes}")
    return label
