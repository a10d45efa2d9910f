"""Text on its way out (messages, logs, status files, trackers): without secrets and terminal escapes, quotes at most a
line long. No torch; every room may import it."""

from __future__ import annotations

import logging
import re
import reprlib
import sys
import traceback
from types import TracebackType
from typing import Any
from urllib.parse import unquote

_LONGEST_QUOTE = 160  # characters of a value that a message repeats
# Lengths are bounded in all patterns, so that their time grows with the text alone.
_SECRET_NAME = r"[\w.-]{0,40}(?:signature|\bsig|token|credential|key|passw(?:or)?d|secret)[\w.-]{0,40}"
# user:password@ of a URL: up to the last @ before the path; a password that holds a slash comes after a colon which no
# port follows.
_USER = re.compile(r"(?<=://)(?:[^/\s]{0,300}@|[^/\s@:]{0,100}:(?!\d{0,5}(?:[/?#\s,]|$))\S{0,300}@)")
# The values of a query by which a store signs requests. ${NAME} stands for a secret and is none.
_SIGNED = re.compile(rf"([?&]{_SECRET_NAME}=)(?!\$\{{)[^&\s'\"\])}}]+", re.IGNORECASE)
# Parameters of a query that change whenever a URL is signed anew, or that say who asks. `key` alone may name a file.
_SIGNING = re.compile(
    r"(?:x-(?:amz|goog|ms|oss|cos|obs)|q-(?:sign|ak|key|header|url))-.*|sig|.*signature|.*token_*|.*credentials?"
    r"|.*passw(?:or)?d|.*secret|.*api-?_?key|.*access-?_?(?:key-?_?)?id|key-pair-id|policy|expires|authorization",
    re.IGNORECASE,
)
# Azure's, whose names are too short to mean the same elsewhere: they count beside a `sig`.
_SIGNING_AZURE = re.compile(r"sv|ss|srt|sp|se|st|spr|sip|sr|si|sdd|sk(?:oid|tid|t|e|s|v)|saoid|suoid|scid")
_ASSIGNED = re.compile(
    r"(\b[\w-]{0,40}(?:passw(?:or)?d|secret|api_?key|access_?key|auth_?token)[\w-]{0,40}['\"]?\s{0,9}[:=]\s{0,9})"
    r"(?!\$\{)['\"]?[^\s'\"&,]+",
    re.IGNORECASE,
)
_KNOWN_FORM = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|(?<=Bearer )\S+)")
# C0 and C1 controls but newline and tab, marks that turn the direction of text, line separators, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MOST_DIGITS = 40
_expanded: dict[str, str] = {}  # {value of an environment variable that a config names: ${NAME}}
_LEAST_REMEMBERED = 6  # characters: shorter values would be found in innocent words


def remember(name: str, value: str) -> None:
    """Have `redact` write ${name} for a value that has been read from the environment."""
    if len(value) >= _LEAST_REMEMBERED:
        _expanded[value] = f"${{{name}}}"


def redact(text: str) -> str:
    """The text with passwords, signatures of URLs and known forms of tokens replaced by ***, and with ${NAME} in place
    of what was read from the environment."""
    for value in sorted(_expanded, key=len, reverse=True):
        text = text.replace(value, _expanded[value])
    text = _ASSIGNED.sub(r"\1***", _SIGNED.sub(r"\1***", _USER.sub("***@", text)))
    return _KNOWN_FORM.sub("***", text)


def holds_secret(text: str) -> bool:
    """Whether a text has a URL with a password or a signature, or a token of a known form. ${NAME} is none."""
    user = _USER.search(text)
    # The user's name may be written out, the password must not be.
    literal = user is not None and not re.fullmatch(r"(?:[^:]*:)?\$\{\w+\}@", user[0])
    return literal or _SIGNED.search(text) is not None or _KNOWN_FORM.search(text) is not None


def unsigned(url: str) -> str:
    """A URL without its user and without the parameters of its query that sign it, which change from start to start.
    The others stay, because they may name the file."""
    where, mark, query = _USER.sub("", url, count=1).partition("?")
    if not mark:
        return where
    names = {part: unquote(part.partition("=")[0]).lower() for part in query.split("&")}
    signing = (_SIGNING, _SIGNING_AZURE) if "sig" in names.values() else (_SIGNING,)
    kept = "&".join(part for part, name in names.items() if not any(sign.fullmatch(name) for sign in signing))
    return f"{where}?{kept}" if kept else where


def printable(text: str) -> str:
    """The text with what would steer a terminal written as escapes; newlines and tabs stay."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def message(text: str) -> str:
    """A text as it may leave the process: redacted, then printable."""
    return printable(redact(text))


class _Short(reprlib.Repr):
    """Never walks more of a value than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 3, 4, 6, 6, 6
        self.maxstring = self.maxother = _LONGEST_QUOTE

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write more than 4300 digits, and takes quadratic time for fewer.
        return repr(x) if x.bit_length() < _MOST_DIGITS * 4 else f"a number of {x.bit_length()} bits"


def quote(value: Any) -> str:
    """A value as a message may repeat it: redacted, one line of bounded length, at a cost that stays the same."""
    # Redacted whole before it is cut: half a URL might no longer look like one.
    text = redact(value[: 4 * _LONGEST_QUOTE]) if isinstance(value, str) else value
    shown = printable(redact(_Short().repr(text))).replace("\n", "\\n").replace("\t", "\\t")
    return shown if len(shown) <= _LONGEST_QUOTE else f"{shown[: _LONGEST_QUOTE - 4]} ..."


def one_line(text: str, longest: int = 1000) -> str:
    """A sentence of a message as one line, cut where what it repeats has made it longer than any sentence."""
    text = printable(redact(text[: 4 * longest])).replace("\n", "\\n")
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


class _OfLogs(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = message(record.getMessage()), ()
        return True


_OF_LOGS = _OfLogs()


def redact_logs_and_tracebacks() -> None:
    """Have this process's warnings and the traceback of an uncaught error pass through `message`."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(message("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)

    sys.excepthook = show
    if logging.lastResort is not None:  # the handler of a program that sets up no other
        logging.lastResort.addFilter(_OF_LOGS)
