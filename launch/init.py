"""Write a first config: five questions (data, GPUs, hours, resolution, text encoder), and the estimate of the answers.

mudit init                                                              asks
mudit init --data 'shards/train-*.tar' --gpus 8 --hours 24 --resolution 512 --encoder sd3 --output first.yaml

The model is the largest of the shipped MMDiTs (or --base NAME) that suits the compute and fits into memory; the steps
are those that the hours hold. --card: the kind of GPU, where nvidia-smi does not tell. Then: mudit train --config FILE.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data.config import DataConfig
from launch.common import add_overwrite, command, keep_files, run
from launch.machine.finding import answer
from launch.processes import importing
from trainer.errors import ConfigError
from trainer.estimate.cluster import CARDS, Cluster

BASES = ("mmdit_18b_mup", "mmdit_2b_mup", "mmdit_0.7b_mup", "mmdit_0.18b_mup")


class Question(NamedTuple):
    """name: of the option. kind: makes a value of a text, or raises ValueError with what was expected."""

    name: str
    asks: str
    kind: Callable[[str], Any]
    default: Any


def main() -> int:
    here = cards_here()
    questions = [
        Question("data", "shards: a folder, a pattern, URLs, or synthetic", str, "synthetic"),
        Question("gpus", "how many GPUs", whole, len(here) or 8),
        Question("hours", "how many hours they are yours", positive, 24),
        Question("resolution", "pixels of an image's side", whole, DataConfig.resolution),
        Question("encoder", "text encoder: sd3 (its T5-XXL), or a folder", str, "sd3"),
    ]
    parser = command(__doc__, config=False, overrides=None)
    for question in questions:
        parser.add_argument(f"--{question.name}", type=argument(question.kind), help=question.asks)
    parser.add_argument("--card", choices=CARDS, default=next(filter(None, here), "h100"), help="default: %(default)s")
    parser.add_argument("--gpus-per-node", type=argument(whole), default=8, help="default: 8")
    parser.add_argument("--base", help="the shipped config that yours extends (default: chosen)")
    parser.add_argument("--output", type=Path, default=Path("first.yaml"), help="default: %(default)s")
    add_overwrite(parser)
    a = parser.parse_args()
    keep_files(a.overwrite, a.output)
    answers = {question.name: getattr(a, question.name) for question in questions}
    open_questions = [question for question in questions if answers[question.name] is None]
    if open_questions and not sys.stdin.isatty():
        missing = " ".join(f"--{question.name} {question.default}" for question in open_questions)
        raise ConfigError(f"there is no terminal to ask on: give {missing}, with your own values")
    answers |= {question.name: asked(question) for question in open_questions}
    with importing():
        from trainer.estimate.proposal import Wish, propose

    wish = Wish(**answers)
    cluster = Cluster(wish.gpus, CARDS[a.card], a.gpus_per_node)
    found = propose(wish, cluster, [a.base] if a.base else BASES, a.output.stem)
    a.output.parent.mkdir(parents=True, exist_ok=True)
    a.output.write_text(found.text)
    print(found.page)
    print(f"\n{a.output} extends {found.base}. Next:\n  mudit doctor --config {a.output}")
    print(f"  mudit fetch --config {a.output}\n  mudit train --config {a.output}")
    return 0


def asked(question: Question) -> Any:
    """What a person answers; asked again until it is a value. Return takes the default."""
    while True:
        try:
            said = input(f"{question.asks} [{question.default}]: ").strip()
        except EOFError:
            raise ConfigError(f"no answer to: {question.asks}; nothing is written") from None
        if not said:
            return question.default
        try:
            return question.kind(said)
        except ValueError as error:
            print(f"  {error}")


def cards_here() -> list[str | None]:
    """For each GPU of this machine its name in CARDS, None for one that is not there."""
    names = (answer("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()
    return [next((card for card in CARDS if card.upper() in name.upper()), None) for name in names]


def whole(text: str) -> int:
    """A number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"expected a whole number from 1 on, got {text!r}")
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


if __name__ == "__main__":
    run(main)
