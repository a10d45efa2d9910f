"""Live health: figures by hand, and what a real run logs."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.runs import train
from trainer.loop import forward_backward, train_step
from trainer.monitor.mup_health import BINS, Health, WatchedParameter, time_figures, time_sums
from trainer.monitor.tracking.tracker import shown_name
from trainer.parallel.engine import StepResult
from trainer.run import Intervals
from trainer.state import Totals, TrainState
from trainer.step import Encoded, MicroBatch

pytestmark = pytest.mark.usefixtures("world")


def test_figures_by_role() -> None:
    settings = {
        "a": WatchedParameter("hidden", 1e-3),
        "b": WatchedParameter("hidden", 1e-6),
        "c": WatchedParameter("vector", 1e-3),
        "d": WatchedParameter("vector", 0.0),  # of Muon, which has no epsilon: its gradient is not counted
    }
    weights = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2), "c": torch.tensor([2.0])}
    gradients = {"a": torch.tensor([0.0099, -0.0101]), "b": torch.tensor([-0.009, 0.0]), "d": torch.zeros(3)}
    health = Health(settings, replicas=1)
    health.before(weights, gradients)
    weights["a"] += torch.tensor([0.3, -0.4])
    weights["b"] += 1.0
    health.after(weights)
    figures = health.figures()
    squared = 3.3**2 + 3.6**2 + 2
    assert figures == {
        "mup/hidden/update_to_weight": pytest.approx(((0.5**2 + 2) / squared) ** 0.5),
        "mup/hidden/weight_norm": pytest.approx(squared**0.5),
        # 0.0099 is under ten epsilons of a, and 0 of b; -0.009 is far over those of b.
        "mup/hidden/tiny_gradient_share": 0.5,
        "mup/vector/update_to_weight": 0.0,
        "mup/vector/weight_norm": 2.0,
    }
    assert health.figures() == {}, "read twice"


def test_a_role_of_zeros_has_no_ratio() -> None:
    health = Health({"a": WatchedParameter("fixed", 1e-3)}, replicas=1)
    health.before({"a": torch.zeros(2)}, {"a": torch.ones(2)})
    health.after({"a": torch.zeros(2)})
    assert health.figures() == {"mup/fixed/weight_norm": 0.0, "mup/fixed/tiny_gradient_share": 0.0}


def test_replicas_are_counted_once() -> None:
    """Two ranks with the same shard: the sum over ranks holds it twice (here: one rank, told that it is half)."""
    health = Health({"a": WatchedParameter("input", 1.0)}, replicas=2)
    health.before({"a": torch.tensor([2.0])}, {"a": torch.ones(1)})
    health.after({"a": torch.tensor([4.0])})
    found = health.figures()
    assert found["mup/input/weight_norm"] == pytest.approx(8**0.5)
    assert found["mup/input/update_to_weight"] == 0.5
    assert found["mup/input/tiny_gradient_share"] == 1.0


def test_loss_by_time() -> None:
    t = torch.tensor([0.0, 0.01, 0.5, 0.9999, 1.0])
    sums = time_sums(t, torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    assert sums.shape == (2, BINS)
    assert time_figures(sums.flatten().tolist()) == {"mup/loss_t0.0625": 2.0, "mup/loss_t0.9375": 8.0}


def test_trackers_keep_the_prefix() -> None:
    assert shown_name("mup/hidden/weight_norm") == "mup/hidden/weight_norm"


def test_a_run_logs_its_health(tmp_path: Path) -> None:
    records = train(
        1, tmp_path / "run", "train.steps=6", "train.log_every=2", "train.validate_every=0", "train.sample_every=0",
        "train.checkpoint_every=0", "optim.clip_norm=0.3", "optim.eps=1e-5", "data.shards=synthetic",
        "optim.warmup_steps=0", "optim.schedule=constant", "train.global_batch_size=64",
    )  # fmt: skip
    for record in (record for record in records if record["step"]):
        by_time = [value for key, value in record.items() if key.startswith("mup/loss_t")]
        assert len(by_time) > BINS // 2
        assert min(by_time) <= record["loss"] <= max(by_time)
        assert 0 <= record["mup/clip_share"] <= 1
        for role in ("input", "hidden", "output", "vector", "fixed"):
            assert record[f"mup/{role}/weight_norm"] > 0
    last = records[-1]
    assert 0 < last["mup/hidden/update_to_weight"] < 0.2
    # Beside so large an epsilon most gradients of the blocks vanish, those of the output do not.
    assert last["mup/hidden/tiny_gradient_share"] > 0.5
    assert last["mup/output/tiny_gradient_share"] < 0.5


def test_only_a_logged_step_is_watched() -> None:
    """Any other would pay for the copy of the weights."""
    seen: list[bool] = []

    def step(lr: float, watch: object, max_norm: None) -> StepResult:
        seen.append(watch is not None)
        return StepResult(*torch.zeros(3))

    b = torch.zeros(2)
    engine: Any = SimpleNamespace(model=lambda *_, **__: (b, None), backward=lambda *_, **__: None, step=step)
    objective: Any = SimpleNamespace(draw=lambda *_: SimpleNamespace(x_t=b, t=b), loss=lambda *_: b + 1)
    run = SimpleNamespace(
        state=TrainState.start(torch.device("cpu")),
        world=SimpleNamespace(size=1, device=torch.device("cpu")),
        plan=SimpleNamespace(global_batch_size=2, every=Intervals(log=3)),
        last_step=7,
        engine=engine,
        passes=partial(forward_backward, engine, objective, None, 0.5),
        alignment_at=lambda step: None,
        health=Health({}, replicas=1),
        timer=SimpleNamespace(),
        lr=lambda _: 1.0,
        ema=SimpleNamespace(update=lambda *_: None),
    )
    encoded = Encoded(x0=b, condition=None, keys=b, weight=b + 1, text_tokens=b.sum())
    for _ in range(7):
        micro_batch = MicroBatch(SimpleNamespace(read=2, holes=[]), lambda: encoded)
        train_step(run, [micro_batch])  # pyright: ignore[reportArgumentType]
    assert seen == [False, False, True, False, False, True, True]
    assert time_figures(Totals.unpacked(run.state.totals).by_time.tolist()) == {"mup/loss_t0.0625": 1.0}
