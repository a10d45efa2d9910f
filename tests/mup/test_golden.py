"""T1-T3: muP at the base width is SP; microsoft/mup trains the same weights; so does the absorbed form."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mup import MuAdamW, MuReadout, set_base_shapes

from models.mmdit import MMDiT
from trainer.mup.rules import Settings
from trainer.mup.table import MuTable, Row

from .checks import (
    BASE_WIDTH,
    CHANNELS,
    HEAD_DIM,
    LR,
    SNAPSHOT,
    TEXT_WIDTH,
    WEIGHT_DECAY,
    adamw,
    largest_difference,
    names_of,
    randomise_final,
    small_config,
    small_model,
    small_table,
    train,
)

STEPS = 10
EPS = 1e-8  # large enough to matter, so that a wrong epsilon shows


def changed(table: MuTable, change: Callable[[str, Row], Row]) -> MuTable:
    return replace(table, rows={name: change(name, row) for name, row in table.rows.items()})


def test_base_width_trains_bit_for_bit_as_sp() -> None:
    tables = [small_table(1.0, Settings(parametrization=p)) for p in ("mup", "sp")]  # type: ignore[arg-type]
    losses = []
    for table in tables:
        model = small_model(1.0, table, torch.float32)
        losses.append(train(model, adamw(model, table, WEIGHT_DECAY, EPS), 4))
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4
    # Beside it the same without a table: plain groups with and without decay.
    model = small_model(1.0, tables[1], torch.float32)
    parameters = dict(model.named_parameters())
    matrices = names_of("input", "hidden", "output")
    groups = [
        {"params": [parameters[n] for n in sorted(matrices)], "weight_decay": WEIGHT_DECAY},
        {"params": [parameters[n] for n in sorted(SNAPSHOT.keys() - matrices)], "weight_decay": 0.0},
    ]
    assert train(model, torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPS), 4) == losses[0]


def mup_twin(width: int) -> MMDiT:
    """The same model as microsoft/mup wants it: its readout, shapes on the parameters."""
    model = MMDiT(small_config(width), CHANNELS, TEXT_WIDTH).double()
    model.final = MuReadout(width, model.final.out_features).double()  # type: ignore[assignment]
    return model


def difference_to_mup(m: float, table: MuTable) -> tuple[float, float, MMDiT]:
    """(largest difference of parameters after training, largest change in training, mup's model)."""
    ours = small_model(m, table)
    randomise_final(ours)
    twin, start = mup_twin(round(m * BASE_WIDTH)), small_model(m, table)
    set_base_shapes(twin, mup_twin(BASE_WIDTH), delta=mup_twin(BASE_WIDTH + HEAD_DIM), rescale_params=False)
    twin.load_state_dict(ours.state_dict())
    start.load_state_dict(ours.state_dict())
    train(ours, adamw(ours, table, WEIGHT_DECAY, EPS), STEPS)
    golden = MuAdamW(twin.parameters(), lr=LR, betas=(0.9, 0.95), eps=EPS, weight_decay=WEIGHT_DECAY)
    train(twin, golden, STEPS)
    return largest_difference(ours, twin), largest_difference(ours, start), twin


@pytest.mark.parametrize("m", [0.5, 2.5])
def test_golden_against_microsoft_mup(m: float) -> None:
    # mup decays every parameter that it is given.
    difference, moved, twin = difference_to_mup(m, small_table(m, Settings(decay="all")))
    assert difference <= 1e-9
    assert moved > LR
    matrices = {name for name, p in twin.named_parameters() if p.infshape.ninf() == 2}  # type: ignore[attr-defined]
    assert matrices == names_of("hidden")


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
def test_golden_sees_a_fault(fault: Callable[[str, Row], Row]) -> None:
    difference, _, _ = difference_to_mup(2.5, changed(small_table(2.5, Settings(decay="all")), fault))
    assert difference > 1e-7


def absorbed(table: MuTable, m: float) -> MuTable:
    """The multiplier 1 / m moved into the weight: lr / m, wd m, eps m (abc-symmetry with theta = m)."""

    def change(name: str, row: Row) -> Row:
        if row.role != "output":
            return row
        return replace(
            row, multiplier=1.0, lr=row.lr / m, weight_decay=row.weight_decay * m, eps=row.eps * m
        )  # fmt: skip

    return changed(table, change)


def difference_to_absorbed(
    m: float, clip: float | None = None, clip_weights: dict[str, float] | None = None, eps: float = EPS
) -> float:
    """Largest difference of parameters after training in both forms, final.weight x m in the absorbed one."""
    table = small_table(m)
    other = absorbed(table, m)
    ours, twin = small_model(m, table), small_model(m, other)
    randomise_final(ours)
    twin.load_state_dict(ours.state_dict())
    twin.final.weight.data /= m
    train(ours, adamw(ours, table, WEIGHT_DECAY, eps), STEPS, clip)
    train(twin, adamw(twin, other, WEIGHT_DECAY, eps), STEPS, clip, clip_weights)
    return largest_difference(ours, twin, {"final.weight": m})


def test_absorbed_form_is_exact_for_a_power_of_two() -> None:
    assert difference_to_absorbed(4.0) == 0.0


def test_absorbed_form_is_equal_for_any_ratio() -> None:
    assert difference_to_absorbed(2.5) <= 1e-9


def test_clipping_tells_the_forms_apart_unless_weighted() -> None:
    # A large epsilon lets the clipped scale through; Adam would cancel a constant one.
    assert difference_to_absorbed(4.0, clip=0.02, eps=1e-3) > 1e-5
    assert difference_to_absorbed(4.0, clip=0.02, clip_weights={"final.weight": 0.25}, eps=1e-3) <= 1e-9
