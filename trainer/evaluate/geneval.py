"""GenEval's rules (Ghosh et al., arXiv 2310.11513), on detections: does an image show what its prompt asks for?

A prompt's facts are a line of the official metadata: tag, `include` (class, count, and maybe colour and position),
`exclude` (class, count). All of `include` must hold and none of `exclude` may.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import DataError

from .metrics import Score

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_CONFIDENCE, _COUNTING_CONFIDENCE = 0.3, 0.9
_MOST_OBJECTS = 16  # of a class in an image
_MARGIN = 0.1  # objects whose centres are apart by less, relative to their sizes added, have no relative position
_DIRECTION = 0.5  # the least share of an offset that counts as a direction: 60 degrees around the axis

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Detection:
    """One object in an image. colours: probabilities of COLOURS for its masked crop, computed where asked."""

    name: str
    score: float
    box: Box
    colours: Callable[[], Sequence[float]] = lambda: ()

    @property
    def colour(self) -> str:
        probabilities = list(self.colours())
        return COLOURS[probabilities.index(max(probabilities))]


def check_facts(facts: Mapping[str, Any], where: str) -> None:
    """Raise DataError unless a prompt's facts are a line of GenEval's metadata."""

    def wrong(reason: str) -> DataError:
        return DataError(f"{where}: {reason}; expected a line of GenEval's evaluation_metadata.jsonl")

    if facts.get("tag") not in TAGS:
        raise wrong(f"tag {facts.get('tag')!r} is none of {', '.join(TAGS)}")
    include, exclude = facts.get("include"), facts.get("exclude", [])
    if not isinstance(include, list) or not include:
        raise wrong("there is no list `include`")
    if not isinstance(exclude, list):
        raise wrong("`exclude` is no list")
    for number, item in enumerate([*include, *exclude]):
        if not isinstance(item, dict) or not isinstance(item.get("class"), str) or type(item.get("count")) is not int:
            raise wrong("an item has no class and count")
        if item["count"] < 1:
            raise wrong(f"a count is {item['count']}, at least 1 is needed")
        if item.get("color", COLOURS[0]) not in COLOURS:
            raise wrong(f"colour {item['color']!r} is none of {', '.join(COLOURS)}")
        if "position" not in item:
            continue
        match item["position"]:
            case [relation, int(target)] if relation in RELATIONS:
                if not 0 <= target < number:
                    raise wrong(f"a position refers to item {target}, which does not come before it")
            case other:
                raise wrong(f"position {other!r} is not one of {', '.join(RELATIONS)} and the number of an item")


def is_correct(detections: Sequence[Detection], facts: Mapping[str, Any]) -> bool:
    """Whether an image with these detections is what the prompt asks for."""
    least = _COUNTING_CONFIDENCE if facts["tag"] == "counting" else _CONFIDENCE
    kept = sorted((d for d in detections if d.score > least), key=lambda d: -d.score)

    def found(name: str) -> list[Detection]:
        """The surest first."""
        return [d for d in kept if d.name == name][:_MOST_OBJECTS]

    groups: list[list[Detection]] = []
    for item in facts["include"]:
        objects = found(item["class"])[: item["count"]]  # colour and position are asked of the surest ones alone
        if len(objects) < item["count"]:
            return False
        if "color" in item and any(d.colour != item["color"] for d in objects):
            return False
        if "position" in item:
            relation, target = item["position"]
            if any(relation not in relations(d.box, other.box) for d in objects for other in groups[target]):
                return False
        groups.append(objects)
    return all(len(found(item["class"])) < item["count"] for item in facts.get("exclude", []))


def relations(a: Box, b: Box) -> set[str]:
    """Where a lies from b: `left of`, `right of`, `above`, `below`; none or two at once may hold."""
    offsets, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (a[low] + a[high] - b[low] - b[high]) / 2
        sizes = abs(a[high] - a[low]) + abs(b[high] - b[low])
        offsets.append(offset)
        beyond.append(math.copysign(max(abs(offset) - _MARGIN * sizes, 0.0), offset))
    if all(abs(value) < 1e-3 for value in beyond):
        return set()
    dx, dy = (value / math.hypot(*offsets) for value in beyond)
    holds = {
        "left of": dx < -_DIRECTION,
        "right of": dx > _DIRECTION,
        "above": dy < -_DIRECTION,
        "below": dy > _DIRECTION,
    }
    return {relation for relation, true in holds.items() if true}


def scores(judged: Sequence[tuple[str, int, bool]]) -> dict[str, Score]:
    """(tag, number of the prompt, correct) of every image -> share of correct images a tag, and `geneval`, the mean of
    the tags. Standard errors are over prompts: the images of one prompt are not independent."""
    results: dict[str, Score] = {}
    for tag in TAGS:
        by_prompt: dict[int, list[bool]] = {}
        for its_tag, prompt, correct in judged:
            if its_tag == tag:
                by_prompt.setdefault(prompt, []).append(correct)
        if not by_prompt:
            continue
        shares = [sum(images) / len(images) for images in by_prompt.values()]
        mean = sum(shares) / len(shares)
        variance = sum((share - mean) ** 2 for share in shares) / max(1, len(shares) - 1)
        results[f"geneval_{tag}"] = Score(mean, math.sqrt(variance / len(shares)) if len(shares) > 1 else None)
    errors = [score.standard_error or 0.0 for score in results.values()]
    mean = sum(score.value for score in results.values()) / len(results)
    return {"geneval": Score(mean, math.hypot(*errors) / len(errors)), **results}
