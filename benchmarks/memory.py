"""Bytes of activations that wait for the backward pass, by parallel.activation_checkpointing.

    python -m benchmarks.memory --output benchmarks/results/memory_cpu.json

Counted from the tensors that are alive after a forward pass in float32 with fused attention, not from a device's
allocator: the figure is the same on every machine.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import write
from models.backbone import build_model
from models.layers import TextCondition
from trainer.config.load import load_config
from trainer.parallel.activation_checkpointing import checkpoint_activations

MODES = ("none", "selective", "full")


class _Made(TorchDispatchMode):
    """Every storage that an operation makes, held weakly, with its size in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:  # no view of a weight
                self.storages[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return result


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def activation_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that `forward` made and that are alive as long as its result is."""
    with _Made() as made:
        result = forward()
    alive = sum(size for storage, size in made.storages.items() if not storage.expired())
    del result
    return alive


def measure(name: str, batch: int) -> dict[str, Any]:
    """Activations of one forward pass in each mode."""
    config = load_config(name, [])
    channels, length, width = config.autoencoder.channels, config.text_encoder.max_length, config.text_encoder.width
    x, t = torch.randn(batch, channels, config.latent_size, config.latent_size), torch.rand(batch)
    condition = TextCondition(torch.randn(batch, length, width), torch.ones(batch, length, dtype=torch.bool))
    found: dict[str, int] = {}
    for mode in MODES:
        model = build_model(config.model, channels, width)
        checkpoint_activations(model.shard_units(), mode)
        found[mode] = activation_bytes(lambda model=model: model(x, t, condition))
    return {
        "config": name,
        "batch": batch,
        "image_tokens": config.image_tokens,
        "text_tokens": length,
        "activation_mib": {mode: size / 2**20 for mode, size in found.items()},
        "share_of_none": {mode: size / found["none"] for mode, size in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", default="mmdit_demo_mup.yaml", help="a backbone conditioned on text")
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    write(arguments.output, measure(arguments.config, arguments.batch))


if __name__ == "__main__":
    main()
