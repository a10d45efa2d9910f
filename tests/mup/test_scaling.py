"""T4-T6: step size, decay and init of every tensor, and planted faults that the checks must pin down."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.layers import Declaration
from trainer.mup.apply import build_table, init_parameters
from trainer.mup.rules import Settings, WeightDecayRule
from trainer.mup.table import MuTable, Row

from .checks import (
    BASE_WIDTH,
    SNAPSHOT,
    decay_shares,
    expected_std,
    names_of,
    small_model,
    small_table,
    wrong_decays,
    wrong_eps,
    wrong_init,
    wrong_multipliers,
    wrong_updates,
)


@pytest.mark.parametrize("m", [2.5, 4.0])
def test_first_adam_step_is_the_tables_lr(m: float) -> None:
    assert wrong_updates(small_table(m), m) == []


@pytest.mark.parametrize(("rule", "share"), [("independent", 1.0), ("sqrt", 0.5), ("coupled", 0.25)])
def test_decay_alone(rule: WeightDecayRule, share: float) -> None:
    assert wrong_decays(small_table(4.0, Settings(wd_rule=rule)), 4.0, share) == []


def test_decay_of_all_is_one_rate() -> None:
    shares = decay_shares(small_table(4.0, Settings(decay="all")), 4.0)
    assert all(share == pytest.approx(1.0, abs=1e-3) for share in shares.values())


@pytest.mark.parametrize("m", [2.5, 4.0])
def test_init_multipliers_and_eps(m: float) -> None:
    assert wrong_init(small_table(m), m) == []
    assert wrong_multipliers(small_table(m), m) == []
    assert wrong_eps(small_table(m, Settings(eps_rule="width")), m) == []


def test_init_slopes_over_widths() -> None:
    octaves = torch.tensor([0.0, 1.0, 2.0])
    ratios = (1.0, 2.0, 4.0)
    models = [dict(small_model(m, small_table(m), torch.float32).named_parameters()) for m in ratios]
    random = {name for name in SNAPSHOT if expected_std(name, "fan_in")} - {"final.weight"}
    assert len(random) == 24
    for name in random:
        log_std = torch.stack([model[name].detach().std().log2() for model in models])
        slope = ((octaves - 1) * log_std).sum() / 2
        expected = -0.5 if SNAPSHOT[name].role == "hidden" else 0.0
        assert slope.item() == pytest.approx(expected, abs=0.1), name


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
    table = small_table(1.0)
    model = small_model(1.0, table)
    state = torch.get_rng_state()
    init_parameters(model, table, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


Fault = Callable[[str, Row], Row]
M = 4.0
NOTHING: set[str] = set()
MATRICES = {name for name in names_of("hidden") if name.endswith(".weight")}
BIASES = {name for name in names_of("vector") if name.endswith(".bias")}
MODULATIONS = {name for name in MATRICES if "modulation" in name}
FC1 = {"time_embed.fc1.weight"}
FINAL = {"final.weight"}


def on(names: set[str], fault: Callable[[Row], Row]) -> Fault:
    return lambda name, row: fault(row) if name in names else row


# Each fault, and the names that the checks of update (T4), decay (T5), init (T6) and multiplier must give.
FAULTS: dict[str, tuple[Fault, set[str], set[str], set[str], set[str]]] = {
    "none": (on(NOTHING, lambda r: r), NOTHING, NOTHING, NOTHING, NOTHING),
    "hidden lr not scaled": (
        on(MATRICES, lambda r: replace(r, lr=1.0)), MATRICES, MATRICES, NOTHING, NOTHING),
    "hidden lr by the square root": (
        on(MATRICES, lambda r: replace(r, lr=M**-0.5)), MATRICES, MATRICES, NOTHING, NOTHING),
    "hidden init not scaled": (
        on(MATRICES, lambda r: replace(r, init_std=r.init_std * M**0.5)),
        NOTHING, NOTHING, MATRICES, NOTHING),
    "no multiplier": (
        on(FINAL, lambda r: replace(r, multiplier=1.0)), NOTHING, NOTHING, NOTHING, FINAL),
    "double output rule": (
        on(FINAL, lambda r: replace(r, lr=1 / M)), FINAL, FINAL, NOTHING, NOTHING),
    "input lr scaled": (
        on(names_of("input"), lambda r: replace(r, lr=1 / M)),
        names_of("input"), names_of("input"), NOTHING, NOTHING),
    "bias lr scaled": (
        on(BIASES, lambda r: replace(r, lr=1 / M)), BIASES, NOTHING, NOTHING, NOTHING),
    "hidden decay not scaled": (
        on(MATRICES, lambda r: replace(r, weight_decay=1.0)), NOTHING, MATRICES, NOTHING, NOTHING),
    "biases decay": (
        on(BIASES, lambda r: replace(r, weight_decay=1.0)), NOTHING, BIASES, NOTHING, NOTHING),
    # lr / m and wd x m: the decay is right by accident, so only T4 and T6 can tell.
    "time_embed.fc1 as hidden": (
        on(FC1, lambda r: replace(r, lr=1 / M, weight_decay=M, init_std=r.init_std * M**-0.5)),
        FC1, NOTHING, FC1, NOTHING),
    "modulation as input": (
        on(MODULATIONS, lambda r: replace(r, lr=1.0, weight_decay=1.0, init_std=r.init_std * M**0.5)),
        MODULATIONS, NOTHING, MODULATIONS, NOTHING),
}  # fmt: skip


def planted(fault: Fault, settings: Settings | None = None) -> MuTable:
    table = small_table(M, settings)
    return replace(table, rows={name: fault(name, row) for name, row in table.rows.items()})


@pytest.mark.parametrize("name", FAULTS)
def test_checks_name_exactly_the_culprits(name: str) -> None:
    fault, updates, decays, init, multipliers = FAULTS[name]
    table = planted(fault)
    assert set(wrong_updates(table, M)) == updates
    assert set(wrong_decays(table, M)) == decays
    assert set(wrong_init(table, M)) == init
    assert set(wrong_multipliers(table, M)) == multipliers


@pytest.mark.parametrize("role", ["hidden", "input", "output", "vector"])
def test_the_check_of_eps_names_exactly_the_culprits(role: str) -> None:
    table = planted(on(names_of(role), lambda r: replace(r, eps=1.0)), Settings(eps_rule="width"))
    assert set(wrong_eps(table, M)) == names_of(role)


def test_base_width_is_the_snapshots() -> None:
    """The snapshot's literals (32, 8, 3, 20) are those of this base."""
    assert small_table(1.0).rows["blocks.0.image.qkv.weight"].shape == (3 * BASE_WIDTH, BASE_WIDTH)
