"""When unreadable samples end a run: too large a share, or a storage that is gone."""

from collections.abc import Mapping

OUTAGE = 100  # samples lost in consecutive steps that lose nearly all of theirs


def bad_share_message(step: int, share: float, most: float, holes: Mapping[str, int]) -> str:
    """share: of the samples that all ranks have read; most: data.max_bad_share; holes: {reason: samples} of rank 0."""
    return (
        f"{share:.2%} of the samples were unreadable, more than data.max_bad_share {most:.2%} (rank 0 saw "
        f"{_reasons(holes)}). The run is saved at step {step}: make the samples readable again, or raise "
        "data.max_bad_share, and start it again."
    )


def outage_message(lost: int, holes: Mapping[str, int]) -> str:
    """lost: samples of all ranks; holes: {reason: samples} of rank 0."""
    return (
        f"the last {lost} samples could not be read (rank 0 saw {_reasons(holes)}): the storage is gone, not a sample "
        "here and there. The run ends without a checkpoint of the steps that learned from what was left: start it "
        "again once its data can be read."
    )


class OutageDetector:
    """Counts what consecutive steps lose in which nearly nothing could be read: their gradients are of a few samples,
    or of none. Nearly nothing: less than a tenth, or than 1 - max_bad_share where that is less."""

    def __init__(self, max_bad_share: float) -> None:
        self._least = max(0.9, max_bad_share)
        self._before, self._row = (0, 0), 0

    def lost_in_a_row(self, holes: int, read: int) -> int:
        """Samples that the latest such steps have lost; 0 where the last step was not one.

        holes: unreadable samples, read: samples, both of all ranks and since the run has started."""
        lost, seen = holes - self._before[0], read - self._before[1]
        self._before = holes, read
        self._row = self._row + lost if lost > self._least * seen else 0
        return self._row


def _reasons(holes: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(holes.items())) or "none of them"
