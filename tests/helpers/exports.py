"""Random checkpoints without a run, and launch/export.py called in this process."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export.read import write_checkpoint
from launch import export
from models.backbone import build_model
from tests.helpers.forked import once
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.mup.apply import apply_multipliers

from .backbones import random_weights

# A ratio of widths that is no power of two, scaled branches, and a base hyperparameter on the output.
FOLDED = ("model.width=96", "mup.base_width=32", "model.depth=3", "mup.base_depth=2", "mup.output_multiplier=1.7")
# As its twin of diffusers embeds time.
OWN = {"dit": ("model.time_freq_shift=1",)}


def config_of(kind: str, *overrides: str) -> TrainConfig:
    return load_config(f"{kind}_debug_mup.yaml", [*OWN.get(kind, ()), *overrides])


def random_checkpoint(
    folder: Path, config: TrainConfig, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Any, dict[str, Tensor]]:
    """(our model with its multipliers, its parameters times `scale`); the latter are the live weights of a checkpoint,
    whose averages are half of them."""
    table = build_mup_table(config)
    model = build_model(config.model, config.autoencoder.channels, config.text_encoder.width, config.projector)
    apply_multipliers(model, table)
    random_weights(model, dtype)
    tensors = {name: p.detach().mul_(scale).clone() for name, p in model.named_parameters()}
    folder.mkdir(parents=True)
    live = {f"model/{name}": tensor for name, tensor in tensors.items()}
    average = {f"ema_{config.ema.decays[0]}/{name}": tensor / 2 for name, tensor in tensors.items()}
    write_checkpoint(folder, config, table, live | average)
    return model, tensors


def run_export(patch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    patch.setattr(sys, "argv", ["launch/export.py", *once([*map(str, arguments)])])
    assert export.main() == 0


def load_exactly(twin: type[nn.Module], folder: Path, dtype: torch.dtype) -> Any:
    """From the folder's files, which must hold every tensor of the twin and no other."""
    model, found = twin.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)  # type: ignore[attr-defined]
    assert not any(found.values()), found
    return model.eval()
