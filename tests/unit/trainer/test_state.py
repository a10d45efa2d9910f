"""What is summed up between two log lines: by name, and in the order in which checkpoints hold it."""

import pytest
import torch

from trainer.monitor.mup_health import BINS
from trainer.parallel.engine import StepResult
from trainer.state import StepSums, Totals, TrainState
from trainer.step import Encoded, MicroBatchLosses

CPU = torch.device("cpu")


def result(norm: float, skipped: bool, clipped: bool = False) -> StepResult:
    return StepResult(torch.tensor(norm), torch.tensor(float(skipped)), torch.tensor(float(clipped)))


def sums(loss: float = 6.0, weight: float = 4.0) -> torch.Tensor:
    scalars = (torch.tensor(number) for number in (loss, 2.0, 20.0, weight))
    names = ("loss", "repa_loss", "text_tokens", "weight")
    return StepSums(torch.arange(2.0 * BINS), **dict(zip(names, scalars, strict=True))).packed()


def test_totals_are_packed_as_checkpoints_hold_them() -> None:
    packed = torch.arange(8.0 + 2 * BINS, dtype=torch.float64)
    totals = Totals.unpacked(packed)
    names = ("loss", "repa_loss", "grad_norm", "text_tokens", "clipped", "counted", "skipped", "spikes")
    assert [float(getattr(totals, name)) for name in names] == list(range(8))
    assert torch.equal(totals.by_time, packed[8:])
    assert torch.equal(totals.packed(), packed)
    assert Totals.zeros(CPU).shape == packed.shape


def test_sums_of_a_micro_batch_leave_out_rows_of_weight_0() -> None:
    weight = torch.tensor([1.0, 0.0])
    per_sample = torch.tensor([3.0, 5.0], requires_grad=True)
    loss = (weight * per_sample).sum()
    draw = type("Draw", (), {"t": torch.tensor([0.0, 0.99])})
    losses = MicroBatchLosses(loss, torch.tensor(0.5), loss, draw, per_sample)
    encoded = Encoded(per_sample, None, per_sample, weight, text_tokens=torch.tensor(7))
    found = StepSums.of_micro_batch(losses, encoded)
    packed = found.packed()
    assert not packed.requires_grad
    assert packed.tolist() == [3.0, 0.5, 7.0, 1.0, 3.0, *[0.0] * (BINS - 1), 1.0, *[0.0] * (BINS - 1)]


def test_a_step_that_is_taken_counts_by_its_means() -> None:
    state = TrainState.start(CPU)
    state.add_step(sums(), result(0.25, skipped=False, clipped=True))
    state.add_step(sums(loss=2.0), result(0.5, skipped=False))
    totals = Totals.unpacked(state.totals)
    assert (float(totals.loss), float(totals.repa_loss), float(totals.text_tokens)) == (2.0, 1.0, 10.0)
    assert (float(totals.grad_norm), float(totals.clipped), float(totals.counted)) == (0.75, 1.0, 2.0)
    assert (float(totals.skipped), float(totals.spikes)) == (0.0, 0.0)
    assert totals.by_time.tolist() == [2.0 * number for number in range(2 * BINS)]


@pytest.mark.parametrize(("norm", "name"), [(float("nan"), "skipped"), (float("inf"), "skipped"), (100.0, "spikes")])
def test_a_step_that_is_skipped_counts_as_that_alone(norm: float, name: str) -> None:
    state = TrainState.start(CPU)
    state.add_step(sums(loss=float("nan")), result(norm, skipped=True))
    totals = Totals.unpacked(state.totals)
    assert float(getattr(totals, name)) == 1.0
    assert float(state.totals.sum()) == 1.0, "no figure holds a NaN"


def test_a_step_of_holes_alone_has_no_loss() -> None:
    state = TrainState.start(CPU)
    state.add_step(sums(loss=0.0, weight=0.0), result(0.0, skipped=False))
    assert float(Totals.unpacked(state.totals).loss) == 0.0
