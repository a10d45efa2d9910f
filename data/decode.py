"""What a reader's worker does with raw samples: images and captions become the rows of a Batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .batch import Batch
from .config import Bucket, DataConfig
from .errors import SampleError
from .fetch import Raw, SampleFiles
from .images import decode_image
from .index import ImageTextIndex
from .order import position_keys, uniforms
from .precomputed_read import PrecomputedDecoder
from .samples import captions_of, label_of, member
from .shard_index import ABSENT


class Decoder:
    """Raw samples at positions of the run -> a Batch; failures of samples become holes.

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
        self.files = SampleFiles(index, cfg, images_only=classes is not None)

    def batch(self, positions: Sequence[int], samples: Sequence[Raw | None], bucket: Bucket | None = None) -> Batch:
        """A row a position; None is a row without a sample. bucket: None is the square of data.resolution."""
        size, rows = bucket[:2] if bucket else (self._cfg.resolution, self._cfg.resolution), len(positions)
        keys = position_keys(self._seed, np.array(positions, np.int64))
        flip = uniforms(keys, "flip") < self._flip
        dropped = uniforms(keys, "caption dropout" if self._classes is None else "label dropout") < self._dropout
        crop_x, crop_y = uniforms(keys, "crop x"), uniforms(keys, "crop y")
        choice = uniforms(keys, "caption choice")

        batch = Batch(
            images=torch.zeros(rows, 3, *size, dtype=torch.uint8),
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
            sizes=torch.zeros(rows, 2, dtype=torch.int32),
            bucket=bucket,
        )
        assert batch.images is not None
        assert batch.sizes is not None
        for i, sample in enumerate(samples):
            if sample is None:
                continue
            batch.read += 1
            batch.names[i] = f"{self._index.names[sample.shard]}/{self._index.key(sample.row)}"
            try:
                caption = ""
                if self._classes is None:
                    captions = captions_of(self._index, sample)
                    caption = captions.texts[captions.pick(float(choice[i]))]
                label = label_of(sample, self._classes)
                crop = (float(crop_x[i]), float(crop_y[i])) if self._crop else None
                data = member(sample, "image")
                pixels = decode_image(data, size, self._cfg.max_image_pixels, crop, bool(flip[i]))
            except SampleError as error:
                batch.holes.append(str(error))
                continue
            batch.images[i] = torch.from_numpy(pixels)
            batch.sizes[i, 0], batch.sizes[i, 1] = int(sample.row["height"]), int(sample.row["width"])
            batch.full_captions[i] = caption
            batch.captions[i] = "" if dropped[i] else caption
            batch.labels[i] = label if self._classes is None or not dropped[i] else self._classes
            batch.weight[i] = 1.0
        return batch


def make_decoder(
    index: ImageTextIndex,
    cfg: DataConfig,
    seed: int,
    flip: float,
    dropout: float,
    crop: bool,
    classes: int | None,
    features: bool = False,
) -> Decoder | PrecomputedDecoder:
    """What turns samples of this index into batches."""
    if index.dataset is not None:
        return PrecomputedDecoder(index, index.dataset, cfg, seed, flip, dropout, classes, features)
    return Decoder(index, cfg, seed, flip, dropout, crop, classes)
