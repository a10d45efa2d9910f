"""data.filter: what it leaves out, what it says, and what it does to the identity of the data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import FilterConfig, ScoreConfig
from data.errors import DataError, too_many_unreadable
from data.index import ImageTextIndex, IndexSource
from tests.unit.data.test_index import png, write_tar

SIZES = {"wide": (90, 30), "small": (20, 20), "good": (40, 50), "mute": (40, 40), "blank": (40, 40), "long": (40, 40)}
CAPTIONS: dict[str, Any] = {"wide": "x", "small": "x", "good": "fine", "mute": None, "blank": " ", "long": "y" * 99}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Images of SIZES with CAPTIONS as img2dataset writes them, one that is damaged, and one of a damaged caption."""
    members: dict[str, bytes] = {}
    for score, (key, size) in enumerate(SIZES.items()):
        members[f"{key}.png"] = png(size=size)
        members[f"{key}.json"] = json.dumps(
            {"caption": CAPTIONS[key], "score": score, "url": "x", "flag": True}
        ).encode()
    members |= {"broken.png": b"no image", "broken.txt": b"x", "latin.png": png(size=(40, 40)), "latin.txt": b"\xe4"}
    return write_tar(tmp_path / "s.tar", members)


@pytest.mark.parametrize(
    ("keep", "left_out", "reason"),
    [
        ({"has_caption": True}, ["mute", "blank"], "2 without a caption"),
        ({"min_caption_length": 2}, ["wide", "small", "mute", "blank", "broken"], "3 with a caption of fewer than 2"),
        ({"max_caption_length": 98}, ["long"], "1 with a caption of more than 98 characters"),
        ({"min_side": 30}, ["small"], "1 with a side of fewer than 30 pixels"),
        ({"max_aspect": 2.5}, ["wide"], r"1 of an aspect ratio above 2\.5"),
        ({"scores": (ScoreConfig("score", min=1, max=3),)}, ["wide", "blank", "long", "broken", "latin"], "2 without"),
    ],
)  # fmt: skip
def test_what_is_left_out(shard: Path, tmp_path: Path, keep: dict[str, Any], left_out: list[str], reason: str) -> None:
    """Not what is damaged: that stays, and is counted when it is read."""
    whole, index = ImageTextIndex([shard], tmp_path), ImageTextIndex([shard], tmp_path, keep=FilterConfig(**keep))
    names = [index.name(0, sample) for sample in range(len(index))]
    assert names == [f"s/{key}" for key in [*SIZES, "broken", "latin"] if key not in left_out]
    assert index.fingerprint != whole.fingerprint
    assert whole.filtered == []
    again = ImageTextIndex([shard], tmp_path, keep=FilterConfig(**keep))  # from the packed index
    assert again.filtered == index.filtered
    assert index.filtered[0].startswith(f"data.filter keeps {8 - len(left_out)} of 8 samples (left out: ")
    assert re.search(reason, index.filtered[0])


def test_scores_of_a_captions_file(shard: Path, tmp_path: Path) -> None:
    rows = {"key": [*SIZES, "gone"], "caption": ["x"] * 7, "aesthetic": [9.0, 1.0, None, 5.0, 5.5, 4.0, 9.0]}
    pq.write_table(pa.table(rows), tmp_path / "c.parquet")
    source = IndexSource([shard], tmp_path / "c.parquet")
    index = ImageTextIndex([source], keep=FilterConfig(scores=(ScoreConfig("aesthetic", min=5),)))
    assert [index.name(0, sample) for sample in range(len(index))] == ["s/wide", "s/mute", "s/blank"]
    assert "3 without aesthetic, 2 with aesthetic below 5" in index.filtered[0]


def test_a_filter_that_leaves_nothing_or_asks_for_what_is_not_there_is_refused(shard: Path) -> None:
    with pytest.raises(DataError, match=r"data\.filter keeps 0 of 8 samples .* of .*s\.tar: relax"):
        ImageTextIndex([shard], keep=FilterConfig(min_side=1000, scores=(ScoreConfig("score"),)))
    with pytest.raises(DataError, match=r"no sample of .*s\.tar has a number 'beauty' in its \.json member"):
        ImageTextIndex([shard], keep=FilterConfig(scores=(ScoreConfig("beauty", min=1),)))


def test_the_share_of_unreadable_samples_is_of_those_that_were_read() -> None:
    assert not too_many_unreadable(1, 16, 0.01), "one of the first ones is no share yet"
    assert too_many_unreadable(10, 200, 0.01), "whatever the size of the data"
    assert not too_many_unreadable(10, 1000, 0.01)
    assert too_many_unreadable(101, 10_000, 0.01)
    assert too_many_unreadable(1, 10**6, 0.0)
