"""torch.compile per shard unit: what cannot be compiled runs eagerly, with a warning; too many graphs end the run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch._inductor
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as functorch
from torch.fx.experimental import _config as shapes

from ..errors import CompileError

_aten = torch.ops.aten
# A unit is compiled once for each kind of input (first unit or not, with gradients or without, sizes of 1, classes of
# units), whatever its sizes; more than this means that something else varies.
_MOST_GRAPHS = 32

# Whatever makes a part of a concatenation writes it into its place. Inductor would let one kernel read all parts, which
# keeps the RMSNorms of two streams' q and k out of it and, where sizes vary, copies v twice (docs/performance.md).
_PARTS_IN_PLACE = {"max_pointwise_cat_inputs": 1, "max_complex_pointwise_cat_inputs": 1}


def inductor_options(unit: nn.Module) -> dict[str, Any]:
    """What training sets of inductor for a unit, as far as this torch has it; no formula depends on it."""
    known = torch._inductor.list_options() if getattr(unit, "joins_streams", False) else ()
    return {name: value for name, value in _PARTS_IN_PLACE.items() if name in known}


def compile_units(
    units: Sequence[nn.Module], warn: Callable[[str], None], backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile every unit for any batch and any number of tokens: units of a class share their graphs.

    A class of units for which the compiler fails runs eagerly, which `warn` is told once. Raises CompileError in the
    forward pass where a unit would need too many graphs.
    """
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    # Else two sizes that are equal at first (tokens and width, say) are taken for the same, and graphs multiply.
    shapes.use_duck_shape = False
    # The backward pass with the forward pass, or a failure of the compiler would come out of loss.backward().
    functorch.force_non_lazy_backward_lowering = True
    failed: set[str] = set()
    for unit in units:
        eager = unit.forward
        options = inductor_options(unit) if backend == "inductor" else None
        compiled = torch.compile(eager, dynamic=True, fullgraph=True, backend=backend, options=options)
        unit.forward = partial(_compiled, compiled, eager, type(unit).__name__, failed, warn)


def _compiled(
    compiled: Callable[..., Any],
    eager: Callable[..., Any],
    name: str,
    failed: set[str],
    warn: Callable[[str], None],
    *inputs: Any,
) -> Any:
    if name in failed:
        return eager(*inputs)
    try:
        return compiled(*inputs)
    except FailOnRecompileLimitHit as error:
        raise CompileError(
            f"parallel.compile: {name} was compiled {_MOST_GRAPHS} times and its inputs still vary; set "
            "parallel.compile=false, or see with TORCH_LOGS=recompiles what varies"
        ) from error
    except TorchDynamoException as error:
        failed.add(name)
        reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0][:200]
        warn(
            f"warning: parallel.compile: {name} cannot be compiled here ({reason or type(error).__name__}) and runs "
            "eagerly, which is slower; mend the compiler, or set parallel.compile=false"
        )
        return eager(*inputs)
