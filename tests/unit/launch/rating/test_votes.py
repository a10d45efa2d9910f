"""Order, sides, and what the votes add up to, against figures known beforehand."""

import random
from collections import Counter

import pytest

from launch.rating.statistics import fleiss_kappa, results, wilson
from launch.rating.votes import QUESTIONS, Vote, order


def test_order() -> None:
    """A function of seed and rater; every prompt once; each run is left as often as right."""
    orders = {rater: order(0, rater, 40) for rater in ("ann", "bob")}
    assert orders["ann"] == order(0, "ann", 40)
    assert orders["ann"] != orders["bob"]
    assert orders["ann"] != order(1, "ann", 40)
    for pairs in orders.values():
        assert sorted(prompt for prompt, _ in pairs) == list(range(40))
        assert Counter(left for _, left in pairs) == {"a": 20, "b": 20}
    assert {sum(left == "a" for _, left in order(0, str(rater), 3)) for rater in range(20)} == {1, 2}


def votes(prompt: int, choices: str, left: str = "a") -> list[Vote]:
    names = {"a": "a", "b": "b", "x": "both_bad"}
    return [Vote(f"rater {n}", prompt, "looks", names[c], left) for n, c in enumerate(choices)]


def test_win_rate_by_prompt() -> None:
    """Prompts count alike, however many raters saw them; "both bad" is no vote for either."""
    found = results([*votes(0, "bbbb"), *votes(1, "a"), *votes(2, "abxx"), *votes(3, "x")])
    assert found["looks"].win_rate == pytest.approx((1 + 0 + 0.5) / 3)
    assert (found["looks"].low, found["looks"].high) == pytest.approx(wilson(0.5, 3))
    assert found["looks"].votes == {"a": 2, "b": 5, "both_bad": 3}
    assert (found["looks"].prompts, found["looks"].shared_prompts) == (4, 2)
    assert found["looks"].left == pytest.approx(2 / 7)
    assert found["alignment"].win_rate is None
    assert found["alignment"].kappa is None
    assert list(found) == list(QUESTIONS)


def test_wilson() -> None:
    """Newcombe (1998), Table I, method 3."""
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(hits / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1.0, 29)[0] == pytest.approx(0.8830, abs=5e-5)


def test_interval_covers() -> None:
    """Several raters who agree on a prompt are not several observations: an interval by votes would miss too often."""
    chance = random.Random(0)
    covered = 0
    for _ in range(300):
        cast = []
        for prompt in range(30):
            taste = chance.random() < 0.6
            cast += votes(prompt, "".join("b" if taste == (chance.random() < 0.95) else "a" for _ in range(5)))
        truth = 0.6 * 0.95 + 0.4 * 0.05
        found = results(cast)["looks"]
        covered += found.low <= truth <= found.high
    assert covered >= 0.93 * 300


def test_fleiss_kappa() -> None:
    """Fleiss' own kind of table: 10 items, 14 raters, 5 categories; perfect; by chance; unequal numbers of raters."""
    rows = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]  # fmt: skip
    items = [Counter({str(i): count for i, count in enumerate(row)}) for row in rows]
    assert fleiss_kappa(items) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([Counter(a=3), Counter(b=2)]) == pytest.approx(1)
    assert fleiss_kappa([Counter(a=1, b=1)] * 4) == pytest.approx(-1)
    assert fleiss_kappa([Counter(a=3)] * 4) is None
    assert fleiss_kappa([]) is None
