"""metrics.jsonl and status.json of a run folder. They help a person and stand in nobody's way: what a disk or a person
has damaged of them is left out when they are read."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..files import json_text, write_atomically

METRICS, STATUS = "metrics.jsonl", "status.json"
STATES = ("running", "finished", "preempted", "failed")
_NOT_FINITE = "not_finite"  # beside a null: which number it stands for, since JSON has no NaN and no Infinity


class Line(NamedTuple):
    """record: None where the line is no JSON object with a step."""

    raw: bytes
    record: dict[str, Any] | None


def metrics_line(record: Mapping[str, Any]) -> bytes:
    """A line of metrics.jsonl. A number that is not finite is null, and `not_finite` says which one it was."""
    reasons = {k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return json_text({**record, _NOT_FINITE: reasons} if reasons else dict(record)).encode() + b"\n"


def read_lines(folder: Path) -> list[Line]:
    """The complete lines of a run folder's metrics.jsonl; [] where there is no such file."""
    path = folder / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [Line(raw, record_of(raw)) for raw in lines if raw.endswith(b"\n")]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl has logged, a line each; damaged lines are left out."""
    return [line.record for line in read_lines(folder) if line.record is not None]


def write_status(folder: Path, state: str, step: int, reason: str = "") -> None:
    """status.json: running, finished, preempted or failed."""
    write_atomically(folder / STATUS, json_text({"state": state, "step": step, "reason": reason}) + "\n")


def read_status(folder: Path) -> tuple[str, str] | None:
    """(state, reason) of status.json; None where there is none, or a damaged one."""
    try:
        told = json.loads((folder / STATUS).read_bytes())
        return (told["state"], str(told.get("reason", ""))) if told["state"] in STATES else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def record_of(raw: bytes) -> dict[str, Any] | None:
    """What a line of metrics.jsonl says; None where it is no JSON object with a step."""
    try:
        record = json.loads(raw.strip(b"\0\r\n "))  # a crash of the machine may leave zeros before a line
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    reasons = record.pop(_NOT_FINITE, None)
    for key, reason in reasons.items() if isinstance(reasons, dict) else ():
        if reason in ("nan", "inf", "-inf"):
            record[key] = float(reason)
    return record
