"""meta.json of a checkpoint: which fields it has, its digest of itself, and what is refused. It may be a stranger's."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from data.files import json_digest

from ..errors import CheckpointError
from .checksums import META

DIGEST = "digest"
NAME = re.compile(r"step_(\d{8,})")  # of a checkpoint in a run folder
_MOST_BYTES = 1 << 28
Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()  # no escape sequence reaches a terminal


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _dict_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(_is_text(key) and check(value[key]) for key in value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _row_of(*checks: Check) -> Check:
    return lambda value: (
        isinstance(value, list) and len(value) == len(checks) and all(c(v) for c, v in zip(checks, value, strict=True))
    )


def _with(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with these keys; with others only where `optional` is None."""

    def check(value: Any) -> bool:
        if not isinstance(value, dict) or not all(name in value and required[name](value[name]) for name in required):
            return False
        others = {name: value[name] for name in value.keys() - required.keys()}
        return optional is None or all(name in optional and optional[name](others[name]) for name in others)

    return check


def _is_file(name: str) -> bool:
    path = PurePosixPath(name)
    return name == str(path) and not path.is_absolute() and ".." not in path.parts and name != "."


def _are_files(value: Any) -> bool:
    entry = _with({"bytes": _is_count, "sha256": lambda text: isinstance(text, str) and len(text) == 64}, {})
    return _dict_of(entry)(value) and all(map(_is_file, value))


_ROW = _with({"shape": _list_of(_is_count)}, None)
_REQUIRED: dict[str, Check] = {
    "step": _is_count,
    "config": _with({"ema": _with({"decays": _list_of(_is_number)})}),
    "mup": _with({"sha256": _is_text, "settings": _with({"parametrization": _is_text}), "rows": _dict_of(_ROW)}),
    "fingerprints": _dict_of(_is_text),
}
_OPTIONAL: dict[str, Check] = {  # in checkpoints of some age, or of some kind
    "engine": _with({"name": _is_text}, {"stage": _is_count, "world_size": _is_count}),
    "attention": _is_text,
    "validation": lambda value: value is None or _is_text(value),
    "versions": _dict_of(_is_text),
    "commit": _is_text,
    "reads": _list_of(
        _row_of(lambda holes: isinstance(holes, dict) and all(map(_is_count, holes.values())), _is_count)
    ),
    "jumps": _list_of(_row_of(_is_count, _is_count, lambda reason: isinstance(reason, str))),
    "averages_only": lambda value: isinstance(value, bool),
    "files": _are_files,
    DIGEST: _is_text,
}


def seal(meta: Mapping[str, Any]) -> str:
    """The text of meta.json: the fields, and the digest of them all."""
    plain = json.loads(json.dumps({name: value for name, value in meta.items() if name != DIGEST}))
    return json.dumps({**plain, DIGEST: _digest(plain)})


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The fields of a checkpoint's meta.json. Raises CheckpointError where it is damaged, has other fields than
    checkpoints have, or is that of another step than the folder's name says. Those from before there was a digest are
    read without."""
    path = checkpoint / META
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise CheckpointError(f"{path} cannot be read: it has {size} bytes")
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {str(error)[:200]}") from None
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} cannot be read: expected a JSON object")
    fields = _REQUIRED | _OPTIONAL
    if unknown := sorted(meta.keys() - fields.keys()):
        raise CheckpointError(f"{path} has the field {unknown[0][:80]!r}, which no checkpoint of this version has")
    for name, check in fields.items():
        if name not in meta and name in _REQUIRED:
            raise CheckpointError(f"{path} is damaged: it has no field {name!r}")
        if name in meta and not check(meta[name]):
            raise CheckpointError(f"{path} is damaged: its field {name!r} is not of the form that checkpoints have")
    if DIGEST in meta and meta[DIGEST] != _digest(meta):
        raise CheckpointError(f"{path} is damaged: its fields are not those of its digest")
    if (named := NAME.fullmatch(checkpoint.name)) and int(named[1]) != meta["step"]:
        raise CheckpointError(f"{path} is of step {meta['step']}: its folder is renamed, or the file is another's")
    return meta


def _digest(meta: Mapping[str, Any]) -> str:
    return json_digest({name: value for name, value in meta.items() if name != DIGEST})
