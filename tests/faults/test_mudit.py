"""`mudit train --gpus 2` and its processes: signals, and the code with which it ends."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.processes import children, kill_tree
from tests.distributed.runs import last_step
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT
from trainer.checkpoint.find import complete_checkpoints

from .harness import lives, status, wait_until

START_S = 180.0
MUDIT = ("-m", "launch.mudit", "train", "--gpus", "2", "--config", "mmdit_debug_mup", "run.name=run")
SETTINGS = ("train.steps=100000", "train.validate_every=0", "train.sample_every=0", "train.log_every=1")
RUN_WORKERS = (
    "import sys, pathlib; from launch.workers import *; sys.exit(run_workers(pathlib.Path(sys.argv[1]), [], 2))"
)
# Like a worker of a run: the first Ctrl-C asks, the second ends.
PATIENT = """
import os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[0]).parent
def hear(number, frame):
    mark = here / f"asked_{os.environ['RANK']}"
    if mark.exists():
        os._exit(130)
    mark.touch()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, hear)
(here / f"ready_{os.environ['RANK']}").touch()
while True:
    time.sleep(0.1)
"""


@contextlib.contextmanager
def started(*command: str | Path, prefix: tuple[str, ...] = ()) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command in a terminal of its own, and that terminal's keyboard and screen; killed at the end."""
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        ["env", "--default-signal", *prefix, "setsid", "--ctty", sys.executable, *map(str, command)],
        cwd=ROOT, env=environment(), stdin=terminal, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    try:
        yield process, keyboard
    finally:
        kill_tree(process.pid)
        process.wait()
        with contextlib.suppress(OSError):
            os.close(keyboard)


@contextlib.contextmanager
def patient(folder: Path, *prefix: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Two workers that wait for signals."""
    (folder / "worker.py").write_text(PATIENT)
    with started("-c", RUN_WORKERS, folder / "worker.py", prefix=prefix) as (process, keyboard):
        wait_until(lambda: len(list(folder.glob("ready_*"))) == 2, START_S, "both are ready")
        yield process, keyboard


def test_sigterm_saves_and_ends_well(tmp_path: Path) -> None:
    """Where torchrun, told of the signal, would end with an error."""
    run = tmp_path / "run"
    with started(*MUDIT, f"run.dir={tmp_path}", *SETTINGS) as (process, _):
        wait_until(lambda: last_step(run) > 0, START_S, "a first step")
        pids = children(process.pid)
        assert len(pids) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0
        assert not any(lives(pid) for pid in pids)
    told = status(run)
    assert told["state"] == "preempted"
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step_{told['step']:08d}"


def test_the_code_is_that_of_the_process_that_failed(tmp_path: Path) -> None:
    """Bad input that shows itself only once the processes run."""
    with started(*MUDIT, f"run.dir={tmp_path}", "run.init_from=nowhere") as (process, keyboard):
        assert process.wait(START_S) == 2
        said = os.read(keyboard, 1 << 16).decode()
    assert said.count('no complete checkpoint in "nowhere"') == 1
    assert "Traceback" not in said


def test_a_second_ctrl_c_reaches_all(tmp_path: Path) -> None:
    with patient(tmp_path) as (process, keyboard):
        pids = children(process.pid)
        os.write(keyboard, b"\x03")
        wait_until(lambda: len(list(tmp_path.glob("asked_*"))) == 2, 20, "both are asked")
        assert process.poll() is None
        os.write(keyboard, b"\x03")
        assert process.wait(60) == 130
        assert not any(lives(pid) for pid in pids)


def test_a_killed_process_is_named_as_a_shell_does(tmp_path: Path) -> None:
    with patient(tmp_path) as (process, _):
        one, other = sorted(children(process.pid))
        os.kill(one, signal.SIGKILL)
        wait_until(lambda: list(tmp_path.glob("asked_*")), 60, "torchrun asks the other to end")
        os.kill(other, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGKILL


def test_what_nohup_ignores_is_ignored(tmp_path: Path) -> None:
    with patient(tmp_path, "sh", "-c", 'trap "" HUP; exec "$@"', "sh") as (process, _):
        pids = children(process.pid)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: len(list(tmp_path.glob("asked_*"))) == 2, 20, "both are asked, by SIGTERM")
        assert all(lives(pid) for pid in pids)


def test_a_signal_before_the_processes_start_ends_it(tmp_path: Path) -> None:
    """There is nothing to save."""
    early = "import os, signal, launch.workers as w\nw._pass_on(signal.SIGTERM, None)"
    done = subprocess.run([sys.executable, "-c", early], cwd=ROOT, env=environment(), capture_output=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == b"error: ended by SIGTERM: no process was under way\n"
