"""Votes of a blind comparison in one SQLite file: each is on the disk before it is answered."""

import contextlib
import dataclasses
import json
import random
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from data.errors import DataError
from data.files import temporary_beside
from data.redaction import one_line, quote

QUESTIONS = {"alignment": "Which image follows the prompt better?", "looks": "Which image looks better?"}
SIDES = ("left", "right")
BOTH_BAD = "both_bad"
_LONGEST = 1 << 26  # characters of the description, which holds all prompts
_STUDY = {"a": str, "b": str, "prompts": list, "seed": int, "overrides": list, "sources": dict, "token": str}
_TABLES = """
CREATE TABLE study (description TEXT NOT NULL);
CREATE TABLE votes (
    rater TEXT, prompt INTEGER, question TEXT,
    choice TEXT NOT NULL CHECK (choice IN ('a', 'b', 'both_bad')),
    left_was TEXT NOT NULL CHECK (left_was IN ('a', 'b')),
    unix_s REAL NOT NULL,
    PRIMARY KEY (rater, prompt, question)
);
"""


@dataclass(frozen=True)
class Vote:
    """prompt: its number in the file. choice: "a" | "b" | "both_bad". left_was: the run whose image was on the left."""

    rater: str
    prompt: int
    question: str
    choice: str
    left_was: str


class Votes:
    """The file of votes, which threads of this process may share. A rater's last vote on a question counts."""

    def __init__(self, path: Path) -> None:
        if not path.is_file() or path.is_symlink():
            raise DataError(f"{path} does not exist: expected the votes.db that rate.py writes")
        self._lock = threading.Lock()
        try:
            with contextlib.ExitStack() as until_it_is_known:
                self._file = sqlite3.connect(path, check_same_thread=False)
                until_it_is_known.callback(self.close)
                # A commit returns when the vote is on the disk, and leaves one file, which can be copied.
                self._file.execute("PRAGMA journal_mode = DELETE")
                self._file.execute("PRAGMA synchronous = FULL")
                _check_schema(self._file)
                self.study: dict[str, Any] = _study_in(self._file)
                self.all()
                until_it_is_known.pop_all()
        except (sqlite3.Error, ValueError, RecursionError) as error:
            raise DataError(f"{path} is not the votes.db of a rating: {one_line(str(error), 200)}") from None

    @classmethod
    def create(cls, path: Path, study: dict[str, Any]) -> Self:
        """study: what is compared, as JSON data."""
        with temporary_beside(path) as beside, contextlib.closing(sqlite3.connect(beside)) as file:
            beside.chmod(0o600)  # it holds the token
            file.executescript(_TABLES)
            with file:
                file.execute("INSERT INTO study VALUES (?)", (json.dumps(study),))
        return cls(path)

    def close(self) -> None:
        self._file.close()

    def add(self, vote: Vote) -> None:
        row = (vote.rater, vote.prompt, vote.question, vote.choice, vote.left_was, time.time())
        with self._lock, self._file:
            self._file.execute("INSERT OR REPLACE INTO votes VALUES (?, ?, ?, ?, ?, ?)", row)

    def all(self) -> list[Vote]:
        with self._lock:
            rows = self._file.execute("SELECT rater, prompt, question, choice, left_was FROM votes").fetchall()
        votes = [Vote(*row) for row in rows]
        if wrong := next((vote for vote in votes if not self._is_possible(vote)), None):
            raise ValueError(f"nobody can have cast the vote {quote(list(dataclasses.astuple(wrong)))}")
        return votes

    def _is_possible(self, vote: Vote) -> bool:
        rater, prompt = vote.rater, vote.prompt  # SQLite keeps values of any type in any column
        return (
            isinstance(rater, str) and isinstance(prompt, int) and 0 <= prompt < len(self.study["prompts"])
            and vote.question in QUESTIONS and vote.choice in ("a", "b", BOTH_BAD) and vote.left_was in ("a", "b")
        )  # fmt: skip

    def of(self, rater: str) -> set[tuple[int, str]]:
        """(prompt, question) of all that a rater has answered."""
        return {(vote.prompt, vote.question) for vote in self.all() if vote.rater == rater}


def _check_schema(file: sqlite3.Connection) -> None:
    """Raise ValueError where a file has other tables than a study's: views and triggers are programs."""
    with contextlib.closing(sqlite3.connect(":memory:")) as ours:
        ours.executescript(_TABLES)
        wanted, found = (
            sorted(each.execute("SELECT type, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchmany(9))
            for each in (ours, file)
        )
    if found != wanted:
        raise ValueError(f"it has other tables: {quote(found)}")


def _study_in(file: sqlite3.Connection) -> dict[str, Any]:
    """The description of what is compared. Raises ValueError where it is none."""
    row = file.execute(
        "SELECT description FROM study WHERE typeof(description) = 'text' AND length(description) < ?", (_LONGEST,)
    ).fetchone()
    study = json.loads(row[0]) if row else None
    if (
        not isinstance(study, dict)
        or not all(isinstance(study.get(key), kind) for key, kind in _STUDY.items())
        or not all(isinstance(prompt, str) for prompt in study["prompts"])
        or not all(isinstance(study["sources"].get(run), str) for run in ("a", "b"))
    ):
        raise ValueError("it does not describe what is compared")
    return study


def order(seed: int, rater: str, prompts: int) -> list[tuple[int, str]]:
    """(prompt, run on the left) in the order in which a rater sees them; each run is on the left half of the time."""
    chance = random.Random(f"{seed}/{rater}")
    numbers = chance.sample(range(prompts), prompts)
    left = ["a", "b"] * (prompts // 2) + chance.sample(["a", "b"], 1) * (prompts % 2)
    chance.shuffle(left)
    return list(zip(numbers, left, strict=True))
