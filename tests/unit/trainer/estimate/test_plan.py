"""Plans fit, are ordered by time, and do what the estimate of their overrides says."""

import dataclasses
import json
import sys
from typing import Any

import pytest

from launch import estimate as command
from launch import submit
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.estimate.cluster import CARDS, GIB, Cluster
from trainer.estimate.memory import Memory
from trainer.estimate.plan import Plan, Planner, describe_plans, faster_plan
from trainer.estimate.report import estimate

NOTHING: tuple[Any, Any] = (None, None)  # a profile and a table that are not read
SMALL = ("model.depth=2", "objective.repa_weight=0")  # beside the 9.2 GiB of T5-XXL and of the autoencoder


def cluster(memory_gib: float, gpus: int = 8) -> Cluster:
    """Of two nodes; memory_gib of each GPU is for tensors."""
    card = dataclasses.replace(CARDS["h100"], memory_gb=(memory_gib + 3) * GIB / 1e9)
    return Cluster(gpus, card, gpus_per_node=4)


@pytest.mark.slow
def test_plans_fit_and_are_what_the_estimate_says() -> None:
    config, tight = load_config("mmdit_0.18b_mup.yaml", SMALL), cluster(11)
    plans = Planner(config, tight).best()
    assert len(plans) == 5 + all(plan.precomputed for plan in plans[:5])
    assert any(not plan.precomputed for plan in plans)
    seconds = [plan.step.step_s for plan in plans[:5]]
    assert seconds == sorted(seconds)
    assert all(plan.memory <= tight.usable for plan in plans)
    for plan in plans[:2]:
        found = estimate(load_config("mmdit_0.18b_mup.yaml", [*SMALL, *plan.overrides]), tight)
        key, time = ("memory_cached_gib", "time_cached") if plan.precomputed else ("memory_gib", "time")
        assert found[time]["step_s"] == pytest.approx(plan.step.step_s)
        assert found[key]["total"] == pytest.approx(plan.memory / GIB, rel=0.05)
        assert (found["micro_batch"], found["micro_batches"]) == tuple(
            plan.data(tight)[each] for each in ("micro_batch", "micro_batches")
        )
    text = describe_plans(plans, tight)
    assert "MODEL" in text
    assert all(" ".join(plan.overrides) in text for plan in plans)


@pytest.mark.slow
def test_recomputation_is_only_for_what_does_not_fit_without() -> None:
    config = load_config("mmdit_0.18b_mup.yaml", SMALL)
    wide, tight = ({p.config.parallel.activation_checkpointing for p in planned(config, gib)} for gib in (80, 2))
    assert wide == {"none"}
    assert tight > {"none"}


def planned(config: TrainConfig, memory_gib: float) -> list[Plan]:
    return Planner(config, cluster(memory_gib)).best(most=100)


@pytest.mark.slow
def test_where_nothing_fits_it_says_what_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["estimate.py", "--config", "mmdit_0.18b_mup", "--gpus", "2", "--plan", *SMALL]
    monkeypatch.setattr(sys, "argv", [*arguments, "--gpu-memory-gb", "3.37"])
    assert command.main() == 1
    assert "Nothing fits" in (said := capsys.readouterr().out)
    assert "GPUs would do" in said
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    assert command.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert {"overrides", "step_s", "memory_gib", "dollars", "why"} <= found[0].keys()


def test_only_fsdp2_is_planned() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.engine fsdp2 alone, got zero"):
        Planner(load_config("mmdit_debug_mup.yaml", ["parallel.engine=zero"]), cluster(1))


@pytest.mark.slow
def test_a_slow_config_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One sample at a time under full recomputation, of 0.18 B on 8 GPUs; the best plan itself is not warned of."""
    slow = ("parallel.activation_checkpointing=full", "train.micro_batch_size=1", "model.depth=10")
    config = load_config("mmdit_0.18b_mup.yaml", slow)
    found = faster_plan(config, Cluster(8))
    assert found is not None
    plan, ratio = found
    assert ratio > 1.3
    assert faster_plan(plan.config, Cluster(8)) is None
    submit.warn_of_slowness(config, Cluster(8))
    assert " ".join(plan.overrides) in capsys.readouterr().err
    monkeypatch.setattr("trainer.estimate.plan.faster_plan", lambda *_: pytest.fail("a tiny model was looked into"))
    submit.warn_of_slowness(load_config("mmdit_debug_mup.yaml"), Cluster(8))


class OneMiBARow(Memory):
    """A memory that grows by a MiB a row."""

    def total(self, shard: int, rows: int, accumulates: bool) -> int:
        return rows * 2**20


@pytest.mark.slow
def test_overrides_say_the_rows_of_small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """train.micro_batch_size counts images of 256 px, of 32 px it holds 64 times as many: 49 fit of a share of 100, so
    that 34 are taken three times."""
    monkeypatch.setattr(Planner, "_memory", lambda *_: OneMiBARow(*NOTHING))
    arguments = ("mmdit_debug_mup.yaml", ["train.global_batch_size=800", "text_encoder.path=none"])
    plans = planned(load_config(*arguments), 49 / 1024)
    assert len(plans) == 4 * 3  # shard groups of 1, 2, 4 and 8; each kind of recomputation, since none takes all
    for plan in plans:
        assert (plan.data(cluster(1))["micro_batch"], plan.data(cluster(1))["micro_batches"]) == (34, 3)
        pasted = load_config(arguments[0], [*arguments[1], *plan.overrides])
        assert resolve(pasted, 8).micro_batch_rows == 34


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpus"), [("mmdit_2b_mup", 8), ("mmdit_18b_mup", 256)])
def test_the_shipped_configs_follow_the_plan(name: str, gpus: int) -> None:
    """Of shard and recomputation; the micro-batch is that of auto, which fits as the plan's does."""
    config = load_config(name)
    parallel = Planner(config, Cluster(gpus)).best(most=1)[0].config.parallel
    assert parallel.shard == (config.parallel.shard or gpus)
    assert parallel.activation_checkpointing == config.parallel.activation_checkpointing
    assert config.train.micro_batch_size is None
