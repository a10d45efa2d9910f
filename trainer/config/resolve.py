"""What follows from a config and the world size, by arithmetic alone."""

import itertools
import math
from typing import NamedTuple

from data.config import Bucket

from ..errors import ConfigError
from .schema import TrainConfig


def buckets_of(c: TrainConfig) -> list[Bucket]:
    """The square at the longest text first, as in a run of one bucket; then every other pair of image size and
    length."""
    sizes = c.data.bucket_sizes(c.autoencoder.downsample * c.model.patch_size)
    lengths = sorted({*c.data.text_lengths, c.text_encoder.max_length}, reverse=True)
    return [Bucket(*size, length) for size, length in itertools.product(sizes, lengths)]


def micro_batch_rows(c: TrainConfig, bucket: Bucket, world_size: int) -> int:
    """The most samples in a device's micro-batch of a bucket: fewer of larger images, whatever their text."""
    share = -(-c.train.global_batch_size // world_size)
    most = c.train.micro_batch_size
    return share if most is None else max(1, min(share, int(most * 256**2 / (bucket.height * bucket.width))))


def image_tokens(c: TrainConfig, bucket: Bucket) -> int:
    return bucket.height * bucket.width // (c.autoencoder.downsample * c.model.patch_size) ** 2


def longest_side(c: TrainConfig, token: int) -> int:
    """Tokens along the longest side of any image. token: pixels along one."""
    return max(map(max, c.data.bucket_sizes(token))) // token


class Resolved(NamedTuple):
    """What follows from the config and the world size."""

    world_size: int
    shard: int
    """Ranks that share one copy of the weights."""
    micro_batch_rows: int
    """The most samples in a device's micro-batch of squares."""
    time_shift: float
    """s of the squares' shifted time: sqrt(image tokens / shift_base_tokens)."""


def resolve(config: TrainConfig, world_size: int) -> Resolved:
    """Pure arithmetic; raises ConfigError where the world size does not fit."""
    batch, shard = config.train.global_batch_size, config.parallel.shard or world_size
    if world_size > batch:
        raise ConfigError(f"{world_size} processes need train.global_batch_size of at least as many, got {batch}")
    if world_size % shard:
        raise ConfigError(f"parallel.shard {shard} does not divide the {world_size} processes")
    return Resolved(
        world_size=world_size,
        shard=shard,
        micro_batch_rows=micro_batch_rows(config, buckets_of(config)[0], world_size),
        time_shift=math.sqrt(config.image_tokens / config.objective.shift_base_tokens),
    )
