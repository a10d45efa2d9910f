"""The store over which the ranks of one start find each other, empty although torchrun's outlives every restart.

torchrun keeps one store for all starts of a job (seen with torch 2.13; pytorch issues 135712 and 167288), in which a
restarted rank finds the addresses of ranks that are dead. So each start has a name of its own, under which all its keys
lie. TORCHELASTIC_RESTART_COUNT is no such name: agents that restart because a host has come or gone do not raise it.
"""

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from ..errors import RunError

JOIN_S = 1800.0  # for all ranks of a start to arrive, as torch waits
POLL_S = 0.05  # between two looks at the store at first; it doubles up to MOST_POLL_S
MOST_POLL_S = 0.5


def open_store(rank: int, size: int) -> dist.Store:
    """A store that holds nothing of earlier starts, over the one of which torchrun's environment tells.

    Raises RunError where a rank does not arrive, or rank 0's port is taken.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://"))
    except (ValueError, dist.DistError) as error:  # a variable is missing; no answer there, or the port is taken
        where = ":".join(os.environ.get(name, f"no {name}") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RunError(f"the ranks do not find each other at {where}, which these variables name: {error}") from None
    store.set_timeout(timedelta(seconds=JOIN_S))
    return dist.PrefixStore(agree_on_name(store, rank, size, JOIN_S), store)


def agree_on_name(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """A name that rank 0 makes for this start; the same call on all its ranks, which all get the same.

    What rank 0 offers may be read where it is an earlier start's, whose rank 0 is dead. So the other ranks answer each
    offer with a name of their own, made anew, and the offer is taken that is confirmed under that.
    """
    mine, deadline, poll_s = secrets.token_hex(8), time.monotonic() + timeout_s, POLL_S
    answers = {other: f"start/{mine}/{other}" for other in range(1, size)}
    answered = ""
    if rank == 0:
        store.set("start/offer", mine)
    while not store.check(list(answers.values()) if rank == 0 else [f"start/{mine}"]):
        if time.monotonic() > deadline:
            missing = [other for other, key in answers.items() if not store.check([key])] if rank == 0 else [0]
            raise RunError(f"ranks {missing} did not arrive within {timeout_s:.0f} s: look at their nodes")
        if rank != 0 and store.check(["start/offer"]) and (offer := store.get("start/offer").decode()) != answered:
            store.set(f"start/{offer}/{rank}", mine)
            answered = offer
        # In Python, so that a signal is heard meanwhile.
        time.sleep(poll_s)
        poll_s = min(2 * poll_s, MOST_POLL_S)
    if rank != 0:
        return store.get(f"start/{mine}").decode()
    for key in answers.values():
        store.set(f"start/{store.get(key).decode()}", mine)
    return mine
