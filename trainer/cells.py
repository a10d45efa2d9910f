"""The cells of a run: what follows from a config for steps of several image sizes and lengths of text."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from data.config import Cell

if TYPE_CHECKING:
    from .config import TrainConfig


def cells_of(c: "TrainConfig") -> list[Cell]:
    """The square at the longest text first, as in a run of one cell; then every other pair of image size and length."""
    sizes = c.data.bucket_sizes(c.autoencoder.downsample * c.model.patch_size)
    lengths = sorted({*c.data.text_lengths, c.text_encoder.max_length}, reverse=True)
    return [Cell(*size, length) for size, length in itertools.product(sizes, lengths)]


def micro_batch_rows(c: "TrainConfig", cell: Cell, world_size: int) -> int:
    """The most samples in a device's micro-batch of a cell: fewer of larger images, whatever their text."""
    share = -(-c.train.global_batch_size // world_size)
    most = c.train.micro_batch_size
    return share if most is None else max(1, min(share, int(most * 256**2 / (cell.height * cell.width))))


def image_tokens(c: "TrainConfig", cell: Cell) -> int:
    return cell.height * cell.width // (c.autoencoder.downsample * c.model.patch_size) ** 2


def longest_side(c: "TrainConfig", token: int) -> int:
    """Tokens along the longest side of any image. token: pixels along one."""
    return max(map(max, c.data.bucket_sizes(token))) // token


def cell_conflicts(c: "TrainConfig") -> Iterator[str]:
    """What is wrong with the buckets of data."""
    lengths = c.data.text_lengths
    if lengths and c.label_classes is not None:
        yield "data.text_lengths needs a model that reads captions: leave it empty for a model of classes"
    elif lengths and lengths[-1] != c.text_encoder.max_length:
        yield (
            f"data.text_lengths must end with text_encoder.max_length {c.text_encoder.max_length}, where captions are "
            f"cut, got {list(lengths)}"
        )
