"""What a store's failure tells its user: real clients against a real server, wherever one can fail like that."""

from __future__ import annotations

import datetime
import email.utils
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from data import storage
from data.errors import DataError, SampleError, StoreError
from data.shard_index import build_index
from data.storage import Remote, RetryPolicy, file_version, open_shards, read_rate, read_remote
from data.store_errors import store_error
from data.write_shards import write_shards
from tests.helpers.servers import Server, serve

ONCE = RetryPolicy(timeout_s=10.0, retries=0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of one shard, a.tar."""
    write_shards([(f"{i}", bytes(50_000), "png", "x") for i in range(4)], tmp_path / "a", 10)[0].rename(
        tmp_path / "a.tar"
    )
    with serve(tmp_path) as running:
        yield running


def refused(url: str, retry: RetryPolicy = ONCE) -> str:
    """The message of a shard that cannot be indexed."""
    with pytest.raises(DataError) as caught:
        build_index(Remote(url), retry)
    return str(caught.value)


def not_given(url: str, start: int = 0, end: int = 100) -> StoreError:
    """The error of bytes that cannot be read."""
    with pytest.raises(StoreError) as caught:
        read_remote(url, start, end, ONCE, 0)
    return caught.value


def answering(status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> Any:
    """An `override` of the server that gives one answer."""

    def answer(request: BaseHTTPRequestHandler) -> bool:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
        return True

    return answer


@pytest.mark.parametrize(
    ("status", "reason", "remedy"),
    [
        (400, "HTTP 400, bad request", "expired"),
        (401, "HTTP 401, it wants a login", r"https://me:\$\{PASSWORD\}@host/.*MUDIT_VARIABLES"),
        (403, "HTTP 403, access denied", "a signed URL may have expired"),
        (404, "not found", "check the URL"),
        (410, "HTTP 410", "check the URL"),
        (429, "HTTP 429, too many requests", "data.retries"),
        (502, "HTTP 502, a fault of the server", "data.retries"),
    ],
)
def test_an_answer_of_http_is_named_with_its_remedy(server: Server, status: int, reason: str, remedy: str) -> None:
    server.override = answering(status)
    assert f"a.tar cannot be read (store: {reason})" in (said := refused(f"{server.url}/a.tar"))
    assert str(not_given(f"{server.url}/a.tar")).startswith(f"store: {reason}")
    assert re.search(remedy, said), said


@pytest.mark.parametrize("accept", [{}, {"Accept-Ranges": "none"}])
def test_a_server_without_ranges_is_named_before_its_file_is_read(
    server: Server, tmp_path: Path, accept: dict[str, str]
) -> None:
    whole = (tmp_path / "a.tar").read_bytes()
    server.override = answering(200, accept, whole)
    assert "(store: the server gives no ranges): shards are read in ranges" in refused(f"{server.url}/a.tar")
    for start, end in ((0, 100), (100, 200)):
        assert str(not_given(f"{server.url}/a.tar", start, end)) == "store: the server gives no ranges"
    assert read_remote(f"{server.url}/a.tar", 0, len(whole), ONCE, 0) == whole, "all of it is what was asked for"


def test_a_login_page_in_place_of_the_file_is_named(server: Server) -> None:
    server.override = answering(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Sign in</html>" * 99)
    assert "(store: the server gives a web page): it may be a login" in refused(f"{server.url}/a.tar")


def test_the_read_rate_of_a_store_that_refuses_is_an_error_with_a_remedy(server: Server, tmp_path: Path) -> None:
    server.override = answering(200, {}, (tmp_path / "a.tar").read_bytes() * 30)
    with pytest.raises(DataError, match="the server gives no ranges"):
        read_rate([Remote(f"{server.url}/a.tar")], 0)


def test_a_url_whose_query_ends_with_a_slash_is_no_folder(server: Server) -> None:
    assert open_shards(f"{server.url}/download?path=set/") == [Remote(f"{server.url}/download?path=set/")]


def test_an_answer_that_is_longer_than_the_range_or_another_one_is_not_kept(server: Server) -> None:
    sent: list[int] = []

    def endless(request: BaseHTTPRequestHandler) -> bool:
        request.send_response(206)
        request.send_header("Content-Length", str(1 << 32))
        request.end_headers()
        for _ in range(1 << 12):
            request.wfile.write(bytes(1 << 20))
            sent.append(1)
        return True

    server.override = endless
    error = not_given(f"{server.url}/a.tar", 0, 4 << 20)
    assert str(error) == "store: the server gives more than was asked for"
    assert len(sent) < 64, "the connection is closed, and a few MB were in flight"
    server.override = answering(206, {"Content-Range": "bytes 0-9/100"}, bytes(10))
    assert str(not_given(f"{server.url}/a.tar", 50, 60)) == "store: the server gives another range"
    with pytest.raises(SampleError, match="shard: short read"):
        read_remote(f"{server.url}/a.tar", 0, 60, ONCE, 0)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date", "too long", "nonsense"])
def test_retry_after_is_honoured_up_to_a_bound(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int, form: str
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=pauses.append))
    in_20_s = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20), True)
    asked = {"seconds": "20", "date": in_20_s, "too long": "86400", "nonsense": "soon"}[form]
    least = {"seconds": 20, "date": 15, "too long": storage._LONGEST_WAIT_S, "nonsense": 0}[form]

    def busy(request: BaseHTTPRequestHandler) -> bool:
        return not pauses and answering(status, {"Retry-After": asked})(request)

    server.override = busy
    assert len(read_remote(f"{server.url}/a.tar", 0, 100, RetryPolicy(10.0, 2), 0)) == 100
    assert [least <= pause <= least + 6 for pause in pauses] == [True], pauses
    pauses.clear()
    assert file_version(Remote(f"{server.url}/a.tar"), RetryPolicy(10.0, 2)).size > 0, "first requests wait as well"
    assert pauses[0] >= least


def test_hosts_that_cannot_be_reached_are_named(tmp_path: Path) -> None:
    assert "(store: unknown host): check the host" in refused("http://nowhere.invalid/a.tar", RetryPolicy(60.0, 0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        assert "(store: connection refused): no server listens" in refused(f"http://127.0.0.1:{port}/a.tar")
        free.listen()
        slow = refused(f"http://127.0.0.1:{port}/a.tar", RetryPolicy(0.3, 0))
        assert "(store: timed out): check that the host can be reached" in slow


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_a_certificate_that_is_not_trusted_is_named(tmp_path: Path) -> None:
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made += ["-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    with serve(tmp_path) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        plain, server.socket = server.socket, context.wrap_socket(server.socket, server_side=True)
        said = refused(server.url.replace("http:", "https:") + "/a.tar")
        plain.close()
    assert "(store: TLS failed): the host's certificate is not trusted here" in said
    assert "SSL_CERT_FILE" in said


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """The server in place of S3, for s3fs as it is."""
    s3fs = pytest.importorskip("s3fs")
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    nothing = str(tmp_path / "nothing")
    settings = {"AWS_ENDPOINT_URL": server.url, "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1"}
    settings |= {"AWS_CONFIG_FILE": nothing, "AWS_SHARED_CREDENTIALS_FILE": nothing, "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield server
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_without_a_login_says_how_to_give_one(s3: Server) -> None:
    said = refused("s3://bucket/a.tar")
    assert "(store: no login): set AWS_PROFILE" in said
    assert "FSSPEC_S3_ANON=true" in said
    with pytest.raises(DataError, match=r"cannot be listed \(store: no login\): set AWS_PROFILE"):
        open_shards("s3://bucket/set/")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "AccessDenied", r"\(store: HTTP 403, access denied\): it wants a login.*AWS_PROFILE"),
        (403, "SignatureDoesNotMatch", r"\(store: login refused \(SignatureDoesNotMatch\)\): it may have expired"),
        (400, "ExpiredToken", r"\(store: login refused \(ExpiredToken\)\): it may have expired"),
        (404, "NoSuchKey", r"\(store: not found\): check the URL"),
        (301, "PermanentRedirect", r"\(store: wrong region, it is in eu-west-3\): set AWS_DEFAULT_REGION=eu-west-3"),
        (400, "AuthorizationHeaderMalformed", r"\(store: wrong region, it is in eu-west-3\)"),
        (503, "SlowDown", r"\(store: HTTP 503, a fault of the server\): it may pass"),
    ],
)
@pytest.mark.slow
def test_what_s3_refuses_is_named(
    s3: Server, monkeypatch: pytest.MonkeyPatch, status: int, code: str, said: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    body = f"<Error><Code>{code}</Code><Message>no</Message><Region>eu-west-3</Region></Error>".encode()
    s3.override = answering(status, {"x-amz-bucket-region": "eu-west-3", "Content-Type": "application/xml"}, body)
    error = not_given("s3://bucket/a.tar")
    assert re.search(said, f"({error}): {error.remedy}")
    assert "(store: " in refused("s3://bucket/a.tar"), "HEAD has no body, and so no code"
    assert "store: read error" not in refused("s3://bucket/a.tar")


def test_retry_after_of_s3_is_heard(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    s3.override = answering(429, {"Retry-After": "17"}, b"<Error><Code>TooMany</Code></Error>")
    error = not_given("s3://bucket/a.tar")
    assert (str(error), error.asked_s) == ("store: HTTP 429, too many requests", 17.0)


class HttpError(Exception):
    """As gcsfs raises it, which is not installed."""

    code = 401


class DefaultCredentialsError(Exception):
    """As google.auth raises it."""


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (HttpError("Anonymous caller does not have storage.objects.get access"), r"HTTP 401.*gcloud auth"),
        (OSError("Forbidden: bucket/a.tar\nno"), r"HTTP 403, access denied.*GOOGLE_APPLICATION_CREDENTIALS"),
        (DefaultCredentialsError("none"), r"no login.*FSSPEC_GS_TOKEN=anon"),
        (PermissionError("no"), "HTTP 403, access denied"),
        (FileNotFoundError("bucket/a.tar"), "not found"),
        (ConnectionResetError(), "connection lost"),
        (
            RuntimeError("password=hunter2 of\nit"),
            r"read error.*RuntimeError: password=\*\*\* of\\nit",
        ),
    ],
)
def test_other_clients_are_understood(monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str) -> None:
    class Failing(MemoryFileSystem):
        protocol = "gs"

        def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
            raise raised

    monkeypatch.setitem(_registry, "gs", Failing)
    error = not_given("gs://bucket/a.tar")
    assert re.search(said, f"{error}: {error.remedy}"), f"{error}: {error.remedy}"


def test_an_error_that_causes_itself_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert str(store_error(first, "x://a")) == "store: read error"
