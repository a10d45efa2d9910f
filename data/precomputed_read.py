"""Rows of a batch from precomputed samples: latents, text states and features are read straight into its tensors."""

from __future__ import annotations

import numpy as np
import torch

from .batch import Batch
from .captions import captions_of_entry, json_member
from .config import Bucket
from .decode import Choices
from .errors import SampleError
from .precomputed_format import HEADER, Dataset, pooled_rows
from .redaction import one_line
from .samples import RawSample
from .shard_index import ABSENT


class LatentRows:
    """Rows with latents (fp16: mean and, where there is one, logvar), text states and, where the set holds them, pooled
    vectors (bf16), and where `features` is set features (fp16).

    classes: as of Decoder; with them there are no text states. bucket: text states are cut at its length; None is the
    set's longest. A row that stays empty holds zeros and the empty caption.
    """

    def __init__(
        self, dataset: Dataset, classes: int | None, features: bool, keys: np.ndarray, bucket: Bucket | None
    ) -> None:
        self._classes, rows = classes, len(keys)
        self._variants, *shape = dataset.latents_shape
        # Rows are set in numpy's arrays, which takes a fifth of the time, and these are the tensors' memory.
        self._moments = np.zeros((rows, *shape), np.float16)  # [b, 2 or 1, C, h, w]
        self._features = np.zeros((rows, *dataset.features_shape[1:]), np.float16) if features else None  # [b, N, F]
        self._text = _TextRows(rows, dataset, bucket) if classes is None else None
        latents = torch.from_numpy(self._moments)
        self.batch = Batch.empty(
            torch.from_numpy(keys),
            bucket,
            latents=latents[:, 0],
            logvar=latents[:, 1] if latents.shape[1] == 2 else None,
            features=None if self._features is None else torch.from_numpy(self._features),
        )

    def read(self, row: int, sample: RawSample, choices: Choices) -> tuple[str, int]:
        """As of decode.Rows."""
        if sample.row["image_offset"] == ABSENT:  # a hole already when it was precomputed
            # Reasons are counted and shown: one from elsewhere is cut.
            raise SampleError(one_line(sample.member("caption")[:400].decode("utf-8", "replace"), 80))
        label, caption = sample.label(self._classes), ""
        try:
            self._read(sample, "image", "latents", choices.flip, self._moments[row])
            if self._features is not None:
                self._read(sample, "features", "features", choices.flip, self._features[row])
            if self._text is not None:
                caption = self._text.read(row, sample, choices.caption, choices.dropped)
        except SampleError:
            self._moments[row] = 0.0  # what was read in part could be a NaN, which weight 0 does not cancel
            if self._features is not None:
                self._features[row] = 0.0
            raise
        return caption, label

    def _read(self, sample: RawSample, column: str, what: str, flip: bool, target: np.ndarray) -> None:
        """Read a member's part for the image, or for the flipped one, into target, which has the shape of one part."""
        if int(sample.row[f"{column}_size"]) != HEADER + self._variants * target.nbytes:
            raise SampleError(f"{what}: wrong size")
        start = int(sample.row[f"{column}_offset"]) + HEADER
        sample.read_into(start + flip * target.nbytes, target)

    def finish(self) -> Batch:
        """As of decode.Rows."""
        if self._text is not None:
            self.batch.text_states, self.batch.text_mask, self.batch.text_pooled = self._text.finish()
        return self.batch


class _TextRows:
    """Text states of a batch, padded to one length, and pooled vectors; rows that are not read get those of the empty
    caption."""

    def __init__(self, rows: int, dataset: Dataset, bucket: Bucket | None) -> None:
        assert dataset.empty_caption is not None
        said = dataset.declared["text_encoder"]
        self._longest, self._width, pooled = said["max_length"], said["width"], said.get("pooled_width", 0)
        self._behind = pooled_rows(self._width, pooled)  # rows behind a caption's states
        empty = np.split(dataset.empty_caption, [len(dataset.empty_caption) - self._behind])
        self._empty, self._empty_pooled = empty[0], empty[1].reshape(-1)[:pooled]
        self._length = bucket.text_length if bucket else self._longest
        # numpy's zeros cost nothing until they are written, torch's as much as reading the states.
        self._bits = np.zeros((rows, self._length, self._width), np.uint16)  # [b, L, D]
        self._pooled = np.zeros((rows, len(self._empty_pooled)), np.uint16)  # [b, P]
        self._lengths = np.zeros(rows, np.int64)  # tokens of each row, 0 where it was not read

    def read(self, row: int, sample: RawSample, chance: float, dropped: bool) -> str:
        """Read the states of one of the sample's captions, unless it is dropped. -> the caption."""
        entry = json_member(sample.member("caption"))
        captions, tokens = captions_of_entry(entry), entry.get("tokens")
        if not isinstance(tokens, list) or not all(type(t) is int and 0 < t <= self._longest for t in tokens):
            raise SampleError("text: no numbers of tokens")
        ends = np.cumsum([0, *(count + self._behind for count in tokens)])  # rows of the captions before each
        size = HEADER + int(ends[-1]) * self._width * 2
        if len(tokens) != len(captions.texts) or int(sample.row["text_size"]) != size:
            raise SampleError("text: wrong size")
        number = captions.pick(chance)
        if not dropped:
            start = int(sample.row["text_offset"]) + HEADER + int(ends[number]) * self._width * 2
            length = min(tokens[number], self._length)
            target = self._bits[row, :length]
            try:
                sample.read_into(start, target)
                if self._behind:
                    sample.read_into(start + tokens[number] * self._width * 2, self._pooled[row])
            except SampleError:
                target[:] = 0
                raise
            self._lengths[row] = length
        return captions.texts[number]

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(states bf16 [b, L, D], zeros past a caption's end; mask bool [b, L]; pooled vectors bf16 [b, P], if any)."""
        for row in np.flatnonzero(self._lengths == 0):
            length = min(len(self._empty), self._length)
            self._bits[row, :length] = self._empty[:length]
            self._lengths[row], self._pooled[row] = length, self._empty_pooled
        mask = torch.arange(self._length) < torch.from_numpy(self._lengths)[:, None]
        pooled = torch.from_numpy(self._pooled).view(torch.bfloat16) if self._behind else None
        return torch.from_numpy(self._bits).view(torch.bfloat16), mask, pooled
