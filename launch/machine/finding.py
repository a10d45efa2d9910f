"""What launch/doctor.py has found out about one thing."""

import subprocess
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

GIB = 1 << 30


class Finding(NamedTuple):
    """fine; note: something that some runs need is not there; short: what every run of this machine needs is not."""

    state: Literal["fine", "note", "short"]
    what: str
    found: str
    remedy: str = ""

    def line(self) -> str:
        """As the terminal shows it."""
        return f"{self.state:5}  {self.what:11}  {self.found}{f': {self.remedy}' if self.remedy else ''}"


def looked_at(what: str, look: Callable[[], Finding]) -> Finding:
    """The finding of a look; where the look itself fails the others are taken all the same. A package that cannot be
    imported falls short."""
    try:
        return look()
    except ImportError as error:
        return Finding("short", what, f"cannot be imported ({error})", "make setup")
    except Exception as error:
        return Finding("note", what, f"could not be looked at ({type(error).__name__}: {error})")


def answer(*command: str, timeout_s: float = 20) -> str | None:
    """What a program prints; None where it is absent, fails, or says nothing within timeout_s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout_s)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def listed(names: Sequence[object], most: int = 6) -> str:
    """ "a, b and 3 more" """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
