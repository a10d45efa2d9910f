"""DPG-Bench (Hu et al., arXiv 2403.05135): questions about each dense prompt, in a graph. A question counts as true
only where it is answered with yes and so are the questions that it depends on."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.image_sets import Prompt

from .metrics import Score

_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_NO_PARENT = 0


def read_questions(path: str, key: str) -> list[Prompt]:
    """The prompts of dpg_bench.csv in its order; the facts of each are its questions. Raises DataError."""
    file = Path(path).expanduser()
    items: dict[str, dict[str, Any]] = {}
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
                raise DataError(f"{key}: {file} has no column {', '.join(missing)}; expected DPG-Bench's dpg_bench.csv")
            for row in reader:
                item = items.setdefault(row["item_id"], {"text": "", "questions": []})
                item["text"] = item["text"] or (row["text"] or "").strip()
                item["questions"].append(_question(row, f"{key}: {file}, line {reader.line_num}"))
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{key}: {file} cannot be read ({error}); expected DPG-Bench's dpg_bench.csv") from None
    for name, item in items.items():
        known = {question["id"] for question in item["questions"]}
        for question in item["questions"]:
            if unknown := set(question["parents"]) - known:
                raise DataError(
                    f"{key}: {file}: question {question['id']} of {name} depends on {min(unknown)}, which is none"
                )
        if not item["text"]:
            raise DataError(f"{key}: {file}: {name} has no text")
    return [Prompt(item["text"], {"questions": item["questions"]}) for item in items.values()]


def _question(row: Mapping[str, str], where: str) -> dict[str, Any]:
    try:
        parents = [int(number) for number in row["dependency"].split(",")]
        number = int(row["proposition_id"])
    except (ValueError, AttributeError):
        raise DataError(
            f"{where}: proposition_id {row['proposition_id']!r} and dependency {row['dependency']!r} must be numbers"
        ) from None
    category = (row["tuple"] or "").partition("(")[0].partition("-")[0].strip().lower()
    text = (row["question_natural_language"] or "").strip()
    if not category or not text:
        raise DataError(f"{where}: a question needs a tuple, `category (what)`, and its text")
    return {"id": number, "parents": [p for p in parents if p != _NO_PARENT], "category": category, "text": text}


def counted(questions: Sequence[Mapping[str, Any]], answers: Sequence[bool]) -> list[bool]:
    """Which questions count as true. answers: whether each was answered with yes."""
    true = {question["id"]: answer for question, answer in zip(questions, answers, strict=True)}
    for question in questions:
        if not all(true[parent] for parent in question["parents"]):
            true[question["id"]] = False
    return [true[question["id"]] for question in questions]


def scores(judged: Sequence[tuple[int, Sequence[Mapping[str, Any]], Sequence[bool]]]) -> dict[str, Score]:
    """(number of the prompt, its questions, whether each was answered with yes) of every image -> `dpg_bench`: 100 x
    the share of questions that count as true, the mean over images and prompts; its standard error is over prompts.
    And for each category 100 x the share of its questions that were answered with yes, whatever they depend on."""
    of_prompt: dict[int, list[float]] = {}
    of_category: dict[str, list[bool]] = {}
    for prompt, questions, answers in judged:
        true = counted(questions, answers)
        of_prompt.setdefault(prompt, []).append(100 * sum(true) / len(true))
        for question, answer in zip(questions, answers, strict=True):
            of_category.setdefault(question["category"], []).append(answer)
    means = [math.fsum(values) / len(values) for values in of_prompt.values()]
    mean = math.fsum(means) / len(means)
    variance = math.fsum((value - mean) ** 2 for value in means) / max(1, len(means) - 1)
    error = math.sqrt(variance / len(means)) if len(means) > 1 else None
    shares = {f"dpg_bench_{name}": Score(100 * sum(of) / len(of)) for name, of in sorted(of_category.items())}
    return {"dpg_bench": Score(mean, error), **shares}
