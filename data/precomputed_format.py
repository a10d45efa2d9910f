"""dataset.json beside precomputed shards: what they were made with, and whether a config may train on them.

A sample of such a shard consists of these members, side by side in the tar and readable by any WebDataset reader:

    KEY.cls          its class, where it has one
    KEY.json         {"captions": [...], "weights": [...], "tokens": [...], "width": W, "height": H}
    KEY.latents.npy  fp16 [V, 2, C, h, w]: mean and log variance; where V is 2, those of the flipped image come second
    KEY.text.npy     uint16 [sum of tokens, D]: the bits of the bf16 states of all captions, one after the other; in a
                     set with pooled vectors (layout 2) each caption's follows its states, filled up to whole rows
    KEY.features.npy fp16 [V, N, F]: what REPA's encoder sees at each of N image tokens, where it was asked for

A sample that could not be used keeps its place: it is KEY.hole alone, which holds the reason.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from .config import NONE, AutoencoderConfig, DataConfig, TextEncoderConfig
from .errors import DataError, SampleError
from .files import json_digest
from .storage import Remote, RetryPolicy, Shard, file_version, read_remote

DATASET, EMPTY_CAPTION = "dataset.json", "empty_caption.npy"
LAYOUT, POOLED_LAYOUT = 1, 2  # of a set without pooled vectors, and with them
HEADER = 128  # bytes of a .npy file before its array
_MOST_BYTES = 1 << 20  # of dataset.json
_DIGEST, _EMPTY_DIGEST = "digest", "empty_caption_sha256"  # of the other keys, and of EMPTY_CAPTION; not in older sets
_SHARED = ("layout", "autoencoder", "text_encoder", "resolution", "flips")  # keys that several sets must agree on
_REPA = "repa_encoder"  # they must agree on this key too, which sets without features lack


def layout_of(pooled_width: int) -> int:
    """The layout of a set whose captions have pooled vectors of so many features."""
    return POOLED_LAYOUT if pooled_width else LAYOUT


def npy(array: np.ndarray) -> bytes:
    """A .npy file of an array. Its header has HEADER bytes for any shape that precomputed samples have."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    assert buffer.tell() == HEADER + array.nbytes
    return buffer.getvalue()


@dataclass(frozen=True)
class Dataset:
    """A precomputed set.

    where: path of its dataset.json, for messages. declared: the content of that file (the first one, where there are
    several), see Precompute.declared. digest: hash of the contents of all. empty_caption: uint16 [T + R, D], the bits
    of the empty caption's bf16 states, and in R rows (pooled_rows) those of its pooled vector; None in a set for a
    model of classes.
    """

    where: str
    declared: dict[str, Any]
    digest: str
    empty_caption: np.ndarray | None

    @property
    def latents_shape(self) -> tuple[int, int, int, int, int]:
        """(V, 2, C, h, w) of KEY.latents.npy; (V, 1, C, h, w) where the latents have no variance."""
        autoencoder = self.declared["autoencoder"]
        side = self.declared["resolution"] // autoencoder["downsample"]
        moments = 2 if autoencoder.get("variance", True) else 1  # which only those without one declare
        return 1 + self.declared["flips"], moments, autoencoder["channels"], side, side

    @property
    def features_shape(self) -> tuple[int, int, int]:
        """(V, N, F) of KEY.features.npy, in a set that holds it."""
        encoder = self.declared[_REPA]
        return 1 + self.declared["flips"], encoder["tokens_a_side"] ** 2, encoder["width"]

    @property
    def fingerprints(self) -> dict[str, str]:
        """What identifies the encoders and the set, as checkpoints store it."""
        encoders = {part: said for part in ("autoencoder", "text_encoder", _REPA) if (said := self.declared.get(part))}
        return {**{part: said["fingerprint"] for part, said in encoders.items()}, "precomputed_dataset": self.digest}

    def check(
        self, data: DataConfig, autoencoder: AutoencoderConfig, text: TextEncoderConfig, classes: int | None
    ) -> None:
        """Raise DataError where a config does not fit to the set."""
        said = self.declared["autoencoder"]
        pairs = [("data.resolution", data.resolution, self.declared["resolution"])]
        pairs += [(f"autoencoder.{key}", getattr(autoencoder, key), said[key]) for key in ("channels", "downsample")]
        if classes is None:
            if self.empty_caption is None:
                raise DataError(f"{self.where} was precomputed for a model of classes and holds no text states")
            said = self.declared["text_encoder"]
            totals = (
                ("max_length", text.total_length, said["max_length"]),
                ("width", text.total_width, said["width"]),
                ("pooled_width", text.total_pooled, said.get("pooled_width", 0)),
            )
            of = " of all encoders together" if text.more else ""
            pairs += [(f"text_encoder.{key}{of}", total, found) for key, total, found in totals]
        for key, wanted, found in pairs:
            if wanted != found:
                raise DataError(
                    f"{key} is {wanted}, but {self.where} was precomputed with {found}: set it to {found}, or "
                    "precompute the shards anew"
                )
        if data.buckets != NONE:
            raise DataError(
                f"data.buckets is {data.buckets}, but {self.where} holds latents of squares: set it to none"
            )
        if data.flip and not self.declared["flips"]:
            raise DataError(
                f"data.flip is {data.flip}, but {self.where} holds no latents of flipped images, and flipped latents "
                "are not those: set data.flip=0, or precompute with --flips"
            )

    def check_features(self, tokens_a_side: int, width: int) -> None:
        """Raise DataError where the set does not hold features [tokens_a_side², width] of its images."""
        said = self.declared.get(_REPA)
        if said is None:
            raise DataError(
                f"objective.repa_weight needs features of the images, and {self.where} was precomputed without: set it "
                "to 0, or precompute with --repa-features"
            )
        for key, wanted, found in (
            ("objective.repa_width", width, said["width"]),
            ("tokens along a side (by data.resolution and model.patch_size)", tokens_a_side, said["tokens_a_side"]),
        ):
            if wanted != found:
                raise DataError(
                    f"{key}: {wanted}, but {self.where} was precomputed with features for {found}: set it to that, or "
                    "precompute the shards anew"
                )

    def check_encoder(self, part: str, fingerprint: str) -> None:
        """Raise DataError where an encoder is not the one that the set was made with. part: "autoencoder",
        "text_encoder" or "repa_encoder"."""
        found = self.declared[part]["fingerprint"]
        if fingerprint != found:
            key = "objective.repa_encoder" if part == _REPA else f"{part}.path"
            raise DataError(
                f"{key} holds an encoder with fingerprint {fingerprint[:16]}, but {self.where} was precomputed "
                f"with {found[:16]}: give the same encoder, or {NONE}, or precompute the shards anew"
            )


def check_images(autoencoder: AutoencoderConfig, text: TextEncoderConfig, classes: int | None) -> None:
    """Raise DataError where a config lacks an encoder: only training on precomputed shards needs none."""
    if text.path == NONE and classes is None:
        raise DataError("text_encoder.path is none: it is needed to encode captions, give a folder or hub id")
    if autoencoder.path == NONE and autoencoder.downsample != 1:
        raise DataError(
            "autoencoder.path is none: it is needed to turn images into latents and back, give a folder or hub id; for "
            "pixels set autoencoder.channels=3 and autoencoder.downsample=1"
        )


def check_same_kind(training: Dataset | None, validation: Dataset | None) -> None:
    """Raise DataError where data.val_shards hold something else than data.shards, images or precomputed samples, or
    were precomputed with other encoders. None stands for images."""
    if training is None or validation is None:
        if training is not validation:
            kinds = ("images", "precomputed samples") if validation is None else ("precomputed samples", "images")
            raise DataError(f"data.val_shards holds {kinds[0]} and data.shards {kinds[1]}: both must be of one kind")
        return
    for part in ("autoencoder", "text_encoder"):
        if training.declared[part] != validation.declared[part]:
            raise DataError(
                f"{part}: {validation.where} was precomputed with {validation.declared[part]}, {training.where} with "
                f"{training.declared[part]}: both must be made with the same one"
            )


def open_dataset(shards: Sequence[Shard], retry: RetryPolicy) -> Dataset:
    """What precomputed shards were made with. Raises DataError where their dataset.json is missing, or several sets do
    not fit together."""
    found: dict[str, Dataset] = {}
    for shard in shards:
        beside = _beside(shard, DATASET)
        if str(beside) not in found:
            found[str(beside)] = _read(shard, beside, retry)
    first, *others = found.values()
    for other in others:
        for key in (*_SHARED, _REPA):
            ours, theirs = first.declared.get(key), other.declared.get(key)
            if ours != theirs:
                raise DataError(
                    f"{first.where} and {other.where} were precomputed with different values of {key}: "
                    f"{ours} and {theirs}; train on sets made alike"
                )
    digest = hashlib.sha256("\n".join([one.digest for one in found.values()]).encode()).hexdigest()
    return Dataset(first.where, first.declared, digest if others else first.digest, first.empty_caption)


def pooled_rows(width: int, pooled_width: int) -> int:
    """R, the rows of a text state's width that a caption's pooled vector takes; 0 in a set without such vectors."""
    return -(-pooled_width // width)


def dataset_digest(declared: dict[str, Any]) -> str:
    """What identifies the content of a dataset.json, with digests or without."""
    said = {key: value for key, value in declared.items() if key not in (_DIGEST, _EMPTY_DIGEST)}
    return json_digest(said)


def sealed(declared: dict[str, Any], empty_caption: bytes | None) -> str:
    """The text of dataset.json, with digests of itself and of the file of the empty caption."""
    empty = hashlib.sha256(empty_caption).hexdigest() if empty_caption is not None else None
    return json.dumps({**declared, _EMPTY_DIGEST: empty, _DIGEST: dataset_digest(declared)}, indent=1) + "\n"


def empty_caption_of(data: bytes, declared: dict[str, Any]) -> np.ndarray:
    """uint16 [T + R, D], see Dataset, from the bytes of EMPTY_CAPTION. declared: the content of the dataset.json beside
    it. Raises ValueError where they are damaged."""
    text_encoder = declared["text_encoder"]
    array = np.load(io.BytesIO(data), allow_pickle=False)
    rows, width = array.shape if array.ndim == 2 else (0, 0)
    tokens = rows - pooled_rows(text_encoder["width"], text_encoder.get("pooled_width", 0))
    if array.dtype != np.uint16 or width != text_encoder["width"] or not 0 < tokens <= text_encoder["max_length"]:
        raise ValueError(f"it holds {array.dtype} {list(array.shape)}")
    if declared.get(_EMPTY_DIGEST) not in (None, hashlib.sha256(data).hexdigest()):
        raise ValueError("its SHA-256 is another")
    return array


def _beside(shard: Shard, name: str) -> Shard:
    if isinstance(shard, Path):
        return shard.with_name(name)
    url = urlsplit(shard.url)
    return Remote(urlunsplit(url._replace(path=f"{url.path.rpartition('/')[0]}/{name}")))


def _bytes(shard: Shard, retry: RetryPolicy, most: int) -> bytes:
    size = file_version(shard, retry).size
    if size > most:
        raise DataError(f"{shard} has {size} bytes, more than {most}")
    return shard.read_bytes() if isinstance(shard, Path) else read_remote(shard.url, 0, size, retry, 0)


def _is_declared(said: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a dataset.json has the keys that are read of it, each of its kind."""
    if not isinstance(said, dict) or any(key not in said for key in _SHARED):
        return False
    parts = {"autoencoder": ("channels", "downsample"), "text_encoder": ("width", "max_length")}
    parts[_REPA] = ("width", "tokens_a_side")
    for part, numbers in parts.items():
        one = said.get(part)
        if one is None and part != "autoencoder":
            continue
        if not isinstance(one, dict) or not isinstance(one.get("fingerprint"), str):
            return False
        if not all(type(one.get(key)) is int and 0 < one[key] < 1 << 20 for key in numbers):
            return False
        if not isinstance(one.get("variance", True), bool):
            return False
    pooled = (said["text_encoder"] or {}).get("pooled_width", 0)
    if type(pooled) is not int or not 0 <= pooled < 1 << 20 or said["layout"] != layout_of(pooled):
        return False
    return type(said["resolution"]) is int and 0 < said["resolution"] < 1 << 20 and isinstance(said["flips"], bool)


def _read(shard: Shard, path: Shard, retry: RetryPolicy) -> Dataset:
    try:
        declared = json.loads(_bytes(path, retry, _MOST_BYTES))
    except (OSError, SampleError, DataError) as error:
        why = f" ({error})" if isinstance(path, Remote) else ""
        raise DataError(
            f"{shard} holds precomputed samples, but {path} cannot be read{why}: finish launch/precompute.py by "
            "running it again, and keep that file beside the shards"
        ) from None
    except (ValueError, RecursionError):
        declared = None
    if not _is_declared(declared):
        raise DataError(
            f"{path} is no dataset.json of layout {LAYOUT} or {POOLED_LAYOUT}: precompute the shards anew, or read "
            "them with the version that has written them"
        )
    if declared.get(_DIGEST, dataset_digest(declared)) != dataset_digest(declared):
        raise DataError(f"{path} is damaged: it does not have its digest; restore it, or precompute the shards anew")
    empty = None
    if declared["text_encoder"] is not None:
        beside = _beside(shard, EMPTY_CAPTION)
        text = declared["text_encoder"]
        try:
            rows = text["max_length"] + pooled_rows(text["width"], text.get("pooled_width", 0))
            data = _bytes(beside, retry, HEADER + 2 * rows * text["width"])
            empty = empty_caption_of(data, declared)
        except (OSError, SampleError, DataError, ValueError, EOFError) as error:
            raise DataError(
                f"{beside} is missing or damaged ({error}): restore it, or run launch/precompute.py again, which makes "
                "it anew beside the shards"
            ) from None
    return Dataset(str(path), declared, dataset_digest(declared), empty)
