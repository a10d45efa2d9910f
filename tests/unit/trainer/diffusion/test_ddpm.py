"""DDPM: its constants, its loss against numpy, its samplers against diffusers' own loop and a known distribution."""

import itertools
import math
import warnings
from typing import Any, Literal

import diffusers.schedulers.scheduling_ddpm as diffusers_ddpm
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from trainer.diffusion import ddpm as ours
from trainer.diffusion.ddpm import DDPM, BetaSchedule, betas
from trainer.diffusion.ddpm_sampling import DDPMSampler, SamplerName, _generators
from trainer.diffusion.flow import RectifiedFlow
from trainer.diffusion.random import at_step, integers, normal
from trainer.diffusion.sampling import Euler, guided
from trainer.evaluate.suite import load_suite
from trainer.evaluate.val_loss import levels, sample_losses

SCHEDULES: list[BetaSchedule] = ["linear", "scaled_linear"]
SAMPLERS: list[SamplerName] = ["ancestral", "ddim", "dpm_solver", "dpm_solver_sigma_min"]
SHAPE = (4, 3, 3)
KEYS = torch.tensor([7, -3, 0, 2**63 - 1, -(2**63), 123456789012345])
TIMESTEPS = [0, 0, 1, 500, 998, 999]
# By decimal arithmetic with 40 digits, at timesteps 0, 500 and 999 (posterior variance: 1, 500, 999).
BETA = {
    "linear": [0.0001, 0.01005995995995996, 0.02],
    "scaled_linear": [0.00085, 0.004814954141711879, 0.012],
}
ALPHAS_CUMPROD = {
    "linear": [0.9999, 0.0777966583650239, 4.0358297653756835e-05],
    "scaled_linear": [0.99915, 0.27633268382297477, 0.00466009851307724],
}
LOG_POSTERIOR_VARIANCE = {
    "linear": [-9.816725135295593, -4.600049739984908, -3.912023829100455],
    "scaled_linear": [-7.760242621622535, -5.337877954467583, -4.422905496196129],
}


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    """Values in and beyond the first and last 8-bit bins."""
    x = torch.randn(len(KEYS), *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0, 0, :2] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    return x.to(dtype)


def predictions(channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(len(KEYS), channels, *SHAPE[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype)


def times(timesteps: list[int]) -> Tensor:
    return torch.tensor(timesteps, dtype=torch.float32) / 1000


# ---------------------------------------------------------------------------------------------------------- constants
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_constants(schedule: BetaSchedule) -> None:
    beta = betas(schedule)
    assert (beta.dtype, beta.shape) == (torch.float64, (1000,))
    assert beta[[0, 500, 999]].tolist() == pytest.approx(BETA[schedule], rel=1e-13)
    tables = ours._tables(schedule, torch.device("cpu"))
    at = [0, 500, 999]
    assert tables.sqrt_abar[at].square().tolist() == pytest.approx(ALPHAS_CUMPROD[schedule], rel=1e-11)
    one_minus = [1 - a for a in ALPHAS_CUMPROD[schedule]]
    assert tables.sqrt_one_minus_abar[at].square().tolist() == pytest.approx(one_minus, rel=1e-11)
    variance = tables.log_posterior_variance
    assert variance[[1, 500, 999]].tolist() == pytest.approx(LOG_POSTERIOR_VARIANCE[schedule], rel=1e-11)
    assert float(variance[0]) == float(variance[1])
    assert tables.log_beta[at].tolist() == pytest.approx([math.log(b) for b in BETA[schedule]], rel=1e-13)
    assert float(tables.mean_per_noise[0]) == pytest.approx(math.sqrt(1 / ALPHAS_CUMPROD[schedule][0] - 1), rel=1e-11)


def test_constants_of_the_bound() -> None:
    assert pytest.approx(1 / 0.6931471805599453) == ours._BITS
    assert (ours._HALF_BIN, ours._LAST_BINS, ours._LEAST_PROBABILITY) == (1 / 255, 0.999, 1e-12)
    assert ours.TIMESTEPS == 1000


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_schedulers_have_our_alphas(schedule: BetaSchedule, name: SamplerName) -> None:
    scheduler = DDPMSampler(DDPM(schedule, False), name, 50).scheduler()
    exact = (1 - betas(schedule)).cumprod(0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=2e-5, atol=0)  # theirs are float32
    assert scheduler.alphas_cumprod[[0, 500, 999]].tolist() == pytest.approx(ALPHAS_CUMPROD[schedule], rel=2e-5)
    assert float(scheduler.init_noise_sigma) == 1
    assert scheduler.config.prediction_type == "epsilon"


# -------------------------------------------------------------------------------------------------------------- draws
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_draws_by_key(schedule: BetaSchedule) -> None:
    objective, x0 = DDPM(schedule, False), images(torch.float32)
    draw = objective.draw(x0, KEYS)
    assert draw.t.dtype == torch.float32
    timestep = (draw.t.double() * 1000).round()
    assert torch.equal(draw.t, timestep.float() / 1000)
    assert torch.equal(timestep.long(), integers(KEYS, 1000, "time"))
    assert torch.equal(draw.noise, normal(KEYS, SHAPE, "noise").float())
    assert torch.equal(draw.target, draw.noise)
    assert torch.equal(draw.x0, x0)
    assert draw.weight.tolist() == [1.0] * len(KEYS)
    abar = torch.from_numpy(np.cumprod(1 - betas(schedule).numpy()))[timestep.long()][:, None, None, None]
    torch.testing.assert_close(draw.x_t, (abar.sqrt() * x0 + (1 - abar).sqrt() * draw.noise).float())
    for rows in (torch.arange(len(KEYS)).flip(0), torch.tensor([2]), torch.tensor([1, 1, 3])):
        for part, whole in zip(objective.draw(x0[rows], KEYS[rows]), draw, strict=True):
            assert torch.equal(part, whole[rows])
    torch.manual_seed(5)
    assert torch.equal(objective.draw(x0, KEYS).x_t, draw.x_t)


def test_timesteps_are_uniform() -> None:
    numbers = integers(torch.arange(200_000), 1000, "time")
    counts = torch.bincount(numbers, minlength=1000)
    assert len(counts) == 1000, "none beyond 999"
    chi_squared = float(((counts - 200).double().square() / 200).sum())
    assert abs(chi_squared - 999) < 4 * math.sqrt(2 * 999)
    assert abs(float((numbers[1:].double() * numbers[:-1]).mean()) / 499.5**2 - 1) < 0.01, "neighbouring keys"


def test_draws_at_the_levels_of_validation() -> None:
    objective, x0 = DDPM("linear", False), images(torch.float32)
    seen = [objective.draw_at(x0, KEYS, torch.full((len(KEYS),), t)).t[0].item() for t in [0.0, *levels(), 1.0]]
    expected = [0, 62, 188, 312, 438, 562, 688, 812, 938, 999]  # halves are rounded to even
    assert seen == pytest.approx([n / 1000 for n in expected])


# --------------------------------------------------------------------------------------------------------------- loss
def reference_loss(schedule: str, x0: Tensor, noise: Tensor, timesteps: list[int], output: Tensor) -> np.ndarray:
    """MSE + bound in bits, from the definitions: posterior by Bayes' rule, the mean from the predicted x0."""
    ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[schedule]
    power = 1 if schedule == "linear" else 2
    beta = np.linspace(ends[0] ** (1 / power), ends[1] ** (1 / power), 1000) ** power
    alpha, abar = 1 - beta, np.cumprod(1 - beta)

    def posterior_variance(t: int) -> float:
        # Precisions add: that of x_t given x_{t-1}, and of x_{t-1} given x0.
        return 1 / (alpha[t] / beta[t] + 1 / (1 - abar[t - 1]))

    def posterior_mean(t: int, x_start: np.ndarray, x_t: np.ndarray) -> np.ndarray:
        if t == 0:
            return x_start
        sum_of_both = np.sqrt(alpha[t]) / beta[t] * x_t + np.sqrt(abar[t - 1]) / (1 - abar[t - 1]) * x_start
        return posterior_variance(t) * sum_of_both

    losses = []
    for row, t in enumerate(timesteps):
        start, true_noise = x0[row].numpy(), noise[row].numpy()
        eps, v = output[row, : len(start)].numpy(), output[row, len(start) :].numpy()
        x_t = np.sqrt(abar[t]) * start + np.sqrt(1 - abar[t]) * true_noise
        mean = posterior_mean(t, (x_t - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t]), x_t)
        low, high = np.log(posterior_variance(max(t, 1))), np.log(beta[t])
        variance = np.exp(low + (v + 1) / 2 * (high - low))
        if t > 0:
            true_variance = posterior_variance(t)
            gap = posterior_mean(t, start, x_t) - mean
            nats = 0.5 * (np.log(variance / true_variance) + (true_variance + gap**2) / variance - 1)
        else:
            cdf = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
            upper = np.where(start > 0.999, 1.0, cdf((start + 1 / 255 - mean) / np.sqrt(variance)))
            lower = np.where(start < -0.999, 0.0, cdf((start - 1 / 255 - mean) / np.sqrt(variance)))
            nats = -np.log(np.maximum(upper - lower, 1e-12))
        losses.append(np.mean((eps - true_noise) ** 2) + np.mean(nats) / np.log(2))
    return np.array(losses)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("near", [False, True])
def test_hybrid_loss_against_numpy(schedule: BetaSchedule, near: bool) -> None:
    """near: noise predicted almost right, so that the bin at timestep 0 is not out of reach."""
    objective, x0 = DDPM(schedule, learned_sigma=True), images()
    draw = objective.draw_at(x0, KEYS, times(TIMESTEPS))
    output = predictions(8)
    if near:
        output[:, :4] = draw.noise + 0.2 * output[:, :4]
    expected = reference_loss(schedule, x0, draw.noise, TIMESTEPS, output)
    losses = objective.loss(output, draw)
    assert (losses.shape, losses.dtype) == (KEYS.shape, torch.float64)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-9)
    halved = objective.loss(output, draw._replace(weight=torch.full_like(draw.weight, 0.5)))
    torch.testing.assert_close(halved, losses / 2)


def test_loss_in_float32_of_a_bf16_prediction() -> None:
    """Predicted almost right, or so wrong that the bin's probability is the least one: between the two, at timestep 0,
    it is a small difference of two numbers near 1, of which float32 has few digits, and others on each processor."""
    objective, x0 = DDPM("linear", learned_sigma=True), images(torch.float32)
    draw = objective.draw_at(x0, KEYS, times(TIMESTEPS))
    output = predictions(8, torch.float32)
    output[:, :4] = draw.noise + 0.2 * output[:, :4]
    output[0, 1, 2, 2] += 20  # at timestep 0
    output = output.bfloat16()
    losses = objective.loss(output, draw)
    assert losses.dtype == torch.float32
    expected = reference_loss("linear", x0.double(), draw.noise.double(), TIMESTEPS, output.double())
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_exact_parts_of_the_bound() -> None:
    """At t > 0 with the right noise and v = -1 the model is the posterior: the bound is 0; v = 1 is the upper bound."""
    objective, x0 = DDPM("linear", learned_sigma=True), images()
    draw = objective.draw_at(x0, KEYS, times([1, 10, 300, 500, 900, 999]))
    at_posterior = torch.cat([draw.noise, torch.full_like(draw.noise, -1)], 1)
    torch.testing.assert_close(objective.loss(at_posterior, draw), torch.zeros(6).double(), rtol=0, atol=1e-12)
    at_beta = torch.cat([draw.noise, torch.ones_like(draw.noise)], 1)
    ratio = math.exp(LOG_POSTERIOR_VARIANCE["linear"][1]) / BETA["linear"][1]
    bits = 0.5 * (ratio - 1 - math.log(ratio)) / math.log(2)
    assert float(objective.loss(at_beta, draw)[3]) == pytest.approx(bits, rel=1e-6)


def test_mean_is_detached_from_the_bound() -> None:
    """The noise is taught by the squared error alone, the variance by the bound alone."""
    objective = DDPM("linear", learned_sigma=True)
    draw = objective.draw_at(images(), KEYS, times(TIMESTEPS))
    output = predictions(8).requires_grad_()
    objective.loss(output, draw).sum().backward()
    assert output.grad is not None
    squared = 2 * (output.detach()[:, :4] - draw.noise) / draw.noise[0].numel()
    torch.testing.assert_close(output.grad[:, :4], squared)
    assert bool((output.grad[2:, 4:] != 0).all())
    assert bool(output.grad.isfinite().all())


def test_without_learned_sigma() -> None:
    objective = DDPM("scaled_linear", learned_sigma=False)
    draw = objective.draw_at(images(), KEYS, times(TIMESTEPS))
    output = predictions(4)
    expected = (output - draw.noise).square().mean((1, 2, 3))
    torch.testing.assert_close(objective.loss(output, draw), expected)
    with pytest.raises(AssertionError, match="8 channels predicted, expected 4"):
        objective.loss(predictions(8), draw)


def test_validation_measures_the_noise_alone() -> None:
    objective = DDPM("linear", learned_sigma=True)
    draw = objective.draw_at(images(), KEYS, times(TIMESTEPS))._replace(weight=torch.full((len(KEYS),), 7.0))
    output = predictions(8)
    expected = (output[:, :4] - draw.noise).square().mean((1, 2, 3))
    torch.testing.assert_close(objective.denoising_loss(output, draw), expected)
    flow = RectifiedFlow(0.0, 1.0, 1.0)
    drawn = flow.draw(images(), KEYS)
    assert torch.equal(flow.denoising_loss(output[:, :4], drawn), flow.loss(output[:, :4], drawn))

    class Constant(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Any) -> tuple[Tensor, None]:
            return torch.zeros(len(x), 8, *x.shape[2:], dtype=x.dtype), None

    class Rows:
        x0, condition, keys, weight = images(), None, KEYS, torch.ones(len(KEYS))

    losses = sample_losses(Constant(), objective, Rows(), [None])
    torch.testing.assert_close(losses[0, 3], normal(KEYS, SHAPE, "noise").square().mean((1, 2, 3)))


# ----------------------------------------------------------------------------------------------------------- samplers
def network(channels: int) -> Any:
    """A fixed function of x and t in place of a model, not linear in x."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        eps = torch.sin(3 * x) + t[:, None, None, None]
        return torch.cat([eps, torch.cos(2 * x)], 1)[:, :channels]

    return predict


def expected_scheduler(
    name: SamplerName, schedule: BetaSchedule, variance: Literal["learned_range", "fixed_small"]
) -> Any:
    """As a user of diffusers would write it."""
    start, end = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[schedule]
    shared: dict[str, Any] = {"beta_schedule": schedule, "beta_start": start, "beta_end": end}
    if name == "ancestral":
        return DDPMScheduler(**shared, variance_type=variance, clip_sample=False, timestep_spacing="linspace")
    if name == "ddim":
        return DDIMScheduler(**shared, clip_sample=False, timestep_spacing="trailing")
    if name == "dpm_solver_sigma_min":
        shared |= {"final_sigmas_type": "sigma_min"}
    return DPMSolverMultistepScheduler(**shared)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("learned", [False, True])
def test_sampler_is_the_loop_of_diffusers(name: SamplerName, schedule: BetaSchedule, learned: bool) -> None:
    predict = network(8 if learned else 4)
    noise = normal(KEYS, SHAPE, "noise").float()
    scheduler = expected_scheduler(name, schedule, "learned_range" if learned else "fixed_small")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # their use of numpy
        scheduler.set_timesteps(20)
    x = noise
    for number, timestep in enumerate(scheduler.timesteps):
        output = predict(x, torch.full((len(x),), timestep.item() / 1000))
        more = {"generator": _generators(KEYS, number)} if name == "ancestral" else {}
        if name != "ancestral":
            output = output[:, :4]
        x = scheduler.step(output, timestep, x, **more).prev_sample
    ours = DDPMSampler(DDPM(schedule, learned), name, 20)(predict, noise, KEYS)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)  # their betas are rounded to float32 on the way


@pytest.mark.parametrize(("steps", "final_order"), [(20, 2), (12, 2), (8, 1)])
def test_dpm_solver_ends_as_its_authors_do(steps: int, final_order: int) -> None:
    """By the update formulas of the paper (arXiv 2211.01095, algorithm 2), down to timestep 0."""
    abar = (1 - betas("linear")).cumprod(0).double()
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    lam = (alpha / sigma).log()
    times = [round(999 * (1 - i / steps)) for i in range(steps + 1)]
    predict = network(4)
    x = normal(KEYS, SHAPE, "noise").double()
    before = None
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        clean = (x - sigma[s] * predict(x, torch.full((len(x),), s / 1000))) / alpha[s]
        direction, h = clean, lam[t] - lam[s]
        if before is not None and (final_order == 2 or i < steps - 1):
            direction = clean + h / (2 * (lam[s] - lam[times[i - 1]])) * (clean - before)
        x, before = sigma[t] / sigma[s] * x - alpha[t] * torch.expm1(-h) * direction, clean
    sampled = DDPMSampler(DDPM("linear", False), "dpm_solver_sigma_min", steps)
    torch.testing.assert_close(
        sampled(predict, normal(KEYS, SHAPE, "noise").float(), KEYS), x.float(), rtol=1e-3, atol=1e-3
    )
    for suite in ("mjhq_30k", "coco_30k", "geneval"):  # these stand beside PixArt's numbers
        paths = [f"{key}=x" for key in ("network", "reference", "clip", "detector")]
        chosen = load_suite(suite, paths)[1].ddpm
        assert chosen is not None
        assert chosen.sampler == "dpm_solver_sigma_min"


@pytest.mark.parametrize("name", SAMPLERS)
def test_chain_of_timesteps(name: SamplerName) -> None:
    seen = DDPMSampler(DDPM("linear", False), name, 50).scheduler().timesteps.tolist()
    assert len(set(seen)) == 50
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 999
    if name == "ancestral":  # the official DiT's: 50 evenly spaced numbers from 0 to 999, rounded
        assert seen[::-1] == [round(i * 999 / 49) for i in range(50)]
    if name == "ddim":
        assert seen[-1] == 19


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_depend_on_their_key_alone(name: SamplerName) -> None:
    sampler, predict = DDPMSampler(DDPM("linear", True), name, 10), network(8)
    noise = normal(KEYS, SHAPE, "noise").float()
    whole = sampler(predict, noise, KEYS)
    torch.manual_seed(17)  # neither on the global generator, nor on an earlier call, the batch or the order
    state = torch.get_rng_state()
    assert torch.equal(sampler(predict, noise, KEYS), whole)
    assert torch.equal(torch.get_rng_state(), state)
    for rows in (torch.tensor([4]), torch.tensor([5, 2])):
        assert torch.equal(sampler(predict, noise[rows], KEYS[rows]), whole[rows])
    other = sampler(predict, noise, KEYS + 1)
    assert torch.equal(other, whole) == (name != "ancestral")


def test_noise_of_the_steps() -> None:
    keys = torch.arange(500)
    drawn = torch.stack(
        [torch.stack([torch.randn(64, generator=g) for g in _generators(keys, step)]) for step in range(3)]
    )
    assert len(drawn.unique()) > 0.999 * drawn.numel()
    for a, b in ((drawn[0], drawn[1]), (drawn[1], drawn[2]), (drawn[0, 1:], drawn[0, :-1])):
        assert abs(float((a * b).mean())) * math.sqrt(a.numel()) < 4
    assert not torch.equal(at_step(keys, 0), keys)
    assert len(torch.cat([at_step(keys, step) for step in range(1000)]).unique()) == 500_000


@pytest.mark.slow
@pytest.mark.parametrize(("v", "bound"), [(-1.0, "posterior"), (1.0, "beta"), (0.0, "middle")])
def test_learned_range_of_the_ancestral_step(v: float, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance of one full-length step is the bound that v = -1 or 1 names, their geometric mean at 0."""
    seen: dict[int, float] = {}  # x_t by timestep, in the order of the chain

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen[round(float(t[0]) * 1000)] = float(x)
        return torch.cat([torch.zeros_like(x), torch.full_like(x, v)], 1)

    def unit_noise_at_500(shape: tuple[int, ...], **_: Any) -> Tensor:
        return torch.full(shape, float(min(seen) == 500))

    monkeypatch.setattr(diffusers_ddpm, "randn_tensor", unit_noise_at_500)
    DDPMSampler(DDPM("linear", True), "ancestral", 1000)(predict, torch.zeros(1, 1, 1, 1), KEYS[:1])
    # With no noise predicted and none added before, x_t stays 0 down to 500, so that x_499 is the standard deviation
    # itself: a difference of two large x_t would lose it in float32.
    assert seen[500] == 0
    beta, posterior = BETA["linear"][1], math.exp(LOG_POSTERIOR_VARIANCE["linear"][1])
    expected = {"posterior": posterior, "beta": beta, "middle": math.sqrt(beta * posterior)}[bound]
    assert seen[499] ** 2 == pytest.approx(expected, rel=1e-4)  # the bounds are 9e-4 apart


MEAN, STD = 0.3, 0.5


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "steps", "learned"), [
    ("ancestral", 250, False), ("ancestral", 250, True), ("ddim", 100, False), ("dpm_solver", 50, False),
    ("dpm_solver", 50, True), ("dpm_solver_sigma_min", 50, True),
])  # fmt: skip
def test_samplers_recover_a_known_distribution(
    schedule: BetaSchedule, name: SamplerName, steps: int, learned: bool
) -> None:
    """Data N(0.3, 0.5^2): the best prediction of the noise is known, and with it each sampler must give the data."""
    abar = (1 - betas(schedule)).cumprod(0)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        a = abar[(t.double() * 1000).round().long()][:, None, None, None]
        eps = (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
        # The posterior's variance with x0 unknown is wider than the lower bound.
        return torch.cat([eps, torch.full_like(eps, -0.9)], 1) if learned else eps

    keys = torch.arange(40)
    noise = normal(keys, (1, 16, 16), "noise")
    samples = DDPMSampler(DDPM(schedule, learned), name, steps)(predict, noise, keys)
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(samples.std()) == pytest.approx(STD, rel=0.05)


# ----------------------------------------------------------------------------------------------------------- guidance
def test_guidance_on_three_channels() -> None:
    """The fourth channel and the variance are the conditional's, as in the official DiT."""
    x, t = predictions(4), times(TIMESTEPS)
    conditional, unconditional = predictions(8), -predictions(8) + 1
    output = guided(lambda x, t: conditional, lambda x, t: unconditional, 4.0, 3)(x, t)
    led = unconditional + 4 * (conditional - unconditional)
    assert torch.equal(output[:, :3], led[:, :3])
    assert torch.equal(output[:, 3:], conditional[:, 3:])
    output = guided(lambda x, t: conditional, lambda x, t: unconditional, 4.0)(x, t)
    assert torch.equal(output[:, :4], led[:, :4])
    assert torch.equal(output[:, 4:], conditional[:, 4:]), "the variance is never extrapolated"
    assert guided(network(8), network(8), 1.0, 3)(x, t).equal(network(8)(x, t))


@pytest.mark.parametrize("name", SAMPLERS)
def test_guided_sampling_with_learned_sigma(name: SamplerName) -> None:
    noise = normal(KEYS, SHAPE, "noise").float()
    predict = guided(network(8), lambda x, t: -network(8)(x, t), 2.0, 3)
    samples = DDPMSampler(DDPM("linear", True), name, 5)(predict, noise, KEYS)
    assert samples.shape == noise.shape
    assert bool(samples.isfinite().all())


def test_euler_as_a_sampler() -> None:
    x0, noise = images(), normal(KEYS, SHAPE, "noise")
    torch.testing.assert_close(Euler(7, 3.0)(lambda x, t: noise - x0, noise, KEYS), x0)
