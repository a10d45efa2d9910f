"""Checkpoints that are broken or meant to harm: read rightly, or one message; no code, hang or traceback.

A case changes one file of a checkpoint: some bytes, or a value in meta.json or in the index. Where the case is "forged"
the digests are made anew, as a stranger would, so that what lies behind them is tried; such a checkpoint may also hold
other numbers than before.
"""

import contextlib
import copy
import hashlib
import json
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.fuzz import OUTCOMES, READ, REFUSED, fuzz
from tests.helpers.paths import ROOT
from trainer.checkpoint.compatible import check_same_engine, check_same_model
from trainer.checkpoint.find import find_checkpoint, weights_of
from trainer.checkpoint.meta import read_meta, seal
from trainer.config.load import parse
from trainer.config.resume import check_resume
from trainer.config.schema import TrainConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.parallel.dcp import TensorReader, load_tensors
from trainer.parallel.mesh import World
from trainer.state import TrainState

pytestmark = pytest.mark.slow

GENUINE = ROOT / "tests/integration/run_of_0db30ff/checkpoints/step_00000004"
FILES = ("meta.json", ".metadata", "__0_0.distcp")
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 1 << 31, 1 << 62, 1 << 70, 0.5, float("nan"), 1e308, "", "..", "/etc/passwd", "../x",
    "__0_0.distcp", "\x1b[2J", "\ud800", "é" * 99, [], {}, [[]], {"a": [1]},
)  # fmt: skip
SECONDS, BYTES = 20, 1 << 30  # what a case may take


# ------------------------------------------------------------------------------------------------------------- damage
def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in plain data, and in the objects of an index."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        one = stack.pop()
        items: list[tuple[Any, Any]] = []
        if isinstance(one, dict):
            items = list(one.items())
        elif isinstance(one, list):
            items = list(enumerate(one))
        elif hasattr(one, "__dict__") and not isinstance(one, type):
            one = vars(one)
            items = list(one.items())
        found += [(one, key) for key, _ in items]
        stack += [inner for _, inner in items]
    return found


def change_value(data: st.DataObject, root: Any) -> None:
    container, key = data.draw(st.sampled_from(places(root)))
    odd = data.draw(st.sampled_from(ODD))
    match data.draw(st.sampled_from(["set", "remove", "add", "scale"])):
        case "remove":
            del container[key]
        case "add" if isinstance(container, dict):
            container["added" if isinstance(key, str) else key] = odd
        case "scale" if type(container[key]) is int:
            container[key] += data.draw(st.sampled_from([-1, 1, 8, 1 << 20, 1 << 40]))
        case _:
            container[key] = torch.Size([3, 1 << 40]) if isinstance(container[key], torch.Size) else copy.deepcopy(odd)


def change_bytes(data: st.DataObject, content: bytes) -> bytes:
    at = data.draw(st.integers(0, len(content) - 1))
    to = min(len(content), at + data.draw(st.sampled_from([0, 1, 4, 60, 5000])))
    new = data.draw(
        st.sampled_from([b"", b"\0", b"\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"\x86\x94", b"PK\x01\x02", b"9" * 40])
    )
    if data.draw(st.booleans()):
        new = bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))])
        to = at + 1
    return content[:at] + new + content[to:]


def damage(data: st.DataObject, folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    if name == "__0_0.distcp" or data.draw(st.booleans()):
        path.write_bytes(change_bytes(data, content))
    elif name == "meta.json":
        meta = json.loads(content)
        change_value(data, meta)
        path.write_text(json.dumps(meta))
    else:
        index = pickle.loads(content)
        change_value(data, {"entries": index.state_dict_metadata, "where": index.storage_data})
        with contextlib.suppress(AttributeError, RuntimeError):  # an object that pickle cannot write so
            path.write_bytes(pickle.dumps(index))


def forge(folder: Path) -> None:
    """Make the digests anew, as far as meta.json lets."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        for name, entry in meta["files"].items():
            content = (folder / name).read_bytes()
            entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        (folder / "meta.json").write_text(seal(meta))
    except Exception:  # whatever the damage has left of it
        return


# ------------------------------------------------------------------------------------------------------------ reading
def read_as_commands_do(folder: Path, table: dict[str, Any], config: TrainConfig, group: Any) -> dict[str, Tensor]:
    """Everything that resuming, sampling and exporting read of a checkpoint."""
    meta = read_meta(find_checkpoint(folder))
    parse(meta["config"], "the config", [])
    check_same_engine(meta, {"name": "fsdp2"}, folder)
    check_resume(meta["config"], config, meta["step"])
    check_same_model(meta, table, folder, rules=True)
    weights_of(meta)
    state = TrainState.start(torch.device("cpu"))
    state.restore(meta, 0)
    reader = TensorReader(folder)
    shapes = {f"model/{name}": row["shape"] for name, row in table["rows"].items()}
    loaded = {name: torch.zeros(shape) for name, shape in shapes.items()}
    load_tensors(folder, loaded, group)
    for name, tensor in loaded.items():
        torch.testing.assert_close(reader.read(name).to(tensor.dtype), tensor, rtol=0, atol=0, equal_nan=True)
    return loaded


def bounded(action: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor] | None, str]:
    """The result, or None and the message of a user's error; with BYTES of address space beside what there is, in at
    most SECONDS."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    began = time.monotonic()
    try:
        return action(), ""
    except (CheckpointError, ConfigError) as error:
        return None, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert time.monotonic() - began < SECONDS


@pytest.mark.hypothesis
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_refused_or_does_not_matter(name: str, world: World, tmp_path: Path) -> None:
    genuine = json.loads((GENUINE / "meta.json").read_text())
    config = parse(genuine["config"], "the config", [])
    expected = read_as_commands_do(GENUINE, genuine["mup"], config, world.checkpoint)
    folder = tmp_path / GENUINE.name
    trial = lambda: read_as_commands_do(folder, genuine["mup"], config, world.checkpoint)  # noqa: E731

    @fuzz(40)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GENUINE, folder)
        sealed = data.draw(st.booleans())
        if sealed:
            forge(folder)
        forged = data.draw(st.booleans())
        damage(data, folder, name)
        if forged:
            forge(folder)
        found, message = bounded(trial)
        assert "allocate" not in message, "refused for want of memory alone"
        if found is None:
            OUTCOMES[REFUSED] += 1
            return
        same = all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        OUTCOMES[READ if same else "read: forged numbers"] += 1
        assert same or forged, "a digest that does not fit was passed over"

    check()
