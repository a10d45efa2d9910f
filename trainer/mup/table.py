"""MuTable: one row per parameter NAME with its role, optimizer, init, multiplier, lr, weight decay and epsilon.

Built from the shapes of three models on the meta device (base, delta, target) before anything is sharded, and
keyed by name, because attributes on tensors do not survive sharding, materialisation or a copy. A dimension is
infinite if it differs between base and delta; which dimensions are infinite, and the class of the owning module,
give the role. Where they cannot, the model must declare it; what is undecidable, contradicting or unused raises.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

from .kinds import ChoiceError, Kinds, factors_by_name, named, of_muon
from .rules import Optimizer, Role, Settings, decays, factors, polar_scale

VERSION = 1
_OPTIONS = ("branch_scale", "branch_lr", "output_multiplier", "role_lr", "factors", "optimizer", "muon_include",
            "muon_exclude", "muon_head_dim")  # fmt: skip
_COLUMNS = {"lr": "lr", "weight_decay": "weight_decay", "init": "init_std"}  # of a row, by factor


class TableError(ValueError):
    """The table cannot be built: a model's declarations do not fit its shapes. A fault of the model's author."""


class ParameterInfo(NamedTuple):
    """Shape of a parameter and what owns it: "Linear", "Conv", "Embedding" or "Parameter" (anything else).

    in_branch: whether it acts through a residual branch that Settings.branch_scale scales; Settings.branch_lr is then
    on its learning rate.
    """

    shape: tuple[int, ...]
    owner: str
    in_branch: bool = False


class BaseRates(NamedTuple):
    """An optimizer's base hyperparameters, which the factors of its rows multiply; a schedule multiplies lr further.
    eps is 0 for Muon, which has none."""

    lr: float
    weight_decay: float
    eps: float


class Declared(Protocol):
    """What a model declares for the names that match `pattern`; see models.layers.Declaration."""

    @property
    def pattern(self) -> str: ...
    @property
    def init(self) -> str: ...
    @property
    def std(self) -> float: ...
    @property
    def role(self) -> Role | None: ...
    @property
    def inner(self) -> bool: ...
    @property
    def projections(self) -> int: ...
    @property
    def heads(self) -> bool: ...


class _Decided(NamedTuple):
    """What is settled of a parameter before its optimizer is: the declaration that it goes by among them."""

    role: Role
    why: str
    declared: Declared


@dataclass(frozen=True)
class ParameterRow:
    """One parameter. lr, weight_decay and eps are factors on its optimizer's base rates; init_std is absolute.

    matrices, scale: of a row of Muon, which orthogonalises as many matrices [rows / matrices, columns] of it, each on
    its own, and multiplies each polar factor by scale.
    """

    role: Role
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    init: str
    init_std: float
    multiplier: float
    lr: float
    weight_decay: float  # 0 where the weight does not decay
    eps: float
    why: str
    optimizer: Optimizer = "adamw"
    matrices: int = 1
    scale: float = 1.0


def fans(info: ParameterInfo) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight: dim 1 times the kernel, and dim 0; a vector has fan_in 1."""
    shape = info.shape
    if info.owner == "Embedding":
        return 1, shape[-1]
    if len(shape) < 2 or info.owner == "Parameter":
        return 1, shape[-1] if shape else 1
    return math.prod(shape[1:]), shape[0]


def init_std(init: str, std: float, fan_in: int, fan_out: int) -> float:
    """Standard deviation that the declared formula gives at these fans."""
    match init:
        case "zeros" | "ones":
            return 0.0
        case "normal":
            return std
        case "fan_in":
            return std / math.sqrt(fan_in)
        case "xavier_uniform":
            return std * math.sqrt(2 / (fan_in + fan_out))
    raise TableError(f'unknown init "{init}": use zeros, ones, normal, fan_in or xavier_uniform')


def _role_from_shapes(infinite: list[int], info: ParameterInfo) -> tuple[Role | None, tuple[Role, ...], str]:
    """(role or None if undecidable, roles that a declaration may name, reason)."""
    dims = len(info.shape)
    if not infinite:
        return "fixed", ("fixed",), "no dimension grows"
    if len(infinite) >= 3:
        return None, (), f"{len(infinite)} dimensions grow; no rule is known"
    if len(infinite) == 2:
        if info.owner in ("Linear", "Conv") and infinite == [0, 1]:
            return "hidden", ("hidden",), f"{info.owner} width -> width"
        return None, (), "two dimensions of a bare parameter grow: it is unknown which is fan_in; use nn.Linear"
    if dims == 1:
        return "vector", ("vector",), "one dimension, grows"
    if info.owner in ("Linear", "Conv"):
        if infinite == [0]:
            return "input", ("input",), f"{info.owner} fixed -> width"
        return None, ("output",), f"{info.owner} width -> fixed must be declared as output"
    if infinite == [dims - 1]:
        if info.owner == "Embedding":
            return "input", ("input",), "embedding table"
        return "vector", ("vector", "input"), "table whose last dimension grows"
    return None, ("vector",), "a bare parameter grows in another dimension than its last"


def _differing(one: tuple[int, ...], other: tuple[int, ...]) -> list[int]:
    """The dimensions in which two shapes of equal length differ."""
    return [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]


def _decide(name: str, infinite: list[int], info: ParameterInfo, declared: Declared) -> _Decided:
    """The role by shapes and declaration. Raises TableError where they contradict each other or leave it open."""
    role, allowed, why = _role_from_shapes(infinite, info)
    if declared.role is not None:
        if declared.role not in allowed:
            raise TableError(f'{name}: declared as {declared.role} by "{declared.pattern}", but {why}')
        role, why = declared.role, f"declared; {why}"
    if role is None:
        raise TableError(f"{name} {info.shape}: {why}")
    if declared.inner and (role != "output" or declared.init == "zeros"):
        raise TableError(f'{name}: "{declared.pattern}" is declared as inner, which an output not of zeros is')
    if declared.projections and (not _is_matrix(role, info) or info.shape[0] % declared.projections):
        raise TableError(
            f'{name} {info.shape}: "{declared.pattern}" declares {declared.projections} projections, which only the '
            "rows of a linear layer from width to width make, each as many"
        )
    return _Decided(role, why, declared)


def _is_matrix(role: Role, info: ParameterInfo) -> bool:
    """Whether it is the weight of a linear layer from width to width, which Muon can take."""
    return role == "hidden" and info.owner == "Linear"


def _of_muon(
    decided: Mapping[str, _Decided], infos: Mapping[str, ParameterInfo], kinds: Kinds, settings: Settings
) -> frozenset[str]:
    """The names of Muon's parameters."""
    if settings.optimizer == "adamw":
        return frozenset()
    matrices, others = [], {}
    for name, each in decided.items():
        if _is_matrix(each.role, infos[name]):
            matrices.append(name)
        elif len(infos[name].shape) > 1:
            others[name] = f"{each.role} ({each.why})"
    return of_muon(matrices, others, kinds, settings.muon_include, settings.muon_exclude)


def _matrices(name: str, shape: tuple[int, ...], projections: int, head_dim: int | None) -> int:
    """How many matrices of a row Muon orthogonalises each on its own: its projections, or their heads."""
    if not projections or head_dim is None:
        return max(projections, 1)
    if shape[0] % (projections * head_dim):
        raise TableError(f"{name} {shape}: {projections} projections of heads of {head_dim} rows do not make its rows")
    return shape[0] // head_dim


def _row(
    name: str,
    decided: _Decided,
    info: ParameterInfo,
    base: ParameterInfo,
    settings: Settings,
    muons: Collection[str],
) -> ParameterRow:
    """The row of a parameter. info: as it is trained; base: at the base width. muons: the names of Muon's."""
    role, why, declared = decided
    optimizer: Optimizer = "muon" if name in muons else "adamw"
    fan_in, fan_out = fans(info)
    base_fan_in, base_fan_out = fans(base)
    scale = factors(role, fan_in / base_fan_in, fan_out / base_fan_out, settings, declared.inner, optimizer)
    predicts = role == "output" and not declared.inner
    # muP takes the init formula at the base shape; SP at the shape that is trained.
    at_fans = (base_fan_in, base_fan_out) if settings.parametrization == "mup" else (fan_in, fan_out)
    depth_lr = settings.branch_lr if info.in_branch else 1.0
    depth_eps = settings.branch_scale if info.in_branch and settings.eps_rule == "width" else 1.0
    own: dict[str, Any] = {}
    if optimizer == "muon":
        head_dim = settings.muon_head_dim if declared.heads else None
        matrices = _matrices(name, info.shape, declared.projections, head_dim)
        own = {"optimizer": "muon", "matrices": matrices, "scale": polar_scale(fan_in, fan_out // matrices)}
    return ParameterRow(
        role=role,
        shape=info.shape,
        base_shape=base.shape,
        init=declared.init,
        init_std=init_std(declared.init, declared.std, *at_fans) * scale.init,
        multiplier=scale.multiplier * (settings.output_multiplier if predicts else 1.0),
        lr=scale.lr * settings.role_lr.get(role, 1.0) * depth_lr,
        weight_decay=scale.weight_decay if decays(role, len(info.shape), settings) else 0.0,
        eps=scale.eps * depth_eps,
        why=why,
        **own,
    )


def _with_factors(
    rows: Mapping[str, ParameterRow], factors: Mapping[str, Mapping[str, float]], kinds: Kinds
) -> dict[str, ParameterRow]:
    """The rows with the factors of Settings. Raises ChoiceError where one would change nothing."""
    given = factors_by_name(factors, rows, kinds)
    for key, of_key in factors.items():
        for factor in of_key:
            if not any(getattr(rows[name], _COLUMNS[factor]) for name in named(key, rows, kinds)):
                why = "none of them decays" if factor == "weight_decay" else "all of them start at zero or one"
                raise ChoiceError(f'mup.factors "{key}" sets {factor} of parameters that have none: {why}; leave it 1')
    return {
        name: replace(row, **{_COLUMNS[f]: getattr(row, _COLUMNS[f]) * x for f, x in given.get(name, {}).items()})
        for name, row in rows.items()
    }


@dataclass(frozen=True)
class MuTable:
    """Rows by parameter name and the settings they were made with. Compare tables by `hash`."""

    settings: Settings
    rows: Mapping[str, ParameterRow]

    @classmethod
    def build(
        cls,
        base: Mapping[str, ParameterInfo],
        delta: Mapping[str, ParameterInfo],
        target: Mapping[str, ParameterInfo],
        declarations: Sequence[Declared],
        settings: Settings,
        kinds: Kinds | None = None,
    ) -> "MuTable":
        """base and delta: the same model at two widths, so that every dimension that grows differs; target: the
        model to train. kinds: of module, by name patterns, for settings.optimizer "muon". Raises TableError with all
        problems at once, and ChoiceError where what a person chose does not fit the parameters."""
        problems: list[str] = []
        for label, other in (("delta", delta), ("target", target)):
            if base.keys() != other.keys():
                names = sorted(base.keys() ^ other.keys())
                raise TableError(f"base and {label} have different parameters: {', '.join(names[:5])}")
        used: set[int] = set()
        decided: dict[str, _Decided] = {}
        for name, info in target.items():
            base_shape, delta_shape = base[name].shape, delta[name].shape
            if not len(base_shape) == len(delta_shape) == len(info.shape):
                problems.append(f"{name}: base, delta and target have different numbers of dimensions")
                continue
            infinite = _differing(base_shape, delta_shape)
            if stuck := [i for i in _differing(base_shape, info.shape) if i not in infinite]:
                problems.append(
                    f"{name}: dimension {stuck[0]} is {base_shape[stuck[0]]} in the base and "
                    f"{info.shape[stuck[0]]} in the target, but no width dimension: another problem, search again"
                )
            number = next((i for i, d in enumerate(declarations) if fnmatchcase(name, d.pattern)), None)
            if number is None:
                problems.append(f"{name}: no declaration gives its init")
                continue
            used.add(number)
            try:
                decided[name] = _decide(name, infinite, info, declarations[number])
            except TableError as error:
                problems.append(str(error))
        problems += [
            f'the declaration "{d.pattern}" decides no parameter: remove it or fix the pattern'
            for i, d in enumerate(declarations)
            if i not in used
        ]
        if problems:
            raise TableError("muP table: " + "\n  ".join(problems))
        muons = _of_muon(decided, target, kinds or {}, settings)
        rows = {n: _row(n, each, target[n], base[n], settings, muons) for n, each in decided.items()}
        return cls(settings, _with_factors(rows, settings.factors, kinds or {}))

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the hash that a resumed run compares."""
        data = self._plain()
        return {**data, "sha256": _sha256(data)}

    @property
    def hash(self) -> str:
        """sha256 over settings and rows."""
        return _sha256(self._plain())

    def _plain(self) -> dict[str, Any]:
        rows = {
            name: {**asdict(row), "shape": list(row.shape), "base_shape": list(row.base_shape)}
            for name, row in self.rows.items()
        }
        for row in rows.values():  # as AdamW's rows were before there was another optimizer
            if row["optimizer"] == "adamw":
                del row["matrices"], row["scale"]
            if self.settings.optimizer == "adamw":
                del row["optimizer"]
        # Options that are off are left out, as from tables that are older than the option: the hash stays.
        off = {name: value for name, value in asdict(Settings()).items() if name in _OPTIONS}
        settings = {name: value for name, value in asdict(self.settings).items() if off.get(name) != value}
        if acting := {key: given for key, given in self.settings.factors.items() if given}:
            settings["factors"] = acting
        else:
            settings.pop("factors", None)
        return {"version": VERSION, "settings": settings, "rows": rows}

    def in_use(self, base: Mapping[Optimizer, BaseRates]) -> dict[str, dict[str, float]]:
        """What its optimizer has of each parameter: that one's base rates times the row's factors."""
        return {
            name: {key: value * getattr(row, key) for key, value in base[row.optimizer]._asdict().items()}
            for name, row in self.rows.items()
        }

    def describe(self, base: Mapping[Optimizer, BaseRates]) -> str:
        """The table as text, each factor beside the rate in use; equal rows of consecutive blocks are shown once, with
        their count. With Muon also each row's optimizer, and of its own the number of matrices and the scale."""
        rates, with_muon = self.in_use(base), self.settings.optimizer == "muon"
        lines: dict[tuple[str, ...], list[str]] = {}
        for name, row in self.rows.items():
            pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
            cells = (
                pattern, "x".join(map(str, row.shape)), row.role,
                row.init if row.init in ("zeros", "ones") else f"{row.init_std:.3g}",
                f"{row.multiplier:.4g}",
                *(f"{value:.4g}" for key, rate in rates[name].items() for value in (getattr(row, key), rate)),
                *((row.optimizer, *_own_of_muon(row)) if with_muon else ()),
            )  # fmt: skip
            lines.setdefault(cells, []).append(name)
        head = (
            "parameter",
            "shape",
            "role",
            "init std",
            "input x",
            "lr x",
            "lr",
            "wd x",
            "wd",
            "eps x",
            "eps",
            *(("optimizer", "matrices", "scale") if with_muon else ()),
            "tensors",
        )
        table = [head, *((*cells, str(len(names))) for cells, names in lines.items())]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in table]
        if self.settings.branch_scale != 1.0:
            text.append(f"every residual branch x {self.settings.branch_scale:.4g}")
        return "\n".join(text)


def _own_of_muon(row: ParameterRow) -> tuple[str, str]:
    return (str(row.matrices), f"{row.scale:.4g}") if row.optimizer == "muon" else ("-", "-")


def _sha256(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
