"""Ranks of one start find each other over a store that an earlier start has used."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from trainer.errors import RunError
from trainer.parallel.rendezvous import agree_on_name, open_store

RANKS = 3


@pytest.fixture
def client() -> Callable[[], dist.Store]:
    """Connections to one store, of which each thread needs its own."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def start(client: Callable[[], dist.Store], ranks: int, late: int) -> str:
    """The name that all ranks agree on. late: the rank that comes when the others have waited a while."""
    others_wait = threading.Event()

    def join(rank: int) -> str:
        if rank == late:
            others_wait.wait(0.5)
        return agree_on_name(client(), rank, ranks, timeout_s=20)

    with ThreadPoolExecutor(ranks) as threads:
        names = list(threads.map(join, range(ranks)))
    assert len(set(names)) == 1, names
    return names[0]


def test_each_start_has_a_name_of_its_own(client: Callable[[], dist.Store]) -> None:
    """Whichever rank comes last, and after a start in which a rank was killed before it arrived."""
    names = {start(client, RANKS, late=0), start(client, RANKS, late=1)}
    store = client()
    for rank in (0, 1):  # rank 2 is missing: they wait, and are ended
        with pytest.raises(RunError, match="did not arrive") as told:
            agree_on_name(store, rank, RANKS, timeout_s=0.2)
        assert str(told.value).startswith("ranks [1, 2]" if rank == 0 else "ranks [0]")
    names |= {start(client, RANKS, late=0), start(client, 2, late=0), start(client, 1, late=0)}
    assert len(names) == 5


def test_a_port_that_is_taken_and_a_missing_variable_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunError, match=rf"at 127.0.0.1:{port}.*in use"):
            open_store(0, 2)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(RunError, match=r"at no MASTER_ADDR:"):
        open_store(0, 2)
