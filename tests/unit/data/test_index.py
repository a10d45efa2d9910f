"""Shards, their index, and what plain webdataset makes of them."""

from __future__ import annotations

import gc
import io
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from data.captions import CaptionRules
from data.config import DataConfig
from data.errors import DataError, SampleError
from data.images import load_rgb
from data.index import ImageTextIndex
from data.samples import SampleFiles, captions_of
from data.shard_index import ABSENT, index_path, load_index
from data.storage import Remote, open_shards
from data.write_shards import write_shards
from tests.helpers.servers import serve


def png(colour: str = "red", size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int) -> list[tuple[str, bytes, str, str]]:
    return [(f"{i:04d}", png(size=(i + 1, 4)), "png", f"caption {i}") for i in range(count)]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_written_shards_are_indexed_and_plain_webdataset_reads_them(tmp_path: Path) -> None:
    paths = write_shards(samples(5), tmp_path / "train", per_shard=2)
    assert [p.name for p in paths] == [f"train-00000{i}.tar" for i in range(3)]
    index = ImageTextIndex(paths)
    assert index.shard_sizes == [2, 2, 1]
    assert index.name(1, 1) == "train-000001/0003"
    assert index.locate(index.row(2, 0)) == (2, 0)
    assert index.width.tolist() == [1, 2, 3, 4, 5]
    assert index.caption_length.tolist() == [9] * 5

    read = list(WebDataset([str(p) for p in paths], shardshuffle=False))
    assert [(s["__key__"], s["png"], s["txt"].decode()) for s in read] == [(k, d, c) for k, d, _, c in samples(5)]
    gc.collect()  # webdataset leaves the last shard open: let the warning come here


def test_shards_are_the_same_bytes_each_time_and_carry_no_folder(tmp_path: Path) -> None:
    first = write_shards(samples(3), tmp_path / "a" / "train", 10)
    second = write_shards(samples(3), tmp_path / "b" / "train", 10)
    assert first[0].read_bytes() == second[0].read_bytes()
    assert ImageTextIndex(first).fingerprint == ImageTextIndex(second).fingerprint
    third = write_shards(samples(4), tmp_path / "c" / "train", 10)
    assert ImageTextIndex(third).fingerprint != ImageTextIndex(first).fingerprint


def test_a_failure_leaves_nothing_and_older_shards_are_kept(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, bytes, str, str]]:
        yield from samples(3)
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        write_shards(broken(), tmp_path / "train", 2)
    assert list(tmp_path.iterdir()) == []
    write_shards(samples(1), tmp_path / "train", 2)
    with pytest.raises(DataError, match=r"train-000000\.tar exists"):
        write_shards(samples(1), tmp_path / "train", 2)


def test_webdataset_layout_and_odd_members(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "odd.tar",
        {
            "a/b.JPG": png(),
            "a/b.txt": b"text",
            "a/b.json": b'{"caption": "longer text"}',
            "c.d.png": png(),  # key "c", extension "d.png": no image of ours
            "e.webp": b"",
            "e.json": b'{"caption": "hello"}',
            "f.png": png(),
            "../../g.txt": b"\xe4",
            "h.mask": b"3",
        },
    )
    index = ImageTextIndex([path])
    assert [index.name(0, i) for i in range(4)] == ["odd/a/b", "odd/e", "odd/f", "odd/../../g"]
    assert index.caption_length.tolist() == [4, 5, ABSENT, ABSENT]
    assert index.width.tolist() == [6, 0, 6, 0]
    assert index.caption_is_json.tolist() == [False, True, False, False]
    assert index.image_offset[3] == ABSENT


def test_a_stale_or_damaged_index_is_built_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"a.png": png(), "a.txt": b"one"})
    size = path.stat().st_size
    assert load_index(path).table.column("key").to_pylist() == ["a"]
    stored = index_path(path).stat().st_mtime_ns
    load_index(path)
    assert index_path(path).stat().st_mtime_ns == stored

    write_tar(path, {"b.png": png("blue"), "b.txt": b"two"})
    assert path.stat().st_size == size  # tars are padded: the size alone does not tell
    assert load_index(path).table.column("key").to_pylist() == ["b"]
    index_path(path).write_bytes(b"PAR1 nonsense")
    assert load_index(path).table.column("key").to_pylist() == ["b"]
    older = pq.read_table(index_path(path)).drop_columns(["numbers"])
    pq.write_table(older.replace_schema_metadata({**(older.schema.metadata or {}), b"version": b"4"}), index_path(path))
    assert load_index(path).table.column("key").to_pylist() == ["b"]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("image_size", 1 << 30), ("image_offset", 1 << 40), ("image_offset", -2), ("caption_size", -1),
        ("text_size", 1 << 62), ("width", -1), ("label", -3), ("key", None), ("caption_offset", None),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_built_again(column: str, value: int | None, tmp_path: Path) -> None:
    """Rows lie within the tar: a stored one that says otherwise would have a reader allocate what it claims."""
    path = write_tar(tmp_path / "s.tar", {f"{key}.{end}": png() for key in "abc" for end in ("png", "txt")})
    genuine = load_index(path).table
    stored = pq.read_table(index_path(path))
    values = [value, *stored.column(column).to_pylist()[1:]]
    number = stored.schema.get_field_index(column)
    lying = stored.set_column(number, stored.schema.field(number), pa.array(values, stored.schema.field(number).type))
    pq.write_table(lying, index_path(path))
    assert load_index(path).table.equals(genuine)
    assert pq.read_table(index_path(path)).equals(stored), "and stored anew"


def test_a_flipped_bit_of_an_index_is_found(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {f"{n:04d}.{end}": png() for n in range(50) for end in ("png", "txt")})
    genuine, content = load_index(path).table, index_path(path).read_bytes()
    for at in range(100, len(content), len(content) // 40):
        flipped = bytearray(content)
        flipped[at] ^= 4
        index_path(path).write_bytes(flipped)
        assert load_index(path).table.equals(genuine), at


def test_an_index_that_cannot_be_stored_is_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "s.tar", {"a.png": png(), "a.txt": b"one"})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    assert load_index(path).table.num_rows == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s.tar"]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("compress", "name"), [("gzip", "gzip"), ("bzip2", "bzip2"), ("xz", "xz"), ("zstd -q", "zstd"), ("lz4 -q", "lz4")]
)
def test_a_compressed_tar_is_named_with_what_unpacks_it(tmp_path: Path, compress: str, name: str, remote: bool) -> None:
    """As SA-1B is served, under the name of a plain one."""
    if shutil.which(compress.split()[0]) is None:
        pytest.skip(f"{compress.split()[0]} is not installed")
    plain = write_tar(tmp_path / "a.tar", {"a.png": png(), "a.txt": b"x"})
    (tmp_path / "plain").mkdir()
    (tmp_path / "sa_0.tar").write_bytes(subprocess.check_output([*compress.split(), "-c", str(plain)]))
    with serve(tmp_path) as server:
        shard = Remote(f"{server.url}/sa_0.tar") if remote else tmp_path / "sa_0.tar"
        with pytest.raises(DataError, match=rf"sa_0\.tar is compressed by {name}.*decompress it once, ") as caught:
            load_index(shard)
    command = str(caught.value).rpartition("once, ")[2].replace("FILE", "sa_0.tar")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert load_index(tmp_path / "plain" / "sa_0.tar").table.equals(load_index(plain).table)


def test_other_files_that_were_downloaded_as_tars_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "zip.tar", "w") as file:
        file.writestr("a.png", png())
    (tmp_path / "page.tar").write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>" * 99)
    (tmp_path / "pointer.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name, said in (
        ("zip", r"is a zip file, not a tar: unpack it.*launch/shard\.py --images"),
        ("page", "is a web page, not a tar: download the file itself"),
        ("pointer", "is a git-lfs pointer, not the file: run git lfs pull"),
    ):
        with pytest.raises(DataError, match=rf"{name}\.tar {said}"):
            load_index(tmp_path / f"{name}.tar")


def test_a_truncated_tar_keeps_its_first_samples(tmp_path: Path) -> None:
    [path] = write_shards(samples(3), tmp_path / "t", 10)
    whole = load_index(path).table
    end = whole.column("image_offset")[2].as_py() + 10
    path.write_bytes(path.read_bytes()[:end])
    assert load_index(path).table.num_rows == 3


def test_open_shards(tmp_path: Path) -> None:
    write_shards(samples(5), tmp_path / "train", 2)
    names = [f"train-00000{i}.tar" for i in range(3)]
    for spec in (
        str(tmp_path),
        f"{tmp_path}/train-{{000000..000002}}.tar",
        f"{tmp_path}/train-*.tar",
        f"{tmp_path}/train-00000{{0,1}}.tar, {tmp_path}/train-000002.tar",
    ):
        assert [p.name for p in open_shards(spec)] == names


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("DIR/train-{000000..000003}.tar", r"train-000001\.tar does not exist.* those that exist: '.*/train-\*\.tar'"),
        ("DIR/nothing", "nothing does not exist"),
        ("DIR/empty", r"no \.tar file matches"),
        ("DIR/val-*.tar", r"no \.tar file matches"),
    ],
)
def test_missing_shards_are_named(tmp_path: Path, spec: str, message: str) -> None:
    write_shards(samples(1), tmp_path / "train", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_shards(spec.replace("DIR", str(tmp_path)))


def test_a_file_that_is_no_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"bad\.tar"):
        load_index(path)


@pytest.mark.parametrize("content", [b"", bytes(10240), b"text", b"macOS"])
def test_a_shard_without_samples_is_skipped_and_told(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_tar(tmp_path / "t" / "b.tar", {"0.png": png(), "0.txt": b"x"})
    alone = ImageTextIndex([good])
    empty = tmp_path / "t" / ("._b.tar" if content == b"macOS" else "a.tar")
    empty.write_bytes(content)
    if content == b"text":
        write_tar(empty, {"a.txt": b"only text"})
    index = ImageTextIndex(open_shards(str(tmp_path / "t")), tmp_path / "cache")
    assert [index.name(*index.locate(i)) for i in range(len(index))] == ["b/0"]
    assert index.fingerprint == alone.fingerprint, "it may be removed in mid-run"
    caplog.clear()
    ImageTextIndex(open_shards(str(tmp_path / "t")), tmp_path / "cache")
    assert f"shards without a sample, which are skipped: 1, the first in '{empty.name}'" in caplog.text
    good.unlink()
    with pytest.raises(DataError, match=r"no shard of .* holds a sample: .*skipped: 1.*launch/shard.py"):
        ImageTextIndex(open_shards(str(tmp_path / "t")))


def tar_of(*names: str) -> bytes:
    """A tar of these members in this order, whose names may come twice."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            info, data = tarfile.TarInfo(name), png() if name.endswith(("png", "jpg")) else b"x"
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "keys", "remark"),
    [
        (tar_of("0.png", "1.png", "0.txt", "1.txt"), "01", "several places of their tar, .*sort=name.*: 2, .*'0'"),
        (tar_of("0.png", "1.png", "1.txt", "0.txt"), "01", "several places of their tar.*: 1, .*'0'"),
        (tar_of("0.png", "0.txt", "1.png", "1.txt", "0.png", "0.txt"), "010", "the key of one before them.*: 1, .*'0'"),
        (tar_of("0.jpg", "0.png", "0.txt"), "0", "several images, of which the last.*: 1, .*'0'"),
        (tar_of("0.png", "0.txt", "0.b.png", "a.b.png"), "0", "first dot.*: 1, .*'a.b.png'"),
        (tar_of("0.png", "0.txt", "README", "x.pdf", "d/._0.png"), "0", "belong to no sample.*: 3, .*'README'"),
        (tar_of("0.png", "0.txt", "1.txt"), "01", "without an image: 1, .*'1'"),
        (tar_of("0.png", "0.txt") + tar_of("1.png"), "0", "end early.*: 1, .*another tar begins .* tar -A"),
        (tar_of("0.png", "0.txt")[:2000], "0", "end early.*: 1, .*no end mark"),
        (tar_of("0.png", "0.txt", "0.mask.png", "d/1.png", "d/1.txt", "2.webp") + bytes(99), ["0", "d/1", "2"], None),
    ],
)
def test_members_are_joined_by_key_and_what_is_odd_is_told(
    content: bytes, keys: Sequence[str], remark: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    index = ImageTextIndex([tmp_path / "s.tar"])
    assert [index.name(0, i) for i in range(len(index))] == [f"s/{key}" for key in keys]
    [said] = index.remarks or [""]
    assert (re.search(remark, said) and said in caplog.text) if remark else not said
    if remark and ("places" in remark or "before" in remark):
        assert (index.image_offset != ABSENT).all()
        assert (index.caption_length == 1).all()


def test_a_damaged_packed_index_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each of its files, cut or with a flipped bit; and the arrays that are stored beside it."""
    path = write_tar(tmp_path / "s.tar", {f"{n:04d}.{end}": png() for n in range(20) for end in ("png", "txt")})
    names, widths, made = [], np.arange(5), 0

    def make() -> np.ndarray:
        nonlocal made
        made += 1
        return widths

    def opened() -> ImageTextIndex:
        index = ImageTextIndex([path], tmp_path / "cache")
        assert [index.name(0, n) for n in range(20)] == names
        assert index.stored_array("widths", make).tolist() == widths.tolist()
        return index

    names = [ImageTextIndex([path]).name(0, n) for n in range(20)]
    folder = opened()._packed
    opened()
    assert made == 1
    assert not caplog.records
    for name in ("set.json", "rows.bin", "keys.bin", "captions.bin", "widths.npy"):
        for kind in ("cut", "flip"):
            content = bytearray((folder / name).read_bytes() or b"x")
            if kind == "cut":
                del content[len(content) // 2 :]
            else:
                content[len(content) // 2] ^= 16
            if bytes(content) != (folder / name).read_bytes():
                (folder / name).write_bytes(content)
                opened()
                assert bytes(content) != (folder / name).read_bytes(), (name, kind)
    assert "is damaged: it is made anew" in caplog.text


def test_the_field_of_the_caption_is_chosen(tmp_path: Path) -> None:
    """The first that is filled, in the .json or as a plain member, whatever the order in the tar."""
    members = {
        "a.png": png(), "a.txt": b"alt", "a.json": b'{"llava": ["one", "two"], "caption": "no"}',
        "b.json": b'{"llava": null}', "b.blip": b"from blip", "b.png": png(), "b.txt": b"alt",
        "c.png": png(), "c.blip": b" ", "c.txt": b"alt",
        "d.png": png(), "d.json": b'{"caption": "no"}',
    }  # fmt: skip
    path = write_tar(tmp_path / "s.tar", members)
    index = ImageTextIndex([path], tmp_path / "cache", rules=CaptionRules(("llava", "blip", "txt")))
    files = SampleFiles(index, DataConfig(), images_only=False)
    texts = [captions_of(index, files.sample(0, i)).texts for i in range(3)]
    assert texts == [["one", "two"], ["from blip"], ["alt"]]
    assert index.caption_length.tolist() == [3, 9, 3, 0]
    usual = ImageTextIndex([path], tmp_path / "cache")
    assert usual.caption_length.tolist() == [3, 3, 3, 2], "each choice has an index of its own"
    files = SampleFiles(usual, DataConfig(), images_only=False)
    assert [captions_of(usual, files.sample(0, i)).texts for i in (0, 3)] == [["alt"], ["no"]]


def test_images_of_other_formats_are_named(tmp_path: Path) -> None:
    """By their extension in the index, by their bytes where that lies."""
    gif = io.BytesIO()
    Image.new("P", (2, 2)).save(gif, "GIF")
    other = {"a.png": gif.getvalue(), "b.heic": b"\0\0\0\x18ftypheic" + b"\0" * 9, "c.jpg": b"<!DOCTYPE html><p>404"}
    index = ImageTextIndex([write_tar(tmp_path / "s.tar", {**other, "d.gif": gif.getvalue(), "d.png": png()})])
    files, reasons = SampleFiles(index, DataConfig(), images_only=True), []
    for number in range(len(index)):
        try:
            load_rgb(files.sample(0, number).member("image"), 10**6)
        except SampleError as error:
            reasons.append(str(error))
    assert reasons == [f"image: {kind}, expected jpeg, png or webp" for kind in ("gif", "heic", "a web page")]
    path = write_tar(tmp_path / "t.tar", {"a.heic": b"x", "a.txt": b"x", "b.gif": b"x"})
    with pytest.raises(DataError, match=r"formats that are not read \(1 x heic, 1 x gif\): convert them to one of jpg"):
        load_index(path)
