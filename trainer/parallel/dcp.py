"""torch's distributed checkpoint without arbitrary pickles: its index file is unpickled from a list of types."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

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
