"""Muon's own settings."""

from typing import NamedTuple


class MuonSettings(NamedTuple):
    """momentum: decay rate of the gradient's mean. nesterov: whether this step's gradient is added to it once more.
    steps: Newton-Schulz steps of the polar factor."""

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
