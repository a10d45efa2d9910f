"""T15 and the depth rules (CompleteP, alpha = 1 and 1/2): what training changes does not depend on the depth."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.backbone import build_model, declarations
from models.layers import ClassCondition, TextCondition
from models.registry import MODEL_KINDS
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.mup.apply import apply_branch_scale, apply_multipliers, build_table, init_parameters
from trainer.mup.rules import Settings, depth_factors
from trainer.mup.table import BaseRates, MuTable

from .cases import BASE_WIDTH, CASES, CHANNELS, CLASSES, HEAD_DIM, TEXT_LENGTH, TEXT_WIDTH
from .checks import LR, adamw, scale_of, train, values

pytestmark = pytest.mark.slow  # seconds each: `make test T=tests/mup/test_depth.py`

RESIDUAL = [name for name, case in CASES.items() if case.config(BASE_WIDTH, "zero").residual]
every_residual_case = pytest.mark.parametrize("name", RESIDUAL)
# The controls' limits are calibrated for these: without factors mmdit_options has a slope of 0.27.
every_kind = pytest.mark.parametrize("name", [name for name in RESIDUAL if name in MODEL_KINDS])
BASE_DEPTH, DEPTHS = 2, (2, 4, 8, 16)


def table_of(name: str, depth: int, settings: Settings) -> tuple[MuTable, Callable[[], nn.Module]]:
    def factory(width: int) -> nn.Module:
        return build_model(replace(CASES[name].config(width, "zero"), depth=depth), CHANNELS, TEXT_WIDTH)

    declared = declarations(replace(CASES[name].config(BASE_WIDTH, "zero"), depth=depth))
    table = build_table(factory, BASE_WIDTH, BASE_WIDTH, HEAD_DIM, declared, settings)
    return table, lambda: factory(BASE_WIDTH)


def last_features(name: str, model: nn.Module, depth: int) -> Tensor:
    """Image tokens after the last block, on a fixed batch."""
    generator = torch.Generator().manual_seed(7)
    x, t = torch.randn(4, CHANNELS, 8, 8, generator=generator), torch.rand(4, generator=generator)
    states = torch.randn(4, TEXT_LENGTH, TEXT_WIDTH, generator=generator)
    if CASES[name].config(BASE_WIDTH, "zero").condition == "text":
        condition = TextCondition(states, torch.ones(4, TEXT_LENGTH, dtype=torch.bool))
    else:
        condition = ClassCondition(torch.randint(CLASSES, (4,), generator=generator))
    with torch.no_grad():
        return model(x, t, condition, features_at=depth - 1)[1]


def change(name: str, depth: int, settings: Settings, seed: int, opened: bool) -> float:
    """Root mean square of what a few steps change in the last features. opened: gates and biases do not start at 0."""
    table, build = table_of(name, depth, settings)
    model = build()
    apply_multipliers(model, table)
    init_parameters(model, table, seed)
    if opened:
        generator = torch.Generator().manual_seed(3)
        for p in model.parameters():
            if not p.detach().any():
                p.data.normal_(0, 0.05, generator=generator)
    before = last_features(name, model, depth)
    train(CASES[name], model, adamw(model, table, 0.0, 1e-12, lr=2.0**-9), 4)
    return (last_features(name, model, depth) - before).square().mean().sqrt().item()


def slope_over_depth(name: str, settings: Callable[[int], Settings], opened: bool = False) -> float:
    """Octaves by which the change grows when the depth doubles; settings: of a depth."""
    log_change = []
    for depth in DEPTHS:
        changes = torch.tensor([change(name, depth, settings(depth), seed, opened) for seed in (0, 1)])
        log_change.append(changes.log2().mean())
    octaves = torch.tensor(DEPTHS).float().log2()
    octaves -= octaves.mean()
    return ((octaves * torch.stack(log_change)).sum() / octaves.square().sum()).item()


def at_alpha(alpha: float) -> Callable[[int], Settings]:
    def settings(depth: int) -> Settings:
        branch_scale, branch_lr = depth_factors(depth, BASE_DEPTH, alpha)
        return Settings(branch_scale=branch_scale, branch_lr=branch_lr)

    return settings


@every_kind
def test_change_of_the_last_features_over_depth(name: str) -> None:
    slopes = {alpha: slope_over_depth(name, at_alpha(alpha)) for alpha in (1.0, 0.5)}
    unscaled = slope_over_depth(name, lambda _: Settings())
    print(name, slopes, unscaled)
    assert all(abs(slope) <= 0.25 for slope in slopes.values())
    assert unscaled > 0.4


@every_kind
def test_alpha_one_half_needs_both_of_its_factors(name: str) -> None:
    """With gates that are open; behind those that start at 0 a branch counts for little in the first steps."""
    half = at_alpha(0.5)
    whole = slope_over_depth(name, half, opened=True)
    parts = [
        slope_over_depth(name, lambda depth: replace(half(depth), branch_lr=1.0), opened=True),
        slope_over_depth(name, lambda depth: replace(half(depth), branch_scale=1.0), opened=True),
    ]
    print(name, whole, parts)
    assert abs(whole) <= 0.15
    assert min(parts) > 0.25


def test_depth_factors() -> None:
    assert depth_factors(8, None, 1.0) == (1.0, 1.0)
    assert depth_factors(8, 2, 1.0) == (0.25, 1.0)
    assert depth_factors(8, 2, 0.5) == (0.5, 0.5)
    assert depth_factors(2, 8, 0.5) == (2.0, 2.0), "a shallower model"
    assert depth_factors(57, 28, 1.0)[0] == 28 / 57, "to the last bit, as in tables of runs that are older than alpha"


@every_residual_case
def test_first_adam_step_of_the_blocks(name: str) -> None:
    """At alpha 1/2 and four times the depth a step moves what is in the blocks by half, of every role, and it alone."""
    case, m = CASES[name], 4.0
    branch_scale, branch_lr = depth_factors(8, 2, 0.5)
    table = case.table(m, Settings(branch_scale=branch_scale, branch_lr=branch_lr))
    model = case.model(m, table)
    case.randomise_zeros(model)
    before, optimizer = values(model), adamw(model, table, weight_decay=0.0, eps=1e-16)
    case.loss(model).backward()
    optimizer.step()
    for parameter, p in model.named_parameters():
        assert p.grad is not None
        moved = (p.detach() - before[parameter]).abs()[p.grad != 0].median().item()
        expected = LR * scale_of(case, m, parameter).lr * (0.5 if parameter.startswith("blocks.") else 1.0)
        assert moved == pytest.approx(expected, rel=2e-3), parameter


def configured(name: str, *overrides: str) -> TrainConfig:
    kind, _, options = name.partition("_")
    keys = ("positions=rope", "mlp=swiglu", "single_depth=1", "qk_norm=false") if options else ()
    return load_config(f"{kind}_debug_mup", ["data.shards=synthetic", *(f"model.{key}" for key in keys), *overrides])


@every_residual_case
def test_base_depth_is_bit_for_bit_the_identity(name: str) -> None:
    off = configured(name)
    on = configured(name, f"mup.base_depth={off.model.depth}")
    assert build_mup_table(on).hash == build_mup_table(off).hash
    # Beside it the blocks without the factor: with non-zero gates every branch counts.
    case, table = CASES[name], CASES[name].table(1.0)
    losses = []
    for scale in (None, 1.0, 0.5):
        model = case.model(1.0, table, torch.float32)
        case.randomise_zeros(model)
        if scale is not None:
            apply_branch_scale(model, scale)
        losses.append(train(case, model, adamw(model, table, 0.1, 1e-8), 3))
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@every_residual_case
def test_every_branch_is_scaled(name: str) -> None:
    """At scale 0 nothing is added: the features after the last block are those before the first."""
    model = CASES[name].model(1.0, CASES[name].table(1.0), torch.float32)
    CASES[name].randomise_zeros(model)
    seen: list[Tensor] = []
    model.get_submodule("blocks.0").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    apply_branch_scale(model, 0.0)
    assert torch.equal(last_features(name, model, 2), seen[0])
    apply_branch_scale(model, 1.0)
    assert not torch.equal(last_features(name, model, 2), seen[0])


@every_residual_case
def test_the_scale_is_the_tables(name: str) -> None:
    config = configured(name, "model.depth=8", "mup.base_depth=2")
    table, plain = build_mup_table(config), build_mup_table(configured(name, "model.depth=8"))
    assert table.settings.branch_scale == 0.25
    assert table.hash != plain.hash
    assert table.rows == plain.rows, "at alpha = 1 lr, decay and a constant epsilon stay"
    assert "every residual branch x 0.25" in table.describe({"adamw": BaseRates(1e-3, 0.0, 1e-12)})
    with torch.device("meta"):
        model = build_model(config.model, config.autoencoder.channels, config.text_encoder.width)
    apply_multipliers(model, table)
    assert {getattr(block, "branch_scale") for block in model.get_submodule("blocks").children()} == {0.25}  # noqa: B009


@every_residual_case
def test_the_factors_at_alpha_one_half_are_the_tables(name: str) -> None:
    config = configured(name, "model.depth=8", "mup.base_depth=2", "mup.depth_alpha=0.5")
    table, plain = build_mup_table(config), build_mup_table(configured(name, "model.depth=8"))
    assert (table.settings.branch_scale, table.settings.branch_lr) == (0.5, 0.5)
    assert {row.role for n, row in table.rows.items() if n.startswith("blocks.")} >= {"hidden", "vector"}
    for parameter, row in table.rows.items():
        halved = 0.5 if parameter.startswith("blocks.") else 1.0
        assert row.lr == plain.rows[parameter].lr * halved, parameter
        assert replace(row, lr=1.0) == replace(plain.rows[parameter], lr=1.0), "decay, init and epsilon stay"
    at_base = configured(name, "mup.base_depth=2", "mup.depth_alpha=0.5")
    assert build_mup_table(at_base).hash == build_mup_table(configured(name)).hash


def test_alpha_without_a_base_depth_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mup\.depth_alpha 0\.5 does nothing without mup\.base_depth"):
        configured("dit", "mup.depth_alpha=0.5")


@every_residual_case
def test_epsilon_of_the_blocks_under_eps_rule_width(name: str) -> None:
    table, plain = (CASES[name].table(4.0, Settings(eps_rule="width", branch_scale=s)) for s in (0.25, 1.0))
    for parameter, row in table.rows.items():
        by_depth = 0.25 if parameter.startswith("blocks.") else 1.0
        assert row.eps == plain.rows[parameter].eps * by_depth, parameter
        assert replace(row, eps=1.0) == replace(plain.rows[parameter], eps=1.0)


def test_a_backbone_with_long_skips_refuses() -> None:
    kinds = [name for name, kind in MODEL_KINDS.items() if not kind().residual]
    assert kinds == ["uvit"]
    with pytest.raises(ConfigError, match=r"mup\.base_depth does not fit model\.kind uvit"):
        configured("uvit", "mup.base_depth=4")
    # And so does the model itself, where no config stands before it.
    case = CASES["uvit"]
    with pytest.raises(TypeError, match="no block applies the branch scale"):
        case.model(1.0, case.table(1.0, Settings(branch_scale=0.5)))
