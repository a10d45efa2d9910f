"""Draws by key, rectified flow, the sampler, learning-rate factors and the EMA, each against its own formula."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.diffusion.flow import RectifiedFlow, shift_time
from trainer.diffusion.random import PURPOSES, bits, normal
from trainer.diffusion.sampling import euler, euler_times, guided
from trainer.ema import EMA
from trainer.lr_schedule import Schedule, lr_factor

FLOW = RectifiedFlow(mean=0.0, std=1.0, shift=1.0)
SHAPE = (3, 4, 4)
KEYS = torch.tensor([7, -3, 0, 2**63 - 1, -(2**63), 123456789012345])


def images(count: int = len(KEYS), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def spread_keys(count: int) -> Tensor:
    """Neighbours, the worst case for a generator: real keys are hashes of neighbouring positions."""
    return torch.arange(count, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------- numbers from a key
def splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., 2014) on uint64, written anew."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def reference_words(key: int, count: int, purpose: bytes) -> np.ndarray:
    with np.errstate(over="ignore"):
        tag = np.uint64(int.from_bytes(purpose[:4], "big"))
        start = splitmix(splitmix(np.array([key], np.int64).view(np.uint64)) ^ tag)
        return splitmix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def reference_normals(key: int, count: int, purpose: bytes) -> np.ndarray:
    """Box-Muller on the two halves of each word."""
    words = reference_words(key, (count + 1) // 2, purpose)
    high = ((words >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32
    low = ((words & np.uint64(0xFFFFFFFF)).astype(np.float64) + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(high)), 2 * np.pi * low
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()[:count]


# Made by reference_words and reference_normals: a checkpoint of last year must see the same draws.
GOLDEN_WORDS = {
    (1, "time"): [0x4AC3E6DFEDAAEA03, 0x39601DEBD881A75F],
    (1, "noise"): [0xF9A05209E758AC06, 0xAEB7242B4C345F6C],
    (-2, "time"): [0x14AA3B4C92B89D9F, 0x4CC37C6AFAEBE0A0],
    (-2, "noise"): [0xCFAE1400EF163D1, 0x9A5841DF0E4106B],
}
GOLDEN_NORMALS = {
    1: [0.18468593682784626, -0.1277355898359835, -0.25793251262625344],
    -2: [2.279630010304081, 0.8756840460291078, 2.386632398553068],
}


@pytest.mark.parametrize(("key", "purpose"), list(GOLDEN_WORDS))
def test_golden_words(key: int, purpose: str) -> None:
    ours = bits(torch.tensor([key]), 2, purpose)[0].numpy().view(np.uint64)
    assert [int(word) for word in ours] == GOLDEN_WORDS[key, purpose]


@pytest.mark.parametrize("key", list(GOLDEN_NORMALS))
def test_golden_normals(key: int) -> None:
    """To the rounding of sine and logarithm, which differ between devices."""
    assert normal(torch.tensor([key]), (3,), "noise")[0].tolist() == pytest.approx(GOLDEN_NORMALS[key], abs=1e-12)


@pytest.mark.parametrize("purpose", list(PURPOSES))
def test_equals_the_reference(purpose: str) -> None:
    for key, row in zip(KEYS.tolist(), normal(KEYS, (5, 3), purpose), strict=True):
        np.testing.assert_allclose(row.ravel(), reference_normals(key, 15, purpose.encode()), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "pick",
    [
        pytest.param(lambda n: [torch.arange(n).flip(0)], id="order"),
        pytest.param(lambda n: [torch.tensor([2]), torch.arange(2, n)], id="batch composition"),
        pytest.param(lambda n: list(torch.arange(n).split(4)), id="micro-batches"),
        pytest.param(lambda n: [torch.tensor([1, 1, 3])], id="repeated"),
    ],
)
def test_draw_depends_on_the_key_alone(pick: Callable[[int], list[Tensor]]) -> None:
    x0 = images()
    whole = FLOW.draw(x0, KEYS)
    for rows in pick(len(KEYS)):
        for part, all_rows in zip(FLOW.draw(x0[rows], KEYS[rows]), whole, strict=True):
            assert torch.equal(part, all_rows[rows])
    torch.manual_seed(123)  # nor on the global generator
    assert torch.equal(FLOW.draw(x0, KEYS).noise, whole.noise)


def test_draws_of_a_key_do_not_depend_on_the_image() -> None:
    one, other = FLOW.draw(images(), KEYS), FLOW.draw(images() + 1, KEYS)
    assert torch.equal(one.t, other.t)
    assert torch.equal(one.noise, other.noise)


def normal_distance(sample: Tensor) -> float:
    """Kolmogorov-Smirnov: sqrt(n) x the largest distance to the normal distribution; above 1.63 with p = 1 %."""
    values = sample.double().flatten().sort().values
    cdf = 0.5 * (1 + torch.erf(values / math.sqrt(2)))
    above = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    return math.sqrt(len(values)) * float(torch.maximum(above - cdf, cdf - above + 1 / len(values)).max())


@pytest.mark.slow
@pytest.mark.parametrize("purpose", list(PURPOSES))
def test_normal_distribution(purpose: str) -> None:
    numbers = normal(spread_keys(80_000), (25,), purpose)
    n = numbers.numel()
    assert normal_distance(numbers) < 1.63
    # Each bound is 4 standard errors of its moment.
    assert abs(float(numbers.mean())) < 4 / math.sqrt(n)
    assert abs(float(numbers.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float(numbers.pow(3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float(numbers.pow(4).mean()) - 3) < 4 * math.sqrt(96 / n)
    assert float(numbers.abs().max()) < 7
    # One number from each key, as times are drawn: neighbouring keys are no lattice.
    assert normal_distance(numbers[:, 0]) < 1.63


def test_the_distance_can_fail() -> None:
    numbers = normal(spread_keys(4000), (25,), "noise")
    assert normal_distance(numbers * 1.02) > 1.63
    assert normal_distance(numbers + 0.02) > 1.63


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors."""
    return abs(float((a * b).mean())) * math.sqrt(a.numel())


def test_streams_are_independent() -> None:
    keys = spread_keys(4000)
    numbers = {purpose: normal(keys, (24,), purpose) for purpose in PURPOSES}
    names = list(numbers)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert correlation(numbers[a], numbers[b]) < 4, (a, b)
            assert correlation(numbers[a].square() - 1, (numbers[b].square() - 1) / 2) < 4, (a, b)
    noise = numbers["noise"]
    assert correlation(noise[1:], noise[:-1]) < 4, "neighbouring keys"
    assert correlation(noise[:, 1:], noise[:, :-1]) < 4, "neighbouring numbers"
    assert correlation(noise[:, ::2].square() - 1, (noise[:, 1::2].square() - 1) / 2) < 4, "the two of one word"
    assert len(noise.unique()) == noise.numel(), "no number comes twice"


# --------------------------------------------------------------------------------------------------------------- flow
@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.5, 0.7, 3.0)])
def test_times_are_a_shifted_sigmoid_of_a_normal(mean: float, std: float, shift: float) -> None:
    keys = spread_keys(5000)
    t = RectifiedFlow(mean, std, shift).draw(images(1).expand(len(keys), -1, -1, -1), keys).t
    assert t.dtype == torch.float32
    assert t.shape == keys.shape
    assert bool(((t > 0) & (t < 1)).all())
    u = t.double() / (shift - (shift - 1) * t.double())  # the inverse of SD3's equation 23
    assert normal_distance((torch.logit(u) - mean) / std) < 1.63
    reference = reference_normals(7, 1, b"time")[0]
    u0 = 1 / (1 + math.exp(-(mean + std * reference)))
    expected = shift * u0 / (1 + (shift - 1) * u0)
    assert float(t[7]) == pytest.approx(expected, rel=1e-6)


def test_shift_moves_towards_the_noise() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert shift_time(t, 1.0).tolist() == t.tolist()
    assert shift_time(t, 3.0).tolist() == pytest.approx([0, 0.5, 0.75, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interpolation_and_target(dtype: torch.dtype) -> None:
    x0 = images(dtype=dtype)
    draw = RectifiedFlow(0.2, 0.9, 2.0).draw(x0, KEYS)
    assert draw.noise.dtype == draw.x_t.dtype == draw.target.dtype == dtype
    assert draw.weight.tolist() == [1.0] * len(KEYS)
    t = draw.t.to(dtype)[:, None, None, None]
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-6}
    torch.testing.assert_close(draw.x_t - t * draw.target, x0, **close)
    torch.testing.assert_close(draw.x_t + (1 - t) * draw.target, draw.noise, **close)
    torch.testing.assert_close(draw.noise, normal(KEYS, SHAPE, "noise").to(dtype), rtol=0, atol=0)


def test_ends_of_the_path() -> None:
    x0 = images()
    zero, one = (FLOW.draw_at(x0, KEYS, torch.full((len(KEYS),), t)) for t in (0.0, 1.0))
    assert torch.equal(zero.x_t, x0)
    assert torch.equal(one.x_t, one.noise)
    assert torch.equal(zero.noise, one.noise), "the noise is the key's, whatever the time"


def test_loss_is_a_mean_per_sample() -> None:
    draw = FLOW.draw(images(), KEYS)
    offset = torch.arange(1.0, len(KEYS) + 1)
    losses = FLOW.loss(draw.target + offset[:, None, None, None], draw)
    assert losses.shape == KEYS.shape
    torch.testing.assert_close(losses, offset.square())
    halved = FLOW.loss(draw.target + 1, draw._replace(weight=torch.full_like(draw.weight, 0.5)))
    torch.testing.assert_close(halved, torch.full_like(losses, 0.5))


def test_loss_of_a_bf16_prediction_is_float32() -> None:
    """A mean in bf16 would be wrong in the third digit."""
    draw = FLOW.draw(images(), KEYS)
    prediction = (draw.target + 0.3).bfloat16()
    losses = FLOW.loss(prediction, draw)
    assert losses.dtype == torch.float32
    exact = (prediction.double() - draw.target.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0)
    rounded = (prediction - draw.target.bfloat16()).square().flatten(1).mean(1).double()
    assert float(((rounded - exact) / exact).abs().max()) > 1e-5, "the comparison can fail"


def test_loss_in_float64() -> None:
    draw = FLOW.draw(images(dtype=torch.float64), KEYS)
    assert FLOW.loss(draw.target, draw).dtype == torch.float64


# ------------------------------------------------------------------------------------------------------------ sampler
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times(shift: float) -> None:
    times = euler_times(4, shift)
    assert times == pytest.approx([shift * u / (1 + (shift - 1) * u) for u in (1, 0.75, 0.5, 0.25, 0)])
    assert (times[0], times[-1]) == (1.0, 0.0)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (7, 3.0)])
def test_euler_is_exact_for_a_constant_field(steps: int, shift: float) -> None:
    """The straight path of one image: velocity noise - x0 leads from noise to x0 in any number of steps."""
    x0, noise = images(dtype=torch.float64), normal(KEYS, SHAPE, "noise")
    torch.testing.assert_close(euler(lambda x, t: noise - x0, noise, euler_times(steps, shift)), x0)


def test_euler_on_a_linear_field() -> None:
    """dx/dt = x: each step multiplies by 1 + dt; an implicit or a midpoint step would not."""
    times = euler_times(5, 2.0)
    factor = math.prod(1 + (b - a) for a, b in pairwise(times))
    assert factor != pytest.approx(math.exp(-1), rel=1e-2), "far from the true solution"
    noise = images(dtype=torch.float64)
    torch.testing.assert_close(euler(lambda x, t: x, noise, times), noise * factor)


def test_euler_evaluates_at_the_start_of_each_step() -> None:
    seen: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    noise, times = images(), euler_times(3, 2.0)
    assert torch.equal(euler(velocity, noise, times), noise)
    assert [t.tolist() for t in seen] == [pytest.approx([time] * len(noise)) for time in times[:-1]]
    assert all(t.dtype == torch.float32 for t in seen)


def test_guidance() -> None:
    x, t = images(), torch.full((len(KEYS),), 0.5)
    torch.testing.assert_close(guided(lambda x, t: 3 * x, lambda x, t: x, 4.0)(x, t), x + 4 * (3 * x - x))
    assert torch.equal(guided(lambda x, t: 3 * x, lambda x, t: x, 0.0)(x, t), x)


def test_no_unconditional_call_at_guidance_1() -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("computed")

    x, t = images(), torch.full((len(KEYS),), 0.5)
    assert torch.equal(guided(lambda x, t: 3 * x, never, 1.0)(x, t), 3 * x)
    with pytest.raises(AssertionError, match="computed"):
        guided(lambda x, t: 3 * x, never, 1.5)(x, t)


# --------------------------------------------------------------------------------------------------------- lr factors
CORNERS: list[tuple[Schedule, list[tuple[int, float]]]] = [
    # 100 updates, 10 of warm-up, wsd falls over the last 20.
    ("constant", [(0, 0.1), (8, 0.9), (9, 1.0), (10, 1.0), (55, 1.0), (99, 1.0)]),
    ("linear", [(0, 0.1), (8, 0.9), (9, 1.0), (10, 1.0), (55, 0.5), (99, 1 / 90)]),
    ("cosine", [(0, 0.1), (9, 1.0), (10, 1.0), (40, 0.75), (55, 0.5), (99, 0.5 * (1 + math.cos(math.pi * 89 / 90)))]),
    ("wsd", [(0, 0.1), (9, 1.0), (10, 1.0), (79, 1.0), (80, 1.0), (81, 0.95), (90, 0.5), (99, 0.05)]),
]


@pytest.mark.parametrize(("schedule", "corners"), CORNERS)
def test_lr_factor(schedule: Schedule, corners: list[tuple[int, float]]) -> None:
    for step, expected in corners:
        assert lr_factor(step, schedule, 10, 20, 100) == pytest.approx(expected), step


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_lr_factor_without_warmup(schedule: Schedule) -> None:
    """No update is wasted on a rate of 0, neither the first nor the last; a run of one step trains."""
    factors = [lr_factor(step, schedule, 0, 20, 100) for step in range(100)]
    assert factors[0] == 1.0
    assert min(factors) > 0
    assert factors == sorted(factors, reverse=True)
    assert lr_factor(0, schedule, 0, 1, 1) == 1.0


# ---------------------------------------------------------------------------------------------------------------- EMA
NO, YES = torch.tensor(0.0), torch.tensor(1.0)


def weights(value: float = 1.0) -> dict[str, Tensor]:
    return {"a": torch.full((2, 3), value), "b": torch.full((5,), 2 * value), "c": torch.tensor(3 * value)}


def test_decay_warms_up() -> None:
    ema = EMA(weights(), [0.99], warmup=True)
    assert [ema.decay_at(0.99, n) for n in (0, 1, 9)] == pytest.approx([1 / 10, 2 / 11, 10 / 19])
    assert ema.decay_at(0.99, 889) == pytest.approx(890 / 899)  # the last step of the warm-up: 0.98999
    assert ema.decay_at(0.99, 892) == 0.99
    assert EMA(weights(), [0.99], warmup=False).decay_at(0.99, 0) == 0.99


@pytest.mark.parametrize("warmup", [True, False])
def test_update_against_scalars(warmup: bool) -> None:
    """Several decays side by side, each as one python number after the other."""
    live, decays = weights(), (0.5, 0.99)
    ema = EMA(live, decays, warmup)
    expected = dict.fromkeys(decays, 1.0)
    for step in range(6):
        value = 1.0 + (step + 1) ** 2
        for name, fresh in weights(value).items():
            live[name].copy_(fresh)  # in place, as an optimizer does
        ema.update(step, NO)
        for decay in decays:
            d = min(decay, (1 + step) / (10 + step)) if warmup else decay
            expected[decay] = d * expected[decay] + (1 - d) * value
    for decay in decays:
        for name, reference in weights(expected[decay]).items():
            torch.testing.assert_close(ema.shards[decay][name], reference)
    assert not math.isclose(expected[0.5], expected[0.99], rel_tol=1e-2) or warmup


def test_averages_are_copies() -> None:
    live = weights()
    ema = EMA(live, [0.9], warmup=False)
    live["a"].zero_()
    assert ema.shards[0.9]["a"].tolist() == weights()["a"].tolist()
    assert set(ema.tensors()) == {"ema_0.9/a", "ema_0.9/b", "ema_0.9/c"}
    assert ema.tensors()["ema_0.9/a"] is ema.shards[0.9]["a"]
    assert set(EMA(live, [0.9, 0.5], warmup=False).tensors([0.5])) == {"ema_0.5/a", "ema_0.5/b", "ema_0.5/c"}


def test_reset() -> None:
    live = weights()
    ema = EMA(live, [0.9, 0.5], warmup=False)
    live["a"].zero_()
    ema.reset([0.5])
    assert ema.shards[0.5]["a"].tolist() == live["a"].tolist()
    assert ema.shards[0.9]["a"].tolist() == weights()["a"].tolist()


def test_skipped_step_leaves_averages_alone() -> None:
    live = weights()
    ema = EMA(live, [0.5, 0.9], warmup=False)
    for tensor in live.values():
        tensor.add_(7)
    ema.update(0, YES)
    for shards in ema.shards.values():
        assert all(torch.equal(shards[name], tensor) for name, tensor in weights().items())
    ema.update(0, NO)
    assert float(ema.shards[0.5]["c"]) == pytest.approx(3 + 3.5), "the flag alone made the difference"


def test_float64_averages() -> None:
    live = {"a": torch.zeros(3, dtype=torch.float64)}
    ema = EMA(live, [0.9], warmup=False)
    live["a"].add_(1 + 1e-12)
    ema.update(0, NO)
    torch.testing.assert_close(ema.shards[0.9]["a"], torch.full((3,), 0.1 * (1 + 1e-12)).double(), rtol=1e-7, atol=0)
    assert ema.shards[0.9]["a"].dtype == torch.float64
