"""Readers: the same samples whatever the world size and workers; failures become holes."""

from __future__ import annotations

import contextlib
import io
import itertools
import resource
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

import data.batch
import data.reader
from data.batch import Batch
from data.config import AutoencoderConfig, DataConfig, TextEncoderConfig
from data.errors import DataError, SampleError
from data.images import decode_image, image_size
from data.index import ImageTextIndex, IndexSource
from data.reader import ImageTextReader, validation_batches
from data.synthetic import SyntheticReader
from data.write_shards import write_shards

from .test_index import png, write_tar

BATCH = 8


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageTextIndex:
    rng = np.random.default_rng(0)

    def image(width: int, height: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    samples = [(f"{i:03d}", image(16 + i % 5, 12 + i % 7), "png", f"caption {i}") for i in range(70)]
    return ImageTextIndex(write_shards(samples, tmp_path_factory.mktemp("shards") / "train", 40))


def reader(
    index: ImageTextIndex, rank: int = 0, world: int = 1, micro: int = 64, workers: int = 0, **options: Any
) -> ImageTextReader:
    cfg = DataConfig(shards="unused", resolution=8, num_workers=workers, **options)
    return ImageTextReader(index, cfg, 5, BATCH, 0.3, rank, world, micro)


def rows(batches: list[Batch]) -> list[tuple[object, ...]]:
    """The real rows of micro-batches, comparable with ==."""
    result = []
    for b in batches:
        assert b.images is not None
        for i in range(len(b.names)):
            if b.names[i]:
                pixels = b.images[i].numpy().tobytes()
                result.append((b.names[i], int(b.keys[i]), pixels, b.captions[i], float(b.weight[i])))
    return result


def take(r: ImageTextReader, first: int, count: int) -> list[list[tuple[object, ...]]]:
    return [rows(batches) for _, batches in islice(r.batches(first), count)]


@pytest.mark.slow
def test_batches_do_not_depend_on_world_size_micro_batch_or_workers(index: ImageTextIndex) -> None:
    whole = take(reader(index), 0, 12)
    assert all(len(step) == BATCH for step in whole)
    for world, micro in ((2, 64), (3, 2), (3, 64), (8, 1), (1, 3)):
        parts = [take(reader(index, r, world, micro), 0, 12) for r in range(world)]
        assert [list(chain.from_iterable(step)) for step in zip(*parts, strict=True)] == whole
    assert take(reader(index, workers=2, micro=4), 0, 12) == whole


def test_batches_hold_the_shares_of_sources_of_any_size_at_any_world_size(tmp_path: Path) -> None:
    sizes, weights, batch = {"small": 3, "middle": 40, "large": 200}, (0.1, 0.3, 0.6), 16
    shards = {
        n: write_shards([(f"{i}", png(), "png", "") for i in range(k)], tmp_path / n, k) for n, k in sizes.items()
    }
    index = ImageTextIndex([IndexSource(shards[n], weight=w) for n, w in zip(sizes, weights, strict=True)])
    cfg = DataConfig(resolution=8, num_workers=0)

    def counts(world: int) -> list[list[int]]:
        parts = [take(ImageTextReader(index, cfg, 5, batch, 0.0, r, world, batch), 0, 30) for r in range(world)]
        steps = [
            [str(row[0]).partition("-")[0] for row in chain.from_iterable(step)] for step in zip(*parts, strict=True)
        ]
        return [[names.count(name) for name in sizes] for names in steps]

    one = counts(1)
    assert all(abs(n - batch * w) < 1 for step in one for n, w in zip(step, weights, strict=True)), one
    assert counts(3) == counts(4) == one


def test_too_little_shared_memory_is_refused(index: ImageTextIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers would wait for room without a word. Three steps of 8 images of 192 bytes, and what goes with them."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for free, workers, refused in ((4000, 2, True), (4000, 0, False), (8000, 2, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))  # noqa: B023
        batches = reader(index, 0, 2, workers=workers).batches(0)
        with pytest.raises(DataError, match="docker run --ipc host") if refused else contextlib.nullcontext():
            next(batches)


def test_too_few_open_files_are_refused(index: ImageTextIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor from a worker is one; the library would say so in a traceback, and then wait for the workers."""
    for limit, workers, refused in ((100, 2, True), (100, 0, False), (1024, 2, False)):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))  # noqa: B023
        batches = reader(index, workers=workers).batches(0)
        with pytest.raises(DataError, match="ulimit -n") if refused else contextlib.nullcontext():
            next(batches)


class WorkersInTurn:
    """Does what a DataLoader does with its workers, here: what they are told and what they read is the same."""

    def __init__(self, dataset: Any, num_workers: int, **_: Any) -> None:
        self._dataset, self._workers = dataset, num_workers

    def __iter__(self) -> Iterator[Batch]:
        infos = [SimpleNamespace(id=i, num_workers=self._workers) for i in range(self._workers)] or [None]
        workers = []
        for info in infos:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(data.reader, "get_worker_info", lambda info=info: info)
                worker = iter(self._dataset)
                workers.append(chain([next(worker)], worker))  # it looks at its number when it begins
        while True:
            yield from map(next, workers)


def copying_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize(("workers", "gpu"), [(0, False), (0, True), (1, False), (3, False), (3, True)])
def test_batches_are_copied_by_a_thread_into_page_locked_memory_on_a_gpu(
    index: ImageTextIndex, workers: int, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of one process that copies nothing."""
    whole = [batches for _, batches in islice(reader(index, micro=3).batches(2), 4)]
    copied: list[tuple[str, bool]] = []

    def concatenate(parts: list[Batch], pinned: bool) -> Batch:
        copied.append((threading.current_thread().name.partition("_")[0], pinned))
        return data.batch.concatenate(parts)

    monkeypatch.setattr(data.reader, "concatenate", concatenate)
    monkeypatch.setattr(data.reader, "DataLoader", WorkersInTurn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    stream = reader(index, micro=3, workers=workers).batches(2)
    for number, expected in enumerate(whole, 2):
        step, batches = next(stream)
        assert step == number
        for batch, other in zip(batches, expected, strict=True):
            assert all(map(torch.equal, batch.tensors(), other.tensors()))
            strings = (batch.names, batch.captions, batch.full_captions, batch.holes, batch.read)
            assert strings == (other.names, other.captions, other.full_captions, other.holes, other.read)
    del stream
    assert set(copied) == ({("batches" if workers else "MainThread", gpu)} if workers or gpu else set())
    assert not copying_threads()


def test_the_next_batch_is_copied_while_a_step_is_trained_on(
    index: ImageTextIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is dropped waits for the copy, so that no reader process is forked beside it."""
    begun: Queue[int] = Queue()
    go_on = threading.Semaphore(1)

    def concatenate(parts: list[Batch], pinned: bool) -> Batch:
        begun.put(len(parts))
        go_on.acquire(timeout=10)
        return data.batch.concatenate(parts, pinned)

    monkeypatch.setattr(data.reader, "concatenate", concatenate)
    monkeypatch.setattr(data.reader, "DataLoader", WorkersInTurn)
    stream = reader(index, workers=2).batches(0)
    next(stream)
    assert [begun.get(timeout=10), begun.get(timeout=10)] == [2, 2], "the second copy has begun and is held up"
    assert copying_threads()
    threading.Timer(0.1, go_on.release).start()
    del stream
    assert not copying_threads()


@pytest.mark.parametrize("where", ["reading", "copying"])
def test_an_error_reaches_the_training_thread_and_leaves_no_thread(
    index: ImageTextIndex, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(WorkersInTurn):
        def __iter__(self) -> Iterator[Batch]:
            yield from islice(super().__iter__(), 5)
            raise MemoryError("planted")

    copies = itertools.count()

    def concatenate(parts: list[Batch], pinned: bool) -> Batch:
        if where == "copying" and next(copies) == 2:
            raise MemoryError("planted")
        return data.batch.concatenate(parts, pinned)

    monkeypatch.setattr(data.reader, "concatenate", concatenate)
    monkeypatch.setattr(data.reader, "DataLoader", Failing if where == "reading" else WorkersInTurn)
    with pytest.raises(MemoryError, match="planted"):
        for _ in reader(index, workers=2).batches(0):
            pass
    assert not copying_threads()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 3])
def test_keys_of_each_step_at_any_world_size_before_and_after_a_resume_at_another(
    index: ImageTextIndex, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.reader, "DataLoader", WorkersInTurn)

    def keys(world: int, first: int, count: int) -> list[list[object]]:
        ranks = [take(reader(index, rank, world, workers=workers), first, count) for rank in range(world)]
        return [[row[:2] for row in chain.from_iterable(step)] for step in zip(*ranks, strict=True)]

    whole = [[row[:2] for row in step] for step in take(reader(index), 0, 20)]
    worlds = (1, 2, 3, 4, 6)
    for world, other in zip(worlds, (*worlds[1:], 1), strict=True):
        assert keys(world, 0, 9) + keys(other, 9, 11) == whole, (world, other)


def test_a_resumed_reader_goes_on_where_it_was(index: ImageTextIndex) -> None:
    whole = take(reader(index), 0, 20)
    assert take(reader(index), 13, 7) == whole[13:]
    assert [step for step, _ in islice(reader(index).batches(13), 2)] == [13, 14]


@pytest.mark.parametrize("world", [1, 3, 5])
def test_all_ranks_run_the_same_micro_batches(index: ImageTextIndex, world: int) -> None:
    shapes = set()
    for rank in range(world):
        _, batches = next(reader(index, rank, world, micro=2).batches(0))
        shapes.add((len(batches), *(len(b.names) for b in batches)))
        assert sum(b.read for b in batches) == sum(float(b.weight.sum()) for b in batches)
        for b in batches:
            fill_up = torch.tensor([not name for name in b.names])
            assert (b.weight[fill_up] == 0).all()
            assert b.images is not None
            assert (b.images[fill_up] == 0).all()
            assert len(b.keys) == len(b.captions) == len(b.weight)
    assert len(shapes) == 1
    with pytest.raises(DataError, match="world size 9"):
        reader(index, 0, 9)


def test_draws_depend_on_the_key_alone(index: ImageTextIndex) -> None:
    dropped, kept = 0, 0
    for _, batches in islice(reader(index).batches(0), 60):
        for caption, full in zip(batches[0].captions, batches[0].full_captions, strict=True):
            assert caption in ("", full)
            assert full.startswith("caption ")
            dropped += caption == ""
            kept += caption != ""
    assert 0.2 < dropped / (dropped + kept) < 0.4


def test_reading_does_not_touch_the_generators_of_training(index: ImageTextIndex) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(reader(index).batches(0))
    next(SyntheticReader(*SYNTHETIC, 0, 4, 0, 1, 4).batches(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_epoch_ends_in_rows_without_weight(index: ImageTextIndex) -> None:
    _, [batch] = next(reader(index, epochs=1).batches(1000))
    assert batch.weight.sum() == 0
    assert batch.names == [""] * BATCH
    assert batch.holes == []
    assert batch.read == 0


def jpeg(mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 0).save(buffer, "JPEG")
    return buffer.getvalue()


def huge_png() -> bytes:
    """A PNG whose header claims 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_failures_are_holes_with_a_reason(tmp_path: Path) -> None:
    good = png(size=(16, 16))
    cases: dict[str, tuple[dict[str, bytes], str | None]] = {
        "cmyk": ({"jpg": jpeg("CMYK"), "txt": b"x"}, None),
        "tiny": ({"png": png(size=(1, 1)), "txt": b"x"}, None),
        "grey": ({"jpg": jpeg("L"), "txt": b"x"}, None),
        "corrupt": ({"png": good[:40] + b"junk" * 10, "txt": b"x"}, "image: unreadable"),
        "half": ({"jpg": jpeg(size=(300, 200))[:700], "txt": b"x"}, "image: truncated"),
        "text": ({"png": b"no image", "txt": b"x"}, "image: unreadable"),
        "empty": ({"png": b"", "txt": b"x"}, "image: empty"),
        "huge": ({"png": huge_png(), "txt": b"x"}, "image: too large"),
        "nocaption": ({"png": good}, "caption: missing"),
        "blank": ({"png": good, "txt": b" \n"}, "caption: empty"),
        "latin": ({"png": good, "txt": b"caf\xe9"}, "caption: not utf-8"),
        "badjson": ({"png": good, "json": b"[1]"}, "caption: not JSON with a caption"),
        "noimage": ({"txt": b"x"}, "image: missing"),
        "last": ({"png": good, "txt": b"x"}, "shard: short read"),
    }
    path = write_tar(
        tmp_path / "s.tar",
        {f"{key}.{ext}": data for key, (members, _) in cases.items() for ext, data in members.items()},
    )
    index = ImageTextIndex([path])
    with open(path, "r+b") as file:  # after the index was built, so that the member is expected whole
        file.truncate(int(index.image_offset[len(cases) - 1]) + 5)

    cfg = DataConfig(shards="unused", resolution=8, num_workers=0, epochs=1)
    found: dict[str, str | None] = {}
    keys = []
    for _, [batch] in islice(ImageTextReader(index, cfg, 0, 1, 0.0, 0, 1, 1).batches(0), len(cases)):
        found[batch.names[0].removeprefix("s/")] = batch.holes[0] if batch.holes else None
        assert batch.read == 1
        assert float(batch.weight[0]) == float(not batch.holes)
        keys.append(int(batch.keys[0]))
    # The tar was cut inside "last": its caption lies behind the cut and is what fails first.
    assert found == {key: reason for key, (_, reason) in cases.items()}
    assert len(set(keys)) == len(cases)


@pytest.mark.parametrize("crop", ["random", "center"])
def test_where_images_are_cut(tmp_path: Path, crop: Literal["random", "center"]) -> None:
    """A wide image, eight times: elsewhere each time, or in its middle."""
    wide = np.zeros((8, 64, 3), np.uint8)
    wide[...] = 4 * np.arange(64)[:, None]
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    index = ImageTextIndex([write_tar(tmp_path / "s.tar", {"a.png": buffer.getvalue(), "a.txt": b"x"})])
    cfg = DataConfig(shards="unused", resolution=8, num_workers=0, crop=crop, flip=0.0)
    batches = islice(ImageTextReader(index, cfg, 0, 1, 0.0, 0, 1, 1).batches(0), 8)
    left = {int(batch.images[0, 0, 0, 0]) // 4 for _, [batch] in batches if batch.images is not None}
    assert left == {28} if crop == "center" else len(left) > 4


def test_a_shard_that_vanished_is_a_hole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"a.png": png(), "a.txt": b"x"})
    index = ImageTextIndex([path])
    path.unlink()
    _, [batch] = next(reader(index).batches(0))
    assert batch.holes == ["store: cannot be opened"] * BATCH
    assert batch.names[0] == "s/a"


def test_decoding_crops_flips_and_converts() -> None:
    array = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    data, limit = buffer.getvalue(), 10_000
    expected = array.transpose(2, 0, 1)
    assert (decode_image(data, 8, limit, None, False) == expected[:, :, 2:10]).all()
    assert (decode_image(data, 8, limit, (0.0, 0.0), True) == expected[:, :, 7::-1]).all()
    assert (decode_image(data, 8, limit, (0.999, 0.0), False) == expected[:, :, 4:]).all()
    with pytest.raises(SampleError, match="too large"):
        decode_image(data, 8, 8 * 12 - 1, None, False)

    buffer = io.BytesIO()
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(buffer, "PNG")
    assert (decode_image(buffer.getvalue(), 4, limit, None, False) == 255).all()  # transparent: white
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 9), 0x8000, np.uint16)).save(buffer, "PNG")
    assert (decode_image(buffer.getvalue(), 4, limit, None, False) == 0x80).all()

    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    assert image_size(buffer.getvalue()) == (20, 40)
    assert decode_image(buffer.getvalue(), 4, limit, None, False).shape == (3, 4, 4)

    sliver = io.BytesIO()
    Image.new("RGB", (1, 9000), "red").save(sliver, "PNG")
    assert decode_image(sliver.getvalue(), 16, limit, None, False).shape == (3, 16, 16)


def test_a_large_jpeg_is_reduced_like_a_full_decode() -> None:
    x, y = np.meshgrid(np.linspace(0, 255, 640), np.linspace(0, 255, 512))
    array = np.stack([x, y, 255 - x], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=95)
    fast = decode_image(buffer.getvalue(), 32, 10**6, None, False).astype(int)
    slow = np.asarray(Image.fromarray(array[:, 64:576]).resize((32, 32), Image.Resampling.BOX)).astype(int)
    assert np.abs(fast - slow.transpose(2, 0, 1)).max() < 6


def test_a_photograph_is_decoded_near_to_a_full_decode() -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 40, 3), np.uint8))
    picture = coarse.resize((1000, 1500), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    fast = decode_image(buffer.getvalue(), 256, 10**7, None, False).astype(int)
    whole = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB").crop((0, 250, 1000, 1250))
    slow = np.asarray(whole.resize((256, 256), Image.Resampling.BICUBIC, reducing_gap=2.0)).transpose(2, 0, 1)
    assert np.abs(fast - slow).mean() < 2.5
    assert (fast == decode_image(buffer.getvalue(), 256, 10**7, None, False)).all()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_validation_is_a_fixed_bank(index: ImageTextIndex, world: int) -> None:
    cfg = DataConfig(shards="unused", resolution=8)
    whole = rows(list(validation_batches(index, cfg, 20, 0, 1, 6)))
    assert len({row[0] for row in whole}) == 20
    assert {str(row[0]).split("/")[0] for row in whole} == {"train-000000", "train-000001"}
    parts = [list(validation_batches(index, cfg, 20, r, world, 6)) for r in range(world)]
    assert list(chain.from_iterable(rows(part) for part in parts)) == whole
    assert len({tuple(len(b.names) for b in part) for part in parts}) == 1
    assert len(rows(list(validation_batches(index, cfg, 1000, 0, 1, 6)))) == len(index)


SYNTHETIC = (
    DataConfig(resolution=32),
    TextEncoderConfig(max_length=12, width=10, dropout=0.3),
    AutoencoderConfig(channels=4, downsample=8),
)


def test_a_synthetic_bank_may_be_smaller_than_the_world() -> None:
    """Ranks without a sample have rows of weight 0, as many as the others."""
    ranks = [next(SyntheticReader(*SYNTHETIC, 1, 2, rank, 3, 4).batches(0))[1] for rank in range(3)]
    assert [sum(float(batch.weight.sum()) for batch in batches) for batches in ranks] == [1, 1, 0]
    assert len({len(batches) for batches in ranks}) == 1


def test_synthetic_rows_depend_on_the_key_alone() -> None:
    def collect(world: int, micro: int, first: int) -> list[tuple[object, ...]]:
        ranks = [
            list(islice(SyntheticReader(*SYNTHETIC, 1, 8, r, world, micro).batches(first), 4)) for r in range(world)
        ]
        found = []
        for step in zip(*ranks, strict=True):
            for _, batches in step:
                for b in batches:
                    assert b.latents is not None
                    assert b.text_states is not None
                    assert b.text_mask is not None
                    assert b.latents.shape[1:] == (4, 4, 4)
                    assert b.text_states.shape[1:] == (12, 10)
                    assert (b.text_states[~b.text_mask] == 0).all()
                    found += [
                        (b.names[i], b.captions[i], b.latents[i].numpy().tobytes(),
                         b.text_states[i].numpy().tobytes(), int(b.text_mask[i].sum()))
                        for i in range(len(b.names)) if b.weight[i]
                    ]  # fmt: skip
        return found

    whole = collect(1, 8, 0)
    assert len(whole) == 32
    assert whole[9][0] == "synthetic/9"
    assert collect(3, 2, 0) == whole
    assert collect(2, 8, 2)[:16] == whole[16:]
    assert {row[4] for row in whole if not row[1]} == {1}
    assert len({row[4] for row in whole}) > 4
