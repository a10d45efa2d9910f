"""What follows from a config and the world size, by arithmetic alone."""

import itertools
import math
from typing import NamedTuple

from data.config import Bucket

from ..errors import ConfigError
from .schema import TrainConfig

_SMALL = 3e9  # parameters of a model that keeps its gathered weights


def buckets_of(c: TrainConfig) -> list[Bucket]:
    """All pairs of an image size and a text length; first the square with the longest text, which is the only bucket of
    a run without buckets."""
    sizes = c.data.bucket_sizes(c.autoencoder.downsample * c.model.patch_size)
    lengths = sorted({*c.data.text_lengths, c.text_encoder.total_length}, reverse=True)
    return [Bucket(*size, length) for size, length in itertools.product(sizes, lengths)]


def micro_batch_rows(c: TrainConfig, bucket: Bucket, world_size: int, most: float | None) -> int:
    """Most samples in a device's micro-batch of this bucket. most: as Resolved.micro_batch_size. Larger images make it
    smaller; the text does not count. Where objective.contrastive_weight compares samples in pairs, no pair is parted,
    if there is room for one and the share is even."""
    share = -(-c.train.global_batch_size // world_size)
    area = bucket.height * bucket.width / 256**2
    rows = share if most is None else max(1, min(share, int(most / area + 1e-9)))
    if c.objective.contrastive_weight:  # whole pairs, once the share is parted evenly, as data.batch does
        while rows > 1 and -(-share // -(-share // rows)) % 2:
            rows -= 1
    return rows


def least_rows(c: TrainConfig) -> int:
    """Fewest square images that a micro-batch must have room for: one; where objective.contrastive_weight compares
    samples in pairs, as many as two of the largest bucket's images take."""
    if not c.objective.contrastive_weight:
        return 1
    area = max(bucket.height * bucket.width for bucket in buckets_of(c))
    return -(-2 * area // c.data.resolution**2)


def micro_batch_size(c: TrainConfig, rows: int) -> float:
    """The train.micro_batch_size of so many square images of the config's resolution."""
    return rows * c.data.resolution**2 / 256**2


def image_tokens(c: TrainConfig, bucket: Bucket) -> int:
    """Tokens of an image of this bucket."""
    return bucket.height * bucket.width // (c.autoencoder.downsample * c.model.patch_size) ** 2


def longest_side(c: TrainConfig, token: int) -> int:
    """Tokens along the longest side of any bucket's images. token: pixels along one side of a token."""
    return max(map(max, c.data.bucket_sizes(token))) // token


def compiles(c: TrainConfig, on_gpu: bool) -> bool:
    """Whether blocks are compiled: where parallel.compile is null, on a GPU, but under ZeRO-3, where they cannot be."""
    if c.parallel.compile is not None:
        return c.parallel.compile
    return on_gpu and not (c.parallel.engine == "zero" and c.parallel.zero_stage == 3)


def keeps_gathered(c: TrainConfig, parameters: int) -> bool:
    """Whether blocks keep their gathered weights from the forward to the backward pass. Where
    parallel.reshard_after_forward is null, small models do, and those whose shard is the whole.

    It saves a gather a micro-batch and costs 6 bytes a parameter: the weights in bf16 and, when gradients are
    accumulated, those in fp32 (18 GB of each GPU at 3 B parameters).
    """
    chosen = c.parallel.reshard_after_forward
    return not chosen if chosen is not None else c.parallel.shard == 1 or parameters <= _SMALL


class Resolved(NamedTuple):
    """What follows from the config and the world size."""

    world_size: int
    shard: int
    """Ranks that share one copy of the weights."""
    micro_batch_size: float | None
    """Most samples that a device holds at once at 256² pixels; None is its whole share of the batch."""
    micro_batch_rows: int
    """Most samples in a device's micro-batch of square images."""
    time_shift: float
    """Shift s of the times of square images: sqrt(image tokens / objective.shift_base_tokens)."""


def resolve(config: TrainConfig, world_size: int, fitting: float | None = None) -> Resolved:
    """What follows from a config on `world_size` processes; raises ConfigError where their number does not fit.
    fitting: the micro_batch_size that fits into the device, where train.micro_batch_size is null."""
    batch, shard = config.train.global_batch_size, config.parallel.shard or world_size
    if world_size > batch:
        raise ConfigError(f"{world_size} processes need train.global_batch_size of at least as many, got {batch}")
    if world_size % shard:
        raise ConfigError(f"parallel.shard {shard} does not divide the {world_size} processes")
    if config.parallel.cuda_graph and world_size > 1:
        raise ConfigError(
            f"parallel.cuda_graph needs a run of one process, got {world_size}: over several ones weights are gathered "
            "into other memory in every step; set it to false"
        )
    most = config.train.micro_batch_size or fitting
    return Resolved(
        world_size=world_size,
        shard=shard,
        micro_batch_size=most,
        micro_batch_rows=micro_batch_rows(config, buckets_of(config)[0], world_size, most),
        time_shift=math.sqrt(config.image_tokens / config.objective.shift_base_tokens),
    )
