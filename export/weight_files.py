"""Files of weights, one tensor at a time: safetensors written in any order, and published weights read.

The format (https://github.com/huggingface/safetensors) is a JSON header with the place of each tensor, then the bytes
of the tensors. All places follow from the shapes, so nothing has to be collected in memory before it is written:
safetensors.save_file would need the whole model there.
"""

import json
import math
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import CheckpointError

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PREFIX = "model.diffusion_model."  # of Stability AI's files
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


class _Place(NamedTuple):
    file: int
    offset: int
    """Bytes from the start of the file."""


class SafetensorsWriter:
    """Writes `stem`.safetensors to a folder, or numbered files of at most `max_bytes` (but at least one tensor) and
    their index. shapes: by name, all of one dtype. Elements that are never written are zeros. A context manager."""

    def __init__(
        self, folder: Path, stem: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_bytes: int
    ) -> None:
        self._item = torch.empty((), dtype=dtype).itemsize
        self._dtype = dtype
        sizes = {name: math.prod(shape) * self._item for name, shape in shapes.items()}
        parts: list[list[str]] = [[]]
        filled = 0
        for name, size in sizes.items():
            if parts[-1] and filled + size > max_bytes:
                parts.append([])
                filled = 0
            parts[-1].append(name)
            filled += size
        count = len(parts)
        numbered = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.names = numbered if count > 1 else [f"{stem}.safetensors"]
        self._places: dict[str, _Place] = {}
        self._opened = ExitStack()
        self._files = []
        folder.mkdir(parents=True, exist_ok=True)
        for number, (file_name, part) in enumerate(zip(self.names, parts, strict=True)):
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in part:
                offsets = [end, end + sizes[name]]
                header[name] = {"dtype": _DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": offsets}
                end += sizes[name]
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            file = self._opened.enter_context((folder / file_name).open("w+b"))
            file.write(struct.pack("<Q", len(text)) + text)
            start = file.tell()
            file.truncate(start + end)  # what is not written stays zero
            self._files.append(file)
            self._places |= {name: _Place(number, start + header[name]["data_offsets"][0]) for name in part}
        if count > 1:
            where = {name: self.names[place.file] for name, place in self._places.items()}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, at: int, values: Tensor) -> None:
        """Write elements `at`, at + 1, ... of a tensor. values: 1-D and contiguous."""
        assert values.dtype == self._dtype, f"{name} is {values.dtype}, the file {self._dtype}"
        place = self._places[name]
        file = self._files[place.file]
        file.seek(place.offset + at * self._item)
        file.write(values.view(torch.uint8).numpy())  # a view: no copy is made

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()


class PublishedWeights:
    """Tensors of a published model: the safetensors files of a folder (or of its transformer/), or one file.

    shapes: by name. config: config.json beside the files, empty where there is none. A file of torch is unpickled with
    weights_only, so that it runs no code. Raises CheckpointError where the files cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: dict[str, Any] = {}
        files = _weight_files(path)
        try:
            beside = files[0].with_name("config.json")
            self.config: dict[str, Any] = json.loads(beside.read_text()) if beside.is_file() else {}
            for file in files:
                handle = safe_open(file, "pt") if file.suffix == ".safetensors" else _unpickle(file)
                self._opened |= dict.fromkeys(handle.keys(), handle)
            self.shapes = {
                name.removeprefix(_PREFIX): tuple(
                    handle[name].shape if isinstance(handle, dict) else handle.get_slice(name).get_shape()
                )
                for name, handle in self._opened.items()
            }
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path} cannot be read: {reason}; expected safetensors, or weights alone") from None

    def read(self, name: str) -> Tensor:
        """A tensor in the dtype of its file."""
        name = name if name in self._opened else _PREFIX + name
        handle = self._opened[name]
        return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for folder in (path / "transformer", path):
        for endings in ((".safetensors",), _PICKLES):
            if found := sorted(p for p in folder.glob("*") if p.suffix in endings):
                return found
    raise CheckpointError(
        f"no weights in {path}: expected a file, or a folder with *.safetensors (of a pipeline: in its transformer/)"
    )


def _unpickle(file: Path) -> dict[str, Tensor]:
    try:
        data = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a file that is no archive of torch raises errors of many types
        raise ValueError(str(error) or type(error).__name__) from None
    for key in ("ema", "state_dict", "model"):  # training checkpoints of the official repositories
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise ValueError("it holds more than named tensors")
    return data
