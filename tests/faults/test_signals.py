"""Signals as a person causes them: Ctrl-C while the model is being built, a terminal that is closed in mid-training."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.processes import kill_tree
from tests.distributed.runs import last_step
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT
from trainer.checkpoint.find import complete_checkpoints

from .harness import status, wait_until

START_S = 180.0
SETTINGS = ("train.steps=100000", "train.validate_every=0", "train.sample_every=0", "train.log_every=1")


@contextlib.contextmanager
def started(folder: Path, terminal: int) -> Iterator[subprocess.Popen[bytes]]:
    """launch/train.py with `terminal` for all that it reads and says, as a shell in it would start it."""
    command = ["launch/train.py", "--config", "mmdit_debug_mup.yaml", f"run.dir={folder.parent}", "run.name=run"]
    process = subprocess.Popen(
        ["env", "--default-signal", "setsid", "--ctty", sys.executable, *command, *SETTINGS],
        cwd=ROOT, env=environment(), stdin=terminal, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """Nothing can be printed any more; all that is left to do must be done nonetheless."""
    keyboard, terminal = pty.openpty()
    with started(tmp_path / "run", terminal) as process:
        wait_until(lambda: last_step(tmp_path / "run") > 0, START_S, "a first step")
        os.close(keyboard)
        assert process.wait(START_S) == 0
    told = status(tmp_path / "run")
    assert told["state"] == "preempted"
    assert complete_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step_{told['step']:08d}"


def test_ctrl_c_ends_a_run_that_is_being_built(tmp_path: Path) -> None:
    keyboard, terminal = pty.openpty()
    with started(tmp_path / "run", terminal) as process, open(keyboard, "r+b", buffering=0) as shown:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_until(lambda: "libtorch_cpu" in maps.read_text(), START_S, "torch is being imported")
        shown.write(b"\x03")
        assert process.wait(START_S) == 128 + signal.SIGINT
        said = shown.read(1 << 16).decode()
    assert "ended by SIGINT" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
