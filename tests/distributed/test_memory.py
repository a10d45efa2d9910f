"""Ways of saving memory on two gloo processes: one start for all of memory_checks.py, one test for each promise."""

import json

import pytest

from tests.helpers.forked import finished

from .memory_checks import WAYS
from .test_engine import Results


@pytest.fixture(scope="module")
def ranks() -> Results:
    """What each rank found."""
    done = finished("-m", "tests.distributed.memory_checks", processes=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


@pytest.mark.parametrize("way", WAYS)
def test_trains_alike(ranks: Results, way: str) -> None:
    assert all(r["trains_alike"][way] < 1e-12 for r in ranks)
    assert all(r["trains_alike"]["moved"] > 1e-4 for r in ranks)


def test_collectives_of_a_step(ranks: Results) -> None:
    """Four groups, two micro-batches: weights and gradients are whole as briefly as can be; where weights stay, they
    are gathered once and gradients reduced once. The norm is summed once over shards. Replicas are summed once, and one
    of them tells the norm."""
    gathers, norm = "_allgather_base_", {"allreduce_": 1}
    once = {gathers: 4, "_reduce_scatter_base_": 4} | norm
    # In the forward pass, and again in the backward pass but for the root.
    freed = {gathers: 2 * (4 + 3), "_reduce_scatter_base_": 2 * 4} | norm
    for r in ranks:
        assert r["collectives"] == {
            "free": freed, "prefetch": freed, "keep": once, "keep_offload": once, "shipped": once,
            "replicas": {"allreduce_": 4, "broadcast_": 1},
        }  # fmt: skip


def test_gathered_weights_are_dropped_where_others_are_swapped_in(ranks: Results) -> None:
    for r in ranks:
        found = r["swapped_keep_gathered"]
        assert found["averaged"] < 1e-5
        assert found["differs"] > 1e-4
        assert found["given_back"] < 1e-5


def test_offloaded_state_skips_saves_and_loads(ranks: Results) -> None:
    for r in ranks:
        skipped, saved = r["non_finite_cpu_offload"], r["save_and_load_cpu_offload"]
        assert skipped == {"skipped": 1.0, "moved": 0.0, "average_moved": 0.0, "next_is_finite": 1.0}
        assert (saved["same"], saved["next"]) == (0.0, 0.0)
        assert saved["differed"] > 1e-3
