"""T0 and T4-T6 of a backbone with a fused route of tokens: its layer is hidden, its mask token a vector."""

from dataclasses import replace

import pytest

from trainer.mup.rules import Settings

from .cases import CASES, JOINED, ROUTED_CASES, Case
from .checks import scale_of, wrong_decays, wrong_eps, wrong_init, wrong_multipliers, wrong_updates

every_case = pytest.mark.parametrize(("name", "case"), ROUTED_CASES.items(), ids=ROUTED_CASES)
LAYER = "rejoin.linear.weight"
M = 4.0


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("m", [2.5, 4.0])
def test_snapshot(name: str, case: Case, m: float) -> None:
    rows, plain = case.table(m).rows, CASES[name].table(m).rows
    assert rows.keys() - plain.keys() == JOINED.keys()
    assert {parameter: row for parameter, row in rows.items() if parameter in plain} == plain
    for parameter in JOINED:
        row, scale = rows[parameter], scale_of(case, m, parameter)
        assert row.role == case.snapshot[parameter].role, parameter
        assert row.init_std == pytest.approx((case.std(parameter) or 0.0) * scale.init, rel=1e-12), parameter
        got = (row.multiplier, row.lr, row.weight_decay)
        assert got == pytest.approx((scale.multiplier, scale.lr, scale.decay), rel=1e-12), parameter


@every_case
@pytest.mark.slow
def test_training_follows_the_rules(name: str, case: Case) -> None:
    table = case.table(M)
    assert [check(case, table, M) for check in (wrong_updates, wrong_decays, wrong_init, wrong_multipliers)] == [[]] * 4
    assert wrong_eps(case, case.table(M, Settings(eps_rule="width")), M) == []


@pytest.mark.slow
def test_a_planted_fault_is_named() -> None:
    case = ROUTED_CASES["dit"]
    table = case.table(M)
    wrong = replace(table, rows={**table.rows, LAYER: replace(table.rows[LAYER], lr=1.0)})
    assert wrong_updates(case, wrong, M) == [LAYER]
