"""A web server that answers anything at all: samples that are right, holes, or one message, in bounded time."""

import socket
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig
from data.errors import DataError
from data.index import ImageTextIndex
from data.reader import ImageTextReader
from data.storage import RetryPolicy, open_shards
from tests.helpers.fuzz import count_samples, counted, fuzz

from .test_index import png, write_tar

SECONDS = 0.3


class Liar:
    """Sends `answer` to each request; pieces of it may name the first and last byte and the length asked for."""

    def __init__(self, tar: bytes) -> None:
        self.tar, self.answer = tar, [b""]
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/a.tar"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                request = connection.recv(1 << 16)
                first, last = 0, len(self.tar) - 1
                for line in request.split(b"\r\n"):
                    if line.lower().startswith(b"range: bytes="):
                        first, last = (int(part) for part in line.partition(b"=")[2].split(b"-"))
                body = b"" if request.startswith(b"HEAD") else self.tar[first : last + 1]
                values = {b"FIRST": first, b"LAST": last, b"LENGTH": last + 1 - first, b"SIZE": len(self.tar)}
                for piece in self.answer:
                    for name, value in values.items():
                        piece = piece.replace(name, str(value).encode())
                    connection.sendall(piece.replace(b"BODY", body))
            except OSError:
                return


RIGHT = [
    b"HTTP/1.1 206 Partial Content\r\n",
    b"Accept-Ranges: bytes\r\n",
    b"Content-Length: LENGTH\r\n",
    b"Content-Range: bytes FIRST-LAST/SIZE\r\n",
    b"Connection: close\r\n",
    b"\r\nBODY",
]
# fmt: off
WRONG = [
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 301 Moved\r\nLocation: /b.tar\r\n", b"HTTP/1.1 416 No\r\n", b"HTTP/0.9\r\n",
    b"HTTP/1.1 503 Later\r\nRetry-After: 1\r\n", b"Retry-After: -1\r\n", b"Content-Length: 99999999999999\r\n",
    b"Content-Length: -5\r\n", b"Content-Length: 0\r\n", b"Content-Encoding: gzip\r\n", b"ETag: \xff\xfe\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Content-Range: bytes 5-1/0\r\n", b"\r\n", b"BODYBODY", b"x" * 5000, b"",
]
# fmt: on
PIECES = st.sampled_from(WRONG) | st.binary(max_size=30)


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Liar]:
    tar = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", {"a.png": png(), "a.txt": b"x", "b.png": png()})
    server = Liar(tar.read_bytes())
    yield server
    server.close()


def read_all(url: str, cache: Path) -> list[str | None]:
    """Reasons of the holes of one epoch; None is a sample."""
    retry = RetryPolicy(SECONDS, 0)
    index = ImageTextIndex(open_shards(url), cache, retry)
    cfg = DataConfig(shards=url, resolution=8, num_workers=0, epochs=1, timeout_s=SECONDS, retries=0)
    batches = islice(ImageTextReader(index, cfg, 0, 1, 0.0, 0, 1, 1).batches(0), len(index))
    return [batch.holes[0] if batch.holes else None for _, [batch] in batches]


@fuzz(25, deadline=20_000)
@given(
    before=st.booleans(), changes=st.lists(st.tuples(st.integers(0, 5), PIECES), max_size=2), dropped=st.integers(0, 40)
)
def test_whatever_a_server_answers(
    before: bool, changes: list[tuple[int, bytes]], dropped: int, liar: Liar, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """before: the index too is made of these answers, else of right ones."""
    wrong = list(RIGHT)
    for at, piece in changes:
        wrong[at] = piece
    if dropped < len(wrong):
        del wrong[dropped]
    cache = tmp_path_factory.mktemp("cache")
    if not before:
        liar.answer = RIGHT
        assert {*read_all(liar.url, cache)} == {None, "caption: missing"}
    liar.answer = wrong
    with counted(DataError):
        reasons = read_all(liar.url, cache)
        assert all(reason is None or ": " in reason for reason in reasons)
        count_samples(reasons)
