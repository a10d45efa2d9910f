"""When unreadable samples end a run: too large a share, or a storage that is gone."""

from collections.abc import Mapping

from data.errors import too_many_unreadable

from ..errors import BadDataError

OUTAGE = 100  # samples lost in consecutive steps that lose nearly all of theirs


def bad_share_message(step: int, bad: "BadData", most: float, holes: Mapping[str, int]) -> str:
    """bad: what all ranks have read; most: data.max_bad_share; holes: {reason: samples} of rank 0."""
    return (
        f"{bad.holes} of the {bad.read} samples read were unreadable ({bad.share:.2%}), more than data.max_bad_share "
        f"{most:.2%} (rank 0 saw {_reasons(holes)}). The run is saved at step {step}: make the samples readable again, "
        "leave them out by data.filter in a new run, or raise data.max_bad_share, and start it again."
    )


def outage_message(lost: int, holes: Mapping[str, int]) -> str:
    """lost: samples of all ranks; holes: {reason: samples} of rank 0."""
    return (
        f"the last {lost} samples could not be read (rank 0 saw {_reasons(holes)}): the storage is gone, not a sample "
        "here and there. The run ends without a checkpoint of the steps that learned from what was left: start it "
        "again once its data can be read."
    )


class BadData:
    """What all ranks could not read since the run has started, so that it goes on once its data were mended.

    lost: samples that consecutive steps up to now have lost in which nearly nothing could be read, because their
    gradients are of a few samples, or of none. Nearly nothing: less than a tenth, or than 1 - max_bad_share where that
    is less. holes, read: unreadable samples and samples, both since the run has started.
    """

    def __init__(self, max_bad_share: float) -> None:
        self.lost = self.holes = self.read = 0
        self._most, self._least = max_bad_share, max(0.9, max_bad_share)

    @property
    def share(self) -> float:
        """Unreadable samples per sample."""
        return self.holes / max(1, self.read)

    @property
    def too_much(self) -> bool:
        """Whether data.max_bad_share is passed."""
        return too_many_unreadable(self.holes, self.read, self._most)

    def update(self, holes: int, read: int, reasons: Mapping[str, int]) -> None:
        """holes: unreadable samples, read: samples, both since the run has started; the same as in the last call change
        nothing. reasons: {reason: samples} of this rank. Raises BadDataError where the storage is gone."""
        bad, seen = holes - self.holes, read - self.read
        self.holes, self.read = holes, read
        if seen:
            self.lost = self.lost + bad if bad > self._least * seen else 0
        if self.lost >= OUTAGE:
            raise BadDataError(outage_message(self.lost, reasons))


def _reasons(holes: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(holes.items())) or "none of them"
