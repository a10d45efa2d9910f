"""`mudit init`: its questions, on a terminal and by options."""

import sys
from pathlib import Path

import pytest

from launch import init
from trainer.config.load import load_config
from trainer.errors import ConfigError

pytestmark = pytest.mark.slow


def started(monkeypatch: pytest.MonkeyPatch, answers: list[str] | None, *words: str) -> list[str]:
    """The questions that are asked; answers: None without a terminal."""
    questions = []

    def ask(question: str) -> str:
        questions.append(question)
        if not answers:
            raise EOFError
        return answers.pop(0)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: answers is not None, raising=False)
    monkeypatch.setattr(sys, "argv", ["mudit init", "--base", "mmdit_debug_mup", *words])
    assert init.main() == 0
    return questions


def test_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no value is asked again; Return takes what is shown; what an option says is not asked."""
    monkeypatch.setattr(init, "cards_here", lambda: ["h200"] * 4)
    output = tmp_path / "new" / "first.yaml"
    answers = ["", "two", "0", "2", "nan", "0.01", ""]
    asked = started(monkeypatch, answers, "--resolution", "32", "--output", str(output))
    assert [question.partition(" [")[2] for question in asked] == [
        "synthetic]: ", "4]: ", "4]: ", "4]: ", "24]: ", "24]: ", "sd3]: ",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "expected a whole number from 1 on, got 'two'" in said
    assert "expected a number above 0, got 'nan'" in said
    assert "first on 2 GPUs of 141 GB" in said
    assert f"mudit train --config {output}" in said
    assert load_config(str(output)).data.shards == "synthetic"


def test_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "cards_here", list)
    output = tmp_path / "first.yaml"
    words = ["--gpus", "2", "--hours", "0.01", "--resolution", "32", "--output", str(output)]
    with pytest.raises(ConfigError, match="no terminal to ask on: give --data synthetic --encoder sd3, with your own"):
        started(monkeypatch, None, *words)
    with pytest.raises(ConfigError, match=r"no answer to: shards.*nothing is written"):
        started(monkeypatch, [], *words)
    assert not output.exists()
    words += ["--data", "a.tar", "--encoder", "sd3"]
    assert started(monkeypatch, None, *words) == []
    with pytest.raises(ConfigError, match="exists already"):
        started(monkeypatch, None, *words)
    assert started(monkeypatch, None, *words, "--overwrite") == []
    with pytest.raises(SystemExit):
        started(monkeypatch, None, *words, "--hours", "-1")


def test_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert init.cards_here() == []
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3'\necho 'NVIDIA A100-SXM4-80GB'\necho T4\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert init.cards_here() == ["h100", "a100", None]
