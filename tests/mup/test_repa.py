"""T0 and T4-T6 of a backbone with REPA's projector, and T10: without its rule the checks name it."""

from dataclasses import replace

import pytest
from torch import nn

from models.backbone import build_model
from models.configs import ProjectorConfig
from models.layers import Declaration, OutputLinear
from trainer.mup.apply import build_table
from trainer.mup.rules import Settings
from trainer.mup.table import ParameterRow, TableError

from .cases import BASE_WIDTH, CASES, CHANNELS, CONV_CASES, REPA_CASES, TEXT_WIDTH, Case
from .checks import scale_of, wrong_decays, wrong_eps, wrong_init, wrong_multipliers, wrong_updates

every_case = pytest.mark.parametrize("case", REPA_CASES.values(), ids=REPA_CASES)
BOTH = {**REPA_CASES, **{f"{name}, convolution": case for name, case in CONV_CASES.items()}}
every_projector = pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
FIRST = "projector.fc1.weight"
M = 4.0


@pytest.mark.slow
@every_projector
@pytest.mark.parametrize("m", [2.5, 4.0])
def test_snapshot(case: Case, m: float) -> None:
    table = case.table(m)
    assert table.rows.keys() == case.snapshot.keys()
    for name, row in table.rows.items():
        scale = scale_of(case, m, name)
        assert row.role == case.snapshot[name].role, name
        assert row.init_std == pytest.approx((case.std(name) or 0.0) * scale.init, rel=1e-12), name
        got = (row.multiplier, row.lr, row.weight_decay)
        assert got == pytest.approx((scale.multiplier, scale.lr, scale.decay), rel=1e-12), name


@pytest.mark.slow
@every_projector
def test_the_projector_changes_no_other_row(case: Case) -> None:
    plain = replace(case, projector=None).table(M).rows
    assert {name: row for name, row in case.table(M).rows.items() if name in plain} == plain


@every_case
def test_sp_takes_fan_in_at_the_trained_shape(case: Case) -> None:
    """The same effective std as muP's 1 / m x sqrt(m) x std: the two differ in the gradients."""
    row = case.table(M, Settings(parametrization="sp")).rows[FIRST]
    mup = case.table(M).rows[FIRST]
    assert (row.multiplier, row.lr, row.init_std) == (1.0, 1.0, pytest.approx((M * BASE_WIDTH) ** -0.5))
    assert mup.multiplier * mup.init_std == pytest.approx(row.init_std)


def test_the_output_multiplier_is_about_the_prediction() -> None:
    rows = REPA_CASES["mmdit"].table(M, Settings(output_multiplier=3.0)).rows
    assert (rows["final.weight"].multiplier, rows[FIRST].multiplier) == (3 / M, 1 / M)


@every_projector
@pytest.mark.slow
def test_training_follows_the_rules(case: Case) -> None:
    table = case.table(M)
    assert [check(case, table, M) for check in (wrong_updates, wrong_decays, wrong_init, wrong_multipliers)] == [[]] * 4
    assert wrong_eps(case, case.table(M, Settings(eps_rule="width")), M) == []


def plain_output(row: ParameterRow) -> ParameterRow:
    return replace(row, init_std=row.init_std * M**-0.5)


FAULTS = {
    "no sqrt(m)": (plain_output, [wrong_init]),
    "no rule": (lambda row: replace(plain_output(row), multiplier=1.0), [wrong_init, wrong_multipliers]),
    "double rule": (lambda row: replace(row, lr=1 / M), [wrong_updates, wrong_decays]),
}


@every_case
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
def test_a_planted_fault_is_named(case: Case, fault: str) -> None:
    change, seen_by = FAULTS[fault]
    table = case.table(M)
    table = replace(table, rows={**table.rows, FIRST: change(table.rows[FIRST])})
    for check in (wrong_updates, wrong_decays, wrong_init, wrong_multipliers):
        assert check(case, table, M) == ([FIRST] if check in seen_by else []), check.__name__


@pytest.mark.parametrize(
    ("declared", "width_to_width"),
    [
        (Declaration("*.weight", "zeros", role="output", inner=True), False),
        (Declaration("*.weight", "fan_in", inner=True), True),
    ],
)
def test_inner_is_for_outputs_that_are_not_zero(declared: Declaration, width_to_width: bool) -> None:
    def factory(width: int) -> nn.Module:
        return nn.Sequential(OutputLinear(width, width if width_to_width else 7))

    with pytest.raises(TableError, match="declared as inner"):
        build_table(factory, 8, 16, 2, [declared, Declaration("*.bias", "zeros")], Settings())


def test_a_projector_on_a_backbone_without_a_place_for_it_is_dead() -> None:
    """Why U-ViT is refused by the config: it would not be read."""
    model = build_model(CASES["uvit"].config(BASE_WIDTH, "zero"), CHANNELS, TEXT_WIDTH)
    assert not hasattr(model, "projector")
    with pytest.raises(TypeError, match="no projector"):
        build_model(CASES["uvit"].config(BASE_WIDTH, "zero"), CHANNELS, TEXT_WIDTH, ProjectorConfig(8, 4))
