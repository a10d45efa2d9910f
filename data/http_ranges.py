"""Ranges of files behind HTTP, of which no more is read than was asked for.

fsspec's own read takes whatever a server answers into memory: the whole file, where the server knows no ranges.
"""

from __future__ import annotations

from typing import Any

from .errors import StoreError


async def read_range(system: Any, url: str, start: int, end: int) -> bytes:
    """Bytes start ... end of a URL; fewer where the answer is short. system: fsspec's HTTPFileSystem.

    Raises StoreError where the answer is of another range, or longer; the client's error where there is none.
    """
    options = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers=headers, **options) as answer:
        answer.raise_for_status()
        if answer.status == 200 and answer.content_type == "text/html":
            raise StoreError(
                "store: the server gives a web page",
                "it may be a login, or a page about the file: take the URL behind its download button (on Hugging Face "
                "/resolve/ in place of /blob/)",
            )
        is_whole = start == 0 and answer.content_length == end
        if answer.status != 206 and not is_whole:
            raise StoreError(
                "store: the server gives no ranges",
                "shards are read in ranges: serve the files by a server that answers Range requests by 206 (nginx, "
                "Apache, S3 do, python -m http.server does not), or download them",
            )
        if not answer.headers.get("Content-Range", f"bytes {start}-").startswith(f"bytes {start}-"):
            raise StoreError("store: the server gives another range", _WRONG)
        data = bytearray()
        async for piece in answer.content.iter_any():
            data += piece
            if len(data) > end - start:
                raise StoreError("store: the server gives more than was asked for", _WRONG)
        return bytes(data)


_WRONG = "it, or a proxy before it, answers Range requests wrongly: download the files, or serve them by another server"
