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
    base = [] if "0" in words else ["--base", "mmdit_debug_mup"]
    monkeypatch.setattr(sys, "argv", ["mudit init", *base, *words])
    assert init.main() == 0
    return questions


def test_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no value is asked again; Return takes what is shown; what an option says is not asked."""
    monkeypatch.setattr(init, "cards_here", lambda: ["h200"] * 4)
    output = tmp_path / "new" / "first.yaml"
    answers = ["", "two", "-1", "2", "nan", "0.01", ""]
    asked = started(monkeypatch, answers, "--resolution", "32", "--output", str(output))
    assert [question.partition(" [")[2] for question in asked] == [
        "synthetic]: ", "4]: ", "4]: ", "4]: ", "24]: ", "24]: ", "sd3]: ",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "expected a whole number from 0 on, got 'two'" in said
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


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said, and what is written trains from any folder: data and encoder were named relative to this one."""
    monkeypatch.setattr(init, "cards_here", list)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"d_model": 512}')
    words = ["--gpus", "0", "--resolution", "32", "--output", "own.yaml"]
    asked = started(monkeypatch, ["a.tar,b-{0,1}.tar", "", "t5"], *words)
    assert [question.partition(" [")[2] for question in asked] == ["synthetic]: ", "1]: ", f"{init.MINILM}]: "]
    said = capsys.readouterr().out
    assert "own on this machine's processors: " in said
    assert "mudit fetch" not in said
    config = load_config("own.yaml")
    assert config.data.shards == f"{tmp_path}/a.tar,{tmp_path}/b-{{0,1}}.tar"
    assert config.text_encoder.path == f"{tmp_path}/t5"
    with pytest.raises(ConfigError, match=r"no answer to: how many GPUs"):
        started(monkeypatch, [], "--data", "s3://a/b.tar", "--hours", "0.01", "--resolution", "32", "--encoder", "sd3")
    assert "No GPU is seen here (nvidia-smi): 0 of them train a small model here" in capsys.readouterr().out
    words = ["--data", "s3://a/b.tar", "--gpus", "2", "--hours", "0.01", "--resolution", "32", "--encoder", "t5"]
    started(monkeypatch, None, *words)
    assert "No GPU is seen here (nvidia-smi): train it where there are 2." in capsys.readouterr().out
    assert load_config("first.yaml").data.shards == "s3://a/b.tar"
    with pytest.raises(ConfigError, match="give --data synthetic --gpus 0 --hours 1 --resolution 32 --encoder /"):
        started(monkeypatch, None, "--output", "new.yaml")


def test_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert init.cards_here() == []
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3'\necho 'NVIDIA A100-SXM4-80GB'\necho T4\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert init.cards_here() == ["h100", "a100", None]
