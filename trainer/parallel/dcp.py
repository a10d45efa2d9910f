"""torch's distributed checkpoint (DCP): written by a thread, and read without a pickle that could run code."""

import itertools
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ..errors import CheckpointError
from .dcp_index import Chunk, read_index
from .dcp_tensors import read_chunk

_WRAPPING_BYTES = 4096  # of a tensor in its file and of its entry in the index, at most
_MARGIN = 1.02
_MAKE_ROOM = "free space there, lower run.keep_last, or use another run.dir"


class _UnreadableError(BaseException):
    """A CheckpointError on its way through DCP, which answers an Exception with a traceback and a second try."""


class SafeReader(dcp.FileSystemReader):
    """FileSystemReader that reads tensors and nothing else, and runs no pickle: index and tensors are read as data."""

    def read_metadata(self) -> Metadata:  # pyright: ignore[reportIncompatibleMethodOverride] (DCP looks which it takes)
        try:
            return read_index(Path(self.path))
        except CheckpointError as error:
            raise _UnreadableError(str(error)) from None

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        items = sorted(plan.items, key=lambda item: self.storage_data[item.storage_index][:2])  # by file and offset
        for name, group in itertools.groupby(items, key=lambda item: self.storage_data[item.storage_index].file):
            with open(Path(self.path) / name, "rb") as file:
                for item in group:
                    chunk = read_chunk(file, self.storage_data[item.storage_index])
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_part(chunk, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done


class AsyncSaver:
    """save_tensors in a thread, from copies in host memory that are reused from save to save.

    Not dcp.async_save: its failures are no Exception and a thread that ends with one prints a traceback; here the
    thread's result is a CheckpointError that is the same on all ranks. The stager is torch's: it keeps the layout of
    a DTensor, and pins its memory and copies without waiting where there is a GPU (on CPU both would fail).
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        """group: gloo; between save() and the end of its future it is the thread's alone."""
        cuda = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=cuda,
            )
        )
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> Future[None]:
        """Copy, then write in the thread; call it again only when the future has ended."""
        copies = self._stager.stage(dict(tensors))
        assert isinstance(copies, dict)  # a Future with asynchronous staging alone
        return self._thread.submit(save_tensors, folder, copies, self._group)


class _Writer(dcp.FileSystemWriter):
    """FileSystemWriter that asks for room before any rank writes."""

    def __init__(self, folder: Path) -> None:
        # What it copies ahead is on the host already; 0 keeps its thread away from the GPU.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank, between planning and writing; what it raises is raised on all ranks."""
        check_room(Path(self.path), bytes_of(plans))
        return super().prepare_global_plan(plans)


def bytes_of(plans: list[SavePlan]) -> int:
    """An upper estimate of what the ranks will write: the tensors, each once, and how they are wrapped."""
    parts = [item.tensor_data for plan in plans for item in plan.items if item.tensor_data is not None]
    return sum(part.chunk.sizes.numel() * part.properties.dtype.itemsize + _WRAPPING_BYTES for part in parts)


def check_room(folder: Path, needed: int) -> None:
    """Raise CheckpointError where the file system of `folder` has less than `needed` bytes and a margin free."""
    free = shutil.disk_usage(folder).free
    if free < needed * _MARGIN:
        raise CheckpointError(f"it needs {needed} bytes and {free} are free in {folder.parent}: {_MAKE_ROOM}")


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Write shards (DTensor) and replicated tensors by name; CheckpointError on all ranks where any cannot."""
    try:
        dcp.save(dict(tensors), storage_writer=_Writer(folder), process_group=group)
    except CheckpointException as error:  # no Exception: one that nothing would catch
        reason = _first_reason(error)
        if not isinstance(reason, CheckpointError):  # on a full disk torch speaks of an unexpected position
            free = shutil.disk_usage(folder).free
            reason = f"{reason}, with {free} bytes free in {folder.parent}; if that is too little {_MAKE_ROOM}"
        raise CheckpointError(str(reason)) from None


def load_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Fill `tensors` in place; CheckpointError on all ranks where a file is damaged or a name is missing."""
    try:
        dcp.load(dict(tensors), storage_reader=SafeReader(folder), process_group=group)
    except CheckpointException as error:  # no Exception: one that nothing would catch
        raise CheckpointError(
            f"{folder} cannot be read: {_first_reason(error)}; use another checkpoint, or remove it"
        ) from None


def _part(tensor: Tensor, offsets: Iterable[int], lengths: Iterable[int]) -> Tensor:
    for dimension, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dimension, offset, length)
    return tensor


def _first_reason(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


class TensorReader:
    """Whole tensors of a checkpoint, one after the other, without a process group.

    A read holds the tensor and, while a shard of it is copied, up to twice that shard. Raises CheckpointError where
    the folder is no checkpoint or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = read_index(folder)

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
        for number, place in enumerate(entry.chunks):
            chunk: Chunk = self._index.storage_data[MetadataIndex(name, place.offsets, number)]
            try:
                with open(self._folder / chunk.file, "rb") as file:
                    _part(tensor, place.offsets, place.sizes).copy_(read_chunk(file, chunk))
            except (OSError, CheckpointError) as error:
                raise CheckpointError(f"{self._folder} cannot be read: {error}; use another checkpoint") from None
        return tensor
