"""What muP (and SP) say about one weight: pure arithmetic on its role, its optimizer and its two ratios.

Adam(W), multiplier form (Tensor Programs V, arXiv 2203.03466, Table 8; Zheng et al., arXiv 2505.15270):
a factor is relative to the base hyperparameter, so that at the base width every factor is 1.

Muon moves a matrix by lr x `polar_scale` x the polar factor of its momentum, whose singular values are all 1. So the
change has the spectral norm lr x sqrt(fan_out / fan_in), which is what muP wants of one at every width (Yang et al.,
arXiv 2310.17813): no further factor of the width is due on its learning rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Role = Literal["input", "hidden", "output", "vector", "fixed"]
ROLES: tuple[Role, ...] = get_args(Role)
Parametrization = Literal["mup", "sp"]
WeightDecayRule = Literal["independent", "sqrt", "coupled"]
EpsRule = Literal["constant", "width"]
Optimizer = Literal["adamw", "muon"]
DecayedSet = Literal["matrices", "all"]


@dataclass(frozen=True)
class Settings:
    """The choices that a table is built with.

    wd_rule: how lr x wd, by which both optimizers decay, goes with m = fan_in / base fan_in in a hidden weight:
        "independent" keeps it the same at every width, "sqrt" has it fall with 1 / sqrt(m), "coupled" with 1 / m. Under
        AdamW, whose lr falls with 1 / m, wd so grows with m, with sqrt(m), or not at all; under Muon, whose lr does not
        fall, it falls itself (1 / m is reported best with matrix optimizers, arXiv 2512.05620).
    eps_rule: "width" divides Adam's epsilon by m wherever gradients shrink with 1 / m; "constant" asks for an
        epsilon far below every gradient (1e-12).
    decay: which weights decay at all: "matrices" leaves out biases, gains, tables and position embeddings.
    branch_scale, branch_lr: factors for the blocks of a deeper model (see `depth_factors`). branch_scale is on what
        each block adds to the residual stream, and under eps_rule "width" also on the epsilon of the parameters in the
        blocks, whose gradients it shrinks; branch_lr is on the learning rate of these parameters, the weight decay
        being left alone. About depth alone, so SP has them as well.
    output_multiplier, role_lr: base hyperparameters, which SP has as well: a factor on the input of the output layers,
        and factors on the learning rate of roles (1 where none is given), the weight decay being left alone.
    factors: by kind of module or name pattern, each with any of `lr`, `weight_decay` and `init`, factors on these of
        every parameter that it names, with either optimizer. Base hyperparameters as role_lr, so SP has them as well.
    optimizer: "muon" gives the matrices of the backbone's kinds attention and mlp to Muon, and the rest to AdamW.
        muon_include and muon_exclude: kinds or name patterns that change this choice. muon_head_dim: features of a head
        where each head of query, key and value is orthogonalised on its own; None takes each of these three whole.
    """

    parametrization: Parametrization = "mup"
    wd_rule: WeightDecayRule = "independent"
    eps_rule: EpsRule = "constant"
    decay: DecayedSet = "matrices"
    branch_scale: float = 1.0
    branch_lr: float = 1.0
    output_multiplier: float = 1.0
    role_lr: Mapping[Role, float] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    optimizer: Optimizer = "adamw"
    muon_include: tuple[str, ...] = ()
    muon_exclude: tuple[str, ...] = ()
    muon_head_dim: int | None = None


@dataclass(frozen=True)
class Factors:
    """init: on the standard deviation; multiplier: on the layer's input; the rest: on the optimizer's settings."""

    init: float = 1.0
    multiplier: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def factors(
    role: Role, m_in: float, m_out: float, settings: Settings, inner: bool = False, optimizer: Optimizer = "adamw"
) -> Factors:
    """Factors of a weight whose fan_in is m_in, and fan_out m_out, times that of the base model.

    inner: an output weight that more layers follow. With 1 / m on its input alone what it gives at init would shrink
    with the width, and what follows it with that; sqrt(m) on its std keeps it.

    optimizer: the weight's own. Muon takes hidden weights alone, and has no epsilon.

    SP has none: its init formula is evaluated at the target's own shape (see `table.init_std`).
    """
    if settings.parametrization == "sp":
        return Factors(eps=1.0 if optimizer == "adamw" else 0.0)
    by_width = settings.eps_rule == "width"
    match role:
        case "hidden" if optimizer == "muon":
            decay = {"independent": 1.0, "sqrt": m_in**-0.5, "coupled": 1 / m_in}[settings.wd_rule]
            return Factors(init=m_in**-0.5, weight_decay=decay, eps=0.0)
        case "hidden":
            decay = {"independent": m_in, "sqrt": m_in**0.5, "coupled": 1.0}[settings.wd_rule]
            return Factors(m_in**-0.5, 1.0, 1 / m_in, decay, 1 / m_in if by_width else 1.0)
        case "output":
            return Factors(init=m_in**0.5 if inner else 1.0, multiplier=1 / m_in, eps=1 / m_in if by_width else 1.0)
        case "input" | "vector":
            return Factors(eps=1 / m_out if by_width else 1.0)
        case "fixed":
            return Factors()


def polar_scale(fan_in: int, fan_out: int) -> float:
    """What Muon multiplies the polar factor [fan_out, fan_in] by: the spectral norm that takes inputs with entries of
    size 1 to outputs with entries of size 1. It is Muon's own, so SP has it as well."""
    return (fan_out / fan_in) ** 0.5


def depth_factors(depth: int, base_depth: int | None, alpha: float) -> tuple[float, float]:
    """(branch_scale, branch_lr) of a model whose base hyperparameters hold at base_depth; None does not scale.

    CompleteP (arXiv 2505.01618) and Complete(d)P (arXiv 2512.22382), with L = depth / base_depth: a residual branch is
    multiplied by L^-alpha, and the learning rate of what is in the blocks by L^(alpha - 1). A step changes a
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
