"""Which code a run was started with."""

import subprocess
from pathlib import Path


def commit() -> str:
    """Commit of the code, also of a frozen copy (launch/submit.py); "" elsewhere outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if (frozen := root / "COMMIT").is_file():
        return frozen.read_text().strip()
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip()
