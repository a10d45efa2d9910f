"""Which engine resumes which checkpoint, and what a user is told to do."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import convert
from tests.helpers.paths import ROOT
from trainer.checkpoint.compatible import check_pickles, check_same_engine, check_weights_readable
from trainer.errors import CheckpointError

FSDP2: dict[str, Any] = {"name": "fsdp2"}
FOLDER = Path("runs/a/checkpoints/step_00000004")


def zero(stage: int, world_size: int) -> dict[str, Any]:
    return {"name": "zero", "stage": stage, "world_size": world_size}


@pytest.mark.parametrize("engine", [FSDP2, zero(2, 4)])
def test_the_same_engine_goes_on(engine: dict[str, Any]) -> None:
    check_same_engine({"engine": engine}, engine, FOLDER)


def test_a_checkpoint_from_before_there_was_a_choice_is_of_fsdp2() -> None:
    check_same_engine({}, FSDP2, FOLDER)
    check_weights_readable({}, FOLDER)


@pytest.mark.parametrize(
    ("written", "now", "parts"),
    [
        (FSDP2, zero(3, 4), ["--nproc-per-node 4", "--engine zero --zero-stage 3"]),
        (zero(3, 4), FSDP2, ["--nproc-per-node 4", "--engine fsdp2"]),
        (zero(3, 4), zero(3, 2), ["stage 3 on 4 processes", "stage 3 on 2 processes", "--nproc-per-node 4"]),
        (zero(1, 4), zero(2, 4), ["stage 1 on 4 processes", "stage 2 on 4 processes", "--engine fsdp2"]),
    ],
)
def test_another_engine_is_told_the_command(written: dict[str, Any], now: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_same_engine({"engine": written}, now, FOLDER)
    for part in (*parts, "launch/convert.py", str(FOLDER)):
        assert part in str(caught.value)


def test_weights_of_zero_are_converted_first() -> None:
    with pytest.raises(CheckpointError, match=r"torchrun --nproc-per-node 4 launch/convert\.py .* --engine fsdp2"):
        check_weights_readable({"engine": zero(2, 4)}, FOLDER)


def test_a_damaged_checkpoint_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion would write new checksums over the damage."""
    shutil.copytree(ROOT / "tests/integration/run_of_0db30ff", tmp_path / "run")
    (tensors,) = tmp_path.rglob("*.distcp")
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    arguments = ("--checkpoint", tensors.parent, "--output", tmp_path / "new", "--engine", "zero")
    monkeypatch.setattr(sys, "argv", ["launch/convert.py", *map(str, arguments)])
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is"):
        convert.main()


def test_pickles_of_another_user_are_read_only_if_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system's word for who made them; fsdp2's files run no code, whoever made them."""
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "states.pt").touch()
    check_pickles({"engine": zero(2, 4)}, tmp_path, False, "--trust-pickles")
    monkeypatch.setattr("os.geteuid", lambda: -1)
    with pytest.raises(CheckpointError, match=r"is not a file of this user, .* add --trust-pickles"):
        check_pickles({"engine": zero(2, 4)}, tmp_path, False, "--trust-pickles")
    check_pickles({"engine": zero(2, 4)}, tmp_path, True, "--trust-pickles")
    check_pickles({"engine": FSDP2}, tmp_path, False, "--trust-pickles")
