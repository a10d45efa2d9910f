"""What a rater is asked: one pair of images and one question at a time, in an order that is the rater's own."""

from pathlib import Path
from typing import Any

from launch.rating.votes import BOTH_BAD, QUESTIONS, Vote, Votes, order

_OTHER = {"a": "b", "b": "a"}


class Tasks:
    """A rater's tasks by number, from 0. images: the folder of a/00000.png and b/00000.png."""

    def __init__(self, votes: Votes, images: Path, prompts: list[str], seed: int) -> None:
        self.votes, self.images, self.prompts, self.seed = votes, images, prompts, seed

    @property
    def count(self) -> int:
        """How many each rater has: task n is question n % 2 of the rater's pair n // 2."""
        return len(self.prompts) * len(QUESTIONS)

    def pair(self, rater: str, number: int) -> tuple[int, str, str]:
        """(prompt, run on the left, question) of a rater's task."""
        prompt, left = order(self.seed, rater, len(self.prompts))[number // len(QUESTIONS)]
        return prompt, left, list(QUESTIONS)[number % len(QUESTIONS)]

    def state(self, rater: str, number: int | None) -> dict[str, Any]:
        """What the page shows: task `number`, or the first one without an answer."""
        answered = self.votes.of(rater)
        if number is None:
            pairs = order(self.seed, rater, len(self.prompts))
            tasks = [(prompt, question) for prompt, _ in pairs for question in QUESTIONS]
            number = next((n for n, task in enumerate(tasks) if task not in answered), self.count)
        state = {"number": number, "tasks": self.count, "answered": len(answered), "done": number == self.count}
        if number == self.count:
            return state
        prompt, _, question = self.pair(rater, number)
        return state | {"prompt": self.prompts[prompt], "question": QUESTIONS[question]}

    def image(self, rater: str, number: int, side: str) -> bytes:
        """The PNG on a side ("left" or "right") of a task."""
        prompt, left, _ = self.pair(rater, number)
        run = left if side == "left" else _OTHER[left]
        return (self.images / run / f"{prompt:05d}.png").read_bytes()

    def vote(self, rater: str, number: int, choice: str) -> None:
        """Store the answer to a task. choice: "left" | "right" | "both_bad"."""
        prompt, left, question = self.pair(rater, number)
        run = choice if choice == BOTH_BAD else left if choice == "left" else _OTHER[left]
        self.votes.add(Vote(rater, prompt, question, run, left))
