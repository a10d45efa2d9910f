"""Order, sides, and what the votes add up to, against figures known beforehand."""

import contextlib
import random
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from launch.rating.statistics import fleiss_kappa, results, wilson
from launch.rating.votes import QUESTIONS, Vote, Votes, order
from tests.helpers.fuzz import counted, fuzz


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


STUDY = {"a": "A", "b": "B", "prompts": ["x", "y"], "seed": 0, "overrides": [], "token": "t",
         "sources": {"a": "A", "b": "B"}}  # fmt: skip


def changed(folder: Path, script: str) -> Path:
    """A study's file with one vote, and what SQLite makes of a script there."""
    path = folder / "votes.db"
    with contextlib.closing(Votes.create(path, STUDY)) as new:
        new.add(Vote("ann", 0, "looks", "a", "b"))
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.executescript(script)
    return path


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TRIGGER t AFTER INSERT ON votes BEGIN DELETE FROM votes; END",
        "DROP TABLE study; CREATE VIEW study AS WITH RECURSIVE r(description) AS (SELECT 1 UNION ALL SELECT "
        "description + 1 FROM r) SELECT max(description) AS description FROM r",
        "DELETE FROM study",
        "UPDATE study SET description = zeroblob(99)",
        "UPDATE study SET description = printf('%.*c', 5000, '[')",
        "UPDATE study SET description = json_set(description, '$.prompts', 1)",
        "UPDATE study SET description = json_remove(description, '$.token')",
        "UPDATE votes SET prompt = 99",
        "UPDATE votes SET prompt = 'many'",
        "UPDATE votes SET question = x'00ff'",
        "UPDATE votes SET rater = NULL",
    ],
)
def test_a_foreign_file_is_read_as_data_or_refused(tmp_path: Path, script: str) -> None:
    with pytest.raises(DataError, match=r"votes.db is not the votes.db of a rating: ."):
        Votes(changed(tmp_path, script))


@fuzz(60, deadline=20_000)
@given(st.lists(st.tuples(st.integers(0, 2**15), st.binary(min_size=1, max_size=9)), max_size=6))
def test_mutated_files(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]) -> None:
    path = changed(tmp_path_factory.mktemp("votes"), "")
    data = bytearray(path.read_bytes())
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new
    path.write_bytes(data)
    with counted(DataError), contextlib.closing(Votes(path)) as read:
        results(read.all())


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
