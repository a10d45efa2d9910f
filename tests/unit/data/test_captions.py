"""Captions of one sample: what a member may hold, and which of several is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.captions import CaptionChoice, CaptionFile, captions_from_bytes
from data.errors import DataError, SampleError


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"caption": " a "}, (["a"], [1.0])),
        ({"captions": ["a", "b"]}, (["a", "b"], [1.0, 1.0])),
        ({"captions": ["a", "b"], "weights": [0.2, 0]}, (["a", "b"], [0.2, 0])),
        ({"captions": ["a", "b"], "weights": [1]}, "weights do not fit"),
        ({"captions": ["a"], "weights": [0]}, "weights do not fit"),
        ({"captions": ["a"], "weights": [float("inf")]}, "weights do not fit"),
        ({"captions": ["a"], "weights": [10**400]}, "weights do not fit"),
        ({"captions": ["a \ud800"]}, (["a ?"], [1.0])),
        ({"captions": ["a"], "weights": "1"}, "weights do not fit"),
        ({"captions": [], "weights": []}, "missing"),
        ({"caption": None}, "missing"),
        ({"captions": ["a", 1]}, "not JSON with a caption"),
        ({"captions": "a"}, "not JSON with a caption"),
        ({"captions": ["a", " "]}, "empty"),
        ({"captions": ["a", "x" * 100_001]}, "too long"),
        ([1], "not JSON with a caption"),
    ],
)
def test_captions_of_a_json_member(entry: object, expected: Any) -> None:
    data = json.dumps(entry).encode()
    if isinstance(expected, str):
        with pytest.raises(SampleError, match=expected):
            captions_from_bytes(data, is_json=True)
    else:
        assert captions_from_bytes(data, is_json=True) == expected


def test_captions_are_picked_by_their_weights() -> None:
    choice = CaptionChoice(["a", "b", "c"], [1, 3, 0])
    picked = [choice.pick(chance) for chance in np.linspace(0, 1, 1000, endpoint=False)]
    assert (picked.count(0), picked.count(1), picked.count(2)) == (250, 750, 0)
    assert CaptionChoice(["a", "b"], [0.1, 0.0]).pick(np.nextafter(1.0, 0.0)) == 0


# --------------------------------------------------------------------------------------------- files beside the shards


def captions_of(folder: Path, lines: list[tuple[object, object]], *shards: list[str]) -> list[list[str]]:
    """The captions that the samples of shards get from a file, by their keys; [] for none."""
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps({"key": image, "caption": text}) + "\n" for image, text in lines))
    with open(folder / "texts", "w+b") as texts:
        found = CaptionFile(path, texts)
        rows = [row for keys in shards for row in found.find(keys)]
        texts.flush()
        stored = (folder / "texts").read_bytes()
    parts = [stored[row["offset"] : row["offset"] + row["size"]] for row in rows]
    choices = [
        captions_from_bytes(part, bool(row["is_json"])).texts if part else []
        for part, row in zip(parts, rows, strict=True)
    ]
    assert [row["length"] for row in rows] == [max(map(len, texts), default=-1) for texts in choices]
    return choices


def test_captions_are_joined_by_path_first(tmp_path: Path) -> None:
    lines: list[tuple[object, object]] = [
        ("cats/0003.jpg", "a cat"),
        ("dogs/0003.jpg", "a dog"),
        ("./x/7.png", "seven"),
    ]
    assert captions_of(tmp_path, lines, ["cats/0003", "7"], ["dogs/0003"]) == [["a cat"], ["seven"], ["a dog"]]


@pytest.mark.parametrize(
    ("lines", "shards", "message"),
    [
        (
            [("cats/0003.jpg", "a cat"), ("dogs/0003.jpg", "a dog")],
            [["0003"]],
            r"sample '0003' may be 'cats/0003.jpg' or 'dogs/0003.jpg'",
        ),
        (
            [("0003.jpg", "a cat")],
            [["cats/0003", "dogs/0003"]],
            r"samples 'cats/0003' and 'dogs/0003' have the same last",
        ),
        ([("0003.jpg", "a cat")], [["cats/0003"], ["dogs/0003"]], r"samples 'dogs/0003' and one of another folder"),
    ],
)
def test_a_caption_that_two_images_would_share_is_refused(
    lines: list[tuple[object, object]], shards: list[list[str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        captions_of(tmp_path, lines, *shards)


def test_several_captions_of_an_image_are_kept(tmp_path: Path) -> None:
    lines: list[tuple[object, object]] = [
        (17, "one"), ("b", "alone"), ("sa_17.jpg", "and another"), (17, "one"), ("c", ["x", "longer", " "])
    ]  # fmt: skip
    assert captions_of(tmp_path, lines, ["sa_17", "b", "c", "d"]) == [
        ["one", "and another"], ["alone"], ["x", "longer"], []
    ]  # fmt: skip
