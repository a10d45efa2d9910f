"""How a run ends before its last step: asked by a signal, or by what all ranks have found together."""

import signal
from collections.abc import Mapping
from types import FrameType

import torch
import torch.distributed as dist

OUTAGE = 100  # samples in a row of steps that lose nearly all


class RunError(RuntimeError):
    """The run cannot go on; raised on all ranks alike. The message says why and what to do."""


class BadDataError(RunError):
    """More samples were unreadable than data.max_bad_share allows, or nearly all of the last ones."""


def bad_data(step: int, share: float, most: float, holes: Mapping[str, int]) -> str:
    return (
        f"{share:.2%} of the samples were unreadable, more than data.max_bad_share {most:.2%} (rank 0 saw "
        f"{_reasons(holes)}). The run is saved at step {step}: make the samples readable again, or raise "
        "data.max_bad_share, and start it again."
    )


def outage(lost: int, holes: Mapping[str, int]) -> str:
    return (
        f"the last {lost} samples could not be read (rank 0 saw {_reasons(holes)}): the storage is gone, not a sample "
        "here and there. The run ends without a checkpoint of the steps that learned from what was left: start it "
        "again once its data can be read."
    )


class Losses:
    """Steps in a row in which nearly nothing could be read: their gradients are of a few samples, or of none."""

    def __init__(self, max_bad_share: float) -> None:
        self._least = max(0.9, max_bad_share)
        self._before, self._row = (0, 0), 0

    def in_a_row(self, holes: int, read: int) -> int:
        """Samples that were lost in the last steps alike. holes of read: of all ranks, since the run has started."""
        lost, seen = holes - self._before[0], read - self._before[1]
        self._before = holes, read
        self._row = self._row + lost if lost > self._least * seen else 0
        return self._row


def _reasons(holes: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(holes.items())) or "none of them"


class Agreement:
    """What every rank tells the others in each step: whether it was asked to stop, and how its data are.

    Within it SIGTERM and SIGUSR1 ask for a checkpoint and an orderly end. The sum over ranks goes on beside the step
    on the control group and is read one step later, so that no step waits for it: all ranks stop after the same
    step, at most two after the signal.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._asked = False
        self._sum: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> "Agreement":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None and self._sum is not None:
            self._sum[0].wait()  # the group must not be left in mid-sum

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def exchange(self, holes: int, read: int) -> tuple[bool, int, int]:
        """Tell how many samples this rank found unreadable and read; returns (any rank was asked to stop, unreadable
        samples, samples) of all ranks as of the step before."""
        before, numbers = self._sum, torch.tensor([int(self._asked), holes, read])
        work = dist.all_reduce(numbers, group=self._group, async_op=True)
        assert work is not None
        self._sum = (work, numbers)
        if before is None:
            return False, 0, 0
        before[0].wait()
        asked, holes, read = before[1].tolist()
        return asked > 0, holes, read
