"""What muP (and SP) say about one weight: pure arithmetic on its role and its two ratios.

Adam(W), multiplier form (Tensor Programs V, arXiv 2203.03466, Table 8; Zheng et al., arXiv 2505.15270):
a factor is relative to the base hyperparameter, so that at the base width every factor is 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Role = Literal["input", "hidden", "output", "vector", "fixed"]
ROLES: tuple[Role, ...] = get_args(Role)
Parametrization = Literal["mup", "sp"]
WeightDecayRule = Literal["independent", "sqrt", "coupled"]
EpsRule = Literal["constant", "width"]
DecayedSet = Literal["matrices", "all"]


@dataclass(frozen=True)
class Settings:
    """The choices that a table is built with.

    wd_rule: how the weight decay of a hidden weight grows with m = fan_in / base fan_in. torch's AdamW decays by
        lr x wd, so "independent" (m) keeps lr x wd the same at every width; "coupled" leaves wd alone.
    eps_rule: "width" divides Adam's epsilon by m wherever gradients shrink with 1 / m; "constant" asks for an
        epsilon far below every gradient (1e-12).
    decay: which weights decay at all: "matrices" leaves out biases, gains, tables and position embeddings.
    branch_scale, branch_lr: factors for the blocks of a deeper model (see `depth_factors`). branch_scale is on what
        each block adds to the residual stream, and under eps_rule "width" also on the epsilon of the parameters in the
        blocks, whose gradients it shrinks; branch_lr is on the learning rate of these parameters, the weight decay
        being left alone. About depth alone, so SP has them as well.
    output_multiplier, role_lr: base hyperparameters, which SP has as well: a factor on the input of the output layers,
        and factors on the learning rate of roles (1 where none is given), the weight decay being left alone.
    """

    parametrization: Parametrization = "mup"
    wd_rule: WeightDecayRule = "independent"
    eps_rule: EpsRule = "constant"
    decay: DecayedSet = "matrices"
    branch_scale: float = 1.0
    branch_lr: float = 1.0
    output_multiplier: float = 1.0
    role_lr: Mapping[Role, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Factors:
    """init: on the standard deviation; multiplier: on the layer's input; the rest: on the optimizer's settings."""

    init: float = 1.0
    multiplier: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def factors(role: Role, m_in: float, m_out: float, settings: Settings, inner: bool = False) -> Factors:
    """Factors of a weight whose fan_in is m_in, and fan_out m_out, times that of the base model.

    inner: an output weight that more layers follow. With 1 / m on its input alone what it gives at init would shrink
    with the width, and what follows it with that; sqrt(m) on its std keeps it.

    SP has none: its init formula is evaluated at the target's own shape (see `table.init_std`).
    """
    if settings.parametrization == "sp":
        return Factors()
    by_width = settings.eps_rule == "width"
    match role:
        case "hidden":
            decay = {"independent": m_in, "sqrt": m_in**0.5, "coupled": 1.0}[settings.wd_rule]
            return Factors(m_in**-0.5, 1.0, 1 / m_in, decay, 1 / m_in if by_width else 1.0)
        case "output":
            return Factors(init=m_in**0.5 if inner else 1.0, multiplier=1 / m_in, eps=1 / m_in if by_width else 1.0)
        case "input" | "vector":
            return Factors(eps=1 / m_out if by_width else 1.0)
        case "fixed":
            return Factors()


def depth_factors(depth: int, base_depth: int | None, alpha: float) -> tuple[float, float]:
    """(branch_scale, branch_lr) of a model whose base hyperparameters hold at base_depth; None does not scale.

    CompleteP (arXiv 2505.01618) and Complete(d)P (arXiv 2512.22382), with L = depth / base_depth: a residual branch is
    multiplied by L^-alpha, and the learning rate of what is in the blocks by L^(alpha - 1). One Adam step changes a
    branch in proportion to its learning rate, alike in all blocks, so that L of them change the residual stream by
    L x L^-alpha x L^(alpha - 1) = 1. At alpha = 1 learning rates stay; at alpha = 1/2 independent branches add up to
    the same size at init, and each block changes by less.
    """
    if base_depth is None:
        return 1.0, 1.0
    shallower = base_depth / depth
    return shallower**alpha, shallower ** (1 - alpha)


def decays(role: Role, dims: int, settings: Settings) -> bool:
    """Whether a weight with `dims` dimensions decays at all."""
    if settings.decay == "all":
        return True
    return role in ("input", "hidden", "output") or (role == "fixed" and dims >= 2)
