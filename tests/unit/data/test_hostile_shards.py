"""Tars, images and captions that are broken or meant to harm: read rightly, or holes; never a hang or another error."""

from __future__ import annotations

import gc
import io
import json
import os
import tarfile
import tracemalloc
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter

from data import images
from data.buckets import BucketOrder
from data.config import Bucket, DataConfig, SourceConfig
from data.errors import DataError, SampleError
from data.image_parts import has_more_scans
from data.images import decode_image, image_size
from data.index import ROW, ImageTextIndex, open_index
from data.order import Source
from data.reader import ImageTextReader
from data.shard_index import ABSENT, SCHEMA, index_path, load_index
from data.write_shards import write_shards
from tests.helpers.fuzz import count_samples, counted, fuzz

from .test_index import png, write_tar

FUZZ = fuzz(150, deadline=20_000)  # ms: a hang, not a busy machine


def read_all(path: Path) -> dict[str, str | None]:
    """Name -> reason of its hole, or None, of one epoch over a shard, whatever its index says."""
    index = ImageTextIndex([path])
    cfg = DataConfig(shards="unused", resolution=8, num_workers=0, epochs=1)
    found = {}
    for _, [batch] in islice(ImageTextReader(index, cfg, 0, 1, 0.0, 0, 1, 1).batches(0), len(index)):
        found[batch.names[0]] = batch.holes[0] if batch.holes else None
    return found


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=3, verbose=0) as sink:
        for i in range(5):
            sink.write({"__key__": f"folder/{i}", "png": png(size=(8 + i, 8)), "txt": f"number {i}"})
            sink.write({"__key__": f"j{i}", "jpg": jpeg(), "json": {"caption": "in json", "other": 1}, "cls": i})
    paths = sorted(tmp_path.glob("*.tar"))
    index = ImageTextIndex(paths)
    assert index.shard_sizes == [3, 3, 3, 1]
    assert index.caption_length.tolist() == [8, 7] * 5
    assert [reason for path in paths for reason in read_all(path).values()] == [None] * 10


def jpeg(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 100).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_odd_names_of_every_layout(tmp_path: Path, layout: int) -> None:
    names = ["short", "d" * 60 + "/" + "f" * 80]
    names += [] if layout == tarfile.USTAR_FORMAT else ["x" * 300, "été/猫", "/" + "y" * 200]
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=layout) as tar:
        for name in names:
            for extension, data in (("png", png(size=(9, 9))), ("txt", b"text")):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert read_all(path) == {f"s/{name}": None for name in names}
    assert [s["__key__"] for s in WebDataset(str(path), shardshuffle=False)] == names
    gc.collect()


def test_members_that_are_no_files_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
        ):
            info = tarfile.TarInfo(f"../../evil{number}.png")
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0 if kind != tarfile.LNKTYPE else 4096
            tar.addfile(info)
        for name in ("../../up", "/absolute", "same", "other", "same"):
            for extension, data in (("png", png(size=(9, 9))), ("txt", b"text")):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    before = sorted(tmp_path.parent.rglob("*"))
    index = ImageTextIndex([path])
    assert [index.name(0, i) for i in range(5)] == ["s/../../up", "s//absolute", "s/same", "s/other", "s/same"]
    assert set(read_all(path).values()) == {None}
    assert set(tmp_path.parent.rglob("*")) - set(before) <= {path.with_name("s.tar.index.parquet")}


def test_sizes_are_checked_before_pixels_are_made(tmp_path: Path) -> None:
    large = bytearray(jpeg((16, 16)))
    at = large.index(b"\xff\xc0")  # start of frame: height and width follow
    large[at + 5 : at + 9] = (20_000).to_bytes(2, "big") + (30_000).to_bytes(2, "big")
    path = write_tar(
        tmp_path / "s.tar",
        {
            "a.jpg": bytes(large),
            "a.txt": b"x",
            "b.jpg": jpeg((1, 1)),
            "b.txt": b"x",
            "c.jpg": jpeg(mode="CMYK"),
            "c.txt": b"x",
        },
    )
    tracemalloc.start()
    assert read_all(path) == {"s/a": "image: too large", "s/b": None, "s/c": None}
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()
    assert ImageTextIndex([path]).width.tolist() == [30_000, 1, 40]


def bombs() -> dict[str, bytes]:
    """Small files that took seconds or gigabytes."""
    picture = io.BytesIO()
    Image.new("L", (4000, 4000), 100).save(picture, "JPEG", progressive=True, quality=10)
    scans = picture.getvalue()
    last = scans[scans.rindex(b"\xff\xda") : -2]
    picture = io.BytesIO()
    Image.new("LA", (7000, 7000)).save(picture, "PNG", compress_level=9)
    empty_chunk = b"\0\0\0\0abCd" + zlib.crc32(b"abCd").to_bytes(4, "big")
    small = png(size=(9, 9))
    return {
        "too many scans": scans[:-2] + last * 500 + scans[-2:],
        "too large for its bytes": picture.getvalue(),
        "too many parts": jpeg()[:2] + b"\xff\xe0\x00\x02" * 10**6 + jpeg()[2:],
        "too many parts ": small[:33] + empty_chunk * 10**6 + small[33:],
    }


@pytest.mark.slow
def test_a_picture_that_would_fill_memory_or_take_minutes_is_a_hole(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for i, picture in enumerate([*(made := bombs()).values(), jpeg((3000, 2000))]):
        files |= {f"{i}.{'png' if picture[1:4] == b'PNG' else 'jpg'}": picture, f"{i}.txt": b"x"}
    # No time is asserted: what is refused is not decoded.
    reasons = [reason for _, reason in sorted(read_all(write_tar(tmp_path / "s.tar", files)).items())]
    assert reasons == [*(f"image: {reason.strip()}" for reason in made), None]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "I;16", "transparent P", "transparent RGB"])
def test_pixels_do_not_depend_on_the_bands_they_are_converted_in(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (61, 47, 4), np.uint8)
    buffer, more = io.BytesIO(), {}
    if mode == "I;16":
        picture = Image.fromarray(noise[..., :2].copy().view(np.uint16)[..., 0])
    else:
        picture = Image.fromarray(noise, "RGBA").convert(mode.removeprefix("transparent "))
    if mode.startswith("transparent"):
        more = {"transparency": 3 if mode.endswith("P") else tuple(noise[0, 0, :3].tolist())}
    picture.save(buffer, "PNG", **more)
    whole = decode_image(buffer.getvalue(), 32, 10_000, None, False)
    monkeypatch.setattr(images, "_BAND_PIXELS", 47 * 7)
    assert (decode_image(buffer.getvalue(), 32, 10_000, None, False) == whole).all()


def test_ordinary_pictures_are_within_the_bounds() -> None:
    for more in ({}, {"progressive": True}, {"progressive": True, "exif": b"Exif\0\0" + b"\xff\xda" * 30_000}):
        buffer = io.BytesIO()
        Image.effect_noise((64, 48), 90).convert("RGB").save(buffer, "JPEG", **more)
        data = buffer.getvalue() + b"\xff\xda" * 99  # a film that a phone has appended
        assert decode_image(data, 32, 64 * 48, None, False).shape == (3, 32, 32)
        assert has_more_scans(data, 1) == bool(more)
        assert not has_more_scans(data, 10)


def test_cmyk_has_the_colours_of_rgb() -> None:
    picture = Image.new("RGB", (16, 16), (200, 30, 60))
    buffer = io.BytesIO()
    picture.convert("CMYK").save(buffer, "JPEG", quality=95)
    pixels = decode_image(buffer.getvalue(), 8, 10_000, None, False)
    assert np.abs(pixels[:, 4, 4].astype(int) - [200, 30, 60]).max() < 12


BASE = {"a.png": png(size=(9, 9)), "a.txt": b"one", "b.jpg": jpeg(), "b.json": b'{"caption": "two"}', "c.jpg": jpeg()}


@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, 10_239), st.binary(min_size=1, max_size=12)), max_size=6), st.integers(0, 10_240)
)
def test_mutated_tars(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]], length: int) -> None:
    path = write_tar(tmp_path_factory.mktemp("fuzz") / "s.tar", BASE)
    data = bytearray(path.read_bytes())
    for at, new in changes:
        data[at : at + len(new)] = new
    path.write_bytes(data[: max(length, 1000)])
    with counted(DataError):
        reasons = read_all(path).values()
        assert all(reason is None or ": " in reason for reason in reasons)
        count_samples(reasons)


@FUZZ
@given(st.sampled_from([BASE["a.png"], BASE["b.jpg"]]), st.data())
def test_mutated_images(image: bytes, data: st.DataObject) -> None:
    broken = bytearray(image)
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    for use in (lambda b: decode_image(b, 8, 10**6, (0.3, 0.7), True), image_size):
        with counted(SampleError):
            use(bytes(broken))


def test_a_caption_that_would_fill_memory_is_a_hole(tmp_path: Path) -> None:
    files = {"a.png": png(), "a.json": b"[" * (17 << 20), "b.png": png(), "b.txt": b"x" * 100_001}
    files |= {"c.png": png(), "c.json": b'{"caption": "c", "segments": "' + b"x" * (2 << 20) + b'"}'}
    reasons = [reason for _, reason in sorted(read_all(write_tar(tmp_path / "s.tar", files)).items())]
    assert reasons == ["shard: member too large", "caption: too long", None]


def stored(path: Path, rows: int, **columns: object) -> pa.Table:
    """A table of so many rows that says it is the index of a shard; columns: other values than zeros."""
    made = {}
    for field in SCHEMA:
        text = {"key": "k", "numbers": ""}
        value = columns.get(field.name, text.get(field.name, False if pa.types.is_boolean(field.type) else 0))
        kind = field.type if field.name not in columns or field.name in text else None
        once = pa.array(np.zeros(rows, np.int32))
        made[field.name] = pa.DictionaryArray.from_arrays(once, pa.array([value], kind))
        if value is None:
            made[field.name] = pa.nulls(rows, field.type)
    known = pq.read_schema(index_path(path)).metadata  # of the format and of the shard
    return pa.table(made).replace_schema_metadata({key: known[key] for key in (b"version", b"stamp")})


def within_bounds(read: Any) -> Any:
    def reads(file: Any, *options: Any, **more: Any) -> pa.Table:
        assert file.metadata.num_rows < 100, "it is read"
        return read(file, *options, **more)

    return reads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (3_000_000, {}),  # 300 MB from 200 kB
        (9, {"key": "k" * 10**5}),  # short in the file, where it stands once
        (1, {"key": "k" * 10**7}),
        (9, {"numbers": "1" * 10**5}),
        (1, {"width": "many"}),
        (1, {"image_offset": None}),
        (0, {}),
    ],
)
def test_an_index_that_unpacks_to_more_than_its_shard_needs_is_built_again(
    tmp_path: Path, rows: int, columns: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = write_shards([("a", png(), "png", "x")], tmp_path / "t", 1)
    rightly = load_index(path).table
    pq.write_table(stored(path, rows, **columns), index_path(path), store_schema=False, compression="zstd")
    monkeypatch.setattr(pq.ParquetFile, "read", within_bounds(pq.ParquetFile.read))
    table = load_index(path).table
    assert table.equals(rightly) or not rows


def test_an_index_whose_keys_are_no_text_is_built_again(tmp_path: Path) -> None:
    [path] = write_shards([("kkkkkkkk", png(), "png", "x")], tmp_path / "t", 1)
    rightly = load_index(path).table
    pq.write_table(pq.read_table(index_path(path)), index_path(path), compression="none")
    index_path(path).write_bytes(index_path(path).read_bytes().replace(b"kkkkkkkk", b"\xff" * 8))
    assert load_index(path).table.equals(rightly)


@fuzz(50, deadline=20_000)
@given(st.lists(st.tuples(st.integers(0, 2**15), st.binary(min_size=1, max_size=9)), max_size=6))
def test_mutated_indexes(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]) -> None:
    path = write_tar(tmp_path_factory.mktemp("fuzz") / "s.tar", BASE)
    load_index(path)
    data = bytearray(index_path(path).read_bytes())
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new
    index_path(path).write_bytes(data)
    with counted(DataError):
        reasons = read_all(path).values()
        assert all(reason is None or ": " in reason for reason in reasons)
        count_samples(reasons)


# ----------------------------------------------------------------------------------------------- captions beside
def sa_1b(folder: Path) -> list[Path]:
    """Shards as SA-1B's: sa_N.jpg and the masks sa_N.json."""
    folder.mkdir(exist_ok=True)
    return [
        write_tar(
            folder / f"sa_{shard:06d}.tar",
            {
                f"./sa_{n}.{extension}": data
                for n in range(shard * 4 + 1, shard * 4 + 5)
                for extension, data in (("jpg", jpeg((20 + n, 16))), ("json", b'{"image": {}, "annotations": []}'))
            },
        )
        for shard in range(2)
    ]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "webdataset.parquet"])
def test_captions_beside_the_shards(tmp_path: Path, form: str) -> None:
    sa_1b(tmp_path / "sa")
    entries = [{"image_id": n, "caption": f" picture {n} é "} for n in (3, 1, 2, 5, 6, 8, 99)]
    entries.append({"image_id": 7, "caption": "  "})
    captions = tmp_path / f"captions.{form}"
    if form.startswith("webdataset"):  # as the hub shows an archive of sa_N.txt
        entries = [{"__key__": f"sa_{entry['image_id']}", "txt": entry["caption"]} for entry in entries]
    if form == "jsonl":
        captions.write_text("\n".join(map(json.dumps, entries)))
    else:
        pq.write_table(pa.Table.from_pylist(entries), captions)
    cfg = DataConfig(
        shards=str(tmp_path / "sa"), captions=str(captions), resolution=8, num_workers=0, epochs=1,
        index_cache=str(tmp_path / "index"),
    )  # fmt: skip
    index = open_index(cfg)
    assert index.caption_length.tolist() == [11, 11, 11, ABSENT, 11, 11, ABSENT, 11]
    found = {}
    for _, [batch] in islice(ImageTextReader(index, cfg, 0, 1, 0.0, 0, 1, 1).batches(0), 8):
        found[batch.names[0].rpartition("_")[2]] = batch.holes[0] if batch.holes else batch.full_captions[0]
    expected = {str(n): f"picture {n} é" for n in (1, 2, 3, 5, 6, 8)}
    assert found == expected | {"4": "caption: missing", "7": "caption: missing"}

    captions.write_text('{"nothing": 1}\n')
    with pytest.raises(DataError, match=r"captions"):
        open_index(cfg)


def test_sources_have_captions_of_their_own(tmp_path: Path) -> None:
    sa_1b(tmp_path / "sa")
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"key": f"sa_{n}", "caption": f"c{n}"}) for n in range(1, 9))
    )
    write_shards([(f"{i}", png(), "png", f"own {i}") for i in range(12)], tmp_path / "own" / "t", 10)
    sources = (
        SourceConfig(str(tmp_path / "sa"), 1.0, str(tmp_path / "c.jsonl")),
        SourceConfig(str(tmp_path / "own"), 3.0),
    )
    cfg = DataConfig(sources=sources, resolution=8, num_workers=0, index_cache=str(tmp_path / "index"))
    index = open_index(cfg)
    batches = [b for _, [b] in islice(ImageTextReader(index, cfg, 0, 8, 0.0, 0, 1, 8).batches(0), 50)]
    assert not any(b.holes for b in batches)
    share = np.mean([caption.startswith("c") for b in batches for caption in b.full_captions])
    assert abs(share - 0.25) < 0.03
    other = DataConfig(
        sources=(sources[0], SourceConfig(str(tmp_path / "own"), 2.0)), index_cache=str(tmp_path / "index")
    )
    assert open_index(other).fingerprint != index.fingerprint
    assert index.samples_until_first_end() == 16


# ----------------------------------------------------------------------------------------------- memory of an index
@pytest.mark.slow
@pytest.mark.parametrize("buckets", [1, 2])
def test_memory_of_a_large_index(tmp_path: Path, buckets: int) -> None:
    """Ten bytes a sample are allowed for all processes of a machine; a process holds the order of the chunks alone."""
    shards, each, processes = 200, 11_000, 32  # a fifth of SA-1B; 8 ranks with 3 workers
    folder = tmp_path / "index"
    folder.mkdir()
    with open(folder / "rows.bin", "wb") as rows:
        rows.truncate(shards * each * ROW.itemsize)  # zeros: what is in it does not matter here
    for name in ("keys.bin", "captions.bin"):
        (folder / name).touch()
    (folder / "set.json").write_text(
        json.dumps({"shard_sizes": [each] * shards, "fingerprint": "x", "precomputed": False, "remarks": []})
    )
    index = object.__new__(ImageTextIndex)
    index._open(folder)
    index.sources = [Source(shards, 1.0)]
    lengths = [Bucket(256, 256, 64 << i) for i in range(buckets)]
    BucketOrder(0, index, lengths, 2048, None, 1.0)  # of the process that comes first, and makes the files
    tracemalloc.start()
    order = BucketOrder(0, index, lengths, 2048, None, 1.0)
    queues = order.queues(order.at(40), range(8))
    for _ in range(30):
        for queue in queues:
            run = next(queue)
            index.rows(run.shard, run.samples)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held * processes / len(index) < 10, f"{held} bytes a process"


def test_what_is_kept_beside_an_index_is_made_once(tmp_path: Path) -> None:
    [path] = write_shards([("a", png(), "png", "x")], tmp_path / "t", 1)
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(3)

    for _ in range(2):
        assert ImageTextIndex([path], tmp_path / "cache").stored_array("three", make).tolist() == [0, 1, 2]
    assert len(made) == 1
    unnamed = ImageTextIndex([path])
    assert [unnamed.stored_array("three", make).tolist() for _ in range(2)] == [[0, 1, 2]] * 2
    assert len(made) == 3
    assert not unnamed._packed.exists()


def test_index_of_a_shard_is_small(tmp_path: Path) -> None:
    assert ROW.itemsize <= 80
    [path] = write_shards([(f"{i:05d}", png(), "png", "x") for i in range(500)], tmp_path / "t", 500)
    load_index(path)
    assert os.path.getsize(f"{path}.index.parquet") < 500 * 60
