"""What a rectified flow can predict and be trained on beside its velocity, each against its own formula in float64."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.trainer.diffusion.test_flow import KEYS, SHAPE, images, spread_keys
from trainer.build.engine import build_objective, build_sampler
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.diffusion.flow import RectifiedFlow, shift_time, velocity_towards
from trainer.diffusion.random import normal, uniform
from trainer.diffusion.sampling import Euler, Predict, euler_times, guided
from trainer.errors import ConfigError
from trainer.evaluate.generate import Generator
from trainer.evaluate.val_loss import levels, sample_losses
from trainer.input.training_data import TrainingData
from trainer.parallel.mesh import World
from trainer.step import Encoded, micro_batch_losses

X_FLOW = RectifiedFlow(0.0, 1.0, 1.0, predict="x", x_clamp=0.2)
TIMES = torch.tensor([0.01, 0.1, 0.2, 0.5, 0.9, 1.0])
exact: Any = {"rtol": 1e-12, "atol": 1e-12}


def some(seed: int) -> Tensor:
    return torch.randn(len(KEYS), *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(t: Tensor) -> Tensor:
    return t.double()[:, None, None, None]


# ------------------------------------------------------------------------------------------------------- x-prediction
def test_the_loss_of_x_is_that_of_the_velocity() -> None:
    """Prediction and image are divided by the same clamped time."""
    x0, x_hat = images(dtype=torch.float64), some(1)
    draw = X_FLOW.draw_at(x0, KEYS, TIMES)
    losses = X_FLOW.loss(x_hat, draw)
    clamped = torch.tensor([0.2, 0.2, 0.2, 0.5, 0.9, 1.0]).double()
    torch.testing.assert_close(losses, (x_hat - x0).square().flatten(1).mean(1) / clamped.square(), rtol=1e-6, atol=0)
    velocity = (draw.x_t - x_hat) / column(TIMES)
    above = (velocity - (draw.noise - x0)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses[2:], above[2:], rtol=1e-6, atol=0)
    assert bool((losses[:2] < above[:2] / 2).all()), "below the clamp it weighs less"
    assert torch.equal(X_FLOW.loss(x0, draw), torch.zeros(len(KEYS)).double()), "the image itself is right at any time"


def test_times_and_noise_do_not_depend_on_the_prediction() -> None:
    x0 = images()
    for part, other in zip(
        RectifiedFlow(0.3, 0.9, 2.0).draw(x0, KEYS),
        RectifiedFlow(0.3, 0.9, 2.0, predict="x").draw(x0, KEYS),
        strict=True,
    ):
        assert torch.equal(part, other)


def test_an_x_loss_of_bf16_is_computed_in_float32() -> None:
    draw = X_FLOW.draw_at(images(), KEYS, TIMES)
    prediction = some(1).bfloat16()
    losses = X_FLOW.loss(prediction, draw)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, X_FLOW.loss(prediction.float(), draw), rtol=0, atol=0)


def test_validation_compares_models_whatever_they_predict() -> None:
    """The same velocity, put out as itself or as x, has the same validation loss, at all levels and for any clamp."""

    class Velocity(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Any) -> tuple[Tensor, None]:
            return torch.tanh(x) * column(t), None

    class Clean(Velocity):
        def forward(self, x: Tensor, t: Tensor, condition: Any) -> tuple[Tensor, None]:
            return x - column(t) * super().forward(x, t, condition)[0], None

    weight = torch.ones(len(KEYS))
    batch = Encoded(images(dtype=torch.float64), None, KEYS, weight, torch.tensor(0))
    by_velocity = sample_losses(Velocity(), RectifiedFlow(0.0, 1.0, 1.0), batch, [None])
    by_x = sample_losses(Clean(), X_FLOW, batch, [None])
    torch.testing.assert_close(by_x, by_velocity, rtol=1e-6, atol=0)
    assert min(levels()) < X_FLOW.x_clamp, "the comparison can fail: training would weigh the first level less"


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (7, 3.0), (50, 0.5)])
def test_a_perfect_x_leads_to_the_image(steps: int, shift: float) -> None:
    """In any number of steps, also where the last begins below the clamp of training."""
    x0, noise = images(dtype=torch.float64), normal(KEYS, SHAPE, "noise")
    sampler = Euler(steps, shift, "x")
    torch.testing.assert_close(sampler(lambda x, t: x0, noise, KEYS), x0, rtol=0, atol=1e-6)
    for wrong in (Euler(steps, shift), Euler(steps, shift, "velocity")):
        assert float((wrong(lambda x, t: x0, noise, KEYS) - x0).abs().max()) > 0.1, "x taken for velocity goes astray"


def test_euler_on_x_takes_the_steps_of_its_velocity() -> None:
    """Of a model that is not perfect, so that sign, time and number of conversions all count."""

    def clean(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) + column(t)

    x = noise = images(dtype=torch.float64)
    for t, t_next in pairwise(euler_times(5, 2.0)):
        x = x + (t_next - t) * (x - (torch.sin(x) + t)) / t
    torch.testing.assert_close(Euler(5, 2.0, "x")(clean, noise, KEYS), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [None, 2])
def test_guidance_of_x_is_guidance_of_its_velocity(channels: int | None) -> None:
    def clean(factor: float) -> Predict:
        return lambda x, t: torch.tanh(factor * x)

    def velocity(factor: float) -> Predict:
        return lambda x, t: velocity_towards(torch.tanh(factor * x), x, t)

    noise = images(dtype=torch.float64)
    of_x = Euler(6, 1.5, "x")(guided(clean(2.0), clean(0.5), 3.0, channels), noise, KEYS)
    of_velocity = Euler(6, 1.5)(guided(velocity(2.0), velocity(0.5), 3.0, channels), noise, KEYS)
    torch.testing.assert_close(of_x, of_velocity, **exact)


def test_images_of_a_model_that_predicts_x() -> None:
    """Through what sample grids, sample.py and evaluation call."""
    target = torch.linspace(-1, 1, 3 * 4 * 4).reshape(1, 3, 4, 4)

    class Oracle(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Any) -> tuple[Tensor, None]:
            return target.expand(len(x), -1, -1, -1), None

    config = load_config("mmdit_debug_mup", ["objective.predict=x"])
    sampler = build_sampler(config, resolve(config, 1))
    generate = Generator(Oracle(), lambda p: p, lambda x: x, (3, 4, 4), sampler, 4.0, None, torch.device("cpu"))
    torch.testing.assert_close(generate.pixels(["a", "b"], [0, 1], seed=3), target.expand(2, -1, -1, -1))


# --------------------------------------------------------------------------------------------------------------- times
def distance_to_uniform(sample: Tensor) -> float:
    """Kolmogorov-Smirnov, as normal_distance in test_flow.py: above 1.63 with p = 1 %."""
    values = sample.double().sort().values
    above = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    return math.sqrt(len(values)) * float(torch.maximum(above - values, values - above + 1 / len(values)).max())


def test_uniform_numbers() -> None:
    numbers = uniform(spread_keys(20_000), 2, "uniform")
    assert bool(((numbers > 0) & (numbers < 1)).all())
    assert distance_to_uniform(numbers[:, 0]) < 1.63
    assert distance_to_uniform(numbers[:, 1]) < 1.63
    centred = (numbers - 0.5) * math.sqrt(12)
    assert abs(float((centred[:, 0] * centred[:, 1]).mean())) * math.sqrt(len(numbers)) < 4


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_times_is_uniform_and_not_shifted(share: float) -> None:
    keys = spread_keys(20_000)
    x0 = images(1).expand(len(keys), -1, -1, -1)
    plain = RectifiedFlow(0.5, 0.7, 3.0).draw(x0, keys)
    mixed = RectifiedFlow(0.5, 0.7, 3.0, uniform_share=share).draw(x0, keys)
    even = mixed.t != plain.t
    count = int(even.sum())
    assert abs(count - share * len(keys)) < 4 * math.sqrt(share * (1 - share) * len(keys))
    assert distance_to_uniform(mixed.t[even]) < 1.63
    assert distance_to_uniform(shift_time(mixed.t[even], 3.0)) > 1.63, "a shift would be seen"
    assert torch.equal(mixed.noise, plain.noise)
    rows = torch.tensor([5, 3, 19_999])
    assert torch.equal(RectifiedFlow(0.5, 0.7, 3.0, uniform_share=share).draw(x0[rows], keys[rows]).t, mixed.t[rows])


def test_all_times_uniform() -> None:
    keys = spread_keys(5000)
    flow = RectifiedFlow(1.0, 1.0, 4.0, uniform_share=1.0)
    assert distance_to_uniform(flow.draw(images(1).expand(len(keys), -1, -1, -1), keys).t) < 1.63


# --------------------------------------------------------------------------------------------------- contrastive term
CONTRAST = 0.3


@pytest.mark.parametrize("predict", ["velocity", "x"])
def test_the_contrastive_term_against_a_loop(predict: Any) -> None:
    flow = RectifiedFlow(0.0, 1.0, 1.0, predict=predict, x_clamp=0.2, contrastive_weight=CONTRAST)
    x0, output = images(dtype=torch.float64), some(2)
    draw = flow.draw_at(x0, KEYS, TIMES)
    counts = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    losses = flow.loss(output, draw, counts)
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)):
        velocity, own, others = output[row], draw.noise[row] - x0[row], draw.noise[other] - x0[other]
        if predict == "x":
            at = max(0.2, float(TIMES[row]))
            velocity, own = ((draw.x_t[row] - x) / at for x in (output[row], x0[row]))
        expected = (velocity - own).square().mean()
        if other != 1:  # row 1 holds no sample
            expected -= CONTRAST * (velocity - others).square().mean()
        torch.testing.assert_close(losses[row], expected, rtol=1e-6, atol=1e-12)


def test_the_contrastive_term_does_not_depend_on_micro_batches() -> None:
    flow = RectifiedFlow(0.0, 1.0, 1.0, contrastive_weight=CONTRAST)
    x0, output, counts = images(dtype=torch.float64), some(2), torch.tensor([1.0, 0, 1, 1, 0, 0])
    whole = flow.loss(output, flow.draw(x0, KEYS), counts)
    for size in (2, 4, 6):
        parts = [
            flow.loss(output[rows], flow.draw(x0[rows], KEYS[rows]), counts[rows])
            for rows in torch.arange(len(KEYS)).split(size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    odd = [
        flow.loss(output[rows], flow.draw(x0[rows], KEYS[rows]), counts[rows])
        for rows in torch.arange(len(KEYS)).split(3)
    ]
    assert not torch.equal(torch.cat(odd), whole), "which is why odd micro-batches are refused"


def test_a_row_without_another_has_no_contrastive_term() -> None:
    flow, plain = RectifiedFlow(0.0, 1.0, 1.0, contrastive_weight=CONTRAST), RectifiedFlow(0.0, 1.0, 1.0)
    draw = plain.draw(images(3), KEYS[:3])
    output = some(2)[:3].float()
    assert float(flow.loss(output, draw)[2]) == float(plain.loss(output, draw)[2])
    assert bool((flow.loss(output, draw)[:2] < plain.loss(output, draw)[:2]).all())


def test_validation_has_no_contrastive_term() -> None:
    flow, plain = RectifiedFlow(0.0, 1.0, 1.0, contrastive_weight=CONTRAST), RectifiedFlow(0.0, 1.0, 1.0)
    draw, output = plain.draw(images(), KEYS), some(2).float()
    assert torch.equal(flow.denoising_loss(output, draw), plain.loss(output, draw))


def test_a_step_contrasts_with_no_hole() -> None:
    """micro_batch_losses tells the objective which rows hold a sample."""
    flow, plain = RectifiedFlow(0.0, 1.0, 1.0, contrastive_weight=CONTRAST), RectifiedFlow(0.0, 1.0, 1.0)
    encoded = Encoded(images(4), None, KEYS[:4], torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor(0))

    def model(x: Tensor, t: Tensor, condition: Any, features_at: int | None) -> tuple[Tensor, None]:
        return torch.sin(x), None

    with_term, without = (micro_batch_losses(model, each, None, encoded).per_sample for each in (flow, plain))
    assert float(with_term[0]) == float(without[0])
    assert bool((with_term[1:] < without[1:]).all())


@pytest.mark.parametrize(
    ("world_size", "batch", "micro_batch", "refused"),
    [
        (1, 8, "null", None),
        (2, 8, "null", None),
        (1, 8, "4", None),
        (1, 10, "6", None),  # parted evenly that would be 5 and 5: it takes 4
        (2, 6, "null", r"multiple of 2 x 2 processes, got 6; the nearest is 8$"),
        (2, 2, "null", r"got 2; the nearest is 4$"),
        (1, 8, "1", r"micro_batch_size 0\.00390625 has no room for two samples: the least is 0\.0078125$"),
    ],
)
def test_pairs_stay_together(world_size: int, batch: int, micro_batch: str, refused: str | None) -> None:
    """micro_batch: in samples; at 16 pixels one of 256² pixels is 256 of them."""
    size = micro_batch if micro_batch == "null" else int(micro_batch) / 256
    config = load_config(
        "mmdit_debug_mup",
        ["objective.contrastive_weight=0.05", f"train.global_batch_size={batch}", f"train.micro_batch_size={size}",
         "data.shards=synthetic", "data.resolution=16"],
    )  # fmt: skip
    world = World(0, world_size, torch.device("cpu"), None, None, None)  # type: ignore[arg-type] (no process group)
    if refused is None:
        TrainingData(config, resolve(config, world_size), world)
        return
    with pytest.raises(ConfigError, match=rf"objective\.contrastive_weight .*{refused}"):
        TrainingData(config, resolve(config, world_size), world)


# ----------------------------------------------------------------------------------------------------------- the config
def test_every_key_reaches_the_objective() -> None:
    keys = {"predict": "x", "x_clamp": 0.1, "uniform_share": 0.2, "contrastive_weight": 0.05}
    config = load_config("mmdit_debug_mup", [f"objective.{key}={value}" for key, value in keys.items()])
    objective = build_objective(config, resolve(config, 1))
    assert {key: getattr(objective, key) for key in keys} == keys
    assert build_sampler(config, resolve(config, 1)) == Euler(config.sample.steps, resolve(config, 1).time_shift, "x")
