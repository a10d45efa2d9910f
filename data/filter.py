"""data.filter: which samples are left out when the shards are packed into an index, counted by the reason."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .config import FilterConfig
from .errors import DataError
from .shard_index import ABSENT


class Filter:
    """The filter over the samples of one source. `read` and `left_out` count what it has seen.

    where: the source, for messages; scores_in: what holds the numbers of its samples.
    """

    def __init__(self, cfg: FilterConfig, where: str, scores_in: str) -> None:
        self._cfg, self._where, self._scores_in = cfg, where, scores_in
        self.columns = [score.column for score in cfg.scores]
        self.read, self.left_out = 0, Counter[str]()
        self._found = np.zeros(len(self.columns), bool)

    def keep(self, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """bool [n]: which of n samples stay. rows: ROW [n]. scores: float64 [n, columns], NaN where there is none.

        What is not known of a sample, because its image or its caption cannot be read, does not leave it out: that is
        damage, and stays to be counted as such.
        """
        kept = np.ones(len(rows), bool)
        for reason, out in self._tests(rows, scores):
            self.left_out[reason] += int((kept & out).sum())
            kept &= ~out
        self.read += len(rows)
        self._found |= ~np.isnan(scores).all(axis=0)
        return kept

    def _tests(self, rows: np.ndarray, scores: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(reason, which samples it leaves out); a sample is counted by the first one."""
        cfg, length = self._cfg, rows["caption_length"]
        known = (rows["caption_offset"] != ABSENT) & (length > 0)
        if cfg.has_caption or cfg.min_caption_length:
            yield "without a caption", (rows["caption_offset"] == ABSENT) | (length == 0)
        if cfg.min_caption_length:
            reason = f"with a caption of fewer than {cfg.min_caption_length} characters"
            yield reason, known & (length < cfg.min_caption_length)
        if cfg.max_caption_length is not None:
            reason = f"with a caption of more than {cfg.max_caption_length} characters"
            yield reason, known & (length > cfg.max_caption_length)
        short, long = (of(rows["width"], rows["height"]) for of in (np.minimum, np.maximum))
        if cfg.min_side:
            yield f"with a side of fewer than {cfg.min_side} pixels", (short > 0) & (short < cfg.min_side)
        if cfg.max_aspect is not None:
            yield f"of an aspect ratio above {cfg.max_aspect:g}", long > cfg.max_aspect * np.maximum(1, short)
        for score, value in zip(cfg.scores, scores.T, strict=True):
            yield f"without {score.column}", np.isnan(value)
            if score.min is not None:
                yield f"with {score.column} below {score.min:g}", value < score.min
            if score.max is not None:
                yield f"with {score.column} above {score.max:g}", value > score.max

    def check(self) -> None:
        """Raise DataError where no sample is left of those that were read, or none has a number that is asked for."""
        if not self.read:
            return
        for column, found in zip(self.columns, self._found, strict=True):
            if not found:
                raise DataError(
                    f"data.filter.scores: no sample of {self._where} has a number {column!r} in {self._scores_in}: "
                    "give the name of one that is there"
                )
        if self.left_out.total() == self.read:
            raise DataError(f"{described(self.left_out, self.read)} of {self._where}: relax data.filter")


def described(left_out: Mapping[str, int], read: int) -> str:
    """What a filter did, as a sentence without its full stop."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    kept = read - sum(left_out.values())
    return f"data.filter keeps {kept} of {read} samples" + (f" (left out: {reasons})" if reasons else "")


def scores_of(numbers: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """float64 [n, columns] from the column `numbers` of a shard's index; NaN where a sample has no such number."""
    values = np.full((len(numbers), len(columns)), np.nan)
    for row, text in enumerate(numbers if columns else ()):
        with contextlib.suppress(ValueError, RecursionError, AttributeError):  # an index may be a stranger's
            found = json.loads(text or "{}")
            values[row] = [value if type(value := found.get(column)) in (int, float) else np.nan for column in columns]
    return values
