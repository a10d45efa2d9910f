"""Points are a function of seed and number; keys that do not transfer are refused; the shipped searches are sound."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.studies import SPACE, search
from trainer.config.load import load_config
from trainer.config.yaml_files import CONFIG_DIR, read
from trainer.errors import ConfigError
from trainer.search.definition import load_search, parse_search
from trainer.search.space import Dimension, Sampler, as_overrides, parse_space, point

LR = Dimension("optim.lr", "log_uniform", (1e-4, 1e-1))
CLIP = Dimension("optim.clip_norm", "choices", (0.3, 1.0, 3.0))
WARMUP = Dimension("optim.warmup_steps", "uniform", (0, 1000), integer=True)
POWERS = Dimension("mup.output_multiplier", "powers_of_two", (-2, 2))
SPACES = (LR, CLIP, WARMUP, POWERS)


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_points_follow_from_seed_and_number(sampler: Sampler) -> None:
    drawn = [point(SPACES, sampler, 3, number) for number in range(40)]
    assert [point(SPACES, sampler, 3, number) for number in reversed(range(40))] == drawn[::-1]
    assert point(SPACES, sampler, 4, 0) != drawn[0]
    values: dict[str, list[Any]] = {d.key: [p[d.key] for p in drawn if p] for d in SPACES}
    assert all(1e-4 <= v <= 1e-1 for v in values["optim.lr"])
    assert set(values["optim.clip_norm"]) == {0.3, 1.0, 3.0}
    assert all(isinstance(v, int) and 0 <= v <= 1000 for v in values["optim.warmup_steps"])
    assert set(values["mup.output_multiplier"]) == {0.25, 0.5, 1.0, 2.0, 4.0}
    mean = sum(math.log10(v) for v in values["optim.lr"]) / 40
    assert mean == pytest.approx(-2.5, abs=0.1 if sampler == "qmc" else 0.4), "uniform in the logarithm"


def test_another_key_leaves_random_values_alone() -> None:
    with_clip, alone = point((LR, CLIP), "random", 0, 5), point((LR,), "random", 0, 5)
    assert with_clip
    assert alone
    assert with_clip["optim.lr"] == alone["optim.lr"]


def test_grid_has_every_point_once() -> None:
    points = [point((CLIP, POWERS), "grid", 0, number) for number in range(15)]
    assert len({tuple(p.values()) for p in points if p}) == 15


def test_lists_and_null_reach_the_config() -> None:
    space, problems = parse_space(
        {"optim.betas": {"choices": [[0.9, 0.99]]}, "optim.clip_norm": {"choices": [None]}}, []
    )
    assert not problems
    values = point(space, "random", 0, 0)
    assert values is not None
    config = load_config("mmdit_debug_mup.yaml", as_overrides(values))
    assert config.optim.betas == (0.9, 0.99)
    assert config.optim.clip_norm is None


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("model.width", "what the proxy and its target differ in"),
        ("model.depth", "another model"),
        ("mup.base_width", "the base hyperparameters hold"),
        ("mup.wd_rule", "a rule of the transfer"),
        ("train.global_batch_size", "the best batch follows"),
        ("train.steps", "the budget of a trial"),
        ("train.seed", "`seeds`"),
        ("optim.kind", "search each alone"),
        ("optim.muon.steps", "what Muon is"),
        ("optim.decay_steps", "length of the run"),
        ("data.resolution", "losses on different data"),
        ("ema.decays", "how a trial is measured"),
        ("objective.timestep_mean", "different objectives"),
        ("parallel.shard", "does not change what is learned"),
    ],
)
def test_keys_that_do_not_transfer(key: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"space.{key} does not transfer: .*{reason}"):
        search(tmp_path, space={key: {"choices": [1]}})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "overrides", "message"),
    [
        ({"space": {"optim.lrr": {"choices": [1]}}}, (), 'optim.lrr: unknown key; did you mean "optim.lr"?'),
        ({"space": {"mup.role_lr.hiden": {"choices": [1]}}}, (), 'did you mean "mup.role_lr.hidden"?'),
        ({"space": {"mup.factors.atention.lr": {"choices": [2]}}}, (), 'mup.factors "atention" names no parameter'),
        ({"space": {"mup.factors.mlp.lrr": {"choices": [2]}}}, (), "mup.factors.mlp.lrr: unknown key"),
        ({"space": {"optim.muon.lr": {"choices": [0.1]}}}, (), "optim.muon.lr would do nothing under optim.kind adamw"),
        ({"space": {"optim.lr": {"log_unifrm": [1, 2]}}}, (), 'did you mean "log_uniform"?'),
        ({"space": {"optim.lr": {"log_uniform": [0, 1]}}}, (), "must be positive"),
        ({"space": {"optim.lr": {"uniform": [2, 1]}}}, (), "low < high"),
        ({"space": {"optim.lr": {"powers_of_two": [0.5, 1]}}}, (), "whole numbers"),
        ({"space": {"optim.lr": [1, 2]}}, (), "must be one of"),
        ({"space": {"optim.lr": {"uniform": [-1, 1]}}}, (), "optim.lr must be greater than 0, got -1"),
        ({"space": {"optim.warmup_steps": {"uniform": [0, 20]}}}, (), "must be less than train.steps"),
        ({"trails": 3}, (), 'trails: unknown key; did you mean "trials"?'),
        ({"trials": 0}, (), "trials must be a whole number of at least 1"),
        ({"sampler": "sobol"}, (), "sampler must be one of"),
        ({"sampler": "grid"}, (), "optim.lr, optim.warmup_steps is a range"),
        ({"halving": {"first_step": 5}}, (), "halving must be"),
        ({"halving": {"first_step": 5, "factor": 2}}, (), "must lie after the warm-up (9)"),
        ({"halving": {"first_step": 12, "factor": 2}}, ("optim.schedule=cosine",), "use constant or wsd"),
        ({"halving": {"first_step": 12, "factor": 2}, "seeds": 2}, (), "needs seeds 1"),
        ({}, ("train.validate_every=0",), "needs train.validate_every"),
        ({}, ("optim.lrr=1",), 'did you mean "optim.lr"?'),
    ],
)  # fmt: skip
def test_mistakes(keys: dict[str, Any], overrides: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        search(tmp_path, *overrides, **keys)
    assert message in str(caught.value)


def test_all_mistakes_of_a_space_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        search(tmp_path, space={"model.width": {"choices": [1]}, "optim.lr": {"uniform": [2, 1]}})
    assert "space.model.width" in str(caught.value)
    assert "space.optim.lr" in str(caught.value)


def test_muon_and_kinds_of_module_are_searched(tmp_path: Path) -> None:
    keys = ("optim.muon.lr", "optim.muon.weight_decay", "optim.muon.momentum", "mup.factors.attention.lr",
            "mup.factors.mlp.init")  # fmt: skip
    found = search(tmp_path, "optim.kind=muon", space={key: {"log_uniform": [0.1, 0.9]} for key in keys})
    values = point(found.space, "random", 0, 0)
    assert values is not None
    config = found.proxy(values)
    assert config.optim.muon.momentum == values["optim.muon.momentum"]
    assert config.mup.factors["attention"].lr == values["mup.factors.attention.lr"]
    assert config.mup.factors["mlp"].init == values["mup.factors.mlp.init"]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "search").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_searches(path: Path) -> None:
    found = parse_search(read(path), path.name, path.stem)
    assert found.target is not None
    assert load_config(found.target).mup.base_width == found.proxy().mup.base_width


def test_a_dot_tells_the_proxys_overrides_from_the_searchs() -> None:
    found = load_search("search/demo.yaml", ["trials=3", "train.steps=50"])
    assert (found.trials, found.proxy().train.steps) == (3, 50)


def test_trials_see_the_same_data_and_noise(tmp_path: Path) -> None:
    """Two trials of a seed differ in the searched keys and in their folder alone."""
    found = search(tmp_path, seeds=2)
    points = [point(found.space, "random", 0, number) or {} for number in range(2)]
    one, two = (found.run_config(tmp_path, n, 1, p).model_dump() for n, p in enumerate(points))
    assert one["train"] == two["train"]
    assert one["train"]["seed"] == found.proxy().train.seed + 1
    for key in SPACE:
        section, name = key.split(".")
        del one[section][name]
        del two[section][name]
    assert one.pop("run")["name"] == "0000_seed1"
    assert two.pop("run")["name"] == "0001_seed1"
    assert one == two
