"""The errors of data/, without torch, so that every command can name them at once."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input. The message names the file or key, what was expected and what to do."""


class SampleError(Exception):
    """A sample that cannot be used. It becomes a hole, and the message is the reason under which holes are counted."""


class StoreError(SampleError):
    """The store did not give a sample's bytes, and may give them later. Messages begin with `store: `."""
