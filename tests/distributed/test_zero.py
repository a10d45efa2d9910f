"""The zero engine on gloo processes: one start for all of zero_checks.py, one on four processes, and real runs that
are killed, resumed and converted."""

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forked import finished
from trainer.checkpoint.find import complete_checkpoints

from .runs import assert_close, exact, train, train_and_kill, weights

KINDS = [f"{stage} {precision}" for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
# Difference of the initial values, parameters in no shard, numbers in two, parameters with other settings.
EXACT = {kind: [0.0, [], 0, []] for kind in KINDS}
NONE: dict[str, list[str]] = {kind: [] for kind in KINDS}

Results = list[dict[str, Any]]


def started(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return finished(*arguments, processes=processes)


def checked(processes: int, *checks: str) -> Results:
    """What each rank found."""
    done = started(processes, "-m", "tests.distributed.zero_checks", str(processes), *checks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


@pytest.fixture(scope="module")
def ranks() -> Results:
    return checked(2)


def test_initial_values_are_those_of_fsdp2_and_settings_the_tables(ranks: Results) -> None:
    assert [r["starts_as_the_table_says"] for r in ranks] == [EXACT] * 2


def test_one_step_moves_every_weight_by_its_lr_decay_and_epsilon(ranks: Results) -> None:
    assert [r["one_step_of_zero_moves_as_the_table_says"] for r in ranks] == [NONE] * 2


def test_after_a_resume_the_settings_are_those_of_the_config(ranks: Results) -> None:
    for r in ranks:
        assert list(r["one_step_after_a_resume"].values()) == [[], [], [], []]


def test_four_processes() -> None:
    """Small groups leave ranks without a piece of them. fsdp2 as well, whose own checks start two processes."""
    moves = "one_step_of_zero_moves_as_the_table_says"
    for r in checked(4, "starts_as_the_table_says", moves, "one_step_moves_as_the_table_says"):
        kinds = r[moves].keys()
        assert len(kinds) == 4
        assert r["starts_as_the_table_says"] == {kind: EXACT[kind] for kind in kinds}
        assert r[moves] == {kind: NONE[kind] for kind in kinds}
        assert list(r["one_step_moves_as_the_table_says"].values()) == [[], [], [], []]


def test_losses_are_those_of_fsdp2(ranks: Results) -> None:
    for r in ranks:
        for micro_batches, difference in r["losses_differ_by"].values():
            assert micro_batches == 20
            assert difference < 1e-5


def test_non_finite_step_changes_nothing_on_any_rank(ranks: Results) -> None:
    expected = {"skipped": 1.0, "moved": 0.0, "average_finite": 1.0, "next_moves": 1.0}
    assert [r["non_finite_step_changes"] for r in ranks] == [dict.fromkeys(KINDS, expected)] * 2


def test_swapped_weights_are_used_and_given_back(ranks: Results) -> None:
    for found in (found for r in ranks for found in r["swapped_weights"].values()):
        assert found["off"] < 1e-5
        assert found["differs"] > 1e-3
        assert found["given_back"] == found["weights_given_back"] == 0.0


def test_save_and_load_is_bit_exact(ranks: Results) -> None:
    for found in (found for r in ranks for found in r["save_and_load"].values()):
        assert found.pop("differed") > 1e-3
        assert found == {"same": 0.0, "extra": 0.0, "totals": 3.0, "next": 0.0}


def test_weights_of_fsdp2_start_a_run(ranks: Results) -> None:
    for before, after in (found for r in ranks for found in r["weights_of_fsdp2"].values()):
        assert before > 1e-3
        assert after == 0.0


def test_the_checks_can_fail(ranks: Results) -> None:
    """A group's lr changed after preparation, a schedule's factor changed, the clipping norm left to accelerate."""
    for r in ranks:
        assert r["planted_faults"]["lr"] > 0
        assert r["planted_faults"]["lr_scale"] > 0
        assert "clipping norm" in r["planted_faults"]["clipping"]


# ------------------------------------------------------------------------------------------------- runs, conversion

STEPS = 8
SETTINGS = (
    "parallel.precision=fp32", f"train.steps={STEPS}", "train.checkpoint_every=3", "train.log_every=1",
    f"train.validate_every={STEPS}", "train.sample_every=0", "train.micro_batch_size=0.03125",
)  # fmt: skip
ZERO2, ZERO3 = (("parallel.engine=zero", f"parallel.zero_stage={stage}") for stage in (2, 3))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run of stage 2 and its logged lines."""
    folder = tmp_path_factory.mktemp("zero") / "zero2"
    return folder, train(2, folder, *SETTINGS, *ZERO2)


def test_killed_at_random_it_resumes_bit_exactly(run_folder: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Both processes by SIGKILL, after the first checkpoint; what is read is what DeepSpeed has written."""
    seed = int(os.environ.get("KILL_SEED", random.randrange(1 << 20)))
    print(f"KILL_SEED={seed}")
    chance, folder = random.Random(seed), tmp_path / "a"
    killed_at = train_and_kill(
        2, folder, chance.randint(4, 6), chance.uniform(0, 0.1), *SETTINGS, *ZERO2, after_save=True
    )
    resumed_from = [path.name for path in complete_checkpoints(folder / "checkpoints")]
    assert resumed_from, f"killed at {killed_at}, seed {seed}"
    assert exact(train(2, folder, *SETTINGS, *ZERO2)) == exact(run_folder[1]), f"{killed_at} {resumed_from} {seed}"


def test_converted_runs_go_on(run_folder: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """zero 2 -> fsdp2 -> zero 3, from the middle of a run, which ends as it would have without."""
    folder, records = run_folder
    middle = Path("checkpoints") / "step_00000003"
    converted(folder / middle, tmp_path / "b", "--engine", "fsdp2")
    assert_close(train(2, tmp_path / "b", *SETTINGS), records, 1e-5)
    converted(tmp_path / "b" / middle, tmp_path / "c", "--engine", "zero", "--zero-stage", "3")
    assert_close(train(2, tmp_path / "c", *SETTINGS, *ZERO3), records, 1e-5)
    average = weights(tmp_path / "b", "ema_0.99")
    assert average.keys() == weights(tmp_path / "b").keys()


def converted(checkpoint: Path, output: Path, *arguments: str) -> None:
    done = started(2, "launch/convert.py", "--checkpoint", str(checkpoint), "--output", str(output), *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
