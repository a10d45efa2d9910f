"""A signal to one rank, and all ranks stop after the same step."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from .signals import Signals


class StopSignal:
    """What every rank tells the others in each step: whether it was asked to stop, and how its data are.

    Within it signals (see signals.py) ask for a checkpoint and an orderly end. The sum over ranks goes on beside the
    step on the control group and is read one step later, so that no step waits for it: all ranks stop after the same
    step, at most two after the signal.
    """

    def __init__(self, group: dist.ProcessGroup, before_end: Callable[[str], None]) -> None:
        """before_end: see Signals."""
        self._group = group
        self._signals = Signals(before_end=before_end)
        self._sum: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> "StopSignal":
        self._signals.__enter__()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._signals.__exit__()
        if error is None and self._sum is not None:
            self._sum[0].wait()  # the group must not be left in mid-sum

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._signals.asked

    def any_asked(self) -> bool:
        """Whether any rank was asked to stop up to now, for which it waits."""
        if self._sum is not None:
            self._sum[0].wait()
        asked = torch.tensor(int(self.asked))
        dist.all_reduce(asked, group=self._group)
        return bool(asked)

    def latest(self) -> tuple[int, int]:
        """(unreadable samples, samples) of all ranks as of the present step, for which it waits."""
        assert self._sum is not None
        self._sum[0].wait()
        _, holes, read = self._sum[1].tolist()
        return holes, read

    def exchange(self, holes: int, read: int) -> tuple[bool, int, int]:
        """Tell how many samples this rank found unreadable and read; returns (any rank was asked to stop, unreadable
        samples, samples) of all ranks as of the step before."""
        before, numbers = self._sum, torch.tensor([int(self.asked), holes, read])
        work = dist.all_reduce(numbers, group=self._group, async_op=True)
        assert work is not None
        self._sum = (work, numbers)
        if before is None:
            return False, 0, 0
        before[0].wait()
        asked, holes, read = before[1].tolist()
        return asked > 0, holes, read
