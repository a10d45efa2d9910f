"""What all encoders share: loading without network, errors that say what is missing, fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from ..errors import DataError


def quieten() -> None:
    """Load without progress bars and advice; rank 0's own messages are the user's log."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    # Reader processes are forked after the tokenizer was used; its threads would print a warning in each.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load_error(key: str, path: str, subfolder: str | None, error: Exception) -> DataError:
    where = f"{path}/{subfolder}" if subfolder else path
    if Path(path).is_dir():
        detail = str(error).strip().splitlines()[0]
        return DataError(f"{key}: {where!r} cannot be loaded ({detail}); expected config.json and *.safetensors there")
    detail = str(error).strip().partition("\n")[0]
    return DataError(
        f"{key}: there is no folder {where!r}, and no model of that name can be had from the hub ({detail}); give a "
        "local folder with config.json and *.safetensors, or a hub id that this machine can reach and may read"
    )


def fingerprint_of(config: Mapping[str, Any], names: Sequence[str], module: nn.Module, extra: object) -> str:
    """sha256 of architecture fields and of every parameter's name, shape and first 16 values.

    Values are compared as bf16, so that the precision of a run does not change the identity of its encoder.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([{n: config.get(n) for n in names}, extra], sort_keys=True).encode())
    for name, parameter in sorted(module.named_parameters()):
        values = parameter.detach().reshape(-1)[:16].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def model_fingerprint(model: Any, extra: object) -> str:
    """Identity of a Hugging Face model that only measures, whatever the path: its class, its weights, and `extra`, what
    else of its config and tokenizer moves figures."""
    return fingerprint_of({}, (), model, [type(model).__name__, extra])


def freeze(module: nn.Module, device: torch.device | str) -> None:
    module.requires_grad_(False).eval().to(device)


def unit_range(images: torch.Tensor, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """uint8 images -> [-1, 1] in dtype."""
    return images.to(device).to(dtype) / 127.5 - 1.0


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
