"""mudit data report: its figures against what lies in the shards, and its page."""

import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.report.charts import WIDTH, chart
from data.report.counts import Counts
from launch import data_report, mudit
from tests.helpers.paths import ROOT
from tests.unit.data.report.pictures import jpeg, picture
from tests.unit.data.test_index import png, write_tar

HOSTILE = '<img src=x onerror=alert(1)> & "quotes"'


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight pictures of four sizes with captions of 2 to 30 words; resaved, resized and damaged ones; one without a
    caption."""
    monkeypatch.chdir(tmp_path)
    members: dict[str, bytes] = {}
    for number, size in enumerate([(64, 64), (96, 48), (48, 96), (24, 24)] * 2):
        members |= {f"{number}.jpg": jpeg(picture(number, size)), f"{number}.txt": b"red " * (4 * number + 2)}
    members |= {"again.jpg": jpeg(picture(0, (64, 64)), 60), "again.txt": HOSTILE.encode()}
    members |= {"small.jpg": jpeg(picture(1, (96, 48)).resize((64, 32))), "small.txt": b"small"}
    members |= {"cut.jpg": members["2.jpg"][:-300], "cut.txt": b"cut", "none.jpg": b"no image", "none.txt": b"none"}
    members |= {"mute.png": png(size=(64, 64))}
    write_tar(tmp_path / "a.tar", {name: data for name, data in members.items() if name < "5"})
    write_tar(tmp_path / "b.tar", {name: data for name, data in members.items() if name >= "5"})
    return tmp_path


def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict, str]:
    """(figures, page) of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["data_report.py", ".", "--json", "--workers", "0", *map(str, words)])
    assert data_report.main() == 0
    found = json.loads(capsys.readouterr().out)
    return found, Path(found["page"]).read_text()


ENCODER = f"text_encoder.path={ROOT / '.cache' / 'debug' / 't5'}"
WITH_CONFIG = ("--config", "mmdit_2b_mup", ENCODER, "text_encoder.subfolder=null", "data.buckets=aspect")
WITH_CONFIG += ("data.resolution=64", "train.global_batch_size=1", "data.text_lengths=[]", "text_encoder.max_length=32")


def test_figures(shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found, page = report(monkeypatch, capsys, *WITH_CONFIG)
    assert (found["samples"], found["shards"], found["decoded"], found["unknown_size"]) == (13, 2, 13, 1)
    assert found["side"] == {"least": 24, "median": 48, "95 %": 64, "most": 64}
    assert found["captions"]["with"] == 12
    assert found["holes"] == {
        "image: truncated": [1, "b/cut"],
        "image: unreadable": [1, "b/none"],
        "caption: missing": [1, "b/mute"],
    }
    assert found["near_duplicates"] == {"groups": 2, "images": 4, "largest": 2, "kinds": 8, "pair_seen": 1.0}
    # ByT5: a token for each byte and one for the end. "red red" has 8, and each 4 words more 16 of them.
    lengths = [8 + 16 * number for number in range(8)] + [len(HOSTILE) + 1, 6]
    assert found["lengths"]["cut"] == pytest.approx(sum(length > 32 for length in lengths) / 10)
    assert found["lengths"]["spread"]["most"] == 120
    sizes = {row["size"]: row["samples"] for row in found["buckets"]}
    assert sizes == {"48 x 80": 3, "64 x 64": 6, "80 x 48": 3}, "the nearest of the config's shapes"
    upscaled = {row["size"]: row["upscaled"] for row in found["buckets"]}
    assert upscaled == {"48 x 80": 0, "64 x 64": 2, "80 x 48": 1}
    assert page.count('class="beyond"') > 0


def test_buckets_that_join(shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found, page = report(monkeypatch, capsys, *WITH_CONFIG[:-3], "train.global_batch_size=13", *WITH_CONFIG[-2:])
    [row] = found["buckets"]
    assert (row["samples"], found["joined"]) == (12, 2)
    assert row["cut"] > 0.2, "of what the joined bucket crops"
    assert "2 buckets of fewer samples than a global batch of 13 have joined" in " ".join(page.split())


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_needs_no_other_file_and_runs_nothing_of_a_caption(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = Tags(report(monkeypatch, capsys)[1])
    assert HOSTILE in tags.text
    assert not [tag for tag, _ in tags.seen if tag in ("script", "link", "iframe")]
    pictures = [about for tag, about in tags.seen if tag == "img"]
    assert len(pictures) == 10 + 4, "pairs, and two groups of two"
    assert all((about["src"] or "").startswith("data:image/jpeg;base64,") for about in pictures)
    assert not [about for _, about in tags.seen if any(name.startswith("on") for name in about)]


def test_same_seed_same_page_whatever_reads_it(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, page = report(monkeypatch, capsys, "--sample", 6)
    assert one["decoded"] == 6
    assert one["near_duplicates"]["pair_seen"] == pytest.approx((6 / 13) ** 2)
    assert "so that the set may hold more" in " ".join(page.split())
    assert report(monkeypatch, capsys, "--sample", 6)[1] == page
    assert report(monkeypatch, capsys, "--sample", 6, "--seed", 1)[1] != page


@pytest.mark.slow
def test_worker_processes_read_the_same(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = report(monkeypatch, capsys)[1]
    cores = min(2, len(os.sched_getaffinity(0)))
    assert report(monkeypatch, capsys, "--workers", cores)[1] == page


def test_shards_of_which_nothing_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", {"x.jpg": b"no image", "y.jpg": jpeg(picture(0, (64, 64)))[:100]})
    found, page = report(monkeypatch, capsys)
    assert sum(count for count, _ in found["holes"].values()) == 2
    assert "No sample has a caption." in page
    with pytest.raises(DataError, match="--sample must be at least 1, got 0"):
        report(monkeypatch, capsys, "--sample", 0)


def test_mudit_takes_two_words(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mudit", "data", "report", ".", "--workers", "0", "--output", "p.html"])
    assert mudit._dispatch() == 0
    assert re.search("<h1>.</h1>", Path("p.html").read_text())


def test_bins_hold_each_value_once() -> None:
    for values in ([32] * 5, [1, 2, 3], [5, 900], [110, 404, 1195], [1, 50_000], [0, 7, 70_000]):
        counts = Counts(1 << 16)
        counts.add(np.array(values))
        bins = counts.bins()
        assert bins.counts.sum() == len(values) == len(counts)
        for first, end, count in zip(bins.edges[:-1], bins.edges[1:], bins.counts, strict=True):
            assert count == sum(first <= min(value, 1 << 16) < end for value in values), (values, first, end)
        drawn = chart(bins, "pixels")
        assert all(bar.x >= 0 and bar.x + bar.width <= WIDTH + 1 for bar in drawn.bars)
    counts = Counts(100)
    counts.add(np.arange(1, 101))
    assert (counts.quantile(0.5), counts.quantile(0.95), counts.share_above(90)) == (50, 95, 0.1)
