"""The errors of data/, without torch, so that every command can name them at once."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input. The message names the file or key, what was expected and what to do."""


class SampleError(Exception):
    """A sample that cannot be used. It becomes a hole, and the message is the reason under which holes are counted."""


class StoreError(SampleError):
    """The store did not give a sample's bytes, and may give them later.

    reason: begins with `store: `; holes are counted under it. remedy: what the user can do. asked_s: the seconds after
    which the store wants to be asked again.
    """

    def __init__(self, reason: str, remedy: str = "", asked_s: float = 0.0) -> None:
        super().__init__(reason)
        self.remedy, self.asked_s = remedy, asked_s


_LEAST_BAD = 10  # unreadable samples by which a share is judged: one among the first sixteen is no share yet


def too_many_unreadable(holes: int, read: int, most: float) -> bool:
    """Whether `holes` unreadable samples of `read` are more than data.max_bad_share allows. most: that share."""
    return holes > most * read and (holes >= _LEAST_BAD or not most)
