"""GenEval's rules on hand-made detections with known answers, and the path through small models."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.errors import DataError
from tests.helpers.tiny_networks import save_clip, save_detector
from trainer.evaluate import detector as detector_module
from trainer.evaluate.clip import Clip
from trainer.evaluate.detector import Detector
from trainer.evaluate.geneval import COLOURS, Box, Detection, check_facts, is_correct, relations, scores

CENTRE: Box = (40, 40, 60, 60)


def seen(name: str, score: float = 0.95, box: Box = CENTRE, colour: str | None = None) -> Detection:
    probabilities = [0.7 if c == colour else 0.3 / 9 for c in COLOURS]

    def colours() -> Sequence[float]:
        assert colour is not None, "a colour was asked for that no rule needs"
        return probabilities

    return Detection(name, score, box, colours)


def item(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def facts(tag: str, *include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    made = {"tag": tag, "include": list(include), "prompt": "a photo"}
    if exclude:
        made["exclude"] = list(exclude)
    check_facts(made, "here")
    return made


BENCH = facts("single_object", item("bench"))
TWO = facts("two_object", item("bench"), item("dog"))
THREE_CLOCKS = facts("counting", item("clock", 3), exclude=(item("clock", 4),))
RED_CAR = facts("colors", item("car", color="red"))
TWO_RED_CARS = facts("colors", item("car", 2, color="red"))
DOG_RIGHT = facts("position", item("bench"), item("dog", position=["right of", 0]))
BOTH = facts("color_attr", item("car", color="red"), item("dog", color="black"))
RIGHT: Box = (80, 40, 100, 60)
CLOCKS = [seen("clock")] * 3


@pytest.mark.parametrize(
    ("wanted", "detections", "correct"),
    [
        (BENCH, [seen("bench")], True),
        (BENCH, [], False),
        (BENCH, [seen("dog")], False),
        (BENCH, [seen("bench"), seen("bench"), seen("dog")], True),  # more than asked for, and others, do not matter
        (BENCH, [seen("bench", 0.31)], True),
        (BENCH, [seen("bench", 0.3)], False),  # must be over the threshold
        (TWO, [seen("dog"), seen("bench")], True),
        (TWO, [seen("bench"), seen("bench")], False),
        (TWO, [seen("bench"), seen("dog", 0.2)], False),
        (THREE_CLOCKS, CLOCKS, True),
        (THREE_CLOCKS, CLOCKS[:2], False),
        (THREE_CLOCKS, [*CLOCKS, seen("clock")], False),
        (THREE_CLOCKS, [*CLOCKS, seen("clock", 0.9)], True),  # counting asks for more than 0.9
        (THREE_CLOCKS, [*CLOCKS[:2], seen("clock", 0.9)], False),
        (THREE_CLOCKS, [*CLOCKS, seen("dog")], True),
        (RED_CAR, [seen("car", colour="red")], True),
        (RED_CAR, [seen("car", colour="blue")], False),
        (RED_CAR, [seen("dog", colour="red")], False),
        (RED_CAR, [seen("car", 0.9, colour="red"), seen("car", 0.8, colour="blue")], True),  # the surest one counts
        (RED_CAR, [seen("car", 0.8, colour="red"), seen("car", 0.9, colour="blue")], False),
        (TWO_RED_CARS, [seen("car", 0.9, colour="red"), seen("car", 0.8, colour="red")], True),
        (TWO_RED_CARS, [seen("car", 0.9, colour="red"), seen("car", 0.8, colour="blue")], False),
        (DOG_RIGHT, [seen("bench"), seen("dog", box=RIGHT)], True),
        (DOG_RIGHT, [seen("bench", box=RIGHT), seen("dog")], False),
        (DOG_RIGHT, [seen("bench"), seen("dog", box=(42, 40, 62, 60))], False),  # too near to say
        (DOG_RIGHT, [seen("dog", box=RIGHT)], False),
        (DOG_RIGHT, [seen("bench"), seen("dog", 0.5, RIGHT), seen("dog", 0.9)], False),  # the surest dog is not
        (DOG_RIGHT, [seen("bench"), seen("dog", 0.9, RIGHT), seen("dog", 0.5)], True),
        (BOTH, [seen("car", colour="red"), seen("dog", colour="black")], True),
        (BOTH, [seen("car", colour="black"), seen("dog", colour="red")], False),  # the colours are exchanged
        (BOTH, [seen("car", colour="red")], False),
    ],
)  # fmt: skip
def test_rules(wanted: dict[str, Any], detections: list[Detection], correct: bool) -> None:
    assert is_correct(detections, wanted) is correct
    assert is_correct(detections[::-1], wanted) is correct


def test_at_most_sixteen_objects_of_a_class_count() -> None:
    many = facts("counting", item("clock", 16), exclude=(item("clock", 17),))
    assert is_correct([seen("clock")] * 30, many)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((80, 40, 100, 60), {"right of"}),
        ((0, 40, 20, 60), {"left of"}),
        ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}),
        ((80, 80, 100, 100), {"right of", "below"}),  # on the diagonal both hold
        ((80, 50, 100, 70), {"right of"}),
        ((44, 40, 64, 60), set()),  # the centres are 0.1 of the two widths apart
        ((40, 40, 60, 60), set()),
        ((0, 0, 100, 100), set()),
    ],
)
def test_relations(box: Box, expected: set[str]) -> None:
    assert relations(box, CENTRE) == expected


def test_scores_are_shares_by_tag_and_their_mean() -> None:
    judged = [
        ("colors", 0, True),
        ("colors", 0, False),
        ("colors", 1, True),
        ("colors", 1, True),
        ("counting", 2, False),
    ]
    results = scores(judged)
    assert results["geneval_colors"].value == 0.75
    assert results["geneval_colors"].standard_error == pytest.approx(0.25)  # of two prompts: 0.5 and 1
    assert results["geneval_counting"] == (0.0, None)
    assert results["geneval"].value == 0.375  # tags weigh equally, however many prompts they have
    assert results["geneval"].standard_error == pytest.approx(0.125)
    assert math.isclose(scores([("colors", 0, True)])["geneval"].value, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "x"}, "tag None is none of"),
        ({"tag": "colors"}, "no list `include`"),
        ({"tag": "colors", "include": [{"class": "car"}]}, "class and count"),
        ({"tag": "colors", "include": [item("car", color="teal")]}, "colour 'teal'"),
        ({"tag": "position", "include": [item("car", position=["above", 0])]}, "refers to item 0"),
        *(
            ({"tag": "position", "include": [item("dog"), item("car", position=wrong)]}, "position .* is not one of")
            for wrong in ("left of", ["above"], ["above", "0"], ["left_of", 0], None)
        ),
        ({"tag": "counting", "include": [item("car", 0)]}, "a count is 0"),
        ({"tag": "counting", "include": [item("car", True)]}, "class and count"),
        ({"tag": "counting", "include": [item("car")], "exclude": None}, "`exclude` is no list"),
    ],
)
def test_other_metadata_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"entry 3: .*{message}"):
        check_facts(wrong, "entry 3")


@pytest.mark.slow
def test_small_models_detect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes lie in the image, scores are probabilities, colours sum to 1; COCO's spellings become GenEval's."""
    monkeypatch.setattr(detector_module, "SHORT", 64)
    clip = Clip(str(save_clip(tmp_path / "clip")))
    detector = Detector(str(save_detector(tmp_path / "detector", ["clock", "mouse", "sofa"])), clip)
    detector.check_names(["clock", "computer mouse", "couch"])
    with pytest.raises(DataError, match='no class "dog", "sofa"'):
        detector.check_names(["clock", "sofa", "dog"])
    image = torch.randint(0, 256, (40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = detector(image)
    assert found
    for detection in found:
        left, top, right, bottom = detection.box
        assert 0 <= left < right <= 48
        assert 0 <= top < bottom <= 40
        assert 0 < detection.score < 1
    assert sum(found[0].colours()) == pytest.approx(1, abs=1e-5)
    assert found[0].colour in COLOURS
    for what in ("detector", "clip"):
        (tmp_path / what / "model.safetensors").write_bytes(b"damaged")
        for path in (tmp_path / "absent", tmp_path / what):
            with pytest.raises(DataError, match=rf"{what}: (there is no folder )?'{path}"):
                Detector(str(path), clip) if what == "detector" else Clip(str(path))


def test_clip_reads_whole_captions_alone(tmp_path: Path) -> None:
    """An embedding does not depend on the other captions of its batch, and captions that differ late differ."""
    clip = Clip(str(save_clip(tmp_path / "clip")))
    long = "a b c d e f g h i j k l m n o p q r s t"
    together = clip.texts([long + " u", long + " v", "x"])
    assert torch.equal(together[:1], clip.texts([long + " u", "y", "z"])[:1])
    assert not torch.equal(together[0], together[1])
    old = tmp_path / "clip/pytorch_model.bin"  # all that ViT-B/32's main branch has
    torch.save(load_file(tmp_path / "clip/model.safetensors"), old)
    (tmp_path / "clip/model.safetensors").unlink()
    torch.testing.assert_close(Clip(str(tmp_path / "clip")).texts(["x"]), together[2:])
