"""One step of all optimizers, tensor by tensor: lr, scale, parts and decay of Muon's, and planted faults."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainer.mup.apply import param_groups
from trainer.mup.rules import Optimizer, Settings, WeightDecayRule
from trainer.mup.table import BaseRates, MuTable, ParameterRow
from trainer.parallel.muon import MuonSettings
from trainer.parallel.owners import Ranks
from trainer.parallel.polar import polar_factor
from trainer.parallel.update import Update, squared_norms, total_norm

from .cases import CASES, Case
from .checks import scale_of, values
from .test_muon import EXPECTED, QKV

every_kind = pytest.mark.parametrize("kind", CASES)
MUON = Settings(optimizer="muon")
LR, MUON_LR, DECAY = 1e-3, 4e-3, 0.1
M = 4.0


def stepped(case: Case, table: MuTable, decay: float, zero: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({name: gradient}, {name: change}) of the first step, as an engine takes it. zero: gradients of zeros."""
    model = case.model(M, table)
    case.randomise_zeros(model)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    base: dict[Optimizer, BaseRates] = {
        "adamw": BaseRates(LR, decay, 1e-16),
        "muon": BaseRates(MUON_LR, decay, 0.0),
    }
    update = Update(
        named, lambda shards: param_groups(shards.items(), table, base), (0.9, 0.95), None,
        MuonSettings(0.95, True, 5), Ranks(), torch.device("cpu"), torch.float64,
    )  # fmt: skip
    case.loss(model).backward()
    gradients = {name: p.grad * (not zero) for name, p in model.named_parameters() if p.grad is not None}
    before, kept = values(model), {name: gradient.clone() for name, gradient in gradients.items()}
    update.step(gradients, total_norm(squared_norms(gradients)), LR, None, None)
    return kept, {name: p.detach() - before[name] for name, p in model.named_parameters()}


def wrong_steps(kind: str, table: MuTable) -> set[str]:
    """Parameters whose change is not, for Muon's, lr x scale x the polar factor of each part of the gradient, and for
    AdamW's lr x the expected factor: Muon's parts and scales are those written down by hand."""
    case, wrong = CASES[kind], set()
    gradients, changes = stepped(case, table, decay=0.0, zero=False)
    for name, change in changes.items():
        gradient = gradients[name]
        if own := EXPECTED[kind].get(name):
            parts = gradient.unflatten(0, (own.matrices, -1))
            assert parts.abs().amax((1, 2)).min() > 0, "each part has a gradient"
            expected = -MUON_LR * own.scale * polar_factor(parts, 5).flatten(0, 1)
            good = (change - expected).norm() < 1e-6 * expected.norm()
        else:
            moved = change.abs()[gradient != 0].median().item()
            good = abs(moved / (LR * scale_of(case, M, name).lr) - 1) < 2e-3
        if not good:
            wrong.add(name)
    return wrong


def wrong_decays(kind: str, table: MuTable, share: float) -> set[str]:
    """Weights of Muon that a step without gradient does not shrink by this share of its lr x weight decay."""
    case = CASES[kind]
    _, changes = stepped(case, table, DECAY, zero=True)
    model = case.model(M, table)
    case.randomise_zeros(model)
    start = values(model)
    return {
        name
        for name in EXPECTED[kind]
        if not torch.allclose(changes[name], -share * MUON_LR * DECAY * start[name], rtol=1e-9, atol=1e-12)
    }


@pytest.mark.slow
@every_kind
def test_first_step_is_the_tables(kind: str) -> None:
    assert wrong_steps(kind, CASES[kind].table(M, MUON)) == set()


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize(("rule", "share"), [("independent", 1.0), ("sqrt", 0.5), ("coupled", 0.25)])
def test_decay_alone(kind: str, rule: WeightDecayRule, share: float) -> None:
    assert wrong_decays(kind, CASES[kind].table(M, replace(MUON, wd_rule=rule)), share) == set()


def planted(kind: str, fault: Callable[[ParameterRow], ParameterRow]) -> MuTable:
    table = CASES[kind].table(M, MUON)
    return replace(table, rows={n: fault(r) if r.optimizer == "muon" else r for n, r in table.rows.items()})


@every_kind
@pytest.mark.slow
def test_faults_are_found_where_they_are(kind: str) -> None:
    every = set(EXPECTED[kind])
    fused = {name for name, own in EXPECTED[kind].items() if own.matrices > 1}
    wide, tall = ({name for name in every if name.endswith(f"mlp.{layer}.weight")} for layer in ("fc2", "fc1"))
    assert any(own == QKV for own in EXPECTED[kind].values())
    assert wrong_steps(kind, planted(kind, lambda r: replace(r, lr=1 / M))) == every
    assert wrong_steps(kind, planted(kind, lambda r: replace(r, scale=1.0))) == wide | tall
    assert wrong_steps(kind, planted(kind, lambda r: replace(r, scale=max(1.0, r.scale)))) == wide, "as torch has it"
    as_one = planted(kind, lambda r: replace(r, matrices=1, scale=(r.shape[0] / r.shape[1]) ** 0.5))
    assert wrong_steps(kind, as_one) == fused
    assert wrong_decays(kind, planted(kind, lambda r: replace(r, weight_decay=M)), 1.0) == every
