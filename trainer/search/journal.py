"""A study's journal: Optuna's records, one JSON object per line, that stay readable through full disks and kills."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileOpenLock

from data.files import open_plain

from ..errors import ConfigError
from ..files import append_lines

_RECORD = b'{"op_code"'  # how a record begins; in a text within a record the quotes would be escaped


class Journal(BaseJournalBackend):
    """The journal in the file `path`, which many processes of many machines append to and read.

    Optuna's own backend appends to whatever a full disk has left of the last record: the line of both is no JSON, and
    the study is lost. Here such a tail is cut off before each append. Its writer was told that it had failed, so
    nothing that counted goes with it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = JournalFileOpenLock(str(path))
        self._offsets = [0]  # of the whole lines that have been read, and of the one after them
        open_plain(path, "ab").close()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The records from this number on. Raises ConfigError where a line is damaged."""
        first = min(log_number_from, len(self._offsets) - 1)
        with open(self._path, "rb") as file:
            file.seek(self._offsets[first])
            for number, line in enumerate(file, first):
                if not line.endswith(b"\n"):
                    return  # being written, or torn
                record = self._record(number, line)
                if number + 1 == len(self._offsets):
                    self._offsets.append(self._offsets[number] + len(line))
                if number >= log_number_from:
                    yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append whole records or none. Raises OSError with the journal's path."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._lock.acquire()
        try:
            append_lines(self._path, lines)
        finally:
            self._lock.release()

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        # After a torn tail older versions went on in the same line; a crash of the machine may leave zeros there.
        for start in (0, line.rfind(_RECORD)):
            try:
                record = json.loads(line[max(0, start) :])
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                return record
        raise ConfigError(
            f"{self._path}: line {number + 1} is damaged: expected a record of the study in JSON. Give back the file "
            "from a copy, or give the search another name to start anew; the runs of its trials stay where they are"
        )
