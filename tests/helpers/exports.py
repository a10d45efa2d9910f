"""Random checkpoints without a run, and launch/export.py called in this process."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import UnigramTrainer
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

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
    """kind: of the backbone; what follows a comma tells cases apart."""
    return load_config(f"{kind.partition(',')[0]}_debug_mup.yaml", [*OWN.get(kind, ()), *overrides])


def random_checkpoint(
    folder: Path, config: TrainConfig, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Any, dict[str, torch.Tensor]]:
    """(our model with its multipliers, its parameters times `scale`); the latter are the live weights of a checkpoint,
    whose averages are half of them."""
    table = build_mup_table(config)
    text = config.text_encoder
    model = build_model(
        config.model, config.autoencoder.channels, text.total_width, config.projector, pooled_width=text.total_pooled
    )
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


def unigram_t5(folder: Path) -> Path:
    """A T5 of random weights with a tokenizer of its own kind, which has learned a few captions."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = Metaspace()  # type: ignore[assignment]
    special = ["<pad>", "</s>", "<unk>"]
    trainer = UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(
        ["a red circle on a blue background", "a green cross", "two dogs in snow"] * 20, trainer
    )
    pieces = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    T5Tokenizer(vocab=pieces, extra_ids=100).save_pretrained(folder)
    sizes: dict[str, Any] = {
        "vocab_size": len(pieces) + 100,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
    }
    T5EncoderModel(T5Config(**sizes)).save_pretrained(folder)
    return folder
