"""DPG-Bench: its graph of questions, its scores, and a small BLIP that answers."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BlipForQuestionAnswering

from data.errors import DataError
from tests.helpers.tiny_networks import save_blip
from trainer.evaluate import dpg_bench
from trainer.evaluate.dpg_bench import counted, read_questions, scores
from trainer.evaluate.embeddings import CLIP_PIXELS, normalised
from trainer.evaluate.evaluation import prepare
from trainer.evaluate.suite import SuiteConfig
from trainer.evaluate.vqa import Blip
from trainer.parallel.mesh import World

COLUMNS = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "tuple"]
COLUMNS += ["question_natural_language"]
ROWS = [
    ["a", "a red car, left of a dog", "", "1", "0", "entity", "entity - whole (car)", "is there a car"],
    ["a", "", "", "2", "1", "attribute", "attribute - color (car, red)", "is the car red"],
    ["a", "", "", "3", "0", "entity", "entity - whole (dog)", "is there a dog"],
    ["a", "", "", "4", "2, 3", "relation", "relation - spatial (car, dog, left of)", "is the car left of the dog"],
    ["b", "a dog\nand more", "", "1", "0", "entity", "entity - whole (dog)", "is there a dog"],
]
WORDS = sorted({word for row in ROWS for word in row[-1].split()} | {"yes", "no"})


def write(path: Path, rows: list[list[str]], columns: list[str] = COLUMNS) -> str:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def test_questions_of_the_file(tmp_path: Path) -> None:
    first, second = read_questions(write(tmp_path / "q.csv", ROWS), "prompts")
    assert (first.text, second.text) == ("a red car, left of a dog", "a dog\nand more")
    questions = first.facts["questions"]
    assert [question["parents"] for question in questions] == [[], [1], [], [2, 3]]
    assert [question["category"] for question in questions] == ["entity", "attribute", "entity", "relation"]
    assert questions[1]["text"] == "is the car red"
    for rows, columns, said in (
        (ROWS, [*COLUMNS[:-1], "question"], "no column question_natural_language"),
        ([[*ROWS[0][:4], "7", *ROWS[0][5:]]], COLUMNS, "question 1 of a depends on 7"),
        ([[*ROWS[0][:4], "x", *ROWS[0][5:]]], COLUMNS, "line 2: proposition_id '1' and dependency 'x'"),
        ([[*ROWS[0][:7], " "]], COLUMNS, "a question needs a tuple"),
        ([["a", " ", *ROWS[0][2:]]], COLUMNS, "a has no text"),
        ([["a"]], COLUMNS, "line 2: proposition_id None and dependency None"),
    ):
        with pytest.raises(DataError, match=f"prompts: .*bad.csv.*{said}"):
            read_questions(write(tmp_path / "bad.csv", rows, columns), "prompts")
    with pytest.raises(DataError, match=r"none\.csv cannot be read"):
        read_questions(str(tmp_path / "none.csv"), "prompts")


def test_a_question_counts_only_with_those_it_depends_on(tmp_path: Path) -> None:
    first, second = (prompt.facts["questions"] for prompt in read_questions(write(tmp_path / "q.csv", ROWS), "prompts"))
    assert counted(first, [True, True, True, True]) == [True, True, True, True]
    assert counted(first, [True, True, False, True]) == [True, True, False, False]
    assert counted(first, [False, True, True, True]) == [False, False, True, False], "by way of the colour, too"
    judged = [
        (0, first, [False, True, True, True]),
        (0, first, [True, True, True, True]),
        (1, second, [True]),
        (1, second, [False]),
    ]
    found = scores(judged)
    assert found["dpg_bench"].value == pytest.approx(100 * ((1 / 4 + 1) / 2 + 1 / 2) / 2)
    assert found["dpg_bench"].standard_error == pytest.approx(100 * abs(5 / 8 - 1 / 2) / 2)
    assert found["dpg_bench_entity"].value == pytest.approx(100 * 4 / 6)
    assert found["dpg_bench_relation"].value == 100, "whatever it depends on, as the benchmark's program"


@pytest.mark.slow
def test_answers_are_those_of_the_library(tmp_path: Path) -> None:
    folder = str(save_blip(tmp_path / "blip", WORDS))
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    model: Any = BlipForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = normalised(image[None], 32, CLIP_PIXELS, torch.device("cpu"))
    questions = [row[-1] for row in ROWS]
    wanted = []
    for question in questions:
        tokens = tokenizer(question, return_tensors="pt")
        said = model.generate(
            tokens["input_ids"], seen, tokens["attention_mask"], max_new_tokens=10, do_sample=False, num_beams=1
        )
        wanted.append(tokenizer.decode(said[0], skip_special_tokens=True).strip())
    assert Blip(folder)(image, questions) == wanted
    assert len(set(wanted)) > 1, "answers depend on the question"


def test_a_suite_of_dpg_bench(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        "metrics": ["dpg_bench"], "prompts": write(tmp_path / "q.csv", ROWS), "images_per_prompt": 2, "guidance": 1.0,
        "rectified_flow": {"steps": 1}, "batch_size": 3, "vqa": str(save_blip(tmp_path / "blip", WORDS)),
    }  # fmt: skip
    made = prepare(SuiteConfig.model_validate(keys), 32, None, world.device, world.control)
    assert [prompt.text for prompt in made.prompts] == ["a red car, left of a dog"] * 2 + ["a dog\nand more"] * 2
    asked = []

    def answer(blip: Blip, image: torch.Tensor, questions: list[str]) -> list[str]:
        asked.append((int(image[0, 0, 0]), tuple(questions)))
        return ["yes" if int(image[0, 0, 0]) < 3 else "no"] * len(questions)

    monkeypatch.setattr(Blip, "__call__", answer)
    figures = made.measure(lambda batch: np.stack([np.full((32, 32, 3), i, np.uint8) for i in made.batches[batch]]))
    assert [number for number, _ in asked] == [0, 1, 2, 3], "no image that fills up a batch"
    assert [len(questions) for _, questions in asked] == [4, 4, 1, 1]
    assert figures["dpg_bench"].value == pytest.approx(75)
    assert made.contents.keys() == {"prompts", "vqa"}
    assert dpg_bench.read_questions(keys["prompts"], "prompts")[0].facts == made.prompts[0].facts
