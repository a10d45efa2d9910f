"""What the votes of a blind comparison add up to: win rate with its interval, agreement, the raters' habits."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from launch.rating.votes import BOTH_BAD, QUESTIONS, Vote

_CONFIDENT = 1.96  # standard deviations: a 95 % interval
HEADER = f"{'a':>5} {'b':>5} {'both bad':>9}  {'b wins [95 %]':22} {'kappa':>6} {'left':>5}"
LEGEND = (
    "b wins: its share of the votes for either image, mean over prompts; Wilson's interval, a prompt being one "
    "observation.\nkappa: Fleiss', on the prompts that several raters judged. left: share of votes for the left image."
)


@dataclass(frozen=True)
class Result:
    """The votes on one question. win_rate: of b over a, None without a vote for either; low, high: its 95 % interval.

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
    """{question: what the votes on it add up to}"""
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
    """Agreement above chance on items with at least two votes each: {choice: votes}.

    Fleiss (1971), with each item's own number of raters. None without items, or where all votes are the same: chance
    agrees then too.
    """
    total: Counter[str] = sum(items, Counter())
    expected = sum((count / total.total()) ** 2 for count in total.values()) if items else 1.0
    if expected == 1:
        return None
    pairs = [sum(c * (c - 1) for c in item.values()) / (item.total() * (item.total() - 1)) for item in items]
    return (statistics.fmean(pairs) - expected) / (1 - expected)


def describe(result: Result) -> str:
    """The line of a question, in the columns of HEADER."""
    counts = result.votes
    rate = "no votes for either"
    if result.win_rate is not None:
        rate = f"{result.win_rate:.1%} [{result.low:.1%}, {result.high:.1%}]"
    kappa = "-" if result.kappa is None else f"{result.kappa:.2f}"
    left = "-" if result.left is None else f"{result.left:.0%}"
    return f"{counts['a']:5} {counts['b']:5} {counts[BOTH_BAD]:9}  {rate:22} {kappa:>6} {left:>5}"
