"""The questions of `mudit init`: asked on a terminal, or answered by options, with one look at what is a value."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from data.config import SYNTHETIC
from trainer.errors import ConfigError

_WORDS = (SYNTHETIC, "sd3")  # in place of shards, and of an encoder's folder


class Question(NamedTuple):
    """name: of the option. kind: makes a value of a text, or raises ValueError with what was expected. default: with
    GPUs, and without."""

    name: str
    asks: str
    kind: Callable[[str], Any]
    default: tuple[Any, Any]


def answered(questions: Sequence[Question], given: Mapping[str, Any]) -> dict[str, Any]:
    """{name: answer} of all, "gpus" among them. given: None for what is to be asked. Raises ConfigError where there is
    no terminal to ask on."""
    answers = dict(given)
    missing = [question for question in questions if given[question.name] is None]
    if missing and not sys.stdin.isatty():
        gpus = next((question.default[0] for question in missing if question.name == "gpus"), given["gpus"])
        words = " ".join(f"--{question.name} {question.default[gpus == 0]}" for question in missing)
        raise ConfigError(f"there is no terminal to ask on: give {words}, with your own values")
    for question in missing:
        answers[question.name] = asked(question, question.default[answers["gpus"] == 0])
    return answers


def asked(question: Question, default: Any) -> Any:
    """What a person answers; asked again until it is a value. Return takes the default."""
    while True:
        try:
            said = input(f"{question.asks} [{default}]: ").strip()
        except EOFError:
            raise ConfigError(f"no answer to: {question.asks}; nothing is written") from None
        if not said:
            return default
        try:
            return question.kind(said)
        except ValueError as error:
            print(f"  {error}")


def anywhere(text: str) -> str:
    """Shards or a folder, written so that they are found from every folder."""
    if text in _WORDS or "://" in text or text.startswith("${"):
        return text
    return ",".join(os.path.abspath(os.path.expanduser(each)) for each in re.split(r",(?![^{]*\})", text))


def count(text: str) -> int:
    """A number of things of which there may be none."""
    return whole(text, 0)


def whole(text: str, least: int = 1) -> int:
    """A number of things."""
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"expected a whole number from {least} on, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A quantity."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < math.inf:
        raise ValueError(f"expected a number above 0, got {text!r}")
    return number


def argument(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """As argparse asks for it, with the same message."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
