"""Where shards lie: local paths, and URLs that fsspec reads in ranges. Their names, sizes and versions, and reads."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fsspec.asyn import sync
from fsspec.core import url_to_fs

from .config import SYNTHETIC, DataConfig
from .errors import DataError, SampleError, StoreError
from .http_ranges import read_range
from .order import mix, uniforms
from .redaction import quote, redact, remember, unsigned
from .store_errors import store_error

_PROBE_BYTES = 1 << 14
_FIRST_DELAY_S = 0.25  # before the first repetition; doubles each time
_LONGEST_WAIT_S = 60.0  # for a store that asks for a pause: the watchdog waits for five minutes
_LISTED = "MUDIT_VARIABLES"  # the environment variables that configs may name
_MOST_SHARDS, _MOST_BRACES = 10**6, 100  # that a pattern with braces may stand for, and pairs of them
_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
_MOST_NAMED = 8  # folders in a message
_WINDOW = 4 << 20  # bytes of a remote file that are read at once while it is indexed
_RATE_BYTES, _RATE_CHUNK = 64 << 20, 4 << 20  # what read_rate reads, and how much of it at once


@dataclass(frozen=True)
class Remote:
    """A file behind a URL. str() of it is the URL without secrets."""

    url: str

    @property
    def identity(self) -> str:
        """Which file it is: the URL without what changes whenever it is signed anew."""
        return unsigned(self.url)

    @property
    def name(self) -> str:
        """The last part of the path; with the query where that names the file (`download?file=a.tar`)."""
        parts = urlsplit(self.identity)
        last = parts.path.rpartition("/")[2]
        return last if last.endswith(".tar") or not parts.query else f"{last}?{parts.query}"

    def __str__(self) -> str:
        return redact(self.url)

    def __repr__(self) -> str:
        return f"Remote({redact(self.url)!r})"


Shard = Path | Remote


class FileVersion(NamedTuple):
    """The size of a file in bytes, and what identifies its content."""

    size: int
    version: str


@dataclass(frozen=True)
class RetryPolicy:
    """How long a remote read may take in seconds, and how often a failed one is repeated."""

    timeout_s: float = DataConfig.timeout_s
    retries: int = DataConfig.retries


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises DataError where its package is not installed."""
    try:
        return url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{redact(url)} cannot be opened: {error}; install that package") from None
    except ValueError as error:
        raise DataError(f"{redact(url)} cannot be opened: {redact(str(error))}") from None


def _call(url: str, method: str, timeout_s: float, **options: Any) -> Any:
    """Call a method of the URL's file system. Raises TimeoutError after a time."""
    system, path = _filesystem(url)
    if method == "cat_file" and "https" in system.protocol:
        return sync(system.loop, read_range, system, path, timeout=timeout_s, **options)
    if system.async_impl:
        return sync(system.loop, getattr(system, f"_{method}"), path, timeout=timeout_s, **options)
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(getattr(system, method)(path, **options))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)  # it cannot be interrupted: it is left behind
    thread.start()
    thread.join(timeout_s)
    if not result:
        raise TimeoutError
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _repeated(url: str, method: str, retry: RetryPolicy, key: int, **options: Any) -> Any:
    """_call, repeated after a delay that doubles, and not before the store wants it. key: seeds the jitter of the
    delay. Raises StoreError when the last repetition has failed, or SampleError where it gave too few bytes."""
    failure, asked_s = SampleError(), 0.0
    for attempt in range(retry.retries + 1):
        if attempt:
            jitter = float(uniforms(mix(key).view("int64"), attempt - 1))
            time.sleep(min(asked_s, _LONGEST_WAIT_S) + _FIRST_DELAY_S * 2 ** (attempt - 1) * (0.5 + jitter))
        try:
            result = _call(url, method, retry.timeout_s, **options)
            if method != "cat_file" or len(result) == options["end"] - options["start"]:
                return result
            # What is too short stays so: the tar ends early, or the server's sizes are wrong. Other failures may pass.
            failure, asked_s = SampleError("shard: short read"), 0.0
        except DataError:
            raise
        except Exception as error:  # client libraries raise what they like: OSError, ClientError, BotoCoreError, ...
            failure = store_error(error, url)
            asked_s = failure.asked_s
    raise failure


def read_remote(url: str, start: int, end: int, retry: RetryPolicy, key: int) -> bytes:
    """Bytes start ... end of a URL. Raises SampleError where it does not give them, however often it is asked."""
    return _repeated(url, "cat_file", retry, key, start=start, end=end) if end > start else b""


def unreadable(shard: Shard, error: StoreError) -> DataError:
    """What to say where a store does not give a shard."""
    return DataError(f"shard {shard} cannot be read ({error}): {error.remedy}")


def file_version(shard: Shard, retry: RetryPolicy = RetryPolicy()) -> FileVersion:
    """Size and identity of a file, without reading all of it. Raises DataError where there is no such file.

    Local: a hash of its beginning, middle and end. Its size alone would not do, as tars are padded to 10 KiB, nor would
    its time, which copies change. Remote: what the store says, an ETag or the time of the last change.
    """
    if isinstance(shard, Remote):
        try:
            info = _repeated(shard.url, "info", retry, 0)
        except StoreError as error:
            raise unreadable(shard, error) from None
        if info.get("size") is None:
            raise DataError(f"shard {shard}: the server tells no size, so ranges of it cannot be read")
        keys = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "Last-Modified", "updated")
        version = next((str(info[key]) for key in keys if info.get(key)), "")
        version = version.encode(errors="backslashreplace").decode()  # a header may hold any bytes
        return FileVersion(int(info["size"]), f"{info['size']}:{version}")
    try:
        size = shard.stat().st_size
        digest = hashlib.sha256()
        with open(shard, "rb") as file:
            for offset in (0, size // 2, max(0, size - _PROBE_BYTES)):
                digest.update(os.pread(file.fileno(), _PROBE_BYTES, offset))
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {error.strerror}") from error
    return FileVersion(size, f"{size}:{digest.hexdigest()}")


def read_rate(shards: Sequence[Shard], rank: int) -> float:
    """MB/s (10^6 bytes) at which this process reads a shard: one of its own, where there are enough for all ranks.
    Raises DataError where it cannot be read."""
    shard, retry = shards[rank % len(shards)], RetryPolicy()
    size = min(file_version(shard, retry).size, _RATE_BYTES)
    if isinstance(shard, Path) and hasattr(os, "posix_fadvise"):
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from this node's memory
    began = time.perf_counter()
    for start in range(0, size, _RATE_CHUNK):
        count = min(_RATE_CHUNK, size - start)
        if isinstance(shard, Remote):
            try:
                read_remote(shard.url, start, start + count, retry, start)
            except StoreError as error:
                raise unreadable(shard, error) from None
        else:
            with open(shard, "rb", buffering=0) as file:
                os.pread(file.fileno(), count, start)
    return size / (time.perf_counter() - began) / 1e6


class LocalBytes:
    """An open local file that is read at offsets."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes at an offset; fewer at the end of the file."""
        return os.pread(self._descriptor, size, offset)


class RemoteBytes:
    """A remote file that is read at rising offsets, through a window. Its reads raise SampleError."""

    def __init__(self, shard: Remote, size: int, retry: RetryPolicy) -> None:
        self._shard, self._size, self._retry = shard, size, retry
        self._start, self._window = 0, b""

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes at an offset; fewer at the end of the file."""
        end = min(offset + size, self._size)
        if offset < self._start or end > self._start + len(self._window):
            last = min(max(end, offset + _WINDOW), self._size)
            self._window = read_remote(self._shard.url, offset, last, self._retry, offset) if last > offset else b""
            self._start = offset
        return self._window[offset - self._start : max(0, end - self._start)]


def _expand(pattern: str, most: int = _MOST_SHARDS) -> list[str]:
    """The paths of one pattern, with `{a,b}` and `{000..012}` (padded with zeros as written) expanded. Raises DataError
    where there would be more than `most`."""
    if pattern.count("{") > _MOST_BRACES:
        raise DataError(f"shards {quote(pattern)}: more than {_MOST_BRACES} pairs of braces")
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        if last - first >= most:
            raise DataError(f"shards {quote(pattern)}: more than {_MOST_SHARDS} paths")
        items = [str(i).zfill(len(bounds[1])) for i in range(first, last + 1)]
    else:
        items = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    tails = _expand(tail, max(1, most // max(1, len(items))))
    if len(tails) * len(items) > most:
        raise DataError(f"shards {quote(pattern)}: more than {_MOST_SHARDS} paths")
    return [head + item + end for item in items for end in tails]


def expand_all(spec: str) -> list[str]:
    """The paths of several patterns, with commas between them. Raises DataError as `_expand`."""
    return [name for part in re.split(r",(?![^{]*\})", spec) for name in _expand(part.strip())]


def _with_environment(text: str, key: str) -> str:
    """The text with ${NAME} replaced by the variable's value. Raises DataError where the user does not list it."""
    listed = re.split(r"[\s,]+", os.environ.get(_LISTED, ""))

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in listed:  # a config from elsewhere could send the user's secrets to its own server
            raise DataError(
                f"{key} = {quote(text)}: {_LISTED} does not list {name}: if the config may read that variable, set "
                f"{_LISTED}={name} in the environment (names with commas)"
            )
        if name not in os.environ:
            raise DataError(f"{key} = {quote(text)}: there is no variable {name} in the environment")
        remember(name, os.environ[name])
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def open_shards(spec: str, key: str = "data.shards") -> list[Shard]:
    """The shards that a config key or an option names, in order.

    spec: a folder, a .tar path, or paths with commas, braces or wildcards; or URLs of the same form, where a folder
    ends with /. key: for messages. Raises DataError where nothing matches, or a local shard that is named is missing.
    """
    if spec == SYNTHETIC:
        raise DataError(f"{key} = 'synthetic' has no shards to open")
    shards: list[Shard] = []
    for name in expand_all(_with_environment(spec, key)):
        found = _remote(name, key) if "://" in name else _local(os.path.expanduser(name), key, spec)
        if not found:
            raise _none_found(name, key)
        shards += found
    if not shards:
        raise DataError(f"{key} = {redact(spec)!r} names no shard")
    return shards


def _none_found(name: str, key: str) -> DataError:
    """What to say where a folder, or a pattern of the files in it, has no shard: what there is in its place.

    Shards a level down are not taken unasked: they may be the training and the validation set.
    """
    folder = re.sub(r"/?(\*\.tar)?$", "", name) or "."
    escaped = folder if "://" in folder else glob.escape(os.path.expanduser(folder))
    below = Counter(path.rpartition("/")[0].rpartition("/")[2] for path in _listed(f"{escaped}/*/*.tar"))
    if below:
        folders = ", ".join(f"{quote(part)} holds {count}" for part, count in sorted(below.items())[:_MOST_NAMED])
        more = ", ..." if len(below) > _MOST_NAMED else ""
        return DataError(
            f"{key}: no .tar file lies in {redact(folder)!r} itself, but in its folders ({folders}{more}): name the "
            f"one that is meant, or all of them by '{redact(escaped)}/*/*.tar'"
        )
    packed = [path for path in _listed(f"{escaped}/*") if path.endswith(_PACKED)]
    if packed:
        return DataError(
            f"{key}: {redact(folder)!r} has no .tar file, but compressed ones ({quote(packed[0])}), and samples are "
            "read at their offsets in uncompressed tars: decompress them once"
        )
    return DataError(f"{key}: no .tar file matches {redact(name)!r}; build shards with launch/shard.py")


def _listed(pattern: str) -> list[str]:
    """The paths that a pattern matches; none where they cannot be listed."""
    with contextlib.suppress(Exception):  # it serves a message alone
        if "://" not in pattern:
            return sorted(glob.glob(pattern))
        system, path = _filesystem(pattern)
        return sorted(system.glob(path))
    return []


def _local(name: str, key: str, spec: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if any(sign in name for sign in "*?["):
        return [Path(match) for match in sorted(glob.glob(name))]
    if not path.is_file():
        exist = re.sub(r"\{[^{}]*\}", "*", spec)  # as numbers are missing where a download failed
        remedy = f", or take those that exist: {redact(exist)!r}" if exist != spec else ""
        raise DataError(
            f"shard {path} does not exist (from {key} = {redact(spec)!r}); check the path{remedy}, or build "
            "shards with launch/shard.py"
        )
    return [path]


def _remote(name: str, key: str) -> list[Remote]:
    if "*" not in name and ("?" in name or not name.endswith("/")):
        return [Remote(name)]
    system, path = _filesystem(name if "*" in name else f"{name}*.tar")
    try:
        found = sorted(system.glob(path))
    except Exception as error:  # client libraries raise what they like, see _repeated
        failure = store_error(error, name)
        raise DataError(
            f"{key}: {redact(name)} cannot be listed ({failure}): {failure.remedy}; or name the shards, as in "
            "{000..127}.tar, which need no listing"
        ) from None
    return [Remote(system.unstrip_protocol(match)) for match in found]
