"""Runs that are killed, cut off, hung or fed NaNs, beside tests/distributed/runs.py."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.processes import kill_tree
from tests.helpers.forked import environment, once
from tests.helpers.paths import ROOT

STANDALONE = ("--standalone", "--nproc-per-node", "2")


@dataclass
class Job:
    """A torchrun that is under way; its output goes to a file."""

    process: subprocess.Popen[bytes]
    output: Path

    def wait(self, timeout_s: float) -> int:
        """Exit code; fails with the output where it takes longer."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.text()[-4000:]}") from None

    def text(self) -> str:
        return self.output.read_text(errors="replace")


@contextlib.contextmanager
def job(
    folder: Path,
    *arguments: str,
    faults: Mapping[str, Any] | None = None,
    launcher: Sequence[str] = STANDALONE,
    prefix: Sequence[str] = (),
    more_environment: Mapping[str, str] | None = None,
    config: str = "mmdit_debug_mup.yaml",
) -> Iterator[Job]:
    """torchrun launch/train.py in `folder`, with `faults` (faulty_train.py) where given; killed at the end."""
    script = "launch/train.py" if faults is None else "tests/faults/faulty_train.py"
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *launcher, script, "--config", config]
    output = folder.parent / f"{folder.name}.{time.monotonic_ns()}.log"
    variables = {**environment(), "FAULTS": json.dumps(faults), **(more_environment or {})}
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [*command, *once([f"run.dir={folder.parent}", f"run.name={folder.name}", *arguments])],
            cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield Job(process, output)
    finally:
        kill_tree(process.pid)
        process.wait()


def wait_until(true: Callable[[], Any], timeout_s: float, what: str, poll_s: float = 0.02) -> float:
    """Seconds until `true()`; fails after timeout_s."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(poll_s)
    return time.monotonic() - began


def workers(torchrun: int) -> list[int]:
    """Process ids of torchrun's workers, by rank."""
    found: dict[int, int] = {}
    for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            if parent_of(pid) == torchrun:
                variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                ranks = [v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")]
                found |= {int(rank): pid for rank in ranks}
    return [found[rank] for rank in sorted(found)]


def parent_of(pid: int) -> int:
    return int(_stat(pid)[1])


def lives(pid: int) -> bool:
    """Whether a process runs (one that is dead and not yet looked after does not)."""
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def status(folder: Path) -> dict[str, Any]:
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((folder / "checkpoints").glob(".step_*.tmp"))


def kill(pids: Sequence[int], signal_number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_number)
