"""When unreadable samples end a run: too large a share, or a storage that is gone."""

from collections.abc import Mapping

OUTAGE = 100  # samples in a row of steps that lose nearly all


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


class OutageDetector:
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
