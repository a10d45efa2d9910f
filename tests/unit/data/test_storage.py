"""Shards behind URLs: the same batches as from a folder, whatever the server does; holes where it does not answer."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
from PIL import Image

from data import cache
from data.cache import BlockCache
from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.index import ImageTextIndex, open_index
from data.reader import ImageTextReader
from data.redaction import redact
from data.samples import SampleFiles, _spans, captions_of
from data.shard_index import index_path, load_index
from data.storage import Remote, RetryPolicy, open_shards
from data.write_shards import write_shards
from tests.helpers.servers import Server, serve

from .test_reader import rows

BATCH = 6
QUICK = RetryPolicy(timeout_s=1.0, retries=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 samples in 3 shards."""
    rng = np.random.default_rng(0)

    def image(i: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (12, 10 + i % 7, 3), np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    samples = [(f"{i:03d}", image(i), "png", f"caption {i}") for i in range(150)]
    path = tmp_path_factory.mktemp("remote")
    write_shards(samples, path / "train", 60)
    return path


def settings(**options: Any) -> DataConfig:
    return DataConfig(**{"shards": "unused", "resolution": 8, "num_workers": 0, "timeout_s": 5.0} | options)


def take(
    index: ImageTextIndex, first: int, count: int, cfg: DataConfig, rank: int = 0, world: int = 1
) -> list[list[tuple[object, ...]]]:
    reader = ImageTextReader(index, cfg, 3, BATCH, 0.2, rank, world, 64)
    return [rows(batches) for _, batches in islice(reader.batches(first), count)]


@pytest.fixture(scope="module")
def local(folder: Path) -> list[list[tuple[object, ...]]]:
    return take(ImageTextIndex(open_shards(str(folder))), 0, 40, settings())


def remote_index(server: Server, retry: RetryPolicy = QUICK, cache: Path | None = None) -> ImageTextIndex:
    return ImageTextIndex(open_shards(f"{server.url}/train-{{000000..000002}}.tar"), cache, retry)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.slow
def test_equal_to_a_folder_for_all_worlds_and_workers(folder: Path, local: Any, tmp_path: Path) -> None:
    with serve(folder) as server:
        index = remote_index(server)
        assert index.fingerprint == ImageTextIndex(open_shards(str(folder))).fingerprint
        assert take(index, 0, 40, settings()) == local
        for world, workers in ((2, 0), (3, 0), (4, 3), (6, 0)):
            parts = [take(index, 17, 12, settings(num_workers=workers), r, world) for r in range(world)]
            assert [list(chain.from_iterable(s)) for s in zip(*parts, strict=True)] == local[17:29], (world, workers)
        assert take(index, 5, 20, settings(prefetch_mib=1, cache_dir=str(tmp_path / "blocks"))) == local[5:25]


@pytest.mark.slow
def test_a_chunk_is_one_read(folder: Path) -> None:
    with serve(folder) as server:
        index = remote_index(server)
        server.requests.clear()
        cfg = settings()
        take(index, 0, 25, cfg)
        # Chunks of 6 samples: a slot reads 5 of them, and the first sample of the first one by itself, and one ahead.
        assert len(server.requests) <= BATCH * 7
        budget = settings()
        object.__setattr__(budget, "prefetch_mib", 0)  # not even one sample fits: then a sample is what is read
        server.requests.clear()
        assert take(index, 0, 25, budget) == take(index, 0, 25, cfg)
        assert len(server.requests) > BATCH * 20


@pytest.mark.slow
def test_a_bad_server_costs_time_only(folder: Path, local: Any) -> None:
    with serve(folder) as server:
        index = remote_index(server)
        server.faulty = 0.3
        assert take(index, 0, 12, settings(timeout_s=1.0, retries=9)) == local[:12]
        assert take(index, 0, 12, settings(timeout_s=1.0, retries=9, num_workers=2)) == local[:12]
        assert take(index, 0, 12, settings(timeout_s=1.0, retries=0)) != local[:12], "it is not as bad as it should be"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("stall", "store: timed out"),
        ("reset", "store: connection lost"),
        ("500", "store: HTTP 500, a fault of the server"),
        ("404", "store: not found"),
        ("short", "shard: short read"),
    ],
)
def test_a_server_that_fails_for_good_leaves_holes(folder: Path, fault: str, reason: str) -> None:
    with serve(folder) as server:
        index = remote_index(server)
        server.faulty, server.faults, server.stall_s = 1.0, (fault,), 60.0
        cfg = settings(timeout_s=2.0 if fault == "stall" else 60.0, retries=0)
        reader = ImageTextReader(index, cfg, 3, BATCH, 0.2, 0, 1, 64)
        begin = time.monotonic()
        batches = reader.batches(0)
        _, [batch] = next(batches)
        assert batch.holes == [reason] * BATCH
        assert all(batch.names)
        assert batch.read == BATCH
        assert time.monotonic() - begin < 50, "it has waited for the server"
        server.faulty = 0.0  # it comes back: later chunks are read
        weights = [float(b.weight.sum()) for _, [b] in islice(batches, 20)]
        assert weights[-1] == BATCH


@pytest.mark.slow
def test_a_shard_that_vanishes_is_holes_and_the_others_go_on(folder: Path, local: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with serve(copy) as server:
        index = remote_index(server)
        (copy / "train-000001.tar").unlink()
        found = take(index, 0, 40, settings(retries=0))
    for step, expected in zip(found, local, strict=True):
        assert [row[0] for row in step] == [row[0] for row in expected]
        for row, other in zip(step, expected, strict=True):
            if str(row[0]).startswith("train-000001"):
                assert row[-1] == 0.0
            else:
                assert row == other


def test_index_of_urls_is_cached_and_verified(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with serve(copy) as server:
        first = remote_index(server, cache=tmp_path / "index")
        server.requests.clear()
        assert remote_index(server, cache=tmp_path / "index").fingerprint == first.fingerprint
        assert server.requests == [], "sizes and ETags alone"
        shutil.copy(copy / "train-000000.tar", copy / "train-000002.tar")
        assert remote_index(server, cache=tmp_path / "index").shard_sizes == [60, 60, 60]
        assert {path for path, _, _ in server.requests} == {"/train-000002.tar"}, "only what changed is read"


@pytest.mark.parametrize(
    "path", ["download?file={}&sig={}", "{}?X-Amz-Signature={}&X-Amz-Date=1", "get.tar?f={}&se={}&sig=x"]
)
def test_a_query_names_the_file_and_a_signature_does_not(folder: Path, tmp_path: Path, path: str) -> None:
    """Two files of one size, keys and sizes of members, behind a server that tells no ETag."""
    names = ["one.tar", "two.tar"]
    for name, caption in zip(names, ("a red apple", "a big house"), strict=True):
        samples = [("0", (folder / "train-000000.tar").read_bytes()[512:900], "png", caption)]
        write_shards(samples, tmp_path / "set" / name.removesuffix(".tar"), 10)[0].rename(tmp_path / name)

    def file(asked: str) -> Path:
        return tmp_path / next(name for name in names if name in asked)

    with serve(file) as server:
        server.etags = False

        def index(name: str, signature: str) -> ImageTextIndex:
            shard = Remote(f"{server.url}/{path.format(name, signature)}")
            return ImageTextIndex([shard], tmp_path / "index", QUICK)

        def captions(name: str, signature: str) -> list[str]:
            cfg = settings(cache_dir=str(tmp_path / "blocks"))
            files = SampleFiles(index(name, signature), cfg, False)
            return captions_of(index(name, signature), files.sample(0, 0)).texts

        first, second = index(names[0], "s1"), index(names[1], "s1")
        assert [captions(name, "s1") for name in names] == [["a red apple"], ["a big house"]]
        assert (first.fingerprint == second.fingerprint) == path.startswith("get.tar"), "as two files of one name have"
        server.requests.clear()
        assert index(names[0], "s2").fingerprint == first.fingerprint
        assert [captions(name, "s3") for name in names] == [["a red apple"], ["a big house"]]
        assert server.requests == [], "it is the same file, of which index and blocks are kept"


def test_a_large_shard_is_indexed_through_a_window(tmp_path: Path) -> None:
    big = os.urandom(6 << 20)
    [path] = write_shards([(f"{i}", big, "jpg", "x") for i in range(4)], tmp_path / "big", 10)
    with serve(tmp_path) as server:
        index = load_index(Remote(f"{server.url}/{path.name}"), None, QUICK)
        assert index.table.equals(load_index(path).table)
        assert max(end - first for _, first, end in server.requests) <= 6 << 20


def test_messages_show_no_secret(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        url = server.url.replace("//", "//me:hunter2@") + "/a.tar?X-Amz-Signature=s3cret&b=1"
        with pytest.raises(DataError) as caught:
            ImageTextIndex(open_shards(url), None, RetryPolicy(1.0, 0))
    assert "not found" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "b=1" in str(caught.value)
    for wrong in (lambda: DataConfig(shards=url), lambda: DataConfig(sources=(SourceConfig(url),))):
        with pytest.raises(ValueError, match=r"environment") as refused:
            wrong()
        assert "hunter2" not in str(refused.value)


def test_secrets_come_from_the_environment(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(folder) as server:
        monkeypatch.setenv("MY_SIGNATURE", "s3cret")
        monkeypatch.setenv("MUDIT_VARIABLES", "OTHER, MY_SIGNATURE")
        spec = f"{server.url}/train-000000.tar?sig=${{MY_SIGNATURE}}"
        index = open_index(settings(shards=spec, index_cache=str(tmp_path)))
        assert len(index) == 60
        assert index.paths == [Remote(f"{server.url}/train-000000.tar?sig=s3cret")]
        gone = f"{server.url}/s3cret/x.tar"
        assert redact(f"no {gone}") == f"no {gone.replace('s3cret', '${MY_SIGNATURE}')}"
        assert "s3cret" not in repr(index.paths)
        monkeypatch.setenv("MUDIT_VARIABLES", "OTHER")
        with pytest.raises(DataError, match="MUDIT_VARIABLES does not list MY_SIGNATURE"):
            open_shards(spec)
        monkeypatch.setenv("MUDIT_VARIABLES", "MY_SIGNATURE")
        monkeypatch.delenv("MY_SIGNATURE")
        with pytest.raises(DataError, match="no variable MY_SIGNATURE"):
            open_shards(spec)


@pytest.mark.parametrize("spec", ["a{0..99999999999}.tar", "{0..999}" * 9, "{a,b,c,d}" * 99, "{a}" * 9999])
def test_braces_stand_for_a_bounded_number_of_paths(spec: str) -> None:
    with pytest.raises(DataError, match=r"more than (1000000 paths|100 pairs of braces)"):
        open_shards(spec)


@pytest.mark.parametrize("kind", ["folder", "pattern", "memory", "http", "s3"])
def test_shards_in_the_folders_of_a_folder_are_told_with_what_takes_them(
    folder: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """They are not taken unasked: `train` and `val` may lie there."""
    for name in ("train", "val[1]"):
        shutil.copytree(folder, tmp_path / "set" / name)
    with contextlib.ExitStack() as stack:
        spec = f"{tmp_path}/set"
        if kind == "pattern":
            spec += "/*.tar"
        elif kind == "memory":
            fsspec.filesystem("memory").put(spec, "/set", recursive=True)
            spec = "memory://set/"
        elif kind == "s3":
            spec = request.getfixturevalue("s3").removesuffix("set")
        elif kind == "http":
            address = stack.enter_context(listing(tmp_path))
            spec = f"{address}/set/"
        with pytest.raises(
            DataError, match=r"no \.tar file lies in '.*' itself, but in its folders \('.*' holds 3"
        ) as told:
            open_shards(spec, "data.val_shards")
        if kind != "s3":
            assert "'train' holds 3, 'val[1]' holds 3" in unquote(str(told.value))
        pattern = str(told.value).rpartition(" by ")[2].strip("'")
        assert len(open_shards(pattern)) == (3 if kind == "s3" else 6)


@contextlib.contextmanager
def listing(folder: Path) -> Iterator[str]:
    """The address of a server that lists its folders."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_folder_without_shards_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.tar file matches '.*'; build shards"):
        open_shards(str(tmp_path))
    (tmp_path / "a.tar.zst").touch()
    with pytest.raises(DataError, match=r"has no .tar file, but compressed ones \('.*a\.tar\.zst'\).*decompress"):
        open_shards(str(tmp_path))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("abfs://container/a.tar", "adlfs"),
        ("nothing://a.tar", "nothing"),
        ("http://127.0.0.1:1/a.tar", "cannot be read"),
    ],
)
def test_what_cannot_be_opened_is_named(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageTextIndex(open_shards(url), None, RetryPolicy(1.0, 0))


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[str]:
    """The URL of a bucket with the shards, on moto's server in a process of its own."""
    code = (
        "from moto.server import ThreadedMotoServer as S; import sys; s = S('127.0.0.1', 0, verbose=False); s.start();"
        "print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, pytest.MonkeyPatch.context() as patch:
        for name, value in (
            keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{process.stdout.readline().strip()}"}
        ).items():
            patch.setenv(name, value)
        boto3 = pytest.importorskip("boto3")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in folder.glob("*.tar"):
            client.upload_file(str(path), "bucket", f"set/{path.name}")
        client.close()
        yield "s3://bucket/set"
        process.stdin.close()


@pytest.mark.parametrize("spec", ["/train-*.tar", "/", "/train-{000000..000002}.tar"])
def test_s3(s3: str, local: Any, spec: str, tmp_path: Path) -> None:
    index = ImageTextIndex(open_shards(s3 + spec), tmp_path, QUICK)
    assert [shard.name for shard in index.paths] == [f"train-00000{i}.tar" for i in range(3)]
    patient = {"timeout_s": 60.0}  # the server is a thread beside the tests
    assert take(index, 0, 15, settings(**patient)) == local[:15]
    if spec == "/":
        assert take(index, 9, 15, settings(num_workers=2, **patient)) == local[9:24]


def test_neighbours_are_read_together() -> None:
    def spans(*ranges: tuple[int, int]) -> list[tuple[int, int]]:
        return _spans(*np.array(ranges).T)

    mib = 1 << 20
    assert spans((200, 10), (0, 100)) == [(0, 210)]
    assert spans((mib, 10), (0, 100)) == [(0, 100), (mib, mib + 10)]
    assert spans(*((i * mib, mib) for i in range(100))) == [(0, 64 * mib), (64 * mib, 100 * mib)]


@pytest.mark.slow
def test_the_cache_keeps_versions_apart(folder: Path, local: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    cached = settings(cache_dir=str(tmp_path / "blocks"))
    with serve(copy) as server:
        before = remote_index(server)
        assert take(before, 0, 40, cached) == local
        shutil.copy(folder / "train-000001.tar", copy / "train-000000.tar")
        index = remote_index(server)
        now = take(index, 0, 40, settings())
        assert now != local
        assert take(index, 0, 40, cached) == now
        index.versions = before.versions  # a cache that does not look at the version
        assert take(index, 0, 40, cached) != now


def test_a_shard_that_changes_while_it_is_indexed_is_named(folder: Path, tmp_path: Path) -> None:
    """Or one that is another file here than where its version comes from: rows of one file would describe another."""
    path = tmp_path / "train-000000.tar"
    shutil.copy(folder / path.name, path)
    known = ImageTextIndex([path]).versions
    assert ImageTextIndex([path], versions=known).versions == known
    index_path(path).unlink()
    shutil.copy(folder / "train-000001.tar", path)
    with pytest.raises(DataError, match=r"train-000000\.tar has changed since the start"):
        ImageTextIndex([path], versions=known)
    with pytest.raises(DataError, match="finds 2 shards and rank 0 1"):
        ImageTextIndex([path, path], versions=known)


def test_the_cache_is_bounded_and_drops_what_was_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK_BYTES", 100)
    content = os.urandom(5050)
    fetched: list[tuple[int, int]] = []

    def fetch(start: int, end: int) -> bytes:
        fetched.append((start, end))
        return content[start:end]

    blocks = BlockCache(tmp_path, 2000)
    for _ in range(2):
        assert blocks.read("a", 150, 420, 5050, fetch) == content[150:420]
    assert fetched == [(100, 200), (200, 300), (300, 400), (400, 500)]
    for first in range(500, 5000, 10):
        assert blocks.read("a", first, first + 60, 5050, fetch) == content[first : first + 60]
        assert blocks.read("a", 110, 190, 5050, fetch) == content[110:190]
    assert fetched.count((100, 200)) == 1, "what is used stays"
    assert sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 2000
    assert blocks.read("a", 5000, 5050, 5050, fetch) == content[5000:]
    assert blocks.read("b", 100, 200, 5050, lambda *_: b"short") == b"short"
    assert not [p for p in tmp_path.glob("*/*") if p.stat().st_size == len(b"short")], "a server's fault is not kept"
    block = next(p for p in tmp_path.glob("*/*"))
    block.write_bytes(b"")  # a disk that was full
    again = BlockCache(tmp_path, 2000)
    for first in range(0, 5000, 100):
        assert again.read("a", first, first + 100, 5050, fetch) == content[first : first + 100]
