"""Settings for every test, and what makes a unit test fast."""

import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.processes import importing
from tests.helpers.fuzz import OUTCOMES
from tests.helpers.paths import ROOT
from trainer.parallel.mesh import World, init_world

# The models are so small that a second thread costs more than it gives, and tests run side by side.
torch.set_num_threads(1)

# Run first, in this order: minutes each, of which the first one mostly waits. What comes last should be short, or one
# worker runs it while the others have nothing left.
_LONGEST = (
    "integration/test_slurm.py", "distributed/test_zero.py", "faults/test_faults.py", "distributed/test_resume.py",
    "distributed/test_buckets.py", "distributed/test_worlds.py",
)  # fmt: skip
_STARTS_A_PROCESS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
_running: list[pytest.Item] = []  # the fast test that runs now, if one does


def _refuse(event: str, _: tuple[Any, ...]) -> None:
    if _running and event in _STARTS_A_PROCESS:  # _running first: at the end of the interpreter both are None
        pytest.skip(f"it starts a process ({event}), which make test-fast does not")


sys.addaudithook(_refuse)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports all tests, in each worker."""
    with importing():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    places = {ROOT / "tests" / path: place for place, path in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Holds `make test-fast` to its word: a test that starts a process is left out there."""
    if "not slow" in item.config.option.markexpr:
        _running.append(item)
    try:
        return (yield)
    finally:
        _running.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Cases made by chance are counted by kind, for benchmarks.fuzz."""
    OUTCOMES.clear()
    yield
    item.user_properties += OUTCOMES.items()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A gloo world of this process alone."""
    flash = torch.backends.cuda.flash_sdp_enabled()
    world = init_world(1)
    yield world
    dist.destroy_process_group()
    torch.backends.cuda.enable_flash_sdp(flash)  # init_world turns it off; other tests run in this process
