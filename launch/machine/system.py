"""Python and its packages, memory, limits, disk and compiler."""

import importlib.metadata
import os
import re
import resource
import shutil
import sys
import sysconfig
import tempfile
import time
import tomllib
from pathlib import Path

from launch.machine.finding import GIB, Finding, listed
from trainer.provenance import ROOT

INFINIBAND = Path("/sys/class/infiniband")
SHM = Path("/dev/shm")
LEAST_SHM = 1 * GIB
LEAST_FILES = 4096  # each tensor that a reader hands over is one
TESTED = 256 << 20  # bytes that are written to learn the disk's rate
SLOW_DISK = 100e6  # bytes/s
LEAST_DISK = 10 * GIB


def python() -> Finding:
    """The interpreter, and whether all packages of pyproject.toml are there."""
    found = f"{sys.version.split()[0]} ({sys.executable})"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [re.split(r"[\[<>=~! ;]", dependency)[0] for dependency in project["dependencies"]]
    known = {_plain(str(each.name)) for each in importlib.metadata.distributions()}
    if missing := [name for name in named if _plain(name) not in known]:
        return Finding("short", "Python", f"{found} without {listed(missing)}", "make setup")
    return Finding("fine", "Python", found)


def _plain(package: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def processors() -> Finding:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Finding("fine", "processors", f"{cores} cores, {memory:.0f} GiB of memory in the machine")


def shared_memory() -> Finding:
    """Where readers hand batches over."""
    total = shutil.disk_usage(SHM).total
    found = f"{total / GIB:.3g} GiB"
    if total < LEAST_SHM:
        return Finding(
            "short", "/dev/shm", found, "readers end with a bus error: docker run --ipc host or --shm-size 16g"
        )
    return Finding("fine", "/dev/shm", found)


def limits() -> Finding:
    """Open files, and memory that may be locked, which InfiniBand needs."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    _, locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    found = f"{'any number of' if files == unlimited else files} open files, "
    found += "all memory may be locked" if locked == unlimited else f"{locked >> 20} MiB may be locked"
    if files != unlimited and files < LEAST_FILES:
        return Finding("short", "ulimits", found, "raise `ulimit -Hn`; docker run --ulimit nofile=65536")
    if locked != unlimited and list(INFINIBAND.glob("*")):
        return Finding("short", "ulimits", found, "InfiniBand locks memory: `ulimit -l unlimited`; --ulimit memlock=-1")
    return Finding("fine", "ulimits", found)


def disk(folder: Path) -> Finding:
    """Room below `folder`, and the rate at which it takes a file; where it is not there yet, of what will hold it."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    if free < LEAST_DISK:
        return Finding("short", "disk", f"{there}: {free / GIB:.1f} GiB are free", "make room, or move run.dir")
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".mudit_doctor_") as file:
            began = time.monotonic()
            for _ in range(TESTED // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = TESTED / (time.monotonic() - began)
    except OSError as error:
        return Finding("short", "disk", f"{there}: {error.strerror}", "give rights, or choose another run.dir")
    found = f"{there}: {rate / 1e6:.0f} MB/s written, {free / GIB:.0f} GiB are free"
    if rate < SLOW_DISK:
        return Finding("note", "disk", found, "checkpoints take long: put run.dir on a faster disk")
    return Finding("fine", "disk", found)


def compiler() -> Finding:
    """What parallel.compile needs: a C++ compiler, and Python's headers."""
    named = [os.environ.get("CXX") or "g++", "clang++"]
    path = next(filter(None, map(shutil.which, named)), None)
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    found = f"{path or 'no C++ compiler'}, {'with' if headers else 'without'} Python.h"
    if path is None or not headers:
        return Finding("short", "compilers", found, "apt-get install g++ python3-dev, or parallel.compile=false")
    return Finding("fine", "compilers", found)
