"""Captions of one sample: what a member may hold, and which of several is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.captions import CaptionChoice, CaptionFile, CaptionRules, captions_from_bytes, open_captions
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
        ({"captions": ["a \ud800", "\ud83d\ude00 \udc00b"]}, (["a", "\U0001f600 b"], [1.0, 1.0])),
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


def test_several_files_with_fields_of_other_names(tmp_path: Path) -> None:
    """As people have them: a byte order mark, numbers of two engines, columns of their own, lines with U+2028."""
    (tmp_path / "a.jsonl").write_text(
        '\ufeff{"file_name": "x/1.jpg", "long": "one\u2028line"}\n{"file_name": "x/2.jpg", "long": " "}\n',
        encoding="utf-8",
    )
    rows = {"file_name": ["x/2.jpg", "x/3.jpg"], "short": ["two", None], "long": [None, None]}
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    paths = open_captions(f"{tmp_path}/{{a.jsonl,b.parquet}}")
    assert paths == open_captions(str(tmp_path)) == open_captions(f"{tmp_path}/*") == (*paths,)
    rules = CaptionRules(("long", "short"), "file_name")
    with open(tmp_path / "texts", "w+b") as texts:
        found = CaptionFile(paths, texts, rules=rules)
        assert found.find(["x/1", "x/2", "x/3"])["length"].tolist() == [8, 3, -1]
        with pytest.raises(DataError, match=r"a\.jsonl, line 1: expected .*data\.caption_key.* got .*file_name"):
            CaptionFile(paths, texts)
    with pytest.raises(DataError, match=r"captions '.*c\.jsonl': there is no such file"):
        open_captions(f"{tmp_path}/a.jsonl,{tmp_path}/c.jsonl")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_caption(encoding: str) -> None:
    assert captions_from_bytes("ein Bär\u2028 ".encode(encoding), is_json=False).texts == ["ein Bär"]
    assert captions_from_bytes('{"caption": "ein Bär"}'.encode(encoding), is_json=True).texts == ["ein Bär"]
