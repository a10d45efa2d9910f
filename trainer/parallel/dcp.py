"""torch's distributed checkpoint without arbitrary pickles: its index file is unpickled from a list of types."""

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from .engine import CheckpointError

# The types that torch.distributed.checkpoint itself puts into `.metadata`, each by its full name: a module that is
# trusted as a whole hands out what it imports ("filesystem", "os.system" is a valid reference of a pickle).
_DCP = "torch.distributed.checkpoint"
_SAFE = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", f"{name}StorageMetadata") for name in ("Chunk", "Tensor", "Bytes")),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.filesystem", "_StoragePrefix"),
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_device"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _SAFE or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class SafeReader(dcp.FileSystemReader):
    """FileSystemReader (whose tensors are already read with weights_only) with a restricted index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write shards (DTensor) and replicated tensors by name."""
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, sync_files=True), process_group=group)


def load_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Fill `tensors` in place; CheckpointError on all ranks where a file is damaged or a name is missing."""
    try:
        dcp.load(dict(tensors), storage_reader=SafeReader(folder), process_group=group)
    except CheckpointException as error:  # no Exception: one that nothing would catch
        reason = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder} cannot be read: {reason}; use another checkpoint, or remove it") from None


class TensorReader:
    """Whole tensors of a checkpoint, one after the other, without a process group.

    A read holds the tensor and, while a shard of it is copied, up to twice that shard. Raises CheckpointError where
    the folder is no checkpoint or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._index = SafeReader(folder).read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{folder} has no readable index of tensors: {error}") from None

    def entries(self, group: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type by name of the tensors of "model", or of an average such as "ema_0.9999"."""
        return {
            name.partition("/")[2]: (tuple(entry.size), entry.properties.dtype)
            for name, entry in self._index.state_dict_metadata.items()
            if name.startswith(f"{group}/") and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """By its full name, such as "model/final.weight"."""
        entry = self._index.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata), name
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        reader = SafeReader(self._folder)
        reader.read_metadata = lambda *_, **__: self._index  # the index is the same for all
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it reads in one process, which is what is meant
            try:
                dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
            except CheckpointException as error:
                reason = next(iter(error.failures.values()))[0]
                raise CheckpointError(f"{self._folder} cannot be read: {reason}; use another checkpoint") from None
        return tensor
