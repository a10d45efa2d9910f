"""What all encoders share: quiet loading, errors that say what is missing, and fingerprints."""

from __future__ import annotations

import contextlib
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
from ..files import temporary_beside

_REMEMBERED_BYTES = 1 << 30  # of safetensors files
_LFS = b"version https://git-lfs"
_MOST_HEADER_BYTES = 100_000_000  # of a safetensors file, as its format has it


def quieten() -> None:
    """Have transformers and diffusers load without progress bars and advice."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    # Reader processes are forked after the tokenizer was used: with threads it would print a warning in each of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load_error(key: str, path: str, subfolder: str | None, error: Exception) -> DataError:
    """The DataError to raise where an encoder cannot be loaded. key: of the config, which names it."""
    where = f"{path}/{subfolder}" if subfolder else path
    if Path(path).is_dir():
        if pointers := [file for file in sorted(Path(where).glob("*")) if lfs_pointer(file)]:
            return DataError(
                f"{key}: {str(pointers[0])!r} is a pointer of git-lfs, not the file: run git lfs pull in its folder"
            )
        detail = str(error).strip().partition("\n")[0][:300]
        if (damaged := _first_damaged(Path(where))) is not None:
            return DataError(f"{key}: {str(damaged)!r} is damaged ({detail}): fetch it again")
        return DataError(f"{key}: {where!r} cannot be loaded ({detail}); expected config.json and *.safetensors there")
    detail = str(error).strip().partition("\n")[0]
    if path.startswith(".cache/"):  # of the shipped demo and debug configs
        return DataError(
            f"{key}: there is no folder {where!r} in {str(Path.cwd())!r}: shipped configs that name it are used in the "
            "root of the repository, where `make setup` (and for debug configs a training run) makes it"
        )
    return DataError(
        f"{key}: there is no folder {where!r}, and no model of that name can be had from the hub ({detail}); give a "
        "local folder with config.json and *.safetensors, or a hub id that this machine can reach and may read"
    )


def lfs_pointer(file: Path) -> bool:
    """Whether a file only says where git-lfs has the real one, as after a clone without git-lfs."""
    try:
        with open(file, "rb") as opened:
            return opened.read(len(_LFS)) == _LFS
    except OSError:
        return False


def _first_damaged(folder: Path) -> Path | None:
    """The first of a folder's safetensors files whose header does not describe it."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(min(length, _MOST_HEADER_BYTES)))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            if 8 + length + max(ends, default=0) != path.stat().st_size:
                return path
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return path
    return None


def fingerprint_of(config: Mapping[str, Any], names: Sequence[str], module: nn.Module, extra: object) -> str:
    """sha256 of fields of the architecture, and of the name, the shape and the first 16 values of every parameter.

    Values are taken in bf16, so that the precision of a run does not change the identity of its encoder. names: the
    fields of `config`. extra: what else identifies the encoder, as JSON can hold it.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([{n: config.get(n) for n in names}, extra], sort_keys=True).encode())
    for name, parameter in sorted(module.named_parameters()):
        values = parameter.detach().reshape(-1)[:16].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def weights_digest(module: nn.Module, path: str, subfolder: str | None = None) -> str:
    """sha256 of all values of every parameter, in bf16 as those of fingerprint_of: what tells that one bit has changed.

    It takes seconds for an encoder of billions of parameters. Such a one's is remembered in the user's cache folder, by
    the paths, sizes and times of change of the safetensors files; but not for a hub id, whose files lie elsewhere.
    """
    files = sorted(Path(path, subfolder or "").resolve().glob("*.safetensors"))
    known = None
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder
        seen = [[str(file), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]
        name = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mudit" / "weights"
        known = cache / name if sum(size for _, size, _ in seen) >= _REMEMBERED_BYTES else None
        if known is not None and known.is_file() and len(said := known.read_text()) == len(name):
            return said
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        values = parameter.detach().reshape(-1).to("cpu", torch.bfloat16)
        digest.update(name.encode())
        digest.update(values.view(torch.int16).numpy().data)
    if known is not None:
        with contextlib.suppress(OSError), temporary_beside(known) as temporary:
            temporary.write_text(digest.hexdigest())
    return digest.hexdigest()


def model_fingerprint(model: Any, extra: object) -> str:
    """Identifies a Hugging Face model that is used for metrics alone, whatever its path: by its class, its weights, and
    `extra`, what else of its config and tokenizer changes a metric."""
    return fingerprint_of({}, (), model, [type(model).__name__, extra])


def freeze(module: nn.Module, device: torch.device | str) -> None:
    """Put a module on a device in evaluation mode, without gradients."""
    module.requires_grad_(False).eval().to(device)


def unit_range(images: torch.Tensor, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """uint8 images of any shape -> values in [-1, 1] in a dtype."""
    return images.to(device).to(dtype) / 127.5 - 1.0


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, and fp32 for every other dtype."""
    return dtype if dtype == torch.float64 else torch.float32
