"""The sharded engine on two gloo processes: one start for all of engine_checks.py, one test for each promise."""

import json
from typing import Any

import pytest

from tests.helpers.forked import finished
from trainer.estimate.simulation import profile

from .engine_checks import configured

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks() -> Results:
    """What each rank found."""
    done = finished("-m", "tests.distributed.engine_checks", "2", processes=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


def test_init_does_not_depend_on_sharding(ranks: Results) -> None:
    assert [r["init_does_not_depend_on_sharding"] for r in ranks] == [0.0, 0.0]


def test_optimizer_settings_are_the_tables(ranks: Results) -> None:
    assert [r["optimizer_settings_are_the_tables"] for r in ranks] == [[], []]


def test_one_step_moves_every_weight_by_its_lr_decay_and_epsilon(ranks: Results) -> None:
    """Also after a resume from a run with others. On 4 processes: test_zero.py, whose start it shares."""
    for r in ranks:
        assert set(r["one_step_moves_as_the_table_says"]) == {"fp32", "bf16", "fp32, resumed", "bf16, resumed"}
        assert not any(r["one_step_moves_as_the_table_says"].values()), r
        assert r["another_setting_is_seen"] == {"lr_scale": 0, "weight_decay": 0, "eps": 0}, "of all in the group"


def test_non_finite_step_changes_nothing_on_any_rank(ranks: Results) -> None:
    """A NaN on the last rank alone: skipped on both, and training goes on."""
    for r in ranks:
        assert r["non_finite_step_changes_nothing"] == {
            "skipped": 1.0, "moved": 0.0, "average_moved": 0.0, "next_is_finite": 1.0,
        }  # fmt: skip


def test_a_norm_over_the_limit_changes_nothing_on_any_rank(ranks: Results) -> None:
    for r in ranks:
        taken, moved, skipped, still = r["norm_over_the_limit_changes_nothing"]
        assert (taken, skipped, still) == (0.0, 1.0, 0.0)
        assert moved > 0


def test_swapped_weights_are_used_and_given_back(ranks: Results) -> None:
    for r in ranks:
        found = r["swapped_weights_are_used_and_given_back"]
        assert found["averaged"] < 1e-5
        assert found["differs"] > 1e-4, "the averages are too near to the weights to tell"
        assert found["given_back"] < 1e-5
        assert found["weights_given_back"] == 0.0


def test_replicas_agree_with_full_sharding(ranks: Results) -> None:
    assert all(r["replicas_agree"] < 1e-12 for r in ranks)


def test_each_copy_stages_its_share_of_a_checkpoint(ranks: Results) -> None:
    """Every sharded tensor on one copy, and none of them on all: host memory would hold it several times."""
    for r in ranks:
        found = r["shares_of_copies"]
        assert (found["least"], found["most"]) == (1, 1)
        assert abs(found["own"] - found["all"] / len(ranks)) < 1


def test_save_and_load_is_bit_exact(ranks: Results) -> None:
    for r in ranks:
        found = r["save_and_load"]
        assert found["differed"] > 1e-3
        assert found["same"] == 0.0
        assert found["totals"] == 3.0
        assert found["next"] == 0.0


def test_a_rank_that_cannot_write_fails_the_save_on_all(ranks: Results) -> None:
    for r in ranks:
        found = r["a_failing_rank_fails_all"]
        assert ["No space left" in text for text in found["told"]] == [True, True]
        assert found["left"] == ["step_00000002"]


def test_bf16_keeps_fp32_masters_and_uncast_times(ranks: Results) -> None:
    for r in ranks:
        found = r["bf16_keeps_fp32_masters"]
        assert found["dtypes"] == ["torch.float32"]
        assert found["computed_in"] == "torch.bfloat16"
        assert found["sinusoids_differ_by"] > 0.5
        assert found["sinusoids_off_by"] == 0.0
        assert found["gradients_beyond_bf16"] > 0.2


def test_simulated_state_is_the_real_one_to_the_byte(ranks: Results) -> None:
    for number, r in enumerate(ranks):
        simulated = profile(configured(), 2, rank=number)
        assert [simulated.parameters, simulated.optimizer, simulated.ema] == r["state_bytes"], f"rank {number}"
