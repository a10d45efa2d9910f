"""Precomputed samples -> batches: latents, text states and features are read straight into the batch's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .batch import Batch
from .config import Bucket, DataConfig
from .errors import SampleError
from .fetch import Raw, SampleFiles
from .index import ImageTextIndex
from .order import position_keys, uniforms
from .precomputed_format import HEADER, Dataset
from .samples import label_of, member
from .shard_index import ABSENT, captions_of_entry, json_member


class PrecomputedDecoder:
    """Raw samples at positions of the run -> a Batch with latents (mean and logvar, fp16), text states (bf16) and, if
    `features` is set, features of the images (fp16).

    The same draws from a position's key as for images: flip, choice of the caption, dropout. dropout: of captions, or
    of labels where `classes` is given.
    """

    def __init__(
        self,
        index: ImageTextIndex,
        dataset: Dataset,
        cfg: DataConfig,
        seed: int,
        flip: float,
        dropout: float,
        classes: int | None,
        features: bool = False,
    ) -> None:
        self._index, self._dataset, self._seed = index, dataset, seed
        self._flip, self._dropout, self._classes = flip, dropout, classes
        self._variants, *moments = dataset.latents_shape
        self._moments: list[int] = moments  # [2, C, h, w]
        self._features: list[int] | None = [*dataset.features_shape[1:]] if features else None  # [N, F]
        self.files = SampleFiles(index, cfg, images_only=classes is not None, features=features)

    def batch(self, positions: Sequence[int], samples: Sequence[Raw | None], bucket: Bucket | None = None) -> Batch:
        """A row a position; None is a row without a sample, which holds zeros and the empty caption. bucket: cuts text
        states to its length; None is the set's longest."""
        rows = len(positions)
        keys = position_keys(self._seed, np.array(positions, np.int64))
        flip = uniforms(keys, "flip") < self._flip
        dropped = uniforms(keys, "caption dropout" if self._classes is None else "label dropout") < self._dropout
        choice = uniforms(keys, "caption choice")
        # Rows are set in numpy's arrays, which takes a fifth of the time, and these are the tensors' memory.
        moments = np.zeros((rows, *self._moments), np.float16)  # [b, 2, C, h, w]
        labels, weight = np.full(rows, ABSENT, np.int64), np.zeros(rows, np.float32)
        latents = torch.from_numpy(moments)
        features = np.zeros((rows, *self._features), np.float16) if self._features else None  # [b, N, F]
        text = _TextRows(rows, self._dataset, bucket) if self._classes is None else None
        batch = Batch(
            images=None,
            latents=latents[:, 0],
            captions=[""] * rows,
            full_captions=[""] * rows,
            text_states=None,
            text_mask=None,
            labels=torch.from_numpy(labels),
            keys=torch.from_numpy(keys),
            weight=torch.from_numpy(weight),
            names=[""] * rows,
            holes=[],
            read=0,
            logvar=latents[:, 1],
            sizes=torch.zeros(rows, 2, dtype=torch.int32),
            bucket=bucket,
            features=None if features is None else torch.from_numpy(features),
        )
        assert batch.sizes is not None
        for i, sample in enumerate(samples):
            if sample is None:
                continue
            batch.read += 1
            batch.names[i] = f"{self._index.names[sample.shard]}/{self._index.key(sample.row)}"
            caption = ""
            try:
                if sample.row["image_offset"] == ABSENT:
                    raise SampleError(member(sample, "caption").decode("utf-8", "replace"))
                label = label_of(sample, self._classes)
                self._read(sample, "image", "latents", bool(flip[i]), moments[i])
                if features is not None:
                    self._read(sample, "features", "features", bool(flip[i]), features[i])
                if text is not None:
                    caption = text.read(i, sample, float(choice[i]), bool(dropped[i]))
            except SampleError as error:
                moments[i] = 0.0  # what was read in part could be a NaN, which weight 0 does not cancel
                if features is not None:
                    features[i] = 0.0
                batch.holes.append(str(error))
                continue
            batch.sizes[i, 0], batch.sizes[i, 1] = int(sample.row["height"]), int(sample.row["width"])
            batch.full_captions[i] = caption
            batch.captions[i] = "" if dropped[i] else caption
            labels[i] = label if self._classes is None or not dropped[i] else self._classes
            weight[i] = 1.0
        if text is not None:
            batch.text_states, batch.text_mask = text.finish()
        return batch

    def _read(self, sample: Raw, column: str, what: str, flip: bool, target: np.ndarray) -> None:
        """What a member holds of the image, or of the flipped one, into target: its variants are of target's shape."""
        if int(sample.row[f"{column}_size"]) != HEADER + self._variants * target.nbytes:
            raise SampleError(f"{what}: wrong size")
        start = int(sample.row[f"{column}_offset"]) + HEADER
        sample.read_into(start + flip * target.nbytes, target)


class _TextRows:
    """Text states of a batch, padded to the longest caption; rows that are not read get the empty caption's."""

    def __init__(self, rows: int, dataset: Dataset, bucket: Bucket | None) -> None:
        assert dataset.empty_caption is not None
        self._empty = dataset.empty_caption
        self._longest = dataset.declared["text_encoder"]["max_length"]
        self._width = dataset.declared["text_encoder"]["width"]
        self._length = bucket.text_length if bucket else self._longest
        # numpy's zeros cost nothing until they are written, torch's as much as reading the states.
        self._bits = np.zeros((rows, self._length, self._width), np.uint16)
        self._lengths = np.zeros(rows, np.int64)

    def read(self, row: int, sample: Raw, chance: float, dropped: bool) -> str:
        """Read the states of one of the sample's captions, unless it is dropped; returns the caption."""
        entry = json_member(member(sample, "caption"))
        captions, tokens = captions_of_entry(entry), entry.get("tokens")
        if not isinstance(tokens, list) or not all(type(t) is int and 0 < t <= self._longest for t in tokens):
            raise SampleError("text: no numbers of tokens")
        size = HEADER + sum(tokens) * self._width * 2
        if len(tokens) != len(captions.texts) or int(sample.row["text_size"]) != size:
            raise SampleError("text: wrong size")
        number = captions.pick(chance)
        if not dropped:
            start = int(sample.row["text_offset"]) + HEADER + sum(tokens[:number]) * self._width * 2
            length = min(tokens[number], self._length)
            target = self._bits[row, :length]
            try:
                sample.read_into(start, target)
            except SampleError:
                target[:] = 0
                raise
            self._lengths[row] = length
        return captions.texts[number]

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(states bf16 [b, L, D], zeros past a caption's end; mask bool [b, L])."""
        for row in np.flatnonzero(self._lengths == 0):
            length = min(len(self._empty), self._length)
            self._bits[row, :length] = self._empty[:length]
            self._lengths[row] = length
        return torch.from_numpy(self._bits).view(torch.bfloat16), torch.arange(self._length) < torch.from_numpy(
            self._lengths
        )[:, None]
