"""The table applied to modules and tensors, always by parameter name: multipliers, init, optimizer groups."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .kinds import Kinds
from .rules import Optimizer, Settings
from .table import BaseRates, Declared, MuTable, ParameterInfo, TableError


@runtime_checkable
class Multiplied(Protocol):
    """A layer that multiplies its input; see models.layers.OutputLinear."""

    multiplier: float


@runtime_checkable
class Branched(Protocol):
    """A block that multiplies what it adds to the residual stream, by `branch_scale`."""

    branch_scale: float


def describe(model: nn.Module) -> dict[str, ParameterInfo]:
    """Shape and owner of every parameter, in the model's order."""
    owners: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str]] = [
        (nn.Linear, "Linear"),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "Conv"),
        (nn.Embedding, "Embedding"),
    ]
    branched = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Branched))
    info: dict[str, ParameterInfo] = {}
    for path, module in model.named_modules():
        owner = next((label for types, label in owners if isinstance(module, types)), "Parameter")
        for name, parameter in module.named_parameters(path, recurse=False):
            info[name] = ParameterInfo(tuple(parameter.shape), owner, name.startswith(branched))
    return info


def build_table(
    factory: Callable[[int], nn.Module],
    base_width: int,
    width: int,
    width_step: int,
    declarations: Sequence[Declared],
    settings: Settings,
    kinds: Kinds | None = None,
) -> MuTable:
    """Table of factory(width) against factory(base_width), all on the meta device.

    width_step: the delta model is that much wider than the base. Twice the base width is a width wherever the base
        is one (whole heads, thirds), so base_width is a step that always fits.
    declarations, settings, kinds: as MuTable.build takes them.
    """
    with torch.device("meta"):
        models = [factory(w) for w in (base_width, base_width + width_step, width)]
    dims = [{path: m.head_dim for path, m in model.named_modules() if hasattr(m, "head_dim")} for model in models]
    changed = [path for path, dim in dims[0].items() if any(others.get(path, dim) != dim for others in dims)]
    if changed:
        raise TableError(
            f"{changed[0]}.head_dim changes with the width, but the attention's scale 1 / sqrt(head_dim) "
            "transfers only at a fixed head_dim: grow by heads"
        )
    base, delta, target = (describe(model) for model in models)
    return MuTable.build(base, delta, target, declarations, settings, kinds)


def apply_multipliers(model: nn.Module, table: MuTable) -> None:
    """Put each row's multiplier as a python float on the module that owns the weight, and the branches' on blocks."""
    apply_branch_scale(model, table.settings.branch_scale)
    for name, row in table.rows.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and isinstance(module, Multiplied):
            module.multiplier = row.multiplier
        elif row.multiplier != 1.0:
            raise TypeError(f"{name} needs the input multiplier {row.multiplier}; make its layer an OutputLinear")


def apply_branch_scale(model: nn.Module, scale: float) -> None:
    """Put the scale of residual branches on every block that applies it."""
    blocks = [module for module in model.modules() if isinstance(module, Branched)]
    if scale != 1.0 and not blocks:
        raise TypeError(f"no block applies the branch scale {scale} of mup.base_depth; give it a branch_scale")
    for block in blocks:
        block.branch_scale = scale


def check_names(model: nn.Module, table: MuTable) -> None:
    """Raise unless the model has exactly the table's parameters, with the table's (global) shapes."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected = {name: row.shape for name, row in table.rows.items()}
    if shapes != expected:
        wrong = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))
        raise ValueError(f"the model and its muP table differ at {', '.join(wrong[:5])}")


@torch.no_grad()
def init_parameters(model: nn.Module, table: MuTable, seed: int) -> None:
    """Fill every parameter by its row; each rank makes the whole tensor and keeps its shard, and nothing is sent."""
    check_names(model, table)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(_shard_like(initial_value(table, name, seed, local.device), parameter))


def initial_value(table: MuTable, name: str, seed: int, device: torch.device) -> Tensor:
    """The whole parameter (its row's shape, float32) from a generator seeded by (seed, name).

    So values depend neither on the engine and the world size nor on the order of the parameters.
    """
    row = table.rows[name]
    full = torch.zeros(row.shape, dtype=torch.float32, device=device)
    if row.init == "ones":
        return full.fill_(1.0)
    if row.init_std == 0.0:
        return full
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if row.init == "xavier_uniform":
        bound = 3**0.5 * row.init_std  # a uniform's standard deviation is bound / sqrt(3)
        return full.uniform_(-bound, bound, generator=generator)
    return full.normal_(0.0, row.init_std, generator=generator)


def _shard_like(full: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return full
    shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return shard.to_local()


def param_groups(
    named_parameters: Iterable[tuple[str, Tensor]], table: MuTable, base: Mapping[Optimizer, BaseRates]
) -> list[dict[str, Any]]:
    """Optimizer groups by name; parameters with equal settings share one, and `optimizer` says whose it is.

    base: the base hyperparameters of every optimizer that the table has. lr_scale stays in the group: a schedule sets
    lr = AdamW's base lr x factor x lr_scale in all groups, never an absolute lr. Groups of Muon also hold `scale`, by
    which the polar factor is multiplied, and, for each of their parameters, `matrices` and `shapes`: the number of
    matrices that lie behind each other along the rows, and the whole parameter's (rows, columns).
    """
    named = dict(named_parameters)
    if named.keys() != table.rows.keys():
        wrong = sorted(named.keys() ^ table.rows.keys())
        raise ValueError(f"parameters and muP table differ at {', '.join(wrong[:5])}")
    groups: dict[tuple[Optimizer, float, float, float, float], dict[str, Any]] = {}
    for name, parameter in named.items():
        row = table.rows[name]
        rates = base[row.optimizer]
        group = groups.setdefault(
            (row.optimizer, row.lr, row.weight_decay, row.eps, row.scale),
            {
                "params": [],
                "param_names": [],
                "optimizer": row.optimizer,
                "lr": rates.lr * row.lr,
                "lr_scale": row.lr * (rates.lr / base["adamw"].lr),
                "weight_decay": rates.weight_decay * row.weight_decay,
                "eps": rates.eps * row.eps,
                **({"scale": row.scale, "matrices": [], "shapes": []} if row.optimizer == "muon" else {}),
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
        if row.optimizer == "muon":
            group["matrices"].append(row.matrices)
            group["shapes"].append(row.shape)
    return list(groups.values())
