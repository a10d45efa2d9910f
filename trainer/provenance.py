"""Which code a run was started with, and of which rooms it consists."""

import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def rooms() -> list[str]:
    """The top-level packages of the source tree, from the one list of them: that of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]]


def commit() -> str:
    """Commit of the code, also of a frozen copy (launch/submit.py); "" elsewhere outside a checkout."""
    if (frozen := ROOT / "COMMIT").is_file():
        return frozen.read_text().strip()
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip()
