"""The errors of the data room, without torch, so that every command can name them at once."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input of the data room: names the file or key, what was expected and what to do."""


class SampleError(Exception):
    """A sample that cannot be used; the message is the reason under which holes are counted."""


class StoreError(SampleError):
    """The store did not give a sample's bytes; it may give them later. Messages begin with `store: `."""
