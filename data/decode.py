"""What a reader's worker does with samples: they become the rows of a Batch, and those that cannot be used holes.

`Decoder` is the same for all data. What a row holds is read by ImageRows here, or by LatentRows in precomputed_read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from .batch import Batch
from .config import Bucket, DataConfig
from .errors import SampleError
from .images import decode_image
from .index import ImageTextIndex
from .order import position_keys, uniforms
from .samples import RawSample, SampleFiles, captions_of


class Choices(NamedTuple):
    """What the key of a position decides about the sample there.

    flip: whether the image is mirrored. dropped: whether its caption, or its label, is dropped. caption: in [0, 1),
    which of its captions is taken. crop: where the crop lies along x and y, each in [0, 1).
    """

    flip: bool
    dropped: bool
    caption: float
    crop: tuple[float, float]


class Rows(Protocol):
    """The rows of one batch, filled one by one."""

    batch: Batch

    def read(self, row: int, sample: RawSample, choices: Choices) -> tuple[str, int]:
        """Fill a row with a sample's content. -> (its caption, its label). SampleError leaves the row empty."""
        ...

    def finish(self) -> Batch:
        """The batch, once all rows are filled that can be."""
        ...


class Decoder:
    """Samples at positions of the run -> a Batch. A sample that cannot be used becomes a hole.

    flip: its probability. dropout: probability that a caption is dropped, or a label where `classes` is given: the
    model's number of classes. Then a sample needs a label and no caption is read; else it needs a caption.
    make_rows: of (keys int64 [b], bucket).
    """

    def __init__(
        self,
        index: ImageTextIndex,
        files: SampleFiles,
        make_rows: Callable[[np.ndarray, Bucket | None], Rows],
        seed: int,
        flip: float,
        dropout: float,
        classes: int | None,
    ) -> None:
        self._index, self.files, self._make_rows = index, files, make_rows
        self._seed, self._flip, self._dropout, self._classes = seed, flip, dropout, classes

    def batch(
        self, positions: Sequence[int], samples: Sequence[RawSample | None], bucket: Bucket | None = None
    ) -> Batch:
        """One row per position. Where the sample is None the row stays empty, with weight 0, and is no hole.

        bucket: gives the shape; None is the square of data.resolution and the longest text.
        """
        keys = position_keys(self._seed, np.array(positions, np.int64))
        rows = self._make_rows(keys, bucket)
        batch = rows.batch
        # Rows are set in numpy's views of the tensors, which takes a fifth of the time.
        assert batch.sizes is not None
        labels, weight, sizes = batch.labels.numpy(), batch.weight.numpy(), batch.sizes.numpy()
        for i, (sample, choices) in enumerate(zip(samples, self._choices(keys), strict=True)):
            if sample is None:
                continue
            batch.read += 1
            batch.names[i] = f"{self._index.names[sample.shard]}/{self._index.key(sample.row)}"
            try:
                caption, label = rows.read(i, sample, choices)
            except SampleError as error:
                batch.holes.append(str(error))
                continue
            sizes[i] = sample.row["height"], sample.row["width"]
            batch.full_captions[i] = caption
            batch.captions[i] = "" if choices.dropped else caption
            labels[i] = self._classes if self._classes is not None and choices.dropped else label
            weight[i] = 1.0
        return rows.finish()

    def _choices(self, keys: np.ndarray) -> list[Choices]:
        """The choices of each key."""
        flip = uniforms(keys, "flip") < self._flip
        dropped = uniforms(keys, "caption dropout" if self._classes is None else "label dropout") < self._dropout
        crop = zip(uniforms(keys, "crop x").tolist(), uniforms(keys, "crop y").tolist(), strict=True)
        choice = uniforms(keys, "caption choice")
        return list(map(Choices, flip.tolist(), dropped.tolist(), choice.tolist(), crop))


class ImageRows:
    """Rows with images, cropped and resized to the bucket's size.

    crop: at random; else the centre is taken. classes: as of Decoder.
    """

    def __init__(
        self,
        index: ImageTextIndex,
        cfg: DataConfig,
        crop: bool,
        classes: int | None,
        keys: np.ndarray,
        bucket: Bucket | None,
    ) -> None:
        self._index, self._max_pixels, self._crop, self._classes = index, cfg.max_image_pixels, crop, classes
        self._size = bucket[:2] if bucket else (cfg.resolution, cfg.resolution)
        self._images = torch.zeros(len(keys), 3, *self._size, dtype=torch.uint8)
        self.batch = Batch.empty(torch.from_numpy(keys), bucket, images=self._images)

    def read(self, row: int, sample: RawSample, choices: Choices) -> tuple[str, int]:
        """As of Rows."""
        caption = ""
        if self._classes is None:
            captions = captions_of(self._index, sample)
            caption = captions.texts[captions.pick(choices.caption)]
        label = sample.label(self._classes)
        crop = choices.crop if self._crop else None
        pixels = decode_image(sample.member("image"), self._size, self._max_pixels, crop, choices.flip)
        self._images[row] = torch.from_numpy(pixels)
        return caption, label

    def finish(self) -> Batch:
        """As of Rows."""
        return self.batch
