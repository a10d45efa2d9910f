"""T4-T6: step size, decay and init of every tensor, and planted faults that the checks must pin down."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.layers import Declaration
from trainer.mup.apply import build_table, init_parameters
from trainer.mup.rules import Settings, WeightDecayRule
from trainer.mup.table import MuTable, ParameterRow

from .cases import BASE_WIDTH, CASES, Case
from .checks import decay_shares, wrong_decays, wrong_eps, wrong_init, wrong_multipliers, wrong_updates

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
@pytest.mark.parametrize("m", [2.5, 4.0])
def test_first_adam_step_is_the_tables_lr(case: Case, m: float) -> None:
    assert wrong_updates(case, case.table(m), m) == []


@pytest.mark.slow
@every_case
@pytest.mark.parametrize(("rule", "share"), [("independent", 1.0), ("sqrt", 0.5), ("coupled", 0.25)])
def test_decay_alone(case: Case, rule: WeightDecayRule, share: float) -> None:
    assert wrong_decays(case, case.table(4.0, Settings(wd_rule=rule)), 4.0, share) == []


@pytest.mark.slow
@every_case
def test_decay_of_all_is_one_rate(case: Case) -> None:
    shares = decay_shares(case, case.table(4.0, Settings(decay="all")), 4.0)
    assert all(share == pytest.approx(1.0, abs=1e-3) for share in shares.values())


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("m", [2.5, 4.0])
def test_init_multipliers_and_eps(case: Case, m: float) -> None:
    assert wrong_init(case, case.table(m), m) == []
    assert wrong_multipliers(case, case.table(m), m) == []
    assert wrong_eps(case, case.table(m, Settings(eps_rule="width")), m) == []


@pytest.mark.slow
@every_case
def test_init_slopes_over_widths(case: Case) -> None:
    octaves = torch.tensor([0.0, 1.0, 2.0])
    ratios = (1.0, 2.0, 4.0)
    models = [dict(case.model(m, case.table(m), torch.float32).named_parameters()) for m in ratios]
    assert len(case.random()) >= 10
    for name in case.random():
        log_std = torch.stack([model[name].detach().std().log2() for model in models])
        slope = ((octaves - 1) * log_std).sum() / 2
        expected = -0.5 if case.snapshot[name].role == "hidden" else 0.0
        # Four standard errors of the measured stds at both ends.
        error = sum(1 / (2 * model[name].numel()) for model in models[::2]) ** 0.5 / torch.log(torch.tensor(2.0)) / 2
        assert slope.item() == pytest.approx(expected, abs=4 * error.item()), name


class Pair(nn.Module):
    """Two layers of one shape, registered in a given order."""

    def __init__(self, width: int, names: str = "ab") -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(width, width, bias=False))


def pair_values(names: str = "ab", seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    def factory(width: int) -> nn.Module:
        return Pair(width, names)

    table = build_table(factory, 8, 16, 4, [Declaration("*.weight", "fan_in")], Settings())
    model = Pair(16, names).to(dtype)
    init_parameters(model, table, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_values_depend_on_seed_and_name_alone() -> None:
    first = pair_values()
    torch.rand(7)  # the global generator has no say
    reordered, seeded, double = pair_values("ba"), pair_values(seed=1), pair_values(dtype=torch.float64)
    for name, value in first.items():
        assert torch.equal(value, reordered[name])
        assert torch.equal(value.double(), double[name])
        assert not torch.equal(value, seeded[name])
    assert not torch.equal(first["a.weight"], first["b.weight"])


def test_init_leaves_the_global_generator_alone() -> None:
    case = CASES["mmdit"]
    table = case.table(1.0)
    model = case.model(1.0, table)
    state = torch.get_rng_state()
    init_parameters(model, table, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("parametrization", ["mup", "sp"])
def test_xavier_uniform(parametrization: str) -> None:
    """muP takes the formula at the base shape and shrinks hidden weights by sqrt(m); SP takes it at the trained one."""

    def factory(width: int) -> nn.Module:
        model = nn.Module()
        model.inside, model.into = nn.Linear(width, 3 * width, bias=False), nn.Linear(8, width, bias=False)
        return model

    settings = Settings(parametrization=parametrization)  # type: ignore[arg-type]
    table = build_table(factory, 16, 64, 16, [Declaration("*", "xavier_uniform", std=0.5)], settings)
    model = factory(64)
    init_parameters(model, table, seed=0)
    # sqrt(2 / (fan_in + fan_out)): 16 + 48 at the base, 64 + 192 at the target; 8 + 16 and 8 + 64 for the input.
    stds = {"inside.weight": (2 / 256) ** 0.5, "into.weight": (2 / (24 if parametrization == "mup" else 72)) ** 0.5}
    for name, p in model.named_parameters():
        bound = 3**0.5 * 0.5 * stds[name]
        assert table.rows[name].init_std == pytest.approx(0.5 * stds[name])
        assert 0.98 * bound < p.abs().max() <= bound
        assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.06)


Fault = Callable[[str, ParameterRow], ParameterRow]
M = 4.0


def on(names: set[str], fault: Callable[[ParameterRow], ParameterRow]) -> Fault:
    return lambda name, row: fault(row) if name in names else row


def faults(case: Case) -> dict[str, tuple[Fault, set[str], set[str], set[str], set[str]]]:
    """Each fault, and the names that the checks of update (T4), decay (T5), init (T6) and multiplier must give."""
    nothing: set[str] = set()
    matrices, inputs, final = case.names_of("hidden"), case.names_of("input"), {"final.weight"}
    biases = {name for name in case.names_of("vector") if name.endswith("bias")}
    tables = {name for name in case.names_of("vector") if case.snapshot[name].std}
    random, one_input = case.random(), {case.input_name}
    part = {name for name in matrices if case.hidden_part in name}
    assert part
    assert one_input <= inputs
    return {
        "none": (on(nothing, lambda r: r), nothing, nothing, nothing, nothing),
        "hidden lr not scaled": (
            on(matrices, lambda r: replace(r, lr=1.0)), matrices, matrices, nothing, nothing),
        "hidden lr by the square root": (
            on(matrices, lambda r: replace(r, lr=M**-0.5)), matrices, matrices, nothing, nothing),
        "hidden init not scaled": (
            on(matrices, lambda r: replace(r, init_std=r.init_std * M**0.5)),
            nothing, nothing, matrices & random, nothing),
        "input init by the target's shape": (
            on(inputs, lambda r: replace(r, init_std=r.init_std * M**-0.5)), nothing, nothing, inputs, nothing),
        "normal instead of uniform, and the other way round": (
            on(random, lambda r: replace(r, init="normal" if r.init == "xavier_uniform" else "xavier_uniform")),
            nothing, nothing, random, nothing),
        "no multiplier": (
            on(final, lambda r: replace(r, multiplier=1.0)), nothing, nothing, nothing, final),
        "double output rule": (
            on(final, lambda r: replace(r, lr=1 / M)), final, final, nothing, nothing),
        "input lr scaled": (
            on(inputs, lambda r: replace(r, lr=1 / M)), inputs, inputs, nothing, nothing),
        "bias lr scaled": (
            on(biases, lambda r: replace(r, lr=1 / M)), biases, nothing, nothing, nothing),
        "hidden decay not scaled": (
            on(matrices, lambda r: replace(r, weight_decay=1.0)), nothing, matrices, nothing, nothing),
        "biases decay": (
            on(biases, lambda r: replace(r, weight_decay=1.0)), nothing, biases, nothing, nothing),
        # PixArt's tables as the original draws them, randn / sqrt(width); none in MMDiT and DiT.
        "tables' init by the width": (
            on(tables, lambda r: replace(r, init_std=(M * BASE_WIDTH) ** -0.5)), nothing, nothing, tables, nothing),
        "tables as hidden": (
            on(tables, lambda r: replace(r, lr=1 / M, init_std=r.init_std * M**-0.5)),
            tables, nothing, tables, nothing),
        # lr / m and wd x m: the decay is right by accident, so only T4 and T6 can tell.
        "input as hidden": (
            on(one_input, lambda r: replace(r, lr=1 / M, weight_decay=M, init_std=r.init_std * M**-0.5)),
            one_input, nothing, one_input, nothing),
        "hidden as input": (
            on(part, lambda r: replace(r, lr=1.0, weight_decay=1.0, init_std=r.init_std * M**0.5)),
            part, nothing, part & random, nothing),
    }  # fmt: skip


def planted(case: Case, fault: Fault, settings: Settings | None = None) -> MuTable:
    table = case.table(M, settings)
    return replace(table, rows={name: fault(name, row) for name, row in table.rows.items()})


@every_case
@pytest.mark.parametrize("name", faults(CASES["mmdit"]))
@pytest.mark.slow
def test_checks_name_exactly_the_culprits(case: Case, name: str) -> None:
    fault, updates, decays, init, multipliers = faults(case)[name]
    table = planted(case, fault)
    assert set(wrong_updates(case, table, M)) == updates
    assert set(wrong_decays(case, table, M)) == decays
    assert set(wrong_init(case, table, M)) == init
    assert set(wrong_multipliers(case, table, M)) == multipliers


@every_case
@pytest.mark.parametrize("role", ["hidden", "input", "output", "vector"])
@pytest.mark.slow
def test_the_check_of_eps_names_exactly_the_culprits(case: Case, role: str) -> None:
    table = planted(case, on(case.names_of(role), lambda r: replace(r, eps=1.0)), Settings(eps_rule="width"))
    assert set(wrong_eps(case, table, M)) == case.names_of(role)


@every_case
def test_base_width_is_the_snapshots(case: Case) -> None:
    """The snapshot's literals (48, 12, 20) are those of this base."""
    rows = case.table(1.0).rows
    assert rows["patch_embed.weight"].shape == (BASE_WIDTH, 12) == (48, 12)
    assert all(row.shape == row.base_shape for row in rows.values())
