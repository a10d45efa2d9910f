"""T0: every parameter's role, init and factors equal a checked-in table; what cannot be decided raises."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.backbone import build_model, declarations
from models.layers import Declaration, OutputLinear
from trainer.mup.apply import (
    apply_multipliers,
    build_table,
    check_names,
    describe,
    init_parameters,
    param_groups,
)
from trainer.mup.rules import ROLES, Optimizer, Parametrization, Role, Settings, factors
from trainer.mup.table import BaseRates, MuTable, ParameterInfo, TableError, fans

from .cases import BASE_WIDTH, CASES, CHANNELS, HEAD_DIM, TEXT_WIDTH, AdaLN, Case
from .checks import scale_of

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MMDIT = CASES["mmdit"]
Factory = Callable[[int], nn.Module]
WEIGHT, BIAS = Declaration("*.weight", "fan_in"), Declaration("*.bias", "zeros")


def table_of(factory: Factory, *declarations: Declaration, base: int = 8, width: int = 16) -> MuTable:
    return build_table(factory, base, width, 2, declarations, Settings())


class Holder(nn.Module):
    """Parameters and modules by name."""

    def __init__(self, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)


@every_case
@pytest.mark.parametrize("m", [2.5, 4.0])
@pytest.mark.parametrize("adaln", ["zero", "fan_in"])
def test_snapshot(case: Case, m: float, adaln: AdaLN) -> None:
    table = case.table(m, adaln=adaln)
    by_width = case.table(m, Settings(eps_rule="width"), adaln=adaln)
    assert table.rows.keys() == case.snapshot.keys()
    for name, row in table.rows.items():
        scale, std = scale_of(case, m, name), case.std(name, adaln)
        assert row.role == case.snapshot[name].role, name
        assert row.init_std == pytest.approx((std or 0.0) * scale.init, rel=1e-12), name
        assert (row.init == "ones") == (std is None), name
        assert (row.init == "xavier_uniform") == case.snapshot[name].uniform, name
        got = (row.multiplier, row.lr, row.weight_decay, row.eps, by_width.rows[name].eps)
        expected = (scale.multiplier, scale.lr, scale.decay, 1.0, scale.eps_width)
        assert got == pytest.approx(expected, rel=1e-12), name


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("width", [24, 36])
def test_narrower_than_the_base(case: Case, width: int) -> None:
    m = width / BASE_WIDTH
    table = case.table(m)
    final = table.rows["final.weight"]
    assert (final.multiplier, final.lr, final.weight_decay) == pytest.approx((1 / m, 1.0, 1.0))
    for name in case.names_of("hidden"):
        row = table.rows[name]
        assert (row.lr, row.weight_decay) == pytest.approx((1 / m, m)), name
        assert row.init_std == pytest.approx((case.std(name) or 0.0) * m**-0.5), name


@every_case
def test_decay_of_all_reaches_every_parameter(case: Case) -> None:
    table = case.table(4.0, Settings(decay="all"))
    decays = {name: 4.0 if row.role == "hidden" else 1.0 for name, row in case.snapshot.items()}
    assert {name: row.weight_decay for name, row in table.rows.items()} == decays


def test_a_learned_table_of_fixed_size_decays_and_a_gain_does_not() -> None:
    def factory(width: int) -> nn.Module:
        return Holder(null=torch.zeros(3, 5), gain=torch.zeros(5), position=torch.zeros(1, 9, width))

    table = table_of(factory, Declaration("*", "normal"))
    assert {name: (row.role, row.weight_decay) for name, row in table.rows.items()} == {
        "null": ("fixed", 1.0),
        "gain": ("fixed", 0.0),
        "position": ("vector", 0.0),
    }


@every_case
def test_sp_is_the_same_table_without_factors(case: Case) -> None:
    table, mup = case.table(4.0, Settings(parametrization="sp")), case.table(4.0)
    for name, row in table.rows.items():
        assert row.role == case.snapshot[name].role
        assert (row.multiplier, row.lr, row.weight_decay, row.eps) == (1.0, 1.0, case.snapshot[name].decays, 1.0)
        # SP takes the formula at the trained shape: fan-in init shrinks as under muP, a constant does not, and an
        # input's Xavier does.
        expected = case.sp_std.get(name, mup.rows[name].init_std)
        assert row.init_std == pytest.approx(expected), name
        assert (name in case.sp_std) == (row.init_std != pytest.approx(mup.rows[name].init_std)), name


@pytest.mark.parametrize(
    ("rule", "expected"), [("independent", 6.25), ("sqrt", 2.5), ("coupled", 1.0)]
)  # fmt: skip
def test_weight_decay_rules(rule: str, expected: float) -> None:
    settings = Settings(wd_rule=rule)  # type: ignore[arg-type]
    assert factors("hidden", 6.25, 9.0, settings).weight_decay == expected
    assert factors("input", 1.0, 6.25, settings).weight_decay == 1.0


def test_the_ratio_is_that_of_the_tensors_own_fan_in() -> None:
    """The MLP ratio falls from 4 to 3 between base and target, so the two layers have different ratios."""

    def shapes(width: int, hidden: int) -> dict[str, ParameterInfo]:
        return {
            "fc1.weight": ParameterInfo((hidden, width), "Linear"),
            "fc2.weight": ParameterInfo((width, hidden), "Linear"),
            "same.weight": ParameterInfo((width, 8 if width <= 16 else 10), "Linear"),
        }

    base, delta, target = shapes(8, 32), shapes(20, 80), shapes(16, 48)
    rows = MuTable.build(base, delta, target, [WEIGHT], Settings()).rows
    assert (rows["fc1.weight"].lr, rows["fc2.weight"].lr) == pytest.approx((8 / 16, 32 / 48))
    # Equal to the base in fan_in, wider in fan_out: still hidden, with ratio 1.
    same = rows["same.weight"]
    assert same.role == "hidden"
    assert (same.lr, same.init_std) == pytest.approx((1.0, 8**-0.5))


def test_fans_of_convolutions_and_embeddings() -> None:
    conv = nn.Conv2d(6, 8, (3, 5), groups=2)
    info = describe(Holder(conv=conv, labels=nn.Embedding(10, 4), table=torch.zeros(6, 4)))
    assert fans(info["conv.weight"]) == (3 * 3 * 5, 8)
    assert fans(info["labels.weight"]) == (1, 4)
    assert fans(info["table"]) == (1, 4)


@pytest.mark.parametrize(
    ("parts", "roles"),
    [
        (lambda d: {"a": nn.Conv2d(3, d, 2)}, {"a.weight": "input", "a.bias": "vector"}),
        (lambda d: {"a": nn.Conv2d(d, 2 * d, 3)}, {"a.weight": "hidden", "a.bias": "vector"}),
        (lambda d: {"a": nn.Embedding(11, d)}, {"a.weight": "input"}),
        (lambda d: {"a": nn.LayerNorm(d)}, {"a.weight": "vector", "a.bias": "vector"}),
        (lambda d: {"a": nn.RMSNorm(7)}, {"a.weight": "fixed"}),
        (lambda d: {"a": nn.Linear(7, 5)}, {"a.weight": "fixed", "a.bias": "fixed"}),
        (lambda d: {"table": torch.zeros(6, d)}, {"table": "vector"}),
    ],
)
def test_roles_by_owner(parts: Callable[[int], dict[str, Any]], roles: dict[str, Role]) -> None:
    table = table_of(lambda width: Holder(**parts(width)), Declaration("*", "normal"))
    assert {name: row.role for name, row in table.rows.items()} == roles


@pytest.mark.parametrize(
    ("factory", "declarations", "message"),
    [
        (lambda d: Holder(head=nn.Linear(d, 7)), [WEIGHT, BIAS], r"head\.weight .*declared as output"),
        (lambda d: Holder(head=nn.Conv2d(d, 7, 3)), [WEIGHT, BIAS], r"head\.weight .*declared as output"),
        (lambda d: Holder(mix=torch.zeros(d, d)), [Declaration("mix", "normal")], r"mix .*bare parameter"),
        (lambda d: Holder(mix=torch.zeros(d, 3)), [Declaration("mix", "normal")], r"mix .*other dimension"),
        (lambda d: Holder(mix=torch.zeros(d, d, d)), [Declaration("mix", "normal")], r"mix .*3 dimensions"),
        (
            lambda d: Holder(fc=nn.Linear(d, d)),
            [Declaration("*.weight", "fan_in", role="input"), BIAS],
            r"fc\.weight: declared as input",
        ),
        (
            lambda d: Holder(fc=nn.Linear(3, d)),
            [Declaration("*.weight", "fan_in", role="output"), BIAS],
            r"fc\.weight: declared as output",
        ),
        (
            lambda d: Holder(head=nn.Linear(d, 7)),
            [Declaration("*.weight", "fan_in", role="hidden"), BIAS],
            r"head\.weight: declared as hidden",
        ),
        (
            lambda d: Holder(fc=nn.Linear(d, d)),
            [WEIGHT, BIAS, Declaration("gone.*", "zeros")],
            r'"gone\.\*" decides no parameter',
        ),
        (lambda d: Holder(fc=nn.Linear(d, d)), [WEIGHT], r"fc\.bias: no declaration gives its init"),
        (lambda d: Holder(fc=nn.Linear(d, d)), [Declaration("*", "xavier")], r'unknown init "xavier"'),  # type: ignore[arg-type]
    ],
)
def test_undecidable_contradicting_and_unused(
    factory: Factory, declarations: list[Declaration], message: str
) -> None:  # fmt: skip
    with pytest.raises(TableError, match=message):
        table_of(factory, *declarations)


def test_a_shadowed_declaration_is_unused() -> None:
    with pytest.raises(TableError, match=r'"fc\.weight" decides no parameter'):
        table_of(lambda d: Holder(fc=nn.Linear(d, d)), WEIGHT, BIAS, Declaration("fc.weight", "zeros"))


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(TableError) as error:
        table_of(lambda d: Holder(a=nn.Linear(d, 7), b=torch.zeros(d, d)), WEIGHT, Declaration("b", "normal"))
    assert all(part in str(error.value) for part in ("a.weight", "a.bias", "b (16, 16)"))


def test_a_fixed_dimension_that_differs_is_another_problem() -> None:
    def shapes(width: int, channels: int) -> dict[str, ParameterInfo]:
        with torch.device("meta"):
            return describe(build_model(MMDIT.config(width, "fan_in"), channels, TEXT_WIDTH))

    base, delta = shapes(BASE_WIDTH, CHANNELS), shapes(BASE_WIDTH + HEAD_DIM, CHANNELS)
    declared = declarations(MMDIT.config(BASE_WIDTH, "fan_in"))
    with pytest.raises(TableError) as error:
        MuTable.build(base, delta, shapes(96, CHANNELS + 1), declared, Settings())
    message = str(error.value)
    for name in ("patch_embed.weight", "final.weight", "final.bias"):
        assert f"{name}: dimension" in message
    assert "text_embed" not in message


def test_other_depth_is_another_model() -> None:
    base = {"a.weight": ParameterInfo((8, 8), "Linear")}
    target = {**base, "b.weight": ParameterInfo((8, 8), "Linear")}
    with pytest.raises(TableError, match=r"base and target have different parameters: b\.weight"):
        MuTable.build(base, base, target, [WEIGHT], Settings())


@every_case
def test_a_head_dim_that_grows_is_refused(case: Case) -> None:
    """The attention's scale, 1 / sqrt(head_dim), is right for one head_dim; width grows by heads."""

    def factory(width: int) -> nn.Module:
        config = case.config(width, "fan_in")
        return build_model(replace(config, head_dim=width // 4), CHANNELS, TEXT_WIDTH)

    declared = declarations(case.config(BASE_WIDTH, "fan_in"))
    with pytest.raises(TableError, match=r"\.head_dim changes with the width"):
        build_table(factory, BASE_WIDTH, 96, BASE_WIDTH, declared, Settings())


def test_multiplier_needs_a_layer_that_applies_it() -> None:
    declarations = [Declaration("*.weight", "zeros", role="output"), BIAS]
    table = table_of(lambda d: Holder(head=nn.Linear(d, 7)), *declarations)
    with pytest.raises(TypeError, match=r"head\.weight needs the input multiplier 0\.5"):
        apply_multipliers(Holder(head=nn.Linear(16, 7)), table)
    model = Holder(head=OutputLinear(16, 7))
    apply_multipliers(model, table)
    assert model.get_submodule("head").multiplier == 0.5
    # A second table overwrites the first: nothing is left of it.
    apply_multipliers(model, table_of(lambda d: Holder(head=nn.Linear(d, 7)), *declarations, width=8))
    assert model.get_submodule("head").multiplier == 1.0


@every_case
def test_groups_hold_each_parameter_once_with_its_settings(case: Case) -> None:
    table = case.table(2.5, Settings(eps_rule="width"))
    model = case.model(2.5, table)
    groups = param_groups(model.named_parameters(), table, {"adamw": BaseRates(3e-4, 0.1, 1e-8)})
    named = dict(model.named_parameters())
    seen: list[str] = []
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            scale = scale_of(case, 2.5, name)
            assert parameter is named[name]
            assert group["lr"] == pytest.approx(3e-4 * scale.lr)
            assert group["lr_scale"] == pytest.approx(scale.lr)
            assert group["weight_decay"] == pytest.approx(0.1 * scale.decay)
            assert group["eps"] == pytest.approx(1e-8 * scale.eps_width)
            seen.append(name)
    assert sorted(seen) == sorted(case.snapshot)
    # One each: {input, output}, hidden, vector, fixed; and a fixed matrix, which decays.
    assert len(groups) == 4 + ("final_conv.weight" in case.snapshot)


def test_a_model_that_is_not_the_tables() -> None:
    table, wider = MMDIT.table(4.0), MMDIT.model(2.5, MMDIT.table(2.5))
    with pytest.raises(ValueError, match=r"differ at .*blocks\.0"):
        check_names(wider, table)
    with pytest.raises(ValueError, match="differ at"):
        init_parameters(wider, table, seed=0)
    with pytest.raises(ValueError, match=r"differ at extra"):
        param_groups([*wider.named_parameters(), ("extra", torch.zeros(1))], table, {})


def test_hash_and_text() -> None:
    table = MMDIT.table(4.0)
    assert table.hash == MMDIT.table(4.0).hash == table.to_json()["sha256"]
    others = [MMDIT.table(2.5), MMDIT.table(4.0, Settings(wd_rule="sqrt")), MMDIT.table(4.0, adaln="zero")]
    assert len({table.hash, *(other.hash for other in others)}) == 4
    rates = BaseRates(lr=2e-3, weight_decay=0.1, eps=1e-12)
    base: dict[Optimizer, BaseRates] = {"adamw": rates}
    lines = table.describe(base).splitlines()
    fused = next(line.split() for line in lines if line.startswith("blocks.*.image.qkv.weight"))
    assert fused == ["blocks.*.image.qkv.weight", "576x192", "hidden", "0.0722", "1", "0.25", "0.0005", "4", "0.4",
                     "1", "1e-12", "2"]  # each factor, and the rate in use  # fmt: skip
    for group in param_groups(MMDIT.model(4.0, table).named_parameters(), table, base):
        for name in group["param_names"]:
            assert table.in_use(base)[name] == {key: group[key] for key in rates._fields}, "what the optimizer has"


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("parametrization", ["mup", "sp"])
@pytest.mark.parametrize("role", ROLES)
def test_a_roles_lr_is_a_base_hyperparameter(case: Case, role: Role, parametrization: Parametrization) -> None:
    plain = case.table(2.5, Settings(parametrization))
    table = case.table(2.5, Settings(parametrization, role_lr={role: 0.5}))
    assert table.hash != plain.hash
    assert case.names_of(role)
    for name, row in table.rows.items():
        factor = 0.5 if case.snapshot[name].role == role else 1.0
        assert row == replace(plain.rows[name], lr=plain.rows[name].lr * factor), name


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("parametrization", ["mup", "sp"])
def test_the_output_multiplier_is_a_base_hyperparameter(case: Case, parametrization: Parametrization) -> None:
    plain = case.table(2.5, Settings(parametrization))
    table = case.table(2.5, Settings(parametrization, output_multiplier=3.0))
    assert table.hash != plain.hash
    expected = 3.0 / 2.5 if parametrization == "mup" else 3.0
    assert table.rows["final.weight"].multiplier == pytest.approx(expected)
    for name, row in table.rows.items():
        if name != "final.weight":
            assert row == plain.rows[name], name
    model = case.model(2.5, table)
    assert model.get_submodule("final").multiplier == table.rows["final.weight"].multiplier


def test_options_that_are_off_leave_the_hash_alone() -> None:
    """Runs that are older than the options go on."""
    plain = MMDIT.table(2.5).to_json()
    off = Settings(branch_scale=1.0, branch_lr=1.0, output_multiplier=1.0, role_lr={})
    assert MMDIT.table(2.5, off).to_json() == plain
    assert plain["settings"].keys() == {"parametrization", "wd_rule", "eps_rule", "decay"}
    assert MMDIT.table(2.5, Settings(branch_scale=0.5)).to_json()["settings"]["branch_scale"] == 0.5


@every_case
def test_base_width_gives_ones(case: Case) -> None:
    for row in case.table(1.0, Settings(eps_rule="width", decay="all")).rows.values():
        assert (row.multiplier, row.lr, row.weight_decay, row.eps) == (1.0, 1.0, 1.0, 1.0)
        assert row.shape == row.base_shape
