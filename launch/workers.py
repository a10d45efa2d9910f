"""The processes of one command on this machine: torchrun's agent runs in this process, which passes signals on."""

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from launch.processes import children
from trainer.recovery.signals import SIGNALS

SAVE_S = 600  # for the last save of the others, where one process has failed


def gpus_seen() -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES leaves."""
    return torch.cuda.device_count()


def run_workers(script: Path, words: Sequence[str], processes: int) -> int:
    """`torchrun --nproc-per-node PROCESSES SCRIPT WORDS` -> the exit code of the first process that fails, else 0.

    A signal goes to the processes and not to torchrun, which would end with an error whatever they do: a run that has
    saved ends with 0, and a second Ctrl-C ends it at once, as without torchrun. What this process was told to ignore
    (nohup) they ignore as well.
    """
    # torchrun must listen to one signal at least: to one that nobody sends.
    options = ["--standalone", "--nproc-per-node", str(processes), "--signals-to-handle", "SIGURG"]
    options += ["--shutdown-timeout", str(SAVE_S)]
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _pass_on) for number in heard}
    try:
        torchrun.run(torchrun.parse_args([*options, str(script), *words]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # as a shell names a signal
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    if not (workers := children(os.getpid())):
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(2, f"error: ended by {signal.Signals(number).name}: no process was under way\n".encode())
        os._exit(128 + number)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
