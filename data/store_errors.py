"""What the failure of a store means for its user: an error of fsspec's clients as a reason and what to do about it.

Clients wrap what has happened: fsspec's HTTP calls every failure of a first request FileNotFoundError, s3fs translates
botocore's errors. So the whole chain of causes is looked at. Clients are optional packages, whose errors are known by
their names and attributes.
"""

from __future__ import annotations

import email.utils
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from .errors import StoreError
from .redaction import one_line

_MOST_CAUSES = 16
_LOGIN = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (FSSPEC_S3_ANON=true for a public bucket)",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS (FSSPEC_GS_TOKEN=anon "
    "for a public bucket)",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    "http": "give the URL a login or a signature by ${NAME}, such as https://me:${PASSWORD}@host/, and list NAME in "
    "MUDIT_VARIABLES",
}
_SCHEMES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az", "https": "http"}
_MAY_PASS = "it may pass: start again later, or raise data.retries"
_STATUS = {  # of HTTP: (what it means, what to do)
    400: ("bad request", "a login may have expired, or the region or the URL be wrong: {login}"),
    401: ("it wants a login", "{login}"),
    403: (
        "access denied",
        "it wants a login that may read this file, a signed URL may have expired, or the URL is wrong: {login}",
    ),
    404: ("not found", "check the URL; where a pattern names more shards than exist, * takes those that do"),
    416: ("no such range", "the file is shorter than it was: start again"),
    429: ("too many requests", _MAY_PASS),
}
_NO_LOGIN = {  # names of errors
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError", "ProfileNotFound",
    "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "DefaultCredentialsError",
    "ClientAuthenticationError",
}  # fmt: skip
_LOGIN_REFUSED = {  # the store's own codes
    "ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed",
    "TokenRefreshRequired", "AuthFailure",
}  # fmt: skip
_OTHER_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}


def store_error(error: Exception, url: str) -> StoreError:
    """The error of a client that has read `url`, as a reason with a remedy."""
    if isinstance(error, StoreError):
        return error
    causes = list(_causes(error))
    scheme = urlsplit(url).scheme.lower()
    login = _LOGIN.get(_SCHEMES.get(scheme, scheme), "give the store's client its login, as its own documents say")
    codes = {code for one in causes if (code := _code(one))}
    if any(type(one).__name__ in _NO_LOGIN for one in causes):
        return StoreError("store: no login", login)
    if codes & _OTHER_REGION:
        region = next(filter(None, map(_region, causes)), "")
        name = region or "the region of the bucket"
        return StoreError(f"store: wrong region{region and f', it is in {region}'}", f"set AWS_DEFAULT_REGION={name}")
    if refused := codes & _LOGIN_REFUSED:
        remedy = f"it may have expired, be another store's, or this machine's clock be wrong: {login}"
        return StoreError(f"store: login refused ({min(refused)})", remedy)
    if status := next(filter(None, map(_status, causes)), None):
        return _by_status(status, causes, login)
    for is_kind, reason, remedy in _KINDS:
        if any(is_kind(one) for one in causes):
            return StoreError(f"store: {reason}", remedy)
    if any(str(one).startswith("Forbidden") or isinstance(one, PermissionError) for one in causes):  # gcsfs gives text
        return _by_status(403, causes, login)
    if any(isinstance(one, FileNotFoundError) for one in causes):
        return _by_status(404, causes, login)
    said = one_line(f"{type(error).__name__}: {error}", 300)
    return StoreError("store: read error", f"the store's client says {said}; check the URL and the access to it")


def _by_status(status: int, causes: list[BaseException], login: str) -> StoreError:
    """What the status of an HTTP answer means."""
    reason, remedy = _STATUS.get(status, ("", "check the URL and the access to it"))
    if status >= 500:
        reason, remedy = "a fault of the server", _MAY_PASS
    asked_s = _asked_s(causes) if status in (429, 503) else 0.0
    said = f"HTTP {status}, {reason}" if reason else f"HTTP {status}"
    return StoreError(f"store: {said}" if status != 404 else "store: not found", remedy.format(login=login), asked_s)


def _is_timeout(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or type(error).__name__.endswith(("TimeoutError", "Timeout"))


def _is_lost(error: BaseException) -> bool:
    lost = ("ServerDisconnectedError", "ClientPayloadError", "ClientOSError", "ConnectionClosedError", "IncompleteRead")
    return isinstance(error, ConnectionError) or type(error).__name__ in lost


# (whether an error is of a kind, its reason, its remedy), the surest first.
_KINDS: tuple[tuple[Callable[[BaseException], bool], str, str], ...] = (
    (
        lambda error: isinstance(error, socket.gaierror) or type(error).__name__ == "ClientConnectorDNSError",
        "unknown host",
        "check the host in the URL (or AWS_ENDPOINT_URL), and that this machine resolves names of hosts",
    ),
    (
        lambda error: isinstance(error, ssl.SSLError) or type(error).__name__ == "SSLError",
        "TLS failed",
        "the host's certificate is not trusted here, or it speaks no TLS: check the URL and this machine's clock, set "
        "SSL_CERT_FILE (for S3 AWS_CA_BUNDLE) to the certificates of its authority",
    ),
    (
        lambda error: isinstance(error, ConnectionRefusedError),
        "connection refused",
        "no server listens there: check host and port of the URL (or AWS_ENDPOINT_URL), and firewalls",
    ),
    (_is_timeout, "timed out", "check that the host can be reached from here, or raise data.timeout_s"),
    (_is_lost, "connection lost", _MAY_PASS),
    (
        lambda error: type(error).__name__ == "EndpointConnectionError",
        "cannot be reached",
        "check the host in the URL (or AWS_ENDPOINT_URL) and firewalls",
    ),
)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from."""
    ahead: list[Any] = [error]
    for _ in range(_MOST_CAUSES):
        if not ahead:
            return
        one = ahead.pop(0)
        yield one
        botocore = getattr(one, "kwargs", None)
        told = botocore.get("error") if isinstance(botocore, dict) else None
        inner = (one.__cause__ or one.__context__, getattr(one, "os_error", None), told)
        ahead += [cause for cause in inner if isinstance(cause, BaseException) and cause is not one]


def _response(error: BaseException) -> dict[str, Any]:
    """What botocore tells of an answer; {} of other errors."""
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _status(error: BaseException) -> int | None:
    """The status of an HTTP answer: as aiohttp, gcsfs, azure and botocore have it."""
    answer = _response(error).get("ResponseMetadata", {})
    told = [answer.get("HTTPStatusCode"), getattr(error, "status", None), getattr(error, "status_code", None)]
    if type(error).__name__ == "HttpError":  # gcsfs's; elsewhere a code may be anything
        told.append(getattr(error, "code", None))
    return next((status for status in told if type(status) is int and 300 <= status < 600), None)


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _region(error: BaseException) -> str:
    """The region that S3 says a bucket is in; "" where it does not."""
    response = _response(error)
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return one_line(str(response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region") or ""), 40)


def _asked_s(causes: list[BaseException]) -> float:
    """The seconds that a store asks to wait for: Retry-After, in seconds or as a date; 0 where it does not."""
    for error in causes:
        headers = getattr(error, "headers", None) or _response(error).get("ResponseMetadata", {}).get("HTTPHeaders")
        asked = {str(name).lower(): str(value) for name, value in (headers or {}).items()}.get("retry-after", "")
        if asked.strip().isdecimal():
            return float(asked[:9])
        try:
            return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            continue
    return 0.0
