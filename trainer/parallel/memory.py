"""Activation checkpointing and compilation of a model's blocks (its units).

Both replace a unit's `forward` and nothing else: parameter names stay, and an engine's hooks, which gather weights,
run outside of it. The order: checkpoint, compile (so that the compiler sees what to keep), shard.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.fx.experimental import _config as shapes
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
# What takes long to compute again: matrix products and fused attention. Not bmm, of which attention without a fused
# kernel consists: its scores grow with the square of the tokens.
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
]
# A unit is compiled once for each kind of input (first unit or not, with gradients or without, sizes of 1, classes of
# units), whatever its sizes; more than this means that something else varies.
_MOST_GRAPHS = 32


class CompileError(RuntimeError):
    """A unit's inputs vary more than is compiled for."""


def checkpoint_activations(units: Sequence[nn.Module], mode: Literal["none", "selective", "full"]) -> None:
    """Recompute units in the backward pass. full: from their inputs alone; selective: the outputs of matrix products
    and of fused attention are kept. Gradients stay the same bit for bit."""
    if mode == "none":
        return
    forward = _full if mode == "full" else _selective
    for unit in units:
        unit.forward = MethodType(forward, unit)


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


def _full(unit: nn.Module, *inputs: Any) -> Any:
    # The units draw no random numbers: there is no generator's state to restore.
    forward = partial(type(unit).forward, unit)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)


def _selective(unit: nn.Module, *inputs: Any) -> Any:
    forward, contexts = partial(type(unit).forward, unit), partial(create_selective_checkpoint_contexts, _KEPT)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _compiled(forward: Callable[..., Any], name: str, *inputs: Any) -> Any:
    try:
        return forward(*inputs)
    except FailOnRecompileLimitHit as error:
        raise CompileError(
            f"parallel.compile: {name} was compiled {_MOST_GRAPHS} times and its inputs still vary; set "
            "parallel.compile=false, or see with TORCH_LOGS=recompiles what varies"
        ) from error
