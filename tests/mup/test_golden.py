"""T1-T3: muP at the base width is SP; microsoft/mup trains the same weights; so does the absorbed form."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from mup import MuAdamW, MuReadout, set_base_shapes
from torch import nn

from trainer.mup.rules import Settings
from trainer.mup.table import MuTable, ParameterRow

from .cases import BASE_WIDTH, CASES, HEAD_DIM, Case
from .checks import LR, WEIGHT_DECAY, adamw, largest_difference, train

pytestmark = pytest.mark.slow  # seconds each: `make test T=tests/mup/test_golden.py`

STEPS = 10
EPS = 1e-8  # large enough to matter, so that a wrong epsilon shows

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def changed(table: MuTable, change: Callable[[str, ParameterRow], ParameterRow]) -> MuTable:
    return replace(table, rows={name: change(name, row) for name, row in table.rows.items()})


TUNED: dict[str, Any] = {"output_multiplier": 3.0, "role_lr": {"hidden": 2.0, "vector": 0.5}}  # base hyperparameters


@every_case
def test_base_width_trains_bit_for_bit_as_sp_with_the_same_multipliers(case: Case) -> None:
    plain, *tables = (case.table(1.0, s) for s in (Settings(), Settings("mup", **TUNED), Settings("sp", **TUNED)))
    losses = []
    for table in (plain, *tables):
        model = case.model(1.0, table, torch.float32)
        case.randomise_zeros(model)
        losses.append(train(case, model, adamw(model, table, WEIGHT_DECAY, EPS), 4))
    assert losses[1] == losses[2]
    assert losses[0] != losses[1]


@every_case
def test_base_width_trains_bit_for_bit_as_sp(case: Case) -> None:
    tables = [case.table(1.0, Settings(parametrization=p)) for p in ("mup", "sp")]  # type: ignore[arg-type]
    losses = []
    for table in tables:
        model = case.model(1.0, table, torch.float32)
        losses.append(train(case, model, adamw(model, table, WEIGHT_DECAY, EPS), 4))
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4
    # Beside it the same without a table: plain groups with and without decay.
    model = case.model(1.0, tables[1], torch.float32)
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if case.snapshot[name].decays == decays],
            "weight_decay": WEIGHT_DECAY * decays,
        }
        for decays in (True, False)
    ]
    assert train(case, model, torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPS), 4) == losses[0]


def mup_twin(case: Case, width: int) -> nn.Module:
    """The same model as microsoft/mup wants it: its readout, shapes on the parameters."""
    model = case.build(width / BASE_WIDTH)
    model.final = MuReadout(width, model.get_parameter("final.bias").numel()).double()
    return model


def difference_to_mup(case: Case, m: float, table: MuTable, steps: int = STEPS) -> tuple[float, float, nn.Module]:
    """(largest difference of parameters after training, largest change in training, mup's model)."""
    ours = case.model(m, table)
    case.randomise_zeros(ours)
    twin, start = mup_twin(case, round(m * BASE_WIDTH)), case.model(m, table)
    base, delta = mup_twin(case, BASE_WIDTH), mup_twin(case, BASE_WIDTH + HEAD_DIM)
    set_base_shapes(twin, base, delta=delta, rescale_params=False)
    twin.load_state_dict(ours.state_dict())
    start.load_state_dict(ours.state_dict())
    train(case, ours, adamw(ours, table, WEIGHT_DECAY, EPS), steps)
    golden = MuAdamW(twin.parameters(), lr=LR, betas=(0.9, 0.95), eps=EPS, weight_decay=WEIGHT_DECAY)
    train(case, twin, golden, steps)
    return largest_difference(ours, twin), largest_difference(ours, start), twin


@every_case
@pytest.mark.parametrize("m", [0.5, 2.5])
def test_golden_against_microsoft_mup(case: Case, m: float) -> None:
    # mup decays every parameter that it is given.
    difference, moved, twin = difference_to_mup(case, m, case.table(m, Settings(decay="all")))
    assert difference <= 1e-9
    assert moved > LR
    matrices = {name for name, p in twin.named_parameters() if p.infshape.ninf() == 2}  # type: ignore[attr-defined]
    assert matrices == case.names_of("hidden")


@every_case
@pytest.mark.parametrize(
    "fault",
    [
        lambda name, row: replace(row, lr=1.0) if row.role == "hidden" else row,
        lambda name, row: replace(row, weight_decay=1.0) if row.role == "hidden" else row,
        lambda name, row: replace(row, multiplier=1.0),
        lambda name, row: replace(row, lr=0.4) if name == "final.weight" else row,
        lambda name, row: replace(row, eps=0.4) if row.role == "vector" else row,
    ],
    ids=["hidden lr", "hidden wd", "no multiplier", "double output rule", "eps"],
)
def test_golden_sees_a_fault(case: Case, fault: Callable[[str, ParameterRow], ParameterRow]) -> None:
    difference, _, _ = difference_to_mup(case, 2.5, changed(case.table(2.5, Settings(decay="all")), fault), steps=3)
    assert difference > 1e-7


def absorbed(table: MuTable, theta: float) -> MuTable:
    """The multiplier 1 / theta moved into the weight: lr / theta, wd theta, eps theta (abc-symmetry)."""

    def change(name: str, row: ParameterRow) -> ParameterRow:
        if row.role != "output":
            return row
        return replace(
            row, multiplier=1.0, lr=row.lr / theta, weight_decay=row.weight_decay * theta, eps=row.eps * theta
        )  # fmt: skip

    return changed(table, change)


def difference_to_absorbed(
    case: Case,
    m: float,
    clip: float | None = None,
    clip_weights: dict[str, float] | None = None,
    eps: float = EPS,
    settings: Settings | None = None,
) -> float:
    """Largest difference of parameters after training in both forms, final.weight x theta in the absorbed one."""
    table = case.table(m, settings)
    theta = m / table.settings.output_multiplier
    other = absorbed(table, theta)
    ours, twin = case.model(m, table), case.model(m, other)
    case.randomise_zeros(ours)
    twin.load_state_dict(ours.state_dict())
    twin.get_parameter("final.weight").data /= theta
    train(case, ours, adamw(ours, table, WEIGHT_DECAY, eps), STEPS, clip)
    train(case, twin, adamw(twin, other, WEIGHT_DECAY, eps), STEPS, clip, clip_weights)
    return largest_difference(ours, twin, {"final.weight": theta})


@every_case
def test_absorbed_form_is_exact_for_a_power_of_two(case: Case) -> None:
    assert difference_to_absorbed(case, 4.0) == 0.0


@every_case
def test_absorbed_form_is_equal_for_any_ratio(case: Case) -> None:
    assert difference_to_absorbed(case, 2.5) <= 1e-9


@every_case
@pytest.mark.parametrize(("m", "multiplier", "limit"), [(4.0, 0.5, 0.0), (2.5, 3.0, 1e-9)])
def test_absorbed_form_with_an_output_multiplier(case: Case, m: float, multiplier: float, limit: float) -> None:
    settings = Settings(output_multiplier=multiplier)
    assert difference_to_absorbed(case, m, settings=settings) <= limit


@every_case
def test_clipping_tells_the_forms_apart_unless_weighted(case: Case) -> None:
    # A large epsilon lets the clipped scale through; Adam would cancel a constant one.
    assert difference_to_absorbed(case, 4.0, clip=0.02, eps=1e-3) > 1e-5
    assert difference_to_absorbed(case, 4.0, clip=0.02, clip_weights={"final.weight": 0.25}, eps=1e-3) <= 1e-9
