"""Votes of a blind comparison in one SQLite file: each is on disk before it is answered. And what they add up to."""

import contextlib
import json
import math
import random
import sqlite3
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from data.errors import DataError
from data.files import temporary_beside

QUESTIONS = {"alignment": "Which image follows the prompt better?", "looks": "Which image looks better?"}
SIDES = ("left", "right")
BOTH_BAD = "both_bad"
_CONFIDENT = 1.96  # standard deviations: a 95 % interval
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
    """The file. Threads of this process may share it; the last vote on a question is the one that counts."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"{path} does not exist: expected the votes.db that rate.py writes")
        self._lock = threading.Lock()
        try:
            self._file = sqlite3.connect(path, check_same_thread=False)
            # A commit returns when the vote is on the disk, and leaves one file, which can be copied.
            self._file.execute("PRAGMA journal_mode = DELETE")
            self._file.execute("PRAGMA synchronous = FULL")
            self.study: dict[str, Any] = json.loads(self._file.execute("SELECT description FROM study").fetchone()[0])
            self.all()
        except sqlite3.Error as error:
            raise DataError(f"{path} is not the votes.db of a rating: {error}") from None

    @classmethod
    def create(cls, path: Path, study: dict[str, Any]) -> Self:
        """study: what is compared, in a form for JSON."""
        with temporary_beside(path) as beside, contextlib.closing(sqlite3.connect(beside)) as file:
            file.executescript(_TABLES)
            with file:
                file.execute("INSERT INTO study VALUES (?)", (json.dumps(study),))
        path.chmod(0o600)  # it holds the token
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
        return [Vote(*row) for row in rows]

    def of(self, rater: str) -> set[tuple[int, str]]:
        """(prompt, question) that a rater has answered."""
        return {(vote.prompt, vote.question) for vote in self.all() if vote.rater == rater}


def order(seed: int, rater: str, prompts: int) -> list[tuple[int, str]]:
    """(prompt, run on the left) in the order in which a rater sees them; each run is left half of the time."""
    chance = random.Random(f"{seed}/{rater}")
    numbers = chance.sample(range(prompts), prompts)
    left = ["a", "b"] * (prompts // 2) + chance.sample(["a", "b"], 1) * (prompts % 2)
    chance.shuffle(left)
    return list(zip(numbers, left, strict=True))


# --------------------------------------------------------------------------------------------------------- the result
@dataclass(frozen=True)
class Result:
    """Of one question. win_rate: of b over a, None without a vote for either; low, high: its 95 % interval.

    A prompt's share of votes for b, of those for either, is one observation: votes on one prompt are not independent.
    kappa: Fleiss', on the prompts that at least two raters judged; None where it is not defined. left: the share of
    votes for either that went to the left image, which says whether the raters had a habit.
    """

    votes: dict[str, int]
    prompts: int
    win_rate: float | None
    low: float
    high: float
    kappa: float | None
    shared_prompts: int
    left: float | None


def results(votes: Sequence[Vote]) -> dict[str, Result]:
    return {question: _result([vote for vote in votes if vote.question == question]) for question in QUESTIONS}


def _result(votes: Sequence[Vote]) -> Result:
    by_prompt: dict[int, Counter[str]] = {}
    for vote in votes:
        by_prompt.setdefault(vote.prompt, Counter())[vote.choice] += 1
    shares = [count["b"] / (count["a"] + count["b"]) for count in by_prompt.values() if count["a"] + count["b"]]
    rate = statistics.fmean(shares) if shares else None
    low, high = (0.0, 1.0) if rate is None else wilson(rate, len(shares))
    decided = [vote for vote in votes if vote.choice != BOTH_BAD]
    shared = [count for count in by_prompt.values() if count.total() > 1]
    return Result(
        votes={choice: sum(count[choice] for count in by_prompt.values()) for choice in ("a", "b", BOTH_BAD)},
        prompts=len(by_prompt),
        win_rate=rate,
        low=low,
        high=high,
        kappa=fleiss_kappa(shared),
        shared_prompts=len(shared),
        left=sum(vote.choice == vote.left_was for vote in decided) / len(decided) if decided else None,
    )


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate that n independent observations in [0, 1] have given."""
    z2 = _CONFIDENT**2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _CONFIDENT / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def fleiss_kappa(items: Sequence[Counter[str]]) -> float | None:
    """Agreement above chance of items with at least two votes each: {choice: votes}.

    Fleiss (1971), with each item's own number of raters. None without items, or where all votes are the same: chance
    agrees then too.
    """
    total: Counter[str] = sum(items, Counter())
    expected = sum((count / total.total()) ** 2 for count in total.values()) if items else 1.0
    if expected == 1:
        return None
    pairs = [sum(c * (c - 1) for c in item.values()) / (item.total() * (item.total() - 1)) for item in items]
    return (statistics.fmean(pairs) - expected) / (1 - expected)
