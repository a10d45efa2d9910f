"""T7-T9 and T11: training does not depend on the width, SP's does, and a planted fault is named.

Through the command's own composition (FSDP2, fused AdamW, the trainer's objective), for each configs/*_debug_mup.yaml.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from trainer.build.engine import build_mup_table
from trainer.config.schema import TrainConfig
from trainer.config.yaml_files import CONFIG_DIR
from trainer.coord_check import slopes as coord
from trainer.coord_check.slopes import CONTROL, Figure, Judgement, Kind, Measured, judge, measure
from trainer.coord_check.subject import build_subject, check_config
from trainer.mup.table import ParameterRow
from trainer.parallel.mesh import World

pytestmark = pytest.mark.slow  # seconds each: `make test T=tests/mup/test_coord.py`

BACKBONES = sorted(path.stem for path in CONFIG_DIR.glob("*_debug_mup.yaml"))
# Few text tokens: what is tested is the width. Synthetic data need no encoder of the config's.
SMALL = ("text_encoder.max_length=8", "text_encoder.width=32")
WIDTHS = (64, 128, 256, 512)
# For faults: their slopes are far over the limits, and most of the time goes to 512.
NARROW = WIDTHS[:3]
LR = 2.0**-7
STEPS = 5

Fault = Callable[[str, ParameterRow, float], ParameterRow]
"""(name, row, width / base width) -> the row with the fault."""


def configured(backbone: str, width: int, seed: int, *overrides: str, lr: float = LR) -> TrainConfig:
    return check_config(f"{backbone}.yaml", [*SMALL, *overrides], width, seed, lr, batch=8)


def sweep(
    world: World, backbone: str, *overrides: str, widths: tuple[int, ...] = WIDTHS, seeds: int = 1,
    fault: Fault | None = None, lr: float = LR, steps: int = STEPS,
) -> Measured:  # fmt: skip
    def build(width: int, seed: int) -> coord.Subject:
        config = configured(backbone, width, seed, *overrides, lr=lr)
        table = build_mup_table(config)
        if fault is not None:
            m = width / config.mup.base_width
            table = replace(table, rows={name: fault(name, row, m) for name, row in table.rows.items()})
        return build_subject(config, world, table)

    return measure(build, widths, seeds, steps)


@pytest.fixture(scope="module", params=BACKBONES)
def sound(request: pytest.FixtureRequest, world: World) -> tuple[str, Judgement, Measured]:
    """(backbone, report of the right table beside its SP control, the control)."""
    backbone = request.param
    control = sweep(world, backbone, "mup.parametrization=sp")
    return backbone, judge(sweep(world, backbone, seeds=2), control), control


def slopes(report: Judgement, kind: Kind) -> dict[str, float]:
    """The largest |slope| of each name over the steps, of what is judged."""
    return {row.figure.name: row.size for row in coord.ranked(report.rows, kind)}


def test_a_debug_config_is_found() -> None:
    assert "mmdit_debug_mup" in BACKBONES


def test_mup_does_not_depend_on_the_width(sound: tuple[str, Judgement, Measured]) -> None:
    """T7-T9 at their thresholds. The control is part of the verdict: SP must exceed 0.7."""
    backbone, report, _ = sound
    assert report.verdict == "passed", report.reason
    for kind, limit in {"activation": 0.25, "change": 0.25, "update": 0.25, "weight": 0.3}.items():
        found = slopes(report, kind)  # pyright: ignore[reportArgumentType] (a literal of the dict's keys)
        assert max(found.values()) <= limit, found
    table = build_mup_table(configured(backbone, WIDTHS[0], 0))
    assert slopes(report, "update").keys() == table.rows.keys(), "a parameter never moved"
    assert len(slopes(report, "change")) > len(table.rows) / 3
    assert any(row.slope is not None and row.slope > CONTROL for row in report.control)


# The least rate at which SP's fault shows, as the command finds it: AdamW keeps but a part of the weights.
@pytest.mark.parametrize(("backbone", "lr"), [("mmdit_debug_mup", 2 * LR), ("dit_debug_mup", LR)])
def test_muon_does_not_depend_on_the_width(backbone: str, lr: float, world: World) -> None:
    """Beside SP under Muon, and AdamW's rule for Muon's rate is found."""
    muon = ("optim.kind=muon", f"optim.lr={lr}", f"optim.muon.lr={lr}")
    control = sweep(world, backbone, *muon, "mup.parametrization=sp", lr=lr)
    report = judge(sweep(world, backbone, *muon, lr=lr), control)
    assert report.verdict == "passed", report.reason
    wrong = by_optimizer("muon", lambda row, m: replace(row, lr=row.lr / m))
    found = judge(sweep(world, backbone, *muon, widths=NARROW, fault=wrong, lr=lr), control)
    assert found.verdict == "failed"
    table = build_mup_table(configured(backbone, WIDTHS[0], 0, *muon)).rows
    assert {table[row.figure.name].optimizer for row in found.culprits["update"][:10]} == {"muon"}


# (overrides, the least rate at which SP's fault shows), at 128 to 512: with RoPE width 64 is far from the limit (the
# first change of the output is 0.045, 0.039, 0.035 and 0.034 at 64 to 512).
SINGLE = ("model.depth=3", "model.single_depth=2", "model.mlp=swiglu")
OPTIONS = {
    "no QK-norm": (("model.qk_norm=false",), LR),
    "single, swiglu": (SINGLE, LR),
    "rope": (("model.positions=rope",), 2 * LR),
    "all": ((*SINGLE, "model.positions=rope", "model.qk_norm=false"), 2 * LR),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_mmdit_do_not_depend_on_the_width(option: str, world: World) -> None:
    overrides, lr = OPTIONS[option]
    control = sweep(world, "mmdit_debug_mup", *overrides, "mup.parametrization=sp", widths=WIDTHS[1:], lr=lr)
    report = judge(sweep(world, "mmdit_debug_mup", *overrides, widths=WIDTHS[1:], lr=lr), control)
    assert report.verdict == "passed", report.reason
    table = build_mup_table(configured("mmdit_debug_mup", WIDTHS[0], 0, *overrides))
    assert slopes(report, "update").keys() == table.rows.keys(), "a parameter never moved"


@pytest.mark.parametrize("backbone", ["mmdit_debug_mup", "dit_debug_mup"])
def test_fp8_does_not_depend_on_the_width(backbone: str, world: World) -> None:
    """Emulated, in bf16 but for the blocks' products; beside SP in the same precision."""
    fp8, widths = "parallel.precision=fp8", WIDTHS[:3]
    checked = sweep(world, backbone, fp8, widths=widths, seeds=2)
    report = judge(checked, sweep(world, backbone, fp8, "mup.parametrization=sp", widths=widths))
    assert report.verdict == "passed", report.reason


def test_x_does_not_depend_on_the_width(world: World) -> None:
    """A model that puts out the clean image; beside SP that does."""
    x = ("mmdit_debug_mup", "objective.predict=x")
    control = sweep(world, *x, "mup.parametrization=sp", widths=NARROW)
    report = judge(sweep(world, *x, widths=NARROW, seeds=2), control)
    assert report.verdict == "passed", report.reason


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_route_does_not_depend_on_the_width(backbone: str, world: World) -> None:
    """Half of the tokens skip a block and are fused again; beside SP that does the same."""
    end = 2 if backbone.startswith("uvit") else 1
    route = {"share": 0.5, "start": end - 1, "end": end, "fuse": "sprint"}
    keys = [f"model.route.{key}={value}" for key, value in route.items()]
    control = sweep(world, backbone, *keys, "mup.parametrization=sp", widths=NARROW)
    report = judge(sweep(world, backbone, *keys, widths=NARROW, seeds=2), control)
    assert report.verdict == "passed", report.reason
    table = build_mup_table(configured(backbone, WIDTHS[0], 0, *keys))
    assert slopes(report, "update").keys() == table.rows.keys(), "a parameter never moved"


def test_sp_fails_and_the_worst_are_hidden(sound: tuple[str, Judgement, Measured]) -> None:
    """Judged by the same thresholds, the SP control is a failure that names hidden weights."""
    backbone, report, control = sound
    table = build_mup_table(configured(backbone, WIDTHS[0], 0))
    updates = judge(control, control).culprits["update"]
    assert table.rows[updates[0].figure.name].role == "hidden"
    assert updates[0].size > CONTROL
    assert sum(row.exceeds for row in report.control) > 10


# ------------------------------------------------------------------------------------------------------ planted faults


def by_optimizer(optimizer: str, change: Callable[[ParameterRow, float], ParameterRow]) -> Fault:
    return lambda name, row, m: change(row, m) if row.optimizer == optimizer else row


def by_role(role: str, change: Callable[[ParameterRow, float], ParameterRow]) -> Fault:
    return lambda name, row, m: change(row, m) if row.role == role else row


def by_name(part: str, change: Callable[[ParameterRow, float], ParameterRow]) -> Fault:
    return lambda name, row, m: change(row, m) if part in name and name.endswith(".weight") else row


def as_hidden(row: ParameterRow, m: float) -> ParameterRow:
    return replace(row, lr=1 / m, init_std=row.init_std * m**-0.5)


def as_input(row: ParameterRow, m: float) -> ParameterRow:
    return replace(row, lr=1.0, init_std=row.init_std * m**0.5)


def is_(role: str) -> Callable[[str, ParameterRow], bool]:
    return lambda name, row: row.role == role


class Planted(NamedTuple):
    """seen: kinds of figure that exceed their limit. first: whether the parameter named first is a culprit."""

    fault: Fault
    seen: set[Kind]
    first: Callable[[str, ParameterRow], bool] | None = None


FAULTS: dict[str, Planted] = {
    "hidden lr not scaled": Planted(
        by_role("hidden", lambda r, m: replace(r, lr=1.0)), {"change", "update"}, is_("hidden")),
    "hidden lr by the square root": Planted(  # so mild that what it does to the inputs' gradients may come first
        by_role("hidden", lambda r, m: replace(r, lr=m**-0.5)), {"change", "update"}),
    "input lr scaled": Planted(
        by_role("input", lambda r, m: replace(r, lr=1 / m)), {"update"}, is_("input")),
    "bias lr scaled": Planted(
        by_role("vector", lambda r, m: replace(r, lr=1 / m)), {"update"}, is_("vector")),
    "no multiplier": Planted(  # the loss explodes, and so does more than the output's weight
        by_role("output", lambda r, m: replace(r, multiplier=1.0)), {"activation", "update"}),
    "double output rule": Planted(
        by_role("output", lambda r, m: replace(r, lr=1 / m)), {"activation", "update"}, is_("output")),
    "time_embed.fc1 as hidden": Planted(
        by_name("time_embed.fc1", as_hidden), {"update"}, lambda n, _: n == "time_embed.fc1.weight"),
    "modulation as input": Planted(
        by_name("modulation", as_input), {"change", "update"}, lambda n, _: "modulation" in n),
    "hidden init not scaled": Planted(
        by_role("hidden", lambda r, m: replace(r, init_std=r.init_std * m**0.5)), {"activation", "weight"}),
    # What xavier does to a patch embedding at the target's own shape: std falls with the square root of fan_out.
    "xavier patch at the target's shape": Planted(
        by_name("patch_embed", lambda r, m: replace(r, init_std=r.init_std * m**-0.5)), {"activation"}),
}  # fmt: skip


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(backbone: str, fault: str, world: World) -> None:
    planted = FAULTS[fault]
    table = build_mup_table(configured(backbone, WIDTHS[1], 0))
    changed = {name for name, row in table.rows.items() if planted.fault(name, row, 2.0) != row}
    if not changed:
        pytest.skip("this backbone has no such weight")
    measured = sweep(world, backbone, fault=planted.fault, widths=NARROW)
    culprits = judge(measured, measured).culprits
    over = {kind for kind, rows in culprits.items() if rows}
    assert over >= planted.seen, culprits
    if "update" in planted.seen:
        named = [row.figure.name for row in culprits["update"]]
        assert changed & set(named), named
        assert planted.first is None or planted.first(named[0], table.rows[named[0]]), named


# ---------------------------------------------------------------------------------------------- REPA and its projector

REPA = (
    "objective.repa_weight=0.5", "objective.repa_layer=1", "objective.repa_width=32", "objective.repa_hidden=128",
)  # fmt: skip
ALIGNED = [backbone for backbone in BACKBONES if configured(backbone, 64, 0).model.residual]


@pytest.mark.parametrize("backbone", ALIGNED)
def test_mup_with_repa_does_not_depend_on_the_width(backbone: str, world: World) -> None:
    checked = sweep(world, backbone, *REPA, seeds=2)
    report = judge(checked, sweep(world, backbone, *REPA, "mup.parametrization=sp"))
    assert report.verdict == "passed", report.reason
    assert slopes(report, "update").keys() == build_mup_table(configured(backbone, 64, 0, *REPA)).rows.keys()


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda r, m: replace(r, init_std=r.init_std * m**-0.5), "activation"),  # an output like the final layer
        (lambda r, m: replace(r, init_std=r.init_std * m**-0.5, multiplier=1.0), "update"),  # no rule: a fixed weight
    ],
)
def test_a_projector_without_its_rule_is_named(
    change: Callable[[ParameterRow, float], ParameterRow], seen: Kind, world: World
) -> None:
    fault = by_name("projector.fc1", change)
    measured = sweep(world, "dit_debug_mup", *REPA, fault=fault, widths=NARROW)
    assert any("projector" in row.figure.name for row in judge(measured, measured).culprits[seen])


def test_activations_alone_are_blind_to_a_bias(world: World) -> None:
    """Why the check looks at every parameter: here no output of MMDiT shows a fault in the lr of its biases."""
    measured = sweep(world, "mmdit_debug_mup", fault=FAULTS["bias lr scaled"].fault, widths=NARROW)
    culprits = judge(measured, measured).culprits
    assert culprits["update"]
    assert not culprits["activation"]


# --------------------------------------------------------------------------------------------------- Adam's epsilon


def adaln_zero_slope(world: World, backbone: str, eps: str) -> float:
    """T11: the change with the largest |slope| at steps 3 and 5 of adaLN-zero, at the learning rate of training."""
    overrides = ("model.adaln_init=zero", f"optim.eps={eps}")
    measured = sweep(world, backbone, *overrides, lr=2.0**-10)
    rows = [r for r in coord.rows_of(measured) if r.figure.kind == "change" and r.figure.step in (3, 5) and r.judged]
    worst = max(rows, key=lambda row: row.size)
    assert worst.slope is not None, worst
    return worst.slope


@pytest.mark.parametrize("backbone", [b for b in BACKBONES if hasattr(configured(b, 64, 0).model, "adaln_init")])
def test_adaln_zero_needs_a_small_epsilon(backbone: str, world: World) -> None:
    """Gradients behind a zero gate are as small as 1e-9, and shrink with the width."""
    assert abs(adaln_zero_slope(world, backbone, "1e-12")) <= 0.25
    assert adaln_zero_slope(world, backbone, "1e-8") < -0.25


# ---------------------------------------------------------------------------------------------------------- the judge


def test_fit() -> None:
    sound = coord.fit({64: [1.0, 1.1], 128: [2.0, 2.2], 256: [4.0, 4.4]})
    assert sound.slope == pytest.approx(1.0)
    assert 0 < sound.error < 0.1
    assert coord.fit({64: [0.0], 128: [0.0]})[:3] == (None, 0.0, False)
    assert coord.fit({64: [1.0], 128: [0.0]})[:3] == (None, 0.0, True)
    assert coord.fit({64: [1.0], 128: [float("nan")]}).why == "not finite at width 128"


def test_a_control_that_does_not_move_is_inconclusive(world: World) -> None:
    """At a tiny learning rate SP looks well, and so would a fault; rounding may even fail a right model."""
    sp = sweep(world, "mmdit_debug_mup", "mup.parametrization=sp", widths=NARROW, lr=1e-7)
    assert judge(sp, sp).verdict == "inconclusive"


def test_the_module_with_a_fault_is_seen_through_its_hooks() -> None:
    """Leaves and units are observed; of a compiled unit its output alone."""
    unit = nn.Sequential(nn.Linear(2, 2), nn.SiLU())
    model = nn.Sequential(nn.Linear(2, 2), unit)
    assert coord.observe(model, [unit], compiled=False).keys() == {"0", "1", "1.0", "1.1"}
    assert coord.observe(model, [unit], compiled=True).keys() == {"0", "1"}
    assert coord.recorded_steps(50) == [1, 2, 3, 4, 5, 8, 16, 32, 50]


def test_later_steps_are_reported_but_not_judged() -> None:
    values: dict[Figure, dict[int, list[float]]] = {
        Figure("change", "a", 5): {64: [1.0], 128: [1.0], 256: [1.0]},
        Figure("change", "a", 50): {64: [1.0], 128: [2.0], 256: [4.0]},
        Figure("change", "b", 50): {64: [1.0], 128: [2.0], 256: [float("inf")]},
    }
    rows = coord.rows_of(Measured((64, 128, 256), values, {}, frozenset()))
    assert [(row.judged, row.exceeds) for row in rows] == [(True, False), (False, False), (True, True)]
    assert rows[1].slope == pytest.approx(1.0)


def test_spectral_norm() -> None:
    matrix = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    for tall in (matrix, matrix.T, matrix * 1e-25):
        assert coord._spectral_norm(tall).item() == pytest.approx(torch.linalg.matrix_norm(tall, 2).item(), rel=1e-4)
