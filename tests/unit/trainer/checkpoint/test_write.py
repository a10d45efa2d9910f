"""Saves in the background: what is written, what is verified, what is kept, and what a failure leaves."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tests.helpers.checkpoints import meta_of
from trainer.checkpoint.checksums import digest_files, superseded, verify_files
from trainer.checkpoint.find import complete_checkpoints, find_checkpoint, newest_good, set_aside, verify, weights_of
from trainer.checkpoint.meta import read_meta
from trainer.checkpoint.write import Checkpointer, clear_leftovers
from trainer.errors import CheckpointError
from trainer.parallel.dcp import AsyncSaver, bytes_of, load_tensors
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import World

SLOW_S = 2.0


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread sleeps before it writes."""
    write = dcp.save

    def delayed(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(SLOW_S)
        return write(*arguments, **keywords)

    monkeypatch.setattr(dcp, "save", delayed)


class OneTensor:
    """An engine of one weight, with the real writer; `broken` makes its saves fail in the thread."""

    def __init__(self, world: World) -> None:
        self.weight = torch.zeros(4)
        self.broken = False
        self._saver = AsyncSaver(world.device, world.checkpoint)

    def save(self, folder: Path, extra: Mapping[str, Tensor], averages_only: bool = False) -> Future[None]:
        if self.broken:
            (folder / "__0_0.distcp").write_bytes(b"half")
            failed: Future[None] = Future()
            failed.set_exception(OSError(28, "No space left on device"))
            return failed
        return self._saver.save(folder, dict(extra) if averages_only else {"model/weight": self.weight, **extra})


class Saves(NamedTuple):
    engine: OneTensor
    checkpointer: Checkpointer
    told: list[str]
    folder: Path

    def save(self, step: int, wait: bool = True) -> None:
        self.engine.weight.fill_(step)
        self.checkpointer.save(step, {}, meta_of(step), wait)

    def names(self) -> list[str]:
        """Everything in the checkpoints folder, hidden things too."""
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


Make = Callable[..., Saves]


@pytest.fixture
def make(world: World, tmp_path: Path) -> Make:
    def make(keep_last: int = 9, keep_every: int = 0, asynchronous: bool = True) -> Saves:
        engine, told = OneTensor(world), []
        written_by = cast(Engine, engine)
        checkpointer = Checkpointer(
            tmp_path, written_by, world.checkpoint, keep_last, keep_every, asynchronous, told.append
        )
        return Saves(engine, checkpointer, told, tmp_path)

    return make


def weight_in(checkpoint: Path, world: World, name: str = "model/weight") -> list[float]:
    tensor = torch.full((4,), -1.0)
    load_tensors(checkpoint, {name: tensor}, world.checkpoint)
    return tensor.tolist()


# ------------------------------------------------------------------------------------------------- in the background
@pytest.mark.parametrize("copied", [True, False])
def test_what_is_written_is_the_state_at_the_save(
    copied: bool, slow: None, make: Make, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on while the thread writes. Without the copy the later weights would be written."""
    saves = make()
    if not copied:
        monkeypatch.setattr(saves.engine._saver._stager, "stage", lambda tensors: tensors)
    saves.save(5, wait=False)
    saves.engine.weight.fill_(99.0)
    assert not complete_checkpoints(saves.folder / "checkpoints"), "the save did not wait for the writer"
    saves.checkpointer.wait()
    assert weight_in(find_checkpoint(saves.folder), world) == [5.0 if copied else 99.0] * 4


def test_one_save_at_a_time(slow: None, make: Make, world: World) -> None:
    """The second waits for the first, and its wait is counted; the first's files hold the first's values."""
    saves = make()
    saves.save(1, wait=False)
    assert 0 < saves.checkpointer.figures()["checkpoint_blocked_s"] < SLOW_S
    saves.save(2, wait=False)
    assert saves.names()[-1] == "step_00000001"
    figures = saves.checkpointer.figures()
    assert figures["checkpoint_blocked_s"] > SLOW_S / 2
    assert figures["checkpoint_write_s"] > SLOW_S / 2
    saves.checkpointer.wait()
    for checkpoint, value in zip(complete_checkpoints(saves.folder / "checkpoints"), (1.0, 2.0), strict=True):
        assert weight_in(checkpoint, world) == [value] * 4


def test_synchronous(slow: None, make: Make) -> None:
    saves = make(asynchronous=False)
    saves.save(1, wait=False)
    assert saves.names() == ["step_00000001"]
    assert saves.checkpointer.figures()["checkpoint_blocked_s"] > SLOW_S


def test_snapshots(make: Make, world: World) -> None:
    """The averages alone, beside the checkpoints, never cleared; a resume does not see them."""
    saves = make(keep_last=1)
    config = {"ema": {"decays": [0.5, 0.9]}}
    for step in (2, 4, 6):
        averages = {f"ema_{decay}/weight": torch.full((4,), step * decay) for decay in (0.5, 0.9)}
        saves.checkpointer.save_averages(step, averages, meta_of(step, config=config))
    saves.checkpointer.wait()
    snapshots = complete_checkpoints(saves.folder / "ema")
    assert [path.name for path in snapshots] == ["step_00000002", "step_00000004", "step_00000006"]
    assert newest_good(saves.folder, world.control) == (None, {})
    verify(snapshots[0], world.control)
    meta = read_meta(find_checkpoint(snapshots[0]))
    assert weights_of(meta) == "ema_0.5"
    assert weight_in(snapshots[0], world, "ema_0.5/weight") == [1.0] * 4
    with pytest.raises(CheckpointError, match="model/weight"):
        weight_in(snapshots[0], world)
    assert weights_of({"config": config}) == "model"


# ---------------------------------------------------------------------------------------------------------- failures
def test_a_failure_is_told_and_the_third_ends_the_run(make: Make) -> None:
    saves = make()
    saves.save(1)
    saves.engine.broken = True
    saves.save(2, wait=False)
    saves.save(3, wait=False)
    [warning] = saves.told
    failed = saves.folder / "checkpoints" / "step_00000002"
    assert warning.startswith(f"warning: {failed} was not written: OSError: [Errno 28] No space left on device; ")
    with pytest.raises(CheckpointError, match="step_00000004 was not written: OSError"):
        saves.save(4, wait=False)
    assert saves.names() == ["step_00000001"], "nothing half-written stays, and the older one does"


def test_a_success_forgets_failures(make: Make) -> None:
    saves = make()
    for step in range(1, 9):
        saves.engine.broken = step % 3 != 0
        saves.save(step, wait=False)
    saves.checkpointer.wait()
    assert saves.names() == ["step_00000003", "step_00000006"]
    assert sum("was not written" in text for text in saves.told) == 6
    assert sum("can be written again" in text for text in saves.told) == 2


def test_a_save_that_must_succeed_raises_at_once(make: Make) -> None:
    saves = make()
    saves.save(1)
    saves.engine.broken = True
    with pytest.raises(CheckpointError, match="step_00000002 was not written"):
        saves.save(2)
    saves.engine.broken = False
    saves.save(3)
    assert saves.names() == ["step_00000001", "step_00000003"]


def test_a_folder_that_cannot_be_made(make: Make) -> None:
    saves = make()
    (saves.folder / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"step_00000001 was not written: (NotADirectory|FileExists)Error"):
        saves.save(1)


def test_too_little_room_is_told_before_writing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = make()
    saves.save(1)
    usage = shutil.disk_usage(saves.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=4000))
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", lambda *arguments: pytest.fail("it writes"))
    needs = rf"step_00000002 was not written: it needs \d+ bytes and 4000 are free in {saves.folder}/checkpoints: "
    with pytest.raises(CheckpointError, match=f"{needs}free space there, lower run.keep_last, or use another run.dir"):
        saves.save(2)
    assert saves.names() == ["step_00000001"]


def test_a_full_disk_is_told_with_what_may_be_removed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lower run.keep_last no longer keeps, and what a kill has left, goes before anything is written."""
    saves = make()
    for step in (1, 2, 3, 4):
        saves.save(step)
    (saves.folder / "checkpoints" / ".step_00000005.tmp").mkdir()
    usage = shutil.disk_usage(saves.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(CheckpointError, match=r"These may be removed: step_00000003 \(.* GB\); keep step_00000004 \("):
        make(keep_last=2).save(5)
    assert saves.names() == ["step_00000003", "step_00000004"]
    with pytest.raises(
        CheckpointError, match=r"elsewhere on this disk: a restart needs step_00000004 \(.* GB\), and the"
    ):
        make(keep_last=1).save(5)
    assert saves.names() == ["step_00000004"]


def test_what_kills_have_left_in_a_run_folder_goes(tmp_path: Path) -> None:
    for name in ("checkpoints/.step_00000002.tmp", "checkpoints/step_00000001", "ema/.step_00000002.old", "samples"):
        (tmp_path / name).mkdir(parents=True)
    for name in (".status.json.0badcafe.tmp", "samples/.step_00000001.png.0badcafe.tmp", "status.json", ".lock"):
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"checkpoints", "checkpoints/step_00000001", "ema", "samples", "status.json", ".lock"}


def test_needed_bytes_are_an_upper_estimate(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimates = []

    def noted(folder: Path, needed: int) -> None:
        estimates.append(needed)

    monkeypatch.setattr("trainer.parallel.dcp.check_room", noted)
    tensors = {f"model/blocks.{n}.image.qkv.weight": torch.ones(300, 200, dtype=torch.float64) for n in range(20)}
    tensors |= {f"step/blocks.{n}.image.qkv.weight": torch.zeros(()) for n in range(20)}
    AsyncSaver(world.device, world.checkpoint).save(tmp_path, tensors).result()
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert written <= estimates[0] <= 1.02 * written
    assert bytes_of([]) == 0


# ------------------------------------------------------------------------------------------------------ verification
def damage(file: Path, kind: str) -> None:
    """flip: one bit in the middle; cut: the last byte; gone: the file; added: a file that was not written; link: the
    file lies elsewhere; renumbered: another step, in the text of meta.json."""
    if kind == "added":
        shutil.copy(file.with_name("__0_0.distcp"), file)
        return
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[len(content) // 2] ^= 1
    if kind == "cut":
        del content[-1]
    if kind == "link":
        elsewhere = file.parents[2] / f"{file.parent.name} {file.name}"
        file.rename(elsewhere)
        file.symlink_to(elsewhere)
        return
    if kind == "renumbered":
        content = content.replace(b'"step": ', b'"step": 6')
    file.write_bytes(content)
    if kind == "gone":
        file.unlink()


DAMAGES = [
    pytest.param("__0_0.distcp", "flip", "is damaged: its SHA-256 is", id="flipped bit"),
    pytest.param("__0_0.distcp", "cut", r"is damaged: \d+ bytes, \d+ were written", id="cut"),
    pytest.param("__0_0.distcp", "gone", "is missing", id="gone"),
    pytest.param(".metadata", "flip", "is damaged: its SHA-256 is", id="index"),
    pytest.param("meta.json", "cut", "cannot be read", id="meta"),
    pytest.param("meta.json", "renumbered", "is damaged: its fields are not those of its digest", id="step"),
    pytest.param("__7_0.distcp", "added", "is not among the files that meta.json lists", id="added"),
    pytest.param("__0_0.distcp", "link", "is a link out of the checkpoint", id="link"),
]


@pytest.mark.parametrize(("name", "kind", "message"), DAMAGES)
def test_damage_is_named_and_passed_over(name: str, kind: str, message: str, make: Make, world: World) -> None:
    saves = make()
    for step in (1, 2):
        saves.save(step)
    older, newer = complete_checkpoints(saves.folder / "checkpoints")
    verify(newer, world.control)
    damage(newer / name, kind)
    with pytest.raises(CheckpointError, match=f"{newer / name} {message}"):
        verify(newer, world.control)
    good, damaged = newest_good(saves.folder, world.control)
    assert good == older
    assert list(damaged) == [newer]
    assert find_checkpoint(saves.folder) == older, "what a command takes that only reads"
    with pytest.raises(CheckpointError, match=f"{newer / name} {message}"):
        find_checkpoint(newer)
    damage(older / name, kind)
    with pytest.raises(CheckpointError) as error:
        newest_good(saves.folder, world.control)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is undamaged"):
        find_checkpoint(saves.folder)
    assert all(str(path / name) in str(error.value) for path in (older, newer))


def test_a_checkpoint_without_checksums_loads(make: Make, world: World) -> None:
    saves = make()
    saves.save(1)
    checkpoint = find_checkpoint(saves.folder)
    (checkpoint / "meta.json").write_text(json.dumps(meta_of(1)))
    assert newest_good(saves.folder, world.control) == (checkpoint, {})


def test_ranks_share_the_files(tmp_path: Path) -> None:
    """Each file falls to one rank, a rank's own to itself; at another world size too."""
    names = [f"__{rank}_0.distcp" for rank in range(5)] + [".metadata", "zero/zero_pp_rank_3_mp_rank_00_states.pt"]
    (tmp_path / "zero").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    shares = [digest_files(tmp_path, rank, 5) for rank in range(5)]
    assert sorted(shares[3]) == ["__3_0.distcp", "zero/zero_pp_rank_3_mp_rank_00_states.pt"]
    assert sorted(name for share in shares for name in share) == sorted(names)
    files = digest_files(tmp_path)
    damage(tmp_path / "__4_0.distcp", "flip")
    failed = []
    for rank in range(3):
        try:
            verify_files(tmp_path, files, rank, 3)
        except CheckpointError:
            failed.append(rank)
    assert failed == [1], "file of rank 4 at a world size of 3"


# ---------------------------------------------------------------------------------------------------- what is kept
def test_superseded() -> None:
    steps = [1000, 1500, 2000, 2500, 3000, 3500]
    assert superseded(steps, 2, 0) == [1000, 1500, 2000, 2500]
    assert superseded(steps, 2, 1000) == [1500, 2500]
    assert superseded(steps, 9, 0) == []
    assert superseded(steps, 3, 0, healthy_before=2500) == [1000], "the newest three, and two that are healthy"
    assert superseded(steps, 3, 0, healthy_before=3500) == [1000, 1500, 2000], "these are among the newest three"
    assert superseded(steps, 1, 0, healthy_before=3500) == [1000, 1500, 2000, 2500]
    assert superseded(steps, 1, 0, healthy_before=1000) == steps[:-1], "none is healthy"


def test_keep_every(make: Make) -> None:
    saves = make(keep_last=1, keep_every=4)
    for step in (2, 4, 6, 8, 9, 10):
        saves.save(step)
    assert saves.names() == ["step_00000004", "step_00000008", "step_00000010"]


def test_a_corrupt_one_does_not_push_out_a_good_one(make: Make, world: World) -> None:
    saves = make(keep_last=2)
    for step in (1, 2):
        saves.save(step)
    damage(saves.folder / "checkpoints" / "step_00000002" / "__0_0.distcp", "flip")
    _, damaged = newest_good(saves.folder, world.control)
    for checkpoint, reason in damaged.items():
        set_aside(checkpoint, reason)
    assert "SHA-256" in (saves.folder / "checkpoints" / "step_00000002.corrupt" / "reason.txt").read_text()
    saves.save(3)
    assert saves.names() == ["step_00000001", "step_00000002.corrupt", "step_00000003"]
