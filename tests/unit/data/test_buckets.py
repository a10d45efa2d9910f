"""Buckets: which one a sample is in, which one a step reads, and the promises of the order in each of them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.buckets import BLOCK, BucketOrder, Schedule, assign, merged
from data.config import Bucket, DataConfig
from data.images import decode_image, load_rgb
from data.order import END_OF_DATA, Order, Source, slots_of
from tests.helpers.fuzz import fuzz
from trainer.build.engine import build_objective
from trainer.config.keys import plain
from trainer.config.load import load_config
from trainer.config.resolve import buckets_of, image_tokens, micro_batch_rows, resolve
from trainer.config.resume import check_resume
from trainer.errors import ConfigError

BUCKETS = [Bucket(*size, length) for size, length in product([(32, 32), (24, 44), (44, 24)], (64, 16))]


@dataclass
class Index:
    """The columns of an index that buckets are made of."""

    shard_sizes: list[int]
    sources: list[Source]
    width: np.ndarray
    height: np.ndarray
    caption_length: np.ndarray

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def stored_array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        return make()


def random_index(sizes: list[int], sources: list[Source] | None = None, seed: int = 0) -> Index:
    rng, n = np.random.default_rng(seed), sum(sizes)
    width, height = rng.integers(0, 90, n), rng.integers(0, 90, n)  # 0: unknown
    return Index(sizes, sources or [Source(len(sizes), 1.0)], width, height, rng.integers(-1, 90, n))


def order(
    index: Index, batch: int, epochs: int | None = None, buckets: list[Bucket] = BUCKETS, seed: int = 3
) -> BucketOrder:
    return BucketOrder(seed, index, buckets, batch, epochs, 1.0)


def test_an_order_may_begin_at_a_later_step() -> None:
    for sizes, buckets in (([60, 40], BUCKETS), ([60, 40], BUCKETS[:1])):
        index = random_index(sizes)
        later = BucketOrder(3, index, buckets, 4, None, 1.0, first_step=70)
        assert read(later, 75, 90, range(4)) == read(order(index, 4, buckets=buckets), 5, 90, range(4))


def steps(buckets: BucketOrder, first: int, slots: range) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(bucket, samples) of each step, as a reader takes them: a queue a bucket, begun at its first step."""
    streams: dict[int, Any] = {}

    def samples(queue: Any) -> Any:
        for run in queue:
            yield from ((run.shard, int(sample)) for sample in run.samples)

    for step in count(first):
        at = buckets.at(step)
        if at.bucket not in streams:
            streams[at.bucket] = [samples(queue) for queue in buckets.queues(at, slots)]
        yield at.bucket, [next(stream) for stream in streams[at.bucket]]


def read(buckets: BucketOrder, first: int, number: int, slots: range) -> list[tuple[int, list[tuple[int, int]]]]:
    return [*islice(steps(buckets, first, slots), number)]


# ---------------------------------------------------------------------------------------------------------- buckets
def test_sizes_of_buckets() -> None:
    ratios = [
        (256, 256),
        (240, 272),
        (272, 240),
        (224, 288),
        (288, 224),
        (208, 320),
        (320, 208),
        (192, 336),
        (336, 192),
    ]
    assert DataConfig(buckets="aspect").bucket_sizes(16) == ratios
    large = DataConfig(buckets="aspect", resolution=1024).bucket_sizes(16)
    assert len(large) == len(ratios)
    assert (832, 1280) in large  # sides of 64
    assert DataConfig().bucket_sizes(16) == [(256, 256)]
    for resolution, multiple in ((32, 4), (256, 32), (512, 16), (1024, 32)):
        for h, w in DataConfig(buckets="aspect", resolution=resolution).bucket_sizes(multiple):
            assert h % multiple == w % multiple == 0
            assert abs(h * w / resolution**2 - 1) < 0.1
            assert max(h, w) <= 2 * min(h, w)


def test_the_bucket_of_a_sample() -> None:
    def bucket(width: int, height: int, characters: int, per_token: float = 1.0) -> Bucket:
        return BUCKETS[
            int(assign(np.array([width]), np.array([height]), np.array([characters]), BUCKETS, per_token)[0])
        ]

    assert bucket(100, 100, 14) == (32, 32, 16)
    assert bucket(100, 100, 15) == (32, 32, 64), "two tokens for the tokenizer's own"
    assert bucket(100, 100, 28, per_token=2) == (32, 32, 16)
    assert bucket(300, 100, 500) == (24, 44, 64)
    assert bucket(100, 300, 1) == (44, 24, 16)
    assert bucket(100, 300, 0) == (44, 24, 64), "a caption that is not known"
    assert bucket(0, 0, -1) == (32, 32, 64), "unknown size and length"
    border = (44 / 24) ** 0.5
    assert bucket(int(1000 * border) - 1, 1000, 0)[:2] == (32, 32)
    assert bucket(int(1000 * border) + 2, 1000, 0)[:2] == (24, 44)


def test_small_buckets_join_the_nearest_that_cuts_no_caption() -> None:
    # (32, 32): 64, 16; (24, 44): 64, 16; (44, 24): 64, 16
    assert merged([9, 9, 9, 9, 9, 9], BUCKETS, 9) == [0, 1, 2, 3, 4, 5]
    assert merged([9, 9, 9, 3, 9, 9], BUCKETS, 9) == [0, 1, 2, 2, 4, 5]  # the same shape, longer text
    assert merged([9, 9, 3, 0, 9, 9], BUCKETS, 9) == [0, 1, 0, 3, 4, 5]  # the nearest shape
    assert merged([0, 9, 3, 0, 0, 9], BUCKETS, 9) == [0, 1, 2, 3, 4, 5]  # nothing as long: it stays
    assert merged([9, 0, 4, 0, 1, 0], BUCKETS, 9) == [0, 1, 0, 3, 0, 5]
    assert merged([2, 0, 0, 0, 0, 0], BUCKETS, 9)[0] == 0


# --------------------------------------------------------------------------------------------------------- schedule
@pytest.mark.slow
def test_the_schedule_keeps_the_shares() -> None:
    shares = [Fraction(60), Fraction(27), Fraction(12), Fraction(1)]
    schedule = Schedule(5, shares)
    buckets = [schedule.at(step) for step in range(100 * BLOCK)]
    seen: Counter[int] = Counter()
    for step, at in enumerate(buckets):
        assert at.number == seen[at.bucket], "every step of a bucket is numbered, none twice"
        seen[at.bucket] += 1
        if (step + 1) % BLOCK == 0:
            assert all(abs(seen[c] - share / 100 * (step + 1)) < 2 for c, share in enumerate(shares))
    assert [at.bucket for at in buckets] != [Schedule(6, shares).at(step).bucket for step in range(len(buckets))]


def test_one_bucket_is_the_order_of_older_runs() -> None:
    index = random_index([257, 3, 100], [Source(1, 1.0), Source(2, 0.5)])
    plain = Order(3, index.shard_sizes, 8, None, index.sources)
    wanted = [[(p.shard, p.sample) for p in ps] for _, ps in islice(plain.steps(7, range(8)), 50)]
    assert [samples for _, samples in read(order(index, 8, buckets=BUCKETS[:1]), 7, 50, range(8))] == wanted


# ------------------------------------------------------------------------------------------------------------ order
@st.composite
def cases(draw: st.DrawFn) -> tuple[Index, int, int]:
    sources, sizes = [], []
    for _ in range(draw(st.integers(1, 2))):
        own = draw(st.lists(st.integers(0, 120), min_size=1, max_size=3).filter(any))
        sources.append(Source(len(own), draw(st.floats(0.3, 3))))
        sizes += own
    return random_index(sizes, sources, draw(st.integers(0, 99))), draw(st.integers(1, 24)), draw(st.integers(0, 2**40))


@fuzz(12)
@given(cases(), st.integers(1, 6), st.integers(0, 150))
def test_any_order_seeks_and_is_dealt_to_any_world(case: tuple[Index, int, int], world: int, first: int) -> None:
    index, batch, seed = case
    world = min(world, batch)
    whole = read(order(index, batch, seed=seed), 0, first + 20, range(batch))
    assert read(order(index, batch, seed=seed), first, 20, range(batch)) == whole[first:]
    parts = [read(order(index, batch, seed=seed), first, 20, slots_of(r, world, batch)) for r in range(world)]
    for step, ranks in zip(whole[first:], zip(*parts, strict=True), strict=True):
        assert {bucket for bucket, _ in ranks} == {step[0]}, "all ranks read one bucket"
        assert [sample for _, samples in ranks for sample in samples] == step[1]


@fuzz(12)
@given(cases())
def test_any_epoch_of_a_bucket_reads_each_of_its_samples_once(case: tuple[Index, int, int]) -> None:
    index, batch, seed = case
    seen: Counter[tuple[int, int]] = Counter()
    bucket_of: dict[tuple[int, int], set[int]] = {}
    left = 10 * BLOCK  # steps that are read after the last sample was seen
    for bucket, samples in steps(order(index, batch, epochs=1, seed=seed), 0, range(batch)):
        for sample in samples:
            if sample[0] != END_OF_DATA:
                seen[sample] += 1
                bucket_of.setdefault(sample, set()).add(bucket)
        left -= len(seen) == len(index)
        if not left:
            break
    assert set(seen.values()) == {1}
    assert all(len(buckets) == 1 for buckets in bucket_of.values())


def test_every_batch_is_of_its_bucket_and_follows_the_shares() -> None:
    index = random_index([900, 700])
    starts = [0, 900]
    wanted = assign(index.width, index.height, index.caption_length, BUCKETS, 1.0)
    steps = read(order(index, 8), 0, 400, range(8))
    for bucket, samples in steps:
        assert {int(wanted[starts[shard] + sample]) for shard, sample in samples} == {bucket}
    shares = np.bincount(wanted, minlength=len(BUCKETS)) / len(index)
    counts = np.bincount([bucket for bucket, _ in steps], minlength=len(BUCKETS)) / len(steps)
    assert np.abs(shares - counts).max() < 0.02


@pytest.mark.slow
def test_sources_keep_their_weights_over_the_buckets() -> None:
    index = random_index([900, 900], [Source(1, 3.0), Source(1, 1.0)])
    index.width[900:] = index.height[900:]  # the second source holds squares alone
    shards = Counter(shard for _, samples in read(order(index, 8), 0, 2000, range(8)) for shard, _ in samples)
    assert shards[0] / shards.total() == pytest.approx(0.75, abs=0.02)


# ------------------------------------------------------------------------------------------------------------ pixels
def test_images_are_cropped_to_the_shape_of_the_bucket() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")

    def decoded(height: int, width: int, crop: tuple[float, float] | None = None) -> np.ndarray:
        return decode_image(buffer.getvalue(), (height, width), 10**6, crop, False)

    planes = pixels.transpose(2, 0, 1)
    assert (decoded(60, 100) == planes).all()
    assert (decoded(60, 40, (0.0, 0.5)) == planes[:, :, :40]).all()
    assert (decoded(60, 40) == planes[:, :, 30:70]).all()
    assert (decoded(40, 100, (0.5, 0.999)) == planes[:, 20:]).all()
    assert decoded(24, 44).shape == (3, 24, 44)


@pytest.mark.parametrize(("orientation", "size"), [(1, (210, 100)), (1, (100, 420)), (6, (100, 420)), (6, (420, 100))])
def test_a_large_jpeg_is_decoded_smaller_but_not_below_the_bucket(orientation: int, size: tuple[int, int]) -> None:
    """Draft mode looks at both sides, and at EXIF's turn of them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (3200, 1600)).save(buffer, "JPEG", exif=exif)
    image = load_rgb(buffer.getvalue(), 10**7, at_least=size)
    assert image.height >= size[0]
    assert image.width >= size[1]
    assert image.width * image.height < 3200 * 1600
    assert (image.width > image.height) == (orientation == 1)


# ------------------------------------------------------------------------------------------------------------ config
DEBUG = "mmdit_debug_mup.yaml"


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        (DEBUG, "data.buckets=aspect", r"11 tokens a side, more than model\.pos_embed_max_size 8"),
        ("uvit_debug_mup.yaml", "data.buckets=aspect", r"11 tokens a side, .*model\.input_size 8"),
        (DEBUG, "data.text_lengths=[24,40]", r"must end with text_encoder\.max_length 48.*got \[24, 40\]"),
        (DEBUG, "data.text_lengths=[48,24]", r"data\.text_lengths must be rising"),
        ("dit_debug_mup.yaml", "data.text_lengths=[256]", r"data\.text_lengths needs a model that reads captions"),
        (DEBUG, "data.buckets=aspects", r"data\.buckets.*'none' or 'aspect'"),
        (DEBUG, "data.max_aspect=0.5", r"data\.max_aspect must be between 1 and 8"),
    ],
)
def test_refusals(config: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, [override])


def test_a_resume_with_other_buckets_is_refused() -> None:
    old = plain(load_config(DEBUG))
    del old["data"]["text_lengths"], old["data"]["buckets"]  # a run of an older version
    assert check_resume(old, load_config(DEBUG), 4) == []
    with pytest.raises(ConfigError, match=r"data\.text_lengths: \[\] in the checkpoint, \[24, 48\] now"):
        check_resume(old, load_config(DEBUG, ["data.text_lengths=[24,48]"]), 4)


def test_micro_batches_and_time_shift_follow_the_area() -> None:
    settings = ["data.buckets=aspect", "data.text_lengths=[24,48]", "model.pos_embed_max_size=16"]
    config = load_config(DEBUG, [*settings, "train.micro_batch_size=0.0625", "train.global_batch_size=64"])
    buckets = buckets_of(config)
    assert buckets[0] == (32, 32, 48)
    assert len(buckets) == 10
    rows = {bucket[:2]: micro_batch_rows(config, bucket, 1, 0.0625) for bucket in buckets}
    assert rows == {(32, 32): 4, (28, 36): 4, (36, 28): 4, (24, 44): 3, (44, 24): 3}
    flow: Any = build_objective(config, resolve(config, 1))
    keys = torch.arange(5)
    square, wide = (flow.draw(torch.zeros(5, 3, h, w), keys).t for h, w in ((32, 32), (24, 44)))
    ratio = (wide / (1 - wide)) / (square / (1 - square))  # t / (1 - t) is multiplied by the shift
    torch.testing.assert_close(ratio, torch.full((5,), (66 / 64) ** 0.5), rtol=1e-5, atol=0)
    assert image_tokens(config, Bucket(24, 44, 48)) == 66
