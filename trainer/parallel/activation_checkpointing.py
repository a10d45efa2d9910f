"""Activation checkpointing per shard unit: full or selective."""

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.attention.varlen  # has torch.ops.torch_attn made
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten

# What takes long to compute again: matrix products and fused attention. Not bmm, of which attention without a fused
# kernel consists: its scores grow with the square of the tokens.
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
]


def checkpoint_activations(units: Sequence[nn.Module], mode: Literal["none", "selective", "full"]) -> None:
    """Recompute units in the backward pass. full: from their inputs alone; selective: the outputs of matrix products
    and of fused attention are kept. Gradients stay the same bit for bit."""
    if mode == "none":
        return
    forward = _full if mode == "full" else _selective
    for unit in units:
        unit.forward = MethodType(forward, unit)


def _full(unit: nn.Module, *inputs: Any) -> Any:
    # The units draw no random numbers: there is no generator's state to restore.
    forward = partial(type(unit).forward, unit)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)


def _selective(unit: nn.Module, *inputs: Any) -> Any:
    forward, contexts = partial(type(unit).forward, unit), partial(create_selective_checkpoint_contexts, _KEPT)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
