"""Captions of one sample: what a member may hold, and which of several is chosen."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from data.captions import CaptionChoice, captions_from_bytes
from data.errors import SampleError


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
        ({"captions": [], "weights": []}, "not JSON with a caption"),
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
