"""Files of weights, one tensor at a time: safetensors written in any order, and published weights read.

The format (https://github.com/huggingface/safetensors) is a JSON header with the place of each tensor, then the bytes
of the tensors. All places follow from the shapes, so nothing has to be collected in memory before it is written:
safetensors.save_file would need the whole model there.
"""

import json
import math
import re
import struct
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.encoders.loading import lfs_pointer
from data.files import parse_json
from trainer.errors import CheckpointError

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Of Stability AI's files, and of modules that were saved inside a wrapper.
_PREFIXES = re.compile(r"(?:model\.diffusion_model\.|module\.|_orig_mod\.)+")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# NAME.safetensors, NAME.fp16.safetensors, NAME.fp16-00001-of-00002.safetensors, NAME-00001-of-00002.fp16.safetensors.
_NUMBER = r"(?:-\d+-of-(\d+))?"
_FILE = re.compile(rf"(.+?){_NUMBER}(?:\.((?:fp|bf|int)\d+\w*|(?:non_)?ema))?{_NUMBER}")
_RANKS = {None: 0, "fp32": 0, "bf16": 1, "fp16": 2}  # of variants: what is read first; others come last
_INSIDE = ("ema", "state_dict_ema", "state_dict", "model")  # a training checkpoint of the official repositories


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
    """Tensors of a published model: the files of a folder (or of its transformer/), or one file.

    shapes: by name. config: config.json beside the files, empty where there is none. choice: which files are read, of
    those that are there, in words. A file of torch is unpickled with weights_only, so that it runs no code. Raises
    CheckpointError where the files cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: dict[str, tuple[Any, str]] = {}
        files, aside = _weight_files(path)
        inside = None
        try:
            for file in files:
                if lfs_pointer(file):
                    raise ValueError(
                        f"{file.name} is a pointer of git-lfs, not the file: run git lfs pull in its folder"
                    )
                if file.suffix == ".safetensors":
                    handle = safe_open(file, "pt")
                else:
                    handle, inside = _unpickle(file)
                for name in handle.keys():  # noqa: SIM118 (safe_open has no other)
                    self._opened[_PREFIXES.sub("", name, count=1)] = (handle, name)
            beside = files[0].with_name("config.json")
            self.config: dict[str, Any] = parse_json(beside.read_text()) if beside.is_file() else {}
            self.shapes = {
                bare: tuple(handle[name].shape if isinstance(handle, dict) else handle.get_slice(name).get_shape())
                for bare, (handle, name) in self._opened.items()
            }
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path} cannot be read: {reason}; expected safetensors, or weights alone") from None
        self.choice = f"{_few(files)}{f', of it {inside!r}' if inside else ''}"
        self.choice += f" (left aside: {_few(aside)})" if aside else ""

    def read(self, name: str) -> Tensor:
        """A tensor in the dtype of its file."""
        handle, stored = self._opened[name]
        return handle[stored] if isinstance(handle, dict) else handle.get_tensor(stored)


class _Found(NamedTuple):
    """The files in which a folder has one model, or one variant of it. Sorted, the one to read comes first."""

    rank: int
    pickled: bool
    name: str
    files: tuple[Path, ...]


def _few(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _weight_files(path: Path) -> tuple[Sequence[Path], Sequence[Path]]:
    """(the files of one model, those that are left aside). Of its variants the one with most digits is read, and
    safetensors before pickles."""
    if path.is_file():
        return [path], []
    for folder in (path / "transformer", path):
        if not (found := sorted(_found_in(folder))):
            continue
        first = found[0]
        equal = [each.name for each in found if (each.rank, each.pickled) == (first.rank, first.pickled)]
        if len(equal) > 1:
            raise CheckpointError(f"{folder} holds several models ({', '.join(equal[:4])}): name the file of one")
        return first.files, [file for each in found[1:] for file in each.files]
    raise CheckpointError(
        f"no weights in {path}: expected a file, or a folder with *.safetensors (of a pipeline: in its transformer/)"
    )


def _found_in(folder: Path) -> Iterator[_Found]:
    groups: dict[tuple[str, str | None, str], dict[Path, int]] = {}  # {file: of how many it is one}
    for file in sorted(folder.glob("*")):
        if file.suffix in (".safetensors", *_PICKLES) and (match := _FILE.fullmatch(file.stem)):
            stem, first, variant, last = match.groups()
            groups.setdefault((stem, variant, file.suffix), {})[file] = int(first or last or 1)
    for (stem, variant, suffix), counts in groups.items():
        name = f"{stem}.{variant}" if variant else stem
        beside = [f"{name}{suffix}.index.json", *([f"{stem}{suffix}.index.{variant}.json"] if variant else [])]
        files = [file for file, count in counts.items() if count == 1] or list(counts)
        # The index knows which files belong together; without it their numbers do.
        for index in (folder / each for each in beside if (folder / each).is_file()):
            try:
                names = sorted(set(parse_json(index.read_text())["weight_map"].values()))
                files = [folder / Path(each).name for each in names]
                counts = {files[0]: 1}
            except (ValueError, LookupError, TypeError, AttributeError):
                raise CheckpointError(f"{index} cannot be read: expected an index with a weight_map") from None
            if absent := [file.name for file in files if not file.is_file()]:
                raise CheckpointError(f"{folder}: {absent[0]} is missing, which {index.name} names: fetch it again")
        if (wanted := counts.get(files[0], 1)) not in (1, len(files)):
            raise CheckpointError(f"{folder} has {len(files)} of the {wanted} files of {name}: fetch the others")
        yield _Found(_RANKS.get(variant, len(_RANKS)), suffix in _PICKLES, name, tuple(files))


def _unpickle(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """(named tensors, under which key of the file they were)."""
    try:
        with torch.serialization.safe_globals([Namespace]):  # DiT's checkpoints hold their options: attributes, no code
            # A file of torch before 1.6 is no zip archive, and is read whole.
            data: Any = torch.load(file, map_location="cpu", mmap=is_zipfile(file), weights_only=True)
    except Exception as error:  # a file that is no archive of torch raises errors of many types
        if kind := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"it holds objects ({kind[1]}) beside the weights, and making them could run code: where you trust it, "
                "load it by torch.load(FILE, weights_only=False) and save its named tensors alone"
            ) from None
        if str(error).startswith("Weights only load failed"):  # and then pages of advice to developers, in bold
            raise ValueError("it is damaged, or no file of torch.save") from None
        raise ValueError(str(error) or type(error).__name__) from None
    inside = next((key for key in _INSIDE if isinstance(data, dict) and isinstance(data.get(key), dict)), None)
    data = data if inside is None else data[inside]
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise ValueError("it holds more than named tensors")
    return data, inside
