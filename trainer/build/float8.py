"""Which products of a model are multiplied in fp8 (parallel.precision), and whether its devices can."""

from torch import nn

from models.backbone import Backbone
from models.layers import TokenLinear

from ..collectives import together
from ..config.resolve import compiles
from ..config.schema import TrainConfig
from ..errors import ConfigError
from ..mup.table import MuTable
from ..parallel.float8 import MULTIPLE, fp8_multiply, fp8_problem
from ..parallel.mesh import World

_INSTEAD = "set parallel.precision=bf16"


def token_linears(model: nn.Module) -> dict[str, TokenLinear]:
    """The layers whose products fp8 narrows, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TokenLinear)}


def multiply_in_fp8(model: Backbone, table: MuTable, world: World) -> None:
    """Let the products of the model's TokenLinears be in fp8, and nothing else. Raises ConfigError, on all ranks alike,
    where a device or a shape does not fit, and TypeError where a backbone calls a layer so that must not be one."""
    for problem in together(lambda: fp8_problem(world.device), world.control):
        if problem is not None:
            raise ConfigError(f"parallel.precision fp8: {problem}; or {_INSTEAD}")
    linears = token_linears(model)
    if not linears:
        raise ConfigError(f"parallel.precision fp8: {type(model).__name__} has no TokenLinear; {_INSTEAD}")
    in_units = {id(module) for unit in model.shard_units() for module in unit.modules()}
    for name, linear in linears.items():
        weight = f"{name}.weight"
        row = table.rows[weight]
        if row.role != "hidden" or id(linear) not in in_units:
            raise TypeError(f"{weight} ({row.role}) is a TokenLinear: only hidden weights of the blocks may be")
        if any(size % MULTIPLE for size in row.shape):
            raise ConfigError(
                f"parallel.precision fp8: {weight} is {' x '.join(map(str, row.shape))}, and fp8 multiplies matrices "
                f"whose sizes are multiples of {MULTIPLE}: choose another model.width, or {_INSTEAD}"
            )
    multiply = fp8_multiply(world.device)
    for linear in linears.values():
        linear.multiply = multiply


def check_fp8_is_compiled(config: TrainConfig, world: World) -> None:
    """Raise ConfigError where a GPU would round each matrix in kernels of its own, which take longer than fp8 saves."""
    on_gpu = world.device.type == "cuda"
    if config.parallel.precision == "fp8" and on_gpu and not compiles(config, on_gpu):
        raise ConfigError(f"parallel.precision fp8 needs parallel.compile on a GPU: leave it null, or {_INSTEAD}")
