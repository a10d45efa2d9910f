"""How base hyperparameters follow the batch and the duration of a run: one number r, which moves four of them together.

    lr x sqrt(r)        1 - beta_i x r        eps / sqrt(r)        weight decay x sqrt(r)

With m_B the ratio of the target's batch to the proxy's, and m_D that of the images that they are trained on:

    completed-p    r = m_B / m_D    Complete(d)P (Mlodozeniec et al., arXiv 2512.22382)
    sqrt-batch     r = m_B          Adam's square-root rule (Malladi et al., arXiv 2205.10287)
    none           r = 1            the values are carried as they are

m_B / m_D is the ratio of the proxy's number of steps to the target's. At equal images both rules are the same;
sqrt-batch says nothing of a longer run, at the same batch nor at another.

The best learning rate's exponent in the duration can be measured (`search.py horizon`), and under completed-p it then
takes the place of the rule's -1/2: lr x sqrt(m_B) x m_D^exponent, at which sqrt(m_B) is the rule at equal images. What
lr x weight decay moves by stays r, so that the weight decay takes back what the learning rate is given.

The weight decay is torch's, which AdamW multiplies by the learning rate (optim.weight_decay is written so, with either
optim.decay, which chooses the weights that decay and not how). So lr x weight decay moves by r: the weights forget over
1 / (lr x weight decay) steps, Adam's means over 1 / (1 - beta_i), and 1 / r times the steps make of each the same share
of the run. Under mup.wd_rule "independent" every weight that decays has the base lr x weight decay at every width;
under the other rules hidden weights have it times a factor of the width, which r leaves alone.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

Rules = Literal["none", "sqrt-batch", "completed-p"]
RULES: tuple[Rules, ...] = get_args(Rules)


class Rates(NamedTuple):
    """Base hyperparameters that belong to a batch and a duration; weight_decay is torch's, beside lr."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Size(NamedTuple):
    """What a run is given. base_depth: at which its base hyperparameters hold, its own where no rule scales with it."""

    batch: int
    steps: int
    width: int
    depth: int
    base_depth: int


class Tested(NamedTuple):
    """Ratios of target to proxy within which a rule was found to hold. width, depth: either way."""

    batch: tuple[float, float]
    width: float = math.inf
    depth: float = math.inf
    least_beta2: float = 0.0


TESTED: dict[Rules, Tested] = {
    "none": Tested((0.0, math.inf)),
    "sqrt-batch": Tested((1 / 8, 8.0), least_beta2=0.9),
    "completed-p": Tested((1 / 8, 4.0), width=16.0, depth=32.0),
}
"""Complete(d)P names no range of the duration."""


def ratio(rules: Rules, proxy: Size, target: Size) -> float:
    """r of the module's equations."""
    batch = target.batch / proxy.batch
    return {"none": 1.0, "sqrt-batch": batch, "completed-p": proxy.steps / target.steps}[rules]


def lr_factor(proxy: Size, target: Size, exponent: float) -> float:
    """Of the learning rate under completed-p, by a measured exponent of it in the images of a run at one batch."""
    batch, images = target.batch / proxy.batch, target.batch * target.steps / (proxy.batch * proxy.steps)
    return batch**0.5 * images**exponent


def scaled(rates: Rates, r: float, lr_by: float | None = None) -> Rates:
    """The rates at r, with four significant digits. lr_by: what lr is multiplied by, in place of sqrt(r). Raises
    ValueError where a beta would leave [0, 1)."""
    factor: float = r**0.5 if lr_by is None else lr_by
    if r == 1.0 and factor == 1.0:
        return rates
    return Rates(
        lr=_rounded(rates.lr * factor),
        betas=(_beta("beta1", rates.betas[0], r), _beta("beta2", rates.betas[1], r)),
        eps=_rounded(rates.eps / r**0.5),
        weight_decay=_rounded(rates.weight_decay * r / factor),
    )


def _beta(name: str, beta: float, r: float) -> float:
    rest = _rounded((1 - beta) * r)
    found = float(f"{1 - rest:.12g}")
    if not 0 <= found < 1:
        raise ValueError(
            f"1 - {name} = {1 - beta:.4g} times r = {r:.4g} is {rest:.4g}, and {name} = {found:.4g} does not lie in "
            f"[0, 1): the rule has no such run; use a {'smaller' if r > 1 else 'larger'} r, so other steps or batch"
        )
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def untested(rules: Rules, proxy: Size, target: Size, rates: Rates) -> Iterator[str]:
    """What lies outside the ranges in which the rules were tested, with its numbers. rates: those of the target."""
    tested = TESTED[rules]
    batch, (low, high) = target.batch / proxy.batch, tested.batch
    if not low <= batch <= high:
        yield f"the batch is {batch:.4g} times the proxy's, tested are {low:.4g} to {high:.4g} times"
    for name, here, there, most in (
        ("width", proxy.width, target.width, tested.width),
        ("depth", proxy.depth, target.depth, tested.depth),
    ):
        if max(here / there, there / here) > most:
            yield f"the {name} is {there / here:.4g} times the proxy's, tested are factors up to {most:g}"
    if rules == "completed-p" and proxy.depth != target.depth and proxy.base_depth != target.base_depth:
        yield (
            f"the depth is {proxy.depth} in the proxy and {target.depth} in the target, without the rule for it: their "
            "mup.base_depth must be the same (the proxy's own depth in a target whose proxy has none)"
        )
    if rates.betas[1] < tested.least_beta2:
        yield f"beta2 would be {rates.betas[1]:.4g}, tested is at least {tested.least_beta2:g}"
