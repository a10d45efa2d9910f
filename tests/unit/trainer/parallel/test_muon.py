"""Muon on one process: beside torch.optim.Muon where the definitions agree, and what differs on purpose."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from trainer.parallel.muon import Muon, MuonSettings
from trainer.parallel.owners import Ranks
from trainer.parallel.polar import polar_factor

CPU = torch.device("cpu")
LR, DECAY = 0.02, 0.1


def group(weight: Tensor, scale: float = 1.0, matrices: int = 1) -> dict[str, Any]:
    return {
        "optimizer": "muon", "params": [weight], "param_names": ["w"], "lr": LR, "lr_scale": 1.0,
        "weight_decay": DECAY, "eps": 0.0, "scale": scale, "matrices": [matrices], "shapes": [tuple(weight.shape)],
    }  # fmt: skip


def gradients(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(count)]


def moved(muon: Muon, weight: Tensor, steps: list[Tensor], skipped: float = 0.0) -> Tensor:
    for gradient in steps:
        muon.step({"w": gradient.clone()}, torch.tensor(skipped))
    return weight


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 64), (48, 48)])
def test_as_torch_has_it(shape: tuple[int, int], nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon scales by sqrt(max(1, rows / columns)), which is 1 for these shapes, and always iterates in
    bf16: the polar factor is given to both, so that the rest is compared to rounding."""

    def polar(matrix: Tensor, *_: Any) -> Tensor:
        return polar_factor(matrix[None], 5)[0]

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", polar)
    start, steps = torch.randn(shape, generator=torch.Generator().manual_seed(0)), gradients(4, *shape)
    ours = start.clone()
    moved(Muon([group(ours)], MuonSettings(0.95, nesterov, 5), Ranks(), CPU, torch.float32), ours, steps)
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([theirs], LR, DECAY, momentum=0.95, nesterov=nesterov)
    for gradient in steps:
        theirs.grad = gradient.clone()
        optimizer.step()
    assert (ours - theirs).abs().max() < 1e-5 < 1e-2 < (ours - start).abs().max()


def test_the_iteration_is_torchs_in_bf16() -> None:
    matrix = gradients(1, 40, 64)[0]
    theirs = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    ours = polar_factor(matrix.bfloat16()[None], 5)[0]
    assert (ours.float() - theirs.float()).abs().max() < 0.02
    assert (polar_factor(matrix.bfloat16()[None], 4)[0].float() - theirs.float()).abs().max() > 0.05


def test_matrices_behind_each_other_are_made_orthogonal_each_on_its_own() -> None:
    """q, k and v: the one with the largest gradient does not take the others' share of the step."""
    q, k, v = (size * gradient for size, gradient in zip((1e3, 1.0, 1e-3), gradients(3, 16, 16), strict=True))
    gradient, plain = torch.cat([q, k, v]), MuonSettings(0.0, False, 5)
    fused = torch.zeros(48, 16)
    moved(Muon([group(fused, matrices=3)], plain, Ranks(), CPU, torch.float32), fused, [gradient])
    for part, own in zip(fused.chunk(3), (q, k, v), strict=True):
        alone = torch.zeros(16, 16)
        moved(Muon([group(alone)], plain, Ranks(), CPU, torch.float32), alone, [own])
        assert torch.allclose(part, alone, atol=1e-6)
        assert part.norm() > 0.7 * LR * 4
    whole = torch.zeros(48, 16)
    moved(Muon([group(whole)], plain, Ranks(), CPU, torch.float32), whole, [gradient])
    assert (whole - fused).norm() > 0.5 * fused.norm()


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_step_is_lr_times_scale_and_decays_by_lr_times_decay(scale: float) -> None:
    start = torch.randn(8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, gradient = start.clone(), gradients(1, 8, 32, dtype=torch.float64)[0]
    moved(Muon([group(weight, scale)], MuonSettings(0.95, True, 5), Ranks(), CPU, torch.float64), weight, [gradient])
    expected = (1 - LR * DECAY) * start - LR * scale * polar_factor(gradient[None], 5)[0]
    assert (weight - expected).abs().max() < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_a_skipped_step_changes_nothing(bad: float) -> None:
    steps = gradients(3, 8, 8)
    weight, never = torch.zeros(8, 8), torch.zeros(8, 8)
    muon, other = (Muon([group(w)], MuonSettings(0.95, True, 5), Ranks(), CPU, torch.float32) for w in (weight, never))
    moved(muon, weight, steps[:1])
    kept, momentum = weight.clone(), muon.momenta["w"].clone()
    moved(muon, weight, [torch.full((8, 8), bad)], skipped=1.0)
    assert torch.equal(weight, kept)
    assert torch.equal(muon.momenta["w"], momentum)
    moved(muon, weight, steps[1:])
    assert torch.equal(weight, moved(other, never, steps))
