"""Guidance by the route of a model (sample.guidance_by): what is predicted, by which tokens, and what refuses it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.forms import refusals
from models.model_config import ModelConfig
from tests.helpers.backbones import CHANNELS, condition_of, random_model
from tests.helpers.steps import built
from tests.unit.models.test_route import every_backbone, every_fuse, routed
from tests.unit.trainer.diffusion.test_route import kept_by
from tests.unit.trainer.diffusion.test_route import routed as route_keys
from tests.unit.trainer.evaluate.test_suite import MINIMAL
from trainer.config.load import load_config
from trainer.diffusion.ddpm import DDPM
from trainer.diffusion.ddpm_sampling import DDPMSampler
from trainer.diffusion.random import subset
from trainer.diffusion.route import Route
from trainer.diffusion.sampling import Euler, Predict, Sampler
from trainer.errors import ConfigError
from trainer.evaluate.generate import Generator, initial_noise
from trainer.evaluate.suite import SuiteConfig

SHAPE = (CHANNELS, 8, 8)  # 4 x 4 tokens
NUMBERS = [3, 4, 9]
TIMES = torch.tensor([0.7, 0.7, 0.7])


def guided_by(config: ModelConfig, model: Any, sampler: Sampler, guidance: float, found: list[Tensor]) -> Generator:
    """By the config's route; `found` takes what the sampler makes. The condition is of the prompt's number alone."""
    assert config.route is not None
    whole = condition_of(config, batch=3)

    def encode(prompts: list[str]) -> Any:
        assert "" not in prompts, "no empty caption is needed"
        rows = [int(prompt) for prompt in prompts]
        return type(whole)(*(part[rows].to(model.final.weight.dtype) if part.is_floating_point() else part[rows]
                             for part in whole))  # fmt: skip

    def decode(latents: Tensor) -> Tensor:
        found.append(latents)
        return latents

    route = Route(config.patch_size, config.route.kept, config.route.blocks)
    return Generator(model, encode, decode, SHAPE, sampler, guidance, None, torch.device("cpu"), route)


@pytest.mark.slow
@every_backbone
@every_fuse
@torch.no_grad()
def test_from_the_routed_prediction_to_the_full_one_and_beyond(kind: str, route: Any) -> None:
    config = routed(kind, route)
    model = random_model(config)
    keys, x = initial_noise(5, NUMBERS, SHAPE, torch.device("cpu"))
    kept = Route(config.patch_size, lambda tokens: 4, range(0)).kept_at(x, TIMES, keys)
    condition = condition_of(config, batch=3)
    full, by_part = (model(x, TIMES, condition, kept=each)[0] for each in (None, kept))
    assert not torch.allclose(full[:, :CHANNELS], by_part[:, :CHANNELS], atol=1e-2)

    def predicted(guidance: float) -> Tensor:
        found: list[Tensor] = []
        generate = guided_by(config, model, lambda predict, noise, keys: predict(noise, TIMES), guidance, found)
        generate.pixels(["0", "1", "2"], NUMBERS, seed=5)
        return found[0]

    assert torch.equal(predicted(1.0), full)
    none = predicted(0.0)
    assert torch.equal(none[:, :CHANNELS], by_part[:, :CHANNELS])
    assert torch.equal(none[:, CHANNELS:], full[:, CHANNELS:])  # a learned variance
    torch.testing.assert_close(
        predicted(2.5)[:, :CHANNELS], (2.5 * full - 1.5 * by_part)[:, :CHANNELS], rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mmdit", "dit"])
@every_fuse
def test_an_image_does_not_depend_on_its_batch(kind: str, route: Any) -> None:
    """Nor do its tokens, which are drawn anew for each image and at each step; here by a sampler of each family."""
    config = routed(kind, route)
    model = random_model(config, torch.float64)
    sampler: Sampler = Euler(4, 1.0) if kind == "mmdit" else DDPMSampler(DDPM("linear", True), "ancestral", 4)
    seen: list[Tensor | None] = []
    model.register_forward_pre_hook(lambda _, args, named: seen.append(named.get("kept")), with_kwargs=True)

    def in_double(predict: Predict, noise: Tensor, keys: Tensor) -> Tensor:
        return sampler(predict, noise.double(), keys)

    def images(rows: list[int]) -> tuple[Tensor, list[Tensor]]:
        seen.clear()
        found: list[Tensor] = []
        generate = guided_by(config, model, in_double, 1.5, found)
        generate.pixels([str(row) for row in rows], [NUMBERS[row] for row in rows], seed=5)
        return found[0], [kept for kept in seen if kept is not None]

    together, kept = images([0, 1, 2])
    assert len(kept) == len(seen) / 2 == 4
    assert len({tuple(row) for step in kept for row in step.tolist()}) == 12
    for rows in ([2, 0], [1]):
        apart, own = images(rows)
        for step, expected in zip(own, kept, strict=True):
            assert torch.equal(step, expected[rows])
        torch.testing.assert_close(apart, together[rows], rtol=1e-9, atol=1e-9)


def test_places_are_left_out_evenly_over_the_steps() -> None:
    """Of 50 steps each of 64 tokens is in a quarter: 12.5, within five deviations of the binomial's 3.1."""
    route = Route(2, lambda tokens: 16, range(0))
    keys, x = initial_noise(0, range(8), (4, 16, 16), torch.device("cpu"))
    counts, calls = torch.zeros(8, 64), list[Tensor]()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        calls.append(route.kept_at(x, t, keys))
        return x

    Euler(50, 1.0)(predict, x, keys)
    for kept in calls:
        counts += torch.zeros(8, 64).scatter(1, kept, 1.0)
    assert counts.sum() == 50 * 8 * 16
    assert (counts - 12.5).abs().max() < 5 * 3.1
    assert not torch.equal(calls[0], subset(keys, 64, 16, "route"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mmdit", "dit"])
def test_a_runs_grids_are_guided_by_its_route(kind: str, tmp_path: Path) -> None:
    keys = (*route_keys(kind, "sprint"), "data.shards=.cache/debug/train-{000000..000001}.tar", "sample.count=2",
            "train.sample_every=1", "sample.steps=2", "sample.guidance_by=route")  # fmt: skip
    with built(f"{kind}_debug_mup.yaml", tmp_path, *keys) as run, kept_by(run) as seen:
        run.sample(tmp_path / "a.png")
        assert [None if kept is None else kept.shape[1] for kept in seen] == [None, 16] * 2


def test_who_may_guide_by_a_route() -> None:
    message = r"sample\.guidance_by route needs a model with model\.route, and this one has none"
    with pytest.raises(ConfigError, match=message):
        load_config("mmdit_debug_mup", ["sample.guidance_by=route"])
    suite = SuiteConfig.model_validate(MINIMAL | {"guidance_by": "route"})
    with pytest.raises(ConfigError, match=message):
        suite.applied(load_config("dit_debug_mup"))
    keys = (*route_keys("dit"), "model.time_freq_shift=1")
    config = load_config("dit_debug_mup", keys)
    assert suite.applied(config).sample.guidance_by == "route"
    by_condition = suite.model_copy(update={"guidance_by": "condition"})
    assert by_condition.applied(suite.applied(config)).sample.guidance_by == "condition"
    assert list(refusals(config, "diffusers")) == []
    [reason] = refusals(load_config("dit_debug_mup", [*keys, "sample.guidance_by=route"]), "diffusers")
    assert "no pipeline of diffusers has a route to guide by (sample.guidance_by)" in reason
