"""torch.compile per shard unit; what falls back to eager ends the run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.fx.experimental import _config as shapes

from ..errors import CompileError

_aten = torch.ops.aten
# A unit is compiled once for each kind of input (first unit or not, with gradients or without, sizes of 1, classes of
# units), whatever its sizes; more than this means that something else varies.
_MOST_GRAPHS = 32


def compile_units(units: Sequence[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every unit for any batch and any number of tokens: units of a class share their graphs.

    Raises CompileError in the forward pass where a unit would need too many graphs; nothing ever runs uncompiled.
    """
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    # Else two sizes that are equal at first (tokens and width, say) are taken for the same, and graphs multiply.
    shapes.use_duck_shape = False
    for unit in units:
        compiled = torch.compile(unit.forward, dynamic=True, fullgraph=True, backend=backend)
        unit.forward = partial(_compiled, compiled, type(unit).__name__)


def _compiled(forward: Callable[..., Any], name: str, *inputs: Any) -> Any:
    try:
        return forward(*inputs)
    except FailOnRecompileLimitHit as error:
        raise CompileError(
            f"parallel.compile: {name} was compiled {_MOST_GRAPHS} times and its inputs still vary; set "
            "parallel.compile=false, or see with TORCH_LOGS=recompiles what varies"
        ) from error
