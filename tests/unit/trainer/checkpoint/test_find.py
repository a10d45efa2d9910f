"""Checkpoints that are complete or absent, an index that runs no code, and what a run folder's log holds."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from launch.processes import kill_tree
from tests.faults.harness import lives
from tests.helpers.checkpoints import meta_of
from trainer.build.engine import build_mup_table
from trainer.checkpoint.compatible import check_same_model, check_usable
from trainer.checkpoint.find import complete_checkpoints, find_checkpoint
from trainer.checkpoint.meta import read_meta
from trainer.checkpoint.write import Checkpointer
from trainer.config.keys import plain
from trainer.config.load import load_config
from trainer.errors import CheckpointError
from trainer.files import lock_folder, write_atomically
from trainer.monitor.metrics import Metrics, peak_flops, read_metrics
from trainer.monitor.plots import plot_loss
from trainer.monitor.tracking.tracker import Tracked
from trainer.parallel.dcp import AsyncSaver, load_tensors
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import World


class OneTensor:
    """An engine of one weight, with the real distributed checkpoint."""

    def __init__(self, world: World, value: float = 0.0) -> None:
        self.weight = torch.full((4,), value)
        self._group = world.checkpoint
        self._saver = AsyncSaver(world.device, world.checkpoint)

    def save(self, folder: Path, extra: Mapping[str, Tensor], averages_only: bool = False) -> Future[None]:
        return self._saver.save(folder, dict(extra) if averages_only else {"model/weight": self.weight, **extra})

    def load(self, folder: Path, extra: Mapping[str, Tensor]) -> None:
        load_tensors(folder, {"model/weight": self.weight, **extra}, self._group)


def checkpointer(
    folder: Path,
    world: World,
    engine: OneTensor,
    keep_last: int = 2,
    keep_every: int = 0,
    asynchronous: bool = True,
    tell: Callable[[str], None] = print,
) -> Checkpointer:
    group = world.checkpoint
    return Checkpointer(folder, cast(Engine, engine), group, keep_last, keep_every, asynchronous, tell)


def save(folder: Path, world: World, step: int, keep_last: int = 2) -> None:
    """A checkpoint whose weight is its step."""
    tensors = {"totals": torch.arange(5, dtype=torch.float64)}
    checkpointer(folder, world, OneTensor(world, step), keep_last).save(step, tensors, meta_of(step), wait=True)


def names(folder: Path) -> list[str]:
    """Everything in the checkpoints folder, hidden things too."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# -------------------------------------------------------------------------------------------------------- checkpoints
def test_saved_and_loaded(world: World, tmp_path: Path) -> None:
    save(tmp_path, world, 7)
    assert names(tmp_path) == ["step_00000007"], "nothing beside the complete folder"
    checkpoint = find_checkpoint(tmp_path)
    meta = read_meta(checkpoint)
    assert (meta["step"], sorted(meta["files"])) == (7, [".metadata", "__0_0.distcp"])
    engine, totals = OneTensor(world), torch.zeros(5, dtype=torch.float64)
    checkpointer(tmp_path, world, engine).load(checkpoint, {"totals": totals})
    assert engine.weight.tolist() == [7.0] * 4
    assert totals.tolist() == [0, 1, 2, 3, 4]


def test_keeps_the_last(world: World, tmp_path: Path) -> None:
    for step in (1, 2, 99_999_999, 100_000_000):  # one digit more than the padding: by number, not by name
        save(tmp_path, world, step)
    assert names(tmp_path) == ["step_100000000", "step_99999999"]
    assert find_checkpoint(tmp_path).name == "step_100000000"
    save(tmp_path, world, 100_000_001, keep_last=1)
    assert names(tmp_path) == ["step_100000001"]


def test_incomplete_is_absent(world: World, tmp_path: Path) -> None:
    """What a killed process leaves: found by nobody, cleared by the next save, no obstacle to it."""
    save(tmp_path, world, 5)
    folder = tmp_path / "checkpoints"
    left = [".step_00000006.tmp", ".step_00000009.tmp", ".step_00000004.old", ".step_00000006.old"]
    for name in left:
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_bytes(b"half")
    (folder / left[1] / "meta.json").write_text("{}")  # killed just before it was renamed
    (folder / "step_00000006").mkdir()  # a copy that did not end: no meta.json
    (folder / "step_00000006" / "__0_0.distcp").write_bytes(b"half")
    (folder / "step_latest").mkdir()
    (folder / "step_latest" / "meta.json").write_text("{}")
    assert [p.name for p in complete_checkpoints(folder)] == ["step_00000005"]
    assert find_checkpoint(tmp_path).name == "step_00000005"
    save(tmp_path, world, 6)
    assert names(tmp_path) == ["step_00000005", "step_00000006", "step_latest"]
    assert (folder / "step_00000006" / "__0_0.distcp").read_bytes() != b"half"


def test_incomplete_does_not_count_as_kept(world: World, tmp_path: Path) -> None:
    save(tmp_path, world, 1)
    (tmp_path / "checkpoints" / "step_00000003").mkdir()
    save(tmp_path, world, 2)
    assert [p.name for p in complete_checkpoints(tmp_path / "checkpoints")] == ["step_00000001", "step_00000002"]


def test_saving_a_step_again_replaces_it(world: World, tmp_path: Path) -> None:
    save(tmp_path, world, 5)
    checkpointer(tmp_path, world, OneTensor(world, 42.0)).save(5, {}, meta_of(5, commit="again"), wait=True)
    assert names(tmp_path) == ["step_00000005"]
    engine = OneTensor(world)
    engine.load(find_checkpoint(tmp_path), {})
    assert engine.weight.tolist() == [42.0] * 4
    assert read_meta(find_checkpoint(tmp_path))["commit"] == "again"


def test_find_checkpoint(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, world, 3)
    save(run, world, 4)
    older, newer = run / "checkpoints" / "step_00000003", run / "checkpoints" / "step_00000004"
    assert find_checkpoint(run) == newer
    assert find_checkpoint(run / "checkpoints") == newer
    assert find_checkpoint(older) == older
    for nothing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError) as error:
            find_checkpoint(nothing)
        assert f'no complete checkpoint in "{nothing}"' in str(error.value)


def test_unreadable_meta(tmp_path: Path) -> None:
    for content in ("{", None):
        if content is None:
            (tmp_path / "meta.json").unlink()
        else:
            (tmp_path / "meta.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"meta\.json cannot be read"):
            read_meta(tmp_path)


def test_write_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "status.json"
    write_atomically(file, "old")

    def crash(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(file, "new")
    assert file.read_text() == "old"
    write_atomically(file, "new")
    assert file.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


# ----------------------------------------------------------------------------------------------------- the same model
def table(sha256: str = "x", **rows: tuple[list[int], float]) -> dict[str, Any]:
    return {"sha256": sha256, "rows": {name: {"shape": shape, "lr": lr} for name, (shape, lr) in rows.items()}}


def test_check_same_model() -> None:
    checkpoint, ours = Path("runs/a"), table(a=([4, 2], 1.0), b=([4], 1.0))
    check_same_model({"mup": ours}, ours, checkpoint, rules=True)
    for other, text in (
        (
            table(a=([8, 2], 1.0), b=([8], 1.0)),
            r"2 parameters differ, first a: \[8, 2\] in the checkpoint, \[4, 2\] in",
        ),
        (table(a=([4, 2], 1.0)), r"1 parameters differ, first b: absent in the checkpoint, \[4\] in the config"),
        (table(a=([4, 2], 1.0), b=([4], 1.0), c=([1], 1.0)), r"first c: \[1\] in the checkpoint, absent in the config"),
    ):
        with pytest.raises(CheckpointError, match=f"runs/a is of another model: .*{text}"):
            check_same_model({"mup": other}, ours, checkpoint, rules=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("mup.parametrization=sp", r"the multiplier of final\.weight is 0\.5 in the checkpoint, 1 in the config"),
        ("mup.base_width=64", r"the multiplier of final\.weight"),
        ("mup.output_multiplier=3", r"the multiplier of final\.weight is 0\.5 in the checkpoint, 1\.5"),
        ("mup.base_depth=1", r"the scale of branches is 1 in the checkpoint, 0\.5 in the config"),
    ],
)
def test_weights_under_other_multipliers_are_refused(override: str, said: str) -> None:
    """init_from, sampling and evaluation load raw weights: another table would make another model of them."""
    ours, other = (
        build_mup_table(load_config("mmdit_debug_mup", overrides)).to_json() for overrides in ([], [override])
    )
    check_same_model({"mup": ours}, ours, Path("runs/a"), rules=False)
    with pytest.raises(CheckpointError, match=f"runs/a would compute another function under this config: {said}"):
        check_same_model({"mup": ours}, other, Path("runs/a"), rules=False)


def test_weights_that_predict_something_else_are_refused() -> None:
    """By init_from, sampling and evaluation. Checkpoints from before the key was there predict what was predicted."""
    ours = table(a=([4, 2], 1.0))
    for objective, predicts in (({}, "velocity"), ({"predict": "velocity"}, "velocity"), ({"predict": "x"}, "x")):
        meta = {"mup": ours, "config": {"objective": objective}}
        check_usable(meta, ours, predicts, Path("runs/a"))
        other = {"x": "velocity", "velocity": "x"}[predicts]
        said = f"runs/a was trained with objective.predict {predicts}, and the config says {other}"
        with pytest.raises(CheckpointError, match=said):
            check_usable(meta, ours, other, Path("runs/a"))


def test_check_same_rules() -> None:
    ours = table(a=([4, 2], 1.0), b=([4], 1.0))
    for other, first in (
        (table("y", a=([4, 2], 1.0), b=([4], 0.5)), "b"),
        (table("y", a=([4, 2], 1.0), b=([4], 1.0)), "settings"),
    ):
        check_same_model({"mup": other}, ours, Path("runs/a"), rules=False)  # init_from: what it computes is the same
        with pytest.raises(CheckpointError, match=rf"another muP table \(first difference: {first}\)"):
            check_same_model({"mup": other}, ours, Path("runs/a"), rules=True)


# ------------------------------------------------------------------------------------------------------------ metrics
def logged(folder: Path, steps: range, first_step: int = 0) -> Metrics:
    metrics = Metrics(folder, True, 100, first_step)
    for step in steps:
        metrics.write({"step": step, "loss": 1.0 / (step + 1)})
    metrics.close()
    return metrics


def steps_in(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder)]


def test_lines_past_the_checkpoint_are_cut(tmp_path: Path) -> None:
    logged(tmp_path, range(8))
    logged(tmp_path, range(6, 10), first_step=5)
    assert steps_in(tmp_path) == [*range(6), 6, 7, 8, 9]


def test_half_written_line_is_dropped(tmp_path: Path) -> None:
    logged(tmp_path, range(4))
    file = tmp_path / "metrics.jsonl"
    for half in ('{"step": 4, "lo', '{"step": 4, "loss": 1}'):  # the second lacks its newline alone
        file.write_text("".join(f'{{"step": {n}}}\n' for n in range(4)) + half)
        assert steps_in(tmp_path) == [0, 1, 2, 3]
        logged(tmp_path, range(0), first_step=9)
        assert steps_in(tmp_path) == [0, 1, 2, 3]
        assert file.read_text().endswith("\n")


def test_fresh_start_empties(tmp_path: Path) -> None:
    """Killed before its first checkpoint: the line of step 0 as well is logged anew."""
    logged(tmp_path, range(3))
    logged(tmp_path, range(0))
    assert steps_in(tmp_path) == []


def test_lines_are_flushed(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, True, 100, 0)
    metrics.write({"step": 1})
    assert steps_in(tmp_path) == [1]
    metrics.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_status_and_plots_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """They are left out with a warning; another error is not swallowed."""
    metrics = Metrics(tmp_path, True, 100, 0)
    metrics.write({"step": 1, "loss": 1.0})

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, "no room")

    monkeypatch.setattr("trainer.monitor.records.write_atomically", fail)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    for write, name in (
        (lambda: metrics.status("running", 1), "status.json"),
        (lambda: metrics.plot(last=True), "loss.png"),
    ):
        with contextlib.nullcontext() if number != errno.EACCES else pytest.raises(OSError, match="no room"):
            write()
        assert (f"{tmp_path / name} is not written: no room" in capsys.readouterr().out) is (number != errno.EACCES)
    metrics.close()


def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a line of which a part was written."""
    metrics, room = Metrics(tmp_path, True, 100, 0), 20
    real = metrics._file

    def write(data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(room, len(data))
        room -= taken
        return real.write(data[:taken])

    metrics._file = cast(Any, SimpleNamespace(write=write, close=real.close))
    for step in (1, 2):
        metrics.write({"step": step})
    assert steps_in(tmp_path) == [1]
    assert "No space left on device; 1 lines wait for room" in capsys.readouterr().out
    room = 1000
    metrics.write({"step": 3})
    assert steps_in(tmp_path) == [1, 2, 3]
    metrics.close()


def test_terminal_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, True, 4, 0)
    metrics.write({"step": 1, "loss": 0.5, "grad_norm": 2.0, "lr": 1e-3, "images_per_s": 123.4, "skipped_steps": 2})
    metrics.close()
    line = capsys.readouterr().out
    parts = ("1/4", "loss 0.5000", "|g| 2", "lr 0.001", "123 images/s", "2 skipped", "left")
    assert all(part in line for part in parts), line
    assert line.count("\n") == 1


def test_status(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, True, 4, 0)
    metrics.status("running", 0)
    metrics.status("failed", 3, "it broke")
    metrics.close()
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"state": "failed", "step": 3, "reason": "it broke"}


def test_inactive_metrics_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, False, 4, 0)
    metrics.start_trackers(["wandb"], Tracked(tmp_path, "project", "name", "offline", {}))
    metrics.write({"step": 1, "loss": 0.5})
    metrics.say("hello")
    metrics.status("running", 1)
    metrics.plot(last=True)
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.slow
def test_plot_shows_what_was_logged(tmp_path: Path) -> None:
    metrics = logged(tmp_path, range(1, 9))
    metrics.plot()
    assert not (tmp_path / "loss.png").exists(), "at most once a minute, for which all ranks wait"
    metrics.plot(last=True)
    plot_loss([], tmp_path / "empty.png")
    assert (tmp_path / "loss.png").read_bytes() != (tmp_path / "empty.png").read_bytes()


def test_peak_flops() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("Some Other GPU") is None


def test_meta_of_a_run_is_json() -> None:
    """What a checkpoint stores of a config comes back equal: tuples are lists already."""
    stored = plain(load_config("mmdit_debug_mup"))
    assert json.loads(json.dumps(stored)) == stored


def test_a_run_folder_is_held_by_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    held = lock_folder(folder)
    with pytest.raises(CheckpointError, match=r"in use by another process .* or choose another run\.name"):
        lock_folder(folder, wait_s=0)
    held.close()
    lock_folder(folder, wait_s=0).close()


def test_kill_tree_reaches_processes_in_sessions_of_their_own() -> None:
    """torchrun's workers are such: a kill of the parent's process group alone would leave them training."""
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60'], start_new_session=True)"
    code = f"{child}; print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())
    kill_tree(parent.pid)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while lives(grandchild):  # killed; whoever adopted it may not have looked yet
        assert time.monotonic() < deadline, "the grandchild lives on"
        time.sleep(0.05)
