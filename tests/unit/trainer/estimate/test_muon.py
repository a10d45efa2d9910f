"""What the estimate says of Muon, against the parts that do the work."""

import math

import pytest
import torch

from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.estimate.cluster import CARDS, Cluster
from trainer.estimate.muon import exchanges, matrices_of, polar_flops, polar_seconds, state_numbers
from trainer.estimate.simulation import profile
from trainer.estimate.step_time import Work, step_time
from trainer.parallel.owners import Owners, Ranks, Stacked

SMALL = ("data.shards=synthetic", "text_encoder.path=none", "train.global_batch_size=16")


def configured(kind: str, *more: str, name: str = "mmdit_debug_mup.yaml") -> TrainConfig:
    return load_config(name, [*SMALL, f"optim.kind={kind}", *more])


def test_one_moment_for_what_muon_moves() -> None:
    table = build_mup_table(configured("muon"))
    sizes = {name: math.prod(row.shape) for name, row in table.rows.items()}
    moved = sum(size for name, size in sizes.items() if table.rows[name].optimizer == "muon")
    assert sum(each.numbers for each in matrices_of(table)) == moved > sum(sizes.values()) / 3
    assert state_numbers(table) == 2 * sum(sizes.values()) - moved
    assert state_numbers(build_mup_table(configured("adamw"))) == 2 * sum(sizes.values())
    assert matrices_of(build_mup_table(configured("adamw"))) == []


@pytest.mark.slow
def test_the_engine_holds_as_much() -> None:
    """The simulated engine, on 4 ranks: its state, and no polar factor among the FLOPs of a pass."""
    adamw, muon = (profile(configured(kind, "parallel.precision=bf16"), 4) for kind in ("adamw", "muon"))
    numbers = [state_numbers(build_mup_table(configured(kind))) for kind in ("adamw", "muon")]
    assert adamw.optimizer - muon.optimizer == pytest.approx(4 * (numbers[0] - numbers[1]) / 4, rel=0.02)
    assert muon.steps[0].flops == adamw.steps[0].flops


def test_exchanges_are_those_of_the_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all ranks together, what comes from another one; the mean of a rank is what the estimate says."""
    table = build_mup_table(configured("muon"))
    rows = {name: row for name, row in table.rows.items() if row.optimizer == "muon"}
    parameters = {name: Stacked(row.shape[0], row.shape[1], row.matrices) for name, row in rows.items()}
    for shards, copies in ((4, 1), (2, 2)):
        places = iter([(shards, 0), (copies, 0)])
        monkeypatch.setattr("trainer.parallel.owners._place", lambda group, places=places: next(places))
        owners = Owners(parameters, Ranks(), lambda r, c: r * c, torch.device("cpu"), torch.bfloat16)
        received = sum(
            sum(matrix.elements) - matrix.elements[owner]
            for bucket in owners._buckets
            for of_copy in bucket.owned
            for owner, owned in enumerate(of_copy)
            for matrix in owned
        )
        told = exchanges(matrices_of(table), Cluster(4), shards)
        assert told["all_to_all"].bytes == pytest.approx(2 * 2 * received / 4, rel=0.1)  # q, k, v lie across shards
        assert ("broadcast" in told) == (copies > 1)


@pytest.mark.slow
def test_a_step_is_longer_by_the_polar_factors_and_their_way() -> None:
    cluster = Cluster(32)
    muon, adamw = (
        configured(kind, "train.global_batch_size=1024", name="mmdit_2b_mup.yaml") for kind in ("muon", "adamw")
    )
    work = Work(muon)
    flops, card = polar_flops(work.muon, 5), CARDS["h100"]
    least = flops / 32 / (card.peak_tflops * 1e12)
    assert least < polar_seconds(work.muon, 5, 32, card) < 3 * least
    ours, theirs = step_time(muon, cluster, work), step_time(adamw, cluster, Work(adamw))
    assert theirs.step_s + least < ours.step_s < 1.1 * theirs.step_s
    assert "all_to_all" in ours.network.collectives
    assert "all_to_all" not in theirs.network.collectives


def test_more_gpus_than_matrices_help_no_further() -> None:
    work = Work(configured("muon"))
    few, many, more = (polar_seconds(work.muon, 5, gpus, CARDS["h100"]) for gpus in (1, 1000, 10_000))
    assert few > many == more
