"""A checkpoint runs no code, and nothing is allocated on its word: index and tensors are read as data."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from trainer.errors import CheckpointError
from trainer.parallel.dcp import TensorReader, load_tensors, save_tensors
from trainer.parallel.dcp_index import read_index
from trainer.parallel.mesh import World
from trainer.parallel.records import read_records


class Touch:
    """Pickled, it makes a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._trace,)


def test_what_torch_writes_is_read(world: World, tmp_path: Path) -> None:
    """Every type of numbers, no numbers, a transposed tensor: as by torch's own reader, whose index can run code."""
    tensors = {
        str(dtype): torch.arange(6).view(3, 2).to(dtype)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
    }
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "transposed": torch.rand(5, 3).T}
    save_tensors(tmp_path, tensors, world.checkpoint)
    ours = read_index(tmp_path).state_dict_metadata
    assert ours == dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    fresh = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_tensors(tmp_path, fresh, world.checkpoint)
    reader = TensorReader(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(fresh[name], tensor), name
        assert torch.equal(reader.read(name), tensor), name


# ----------------------------------------------------------------------------------------------------- the index lies
def _bytes_entry(index: Any, folder: Path) -> None:
    """What DCP loads with weights_only=False."""
    file = folder / "__0_0.distcp"
    buffer = io.BytesIO()
    torch.save(Touch(folder / "trace"), buffer)
    place = index.storage_data.pop(MetadataIndex("a", [0, 0]))
    place.offset, place.length = file.stat().st_size, len(buffer.getvalue())
    file.write_bytes(file.read_bytes() + buffer.getvalue())
    index.state_dict_metadata["a"] = BytesStorageMetadata()
    index.storage_data[MetadataIndex("a")] = place


def _place(**changes: Any) -> Callable[[Any, Path], None]:
    def change(index: Any, folder: Path) -> None:
        (folder.parent / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
        vars(index.storage_data[MetadataIndex("a", [0, 0])]).update(changes)

    return change


def _chunks(size: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[Any, Path], None]:
    def change(index: Any, folder: Path) -> None:
        entry = index.state_dict_metadata["a"]
        entry.size = torch.Size(size)
        entry.chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(part)) for offset, part in chunks]

    return change


def _link(index: Any, folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder.parent / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (_bytes_entry, "'a' is a BytesStorageMetadata, which would run code"),
        (_place(relative_path="../__0_0.distcp"), r"lies in '\.\./__0_0\.distcp', which is no file of a checkpoint"),
        (_place(relative_path="meta.json"), "which is no file of a checkpoint"),
        (_place(relative_path="__9_0.distcp"), "No such file"),
        (_place(length=1 << 40), "'a' of 24 bytes lies at bytes 0 to 1099511627776 of __0_0.distcp"),
        (_place(length=8), "'a' of 24 bytes lies at"),
        (_place(offset=-1), "'a' of 24 bytes lies at"),
        (_place(transform_descriptors=["zstd"]), "is compressed"),
        (_chunks((1 << 40, 1 << 20), ((0, 0), (1 << 40, 1 << 20))), "of 4611686018427387904 bytes lies at"),
        (_chunks((6, 2), ((0, 0), (3, 2))), "do not make up a tensor of shape"),
        (_chunks((3, 2), ((0, 0), (3, 2)), ((0, 0), (3, 2))), "do not make up a tensor"),
        (_chunks((3, 2), ((1, 0), (3, 2))), "do not make up a tensor"),
        (_chunks((3, 2), ((0,), (3,))), "do not make up a tensor"),
        (_chunks((2, 3), ((0, 0), (2, 3))), "has the shape"),
        (_link, "is a link"),
    ],
)
def test_a_lying_index_is_refused(
    lie: Callable[[Any, Path], None], said: str, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded or allocated, by both readers, in one message."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    save_tensors(folder, {"a": torch.ones(3, 2)}, world.checkpoint)
    index = pickle.loads((folder / ".metadata").read_bytes())
    lie(index, folder)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    target = torch.zeros(2, 3) if said == "has the shape" else torch.zeros(3, 2)
    for read in (
        lambda: TensorReader(folder).read("a"),
        lambda: load_tensors(folder, {"a": target}, world.checkpoint),
    ):
        with pytest.raises(CheckpointError, match=said):
            read()
    assert not (folder / "trace").exists()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["os.system", "builtins.eval", "torch.load", "torch.int_repr", "builtins.getattr"])
def test_an_index_calls_nothing(kind: str, tmp_path: Path) -> None:
    """Refused by name; what is known by name is not called either."""
    module, _, name = kind.rpartition(".")

    def text(value: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()

    call = pickle.PROTO + b"\x04" + text(module) + text(name) + pickle.STACK_GLOBAL + text(str(tmp_path / "trace"))
    (tmp_path / ".metadata").write_bytes(call + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP)
    with pytest.raises(CheckpointError, match=f"{kind} has no place in it"):
        read_index(tmp_path)
    evil = pickle.dumps(Touch(tmp_path / "trace"))
    record = read_records(evil, lambda kind: True)
    assert record.kind == f"{Path.__module__}.Path.touch"  # pathlib, or in Python 3.13 a module inside it
    assert not (tmp_path / "trace").exists()
    pickle.loads(evil)
    assert (tmp_path / "trace").exists(), "the plain unpickler runs it, so that the above says something"


@pytest.mark.parametrize(
    "body",
    [
        pickle.LONG_BINPUT + b"\xff\xff\xff\x7f",  # C's unpickler allocates 32 GiB
        pickle.EMPTY_TUPLE + b"".join([pickle.MEMOIZE + pickle.BINGET + bytes([n]) + pickle.TUPLE2 for n in range(60)])
        + pickle.NONE + pickle.SETITEM,  # a key whose hash takes 2**60 steps
        pickle.BINUNICODE + b"\xff\xff\xff\xff",
        pickle.FRAME + b"\xff" * 7 + b"\x7f",
        pickle.BINGET + b"\x07",
        pickle.APPEND,
        b"\xfe",
        b"",
    ],
)  # fmt: skip
def test_an_index_that_is_a_bomb_or_garbage_is_refused(body: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + body + pickle.STOP)
    with pytest.raises(CheckpointError, match="is no index of tensors"):
        read_index(tmp_path)


# --------------------------------------------------------------------------------------------------- the tensors lie
def _zip(method: int, pickled: bytes, numbers: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", numbers)
    return buffer.getvalue()


def test_a_lying_tensor_is_refused(world: World, tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a": torch.ones(3, 2)}, world.checkpoint)
    file, index = tmp_path / "__0_0.distcp", tmp_path / ".metadata"
    genuine, kept = file.read_bytes(), index.read_bytes()
    with zipfile.ZipFile(file) as archive:
        said = archive.read("archive/data.pkl")
    other = io.BytesIO()
    torch.save(torch.ones(2, 2), other)
    for content, why in (
        (_zip(zipfile.ZIP_DEFLATED, said, b"\0" * (1 << 20)), "it is compressed"),
        (_zip(zipfile.ZIP_STORED, pickle.dumps(Touch(tmp_path / "trace")), b"\0" * 24), "has no place in it"),
        (_zip(zipfile.ZIP_STORED, said, b"\0" * 20), "it has the shape"),
        (
            _zip(zipfile.ZIP_STORED, said.replace(b"K\x00K\x03K\x02", b"K\x09K\x03K\x02"), b"\0" * 24),
            "it has the shape",
        ),
        (_zip(zipfile.ZIP_STORED, b"\0" * (1 << 15), b"\0" * 24), "too much about itself"),
        (other.getvalue(), "it has the shape"),
        (genuine[:-30], "not a zip file"),
    ):
        file.write_bytes(content)
        changed: Metadata = pickle.loads(kept)
        vars(changed.storage_data[MetadataIndex("a", [0, 0])])["length"] = len(content)
        index.write_bytes(pickle.dumps(changed))
        for read in (
            lambda: TensorReader(tmp_path).read("a"),
            lambda: load_tensors(tmp_path, {"a": torch.zeros(3, 2)}, world.checkpoint),
        ):
            with pytest.raises(CheckpointError, match=f"holds no tensor of shape .*{why}"):
                read()
    assert not (tmp_path / "trace").exists()


def test_what_the_state_expects_must_be_there(world: World, tmp_path: Path) -> None:
    """torch's own error is no Exception: it would pass every handler and end in a traceback."""
    save_tensors(tmp_path, {"a": torch.ones(3)}, world.checkpoint)
    for name, shape, said in (("absent", (1,), "absent"), ("a", (4,), "Size mismatch")):
        with pytest.raises(CheckpointError, match=f"{tmp_path} cannot be read: .*{said}"):
            load_tensors(tmp_path, {name: torch.zeros(shape)}, world.checkpoint)
    assert isinstance(read_index(tmp_path).state_dict_metadata["a"], TensorStorageMetadata)
