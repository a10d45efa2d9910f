"""The commands as a person runs them: what they leave behind, and what they say of a mistake."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from tests.helpers.forked import environment, finished
from tests.helpers.paths import ROOT
from trainer.checkpoint.find import complete_checkpoints, find_checkpoint
from trainer.checkpoint.meta import read_meta
from trainer.config.load import load_config
from trainer.monitor.metrics import read_metrics

DEBUG = ("--config", "mmdit_debug_mup.yaml")
STEPS = 3
Start = Callable[..., subprocess.CompletedProcess[str]]
SHORT = (f"train.steps={STEPS}", "train.validate_every=3", "train.checkpoint_every=2", "train.sample_every=3")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` from the repository root."""
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def train(folder: Path, *overrides: str, start: Start = finished) -> subprocess.CompletedProcess[str]:
    """launch/train.py in `folder`, which must end well."""
    done = start("launch/train.py", *DEBUG, f"run.dir={folder.parent}", f"run.name={folder.name}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every path below a folder with its bytes and time of change; not the lock, which every start takes."""
    return {
        str(p.relative_to(folder)): (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.name != ".lock"
    }


def refused(folder: Path, *command: str | Path, start: Start = finished) -> str:
    """A command that is bad input: one message alone, exit code 2, nothing below `folder` touched."""
    before = contents(folder)
    done = start(*command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error") == 1
    assert "Traceback" not in done.stderr
    assert contents(folder) == before
    return done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that write into one copy it."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    train(folder, *SHORT, start=run)
    return folder


# --------------------------------------------------------------------------------------------------------- what is left


def test_run_folder(source: Path) -> None:
    """What the architecture promises of a run folder, after one process without torchrun."""
    names = {"config.yaml", "mup.json", "metrics.jsonl", "status.json", "samples", "checkpoints"}
    names |= {"loss.png", "evaluation.png"}
    assert {p.name for p in source.iterdir() if p.name != ".lock"} == names
    records = read_metrics(source)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [record["samples_seen"] for record in records] == [0, 8, 16, 24]
    for record in records[1:]:
        assert {"loss", "lr", "grad_norm", "images_per_s"} <= record.keys()
        assert record["grad_norm"] > 0
        assert record["images_per_s"] > 0
    assert [record["lr"] for record in records[1:]] == [0.002, 0.004, 0.004]  # two steps of warm-up
    for record in (records[0], records[3]):
        assert {"val_loss", "val_loss_ema", "val_loss_t0.0625", "val_loss_ema_t0.9375"} <= record.keys()
    assert records[3]["val_loss"] < records[0]["val_loss"]
    assert json.loads((source / "status.json").read_text()) == {"state": "finished", "step": 3, "reason": ""}
    grid = matplotlib.image.imread(source / "samples" / "step_00000003.png")
    assert grid.shape[:2] == (2 * 66 + 2, 2 * 66 + 2)  # four images of 32 pixels, enlarged twice
    assert grid.std() > 0.05
    assert len((source / "samples" / "prompts.txt").read_text().splitlines()) == 4
    assert [p.name for p in complete_checkpoints(source / "checkpoints")] == ["step_00000002", "step_00000003"]
    assert (source / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = load_config(str(source / "config.yaml"))
    assert config == load_config("mmdit_debug_mup", [f"run.dir={source.parent}", "run.name=source", *SHORT])
    table = json.loads((source / "mup.json").read_text())
    used = table.pop("in_use")["blocks.0.image.qkv.weight"]
    assert table == read_meta(find_checkpoint(source))["mup"]
    assert used == {"lr": config.optim.lr / 2, "weight_decay": 0.0, "eps": 1e-12}, "width 64 of base 32"


def test_finished_run_started_again(source: Path) -> None:
    before = contents(source / "checkpoints"), read_metrics(source)
    done = train(source, *SHORT)
    assert f"{source} has finished its 3 steps; nothing to do" in done.stdout
    assert (contents(source / "checkpoints"), read_metrics(source)) == before
    assert json.loads((source / "status.json").read_text())["state"] == "finished"


def test_init_from(source: Path, tmp_path: Path) -> None:
    """A new run starts from the live weights, and its averages from them too, not from the source's averages."""
    # Schedule and identity keys may differ: it is another run.
    changes = ("train.steps=1", "optim.warmup_steps=0", "train.seed=5", "train.checkpoint_every=0")
    done = train(tmp_path / "new", f"run.init_from={source}", "train.sample_every=0", *changes)
    assert f"weights from {source / 'checkpoints' / 'step_00000003'}" in done.stdout
    last, first = read_metrics(source)[-1], read_metrics(tmp_path / "new")[0]
    assert first["step"] == 0
    assert first["val_loss"] == last["val_loss"]
    assert first["val_loss_ema"] == last["val_loss"]
    assert last["val_loss"] != last["val_loss_ema"], "the comparison can fail"


def test_snapshot(tmp_path: Path) -> None:
    """The EMA weights alone: sampled from, and a new run starts from them."""
    folder, snapshot = tmp_path / "source", tmp_path / "source" / "ema" / "step_00000003"
    train(folder, *SHORT, "train.ema_snapshot_every=2", "train.sample_every=0", "run.keep_last=1")
    assert [path.name for path in complete_checkpoints(folder / "ema")] == ["step_00000002", "step_00000003"]
    assert find_checkpoint(folder).parent.name == "checkpoints"
    prompt = ("--prompt", "a red circle", "--output", tmp_path / "a.png")
    done = finished("launch/sample.py", "--checkpoint", snapshot, *prompt)
    assert done.returncode == 0, done.stderr
    assert f"1 images from the EMA weights of {snapshot}" in done.stdout
    changes = ("train.steps=1", "optim.warmup_steps=0", "train.checkpoint_every=0", "train.sample_every=0")
    done = train(tmp_path / "new", f"run.init_from={snapshot}", *changes)
    assert f"weights from {snapshot} (ema_0.99)" in done.stdout
    assert read_metrics(tmp_path / "new")[0]["val_loss"] == read_metrics(folder)[-1]["val_loss_ema"]


def test_allowed_change(source: Path, tmp_path: Path) -> None:
    """Schedule keys that are listed change and are logged; an average that is new starts from the weights."""
    folder = tmp_path / "moved"  # the run folder may move
    shutil.copytree(source, folder)
    allowed = "run.allow_change=[train.steps, optim.lr, ema.decays]"
    done = train(folder, *SHORT, "train.steps=4", "optim.lr=1e-3", "ema.decays=[0.5, 0.99]", "train.seed=0", allowed)
    assert f"resuming {folder / 'checkpoints' / 'step_00000003'}" in done.stdout
    for change in ("train.steps: 3 -> 4", "optim.lr: 0.004 -> 0.001", "ema.decays: [0.99] -> [0.5, 0.99]"):
        assert f"changed: {change}" in done.stdout
    records = read_metrics(folder)
    assert records[:4] == read_metrics(source)
    assert (records[4]["step"], records[4]["lr"], len(records)) == (4, 0.001, 5)


def test_synthetic_data(tmp_path: Path) -> None:
    """Any config runs before its data are there."""
    done = train(tmp_path / "a", "data.shards=synthetic", "text_encoder.path=none", "train.steps=2", *SHORT[1:],
                 "optim.warmup_steps=0")  # fmt: skip
    records = read_metrics(tmp_path / "a")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[2]["val_loss"] > 0
    assert "no sample grids: synthetic data have no captions" in done.stdout
    assert not (tmp_path / "a" / "samples").exists()


def test_sample(source: Path, tmp_path: Path) -> None:
    """An image of the data's size that follows from seed and prompt."""

    def sample(name: str, seed: int, start: Start = finished) -> bytes:
        file = tmp_path / "new" / name
        prompt = ("--prompt", "a red circle on a blue background", "--seed", str(seed))
        done = start("launch/sample.py", "--checkpoint", source, *prompt, "--output", file)
        assert done.returncode == 0, done.stderr
        return file.read_bytes()

    first = sample("a.png", 3, start=run)
    assert matplotlib.image.imread(tmp_path / "new" / "a.png").shape[:2] == (68, 68)  # enlarged, with a border
    assert sample("b.png", 3) == first
    assert sample("c.png", 4) != first


def test_data_order(tmp_path: Path) -> None:
    """The same keys at every world size, and after a resume."""

    def order(world: int, first: int, start: Start = finished) -> list[dict[str, Any]]:
        steps = ("--world-size", str(world), "--from-step", str(first), "--to-step", "5")
        done = start("launch/data_order.py", *DEBUG, *steps, f"run.dir={tmp_path}")
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    whole = order(1, 0, start=run)
    assert [line["step"] for line in whole] == [0, 1, 2, 3, 4]
    assert all(len(line["keys"]) == 8 for line in whole)
    keys = [key for line in whole for key in line["keys"]]
    assert len(set(keys)) == len(keys), "no sample twice in an epoch"
    assert order(2, 0) == whole
    assert order(3, 0) == whole
    assert order(3, 2) == order(1, 2) == whole[2:]
    assert contents(tmp_path) == {}


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "mmdit_dbug_mup"], 'did you mean "mmdit_debug_mup.yaml"?'),
        (
            [*DEBUG, "data.shards=.cache/debug/train-{000000..000002}.tar"],
            "shard .cache/debug/train-000002.tar does not exist",
        ),
        ([*DEBUG, "run.init_from=nowhere"], 'no complete checkpoint in "nowhere"'),
        ([*DEBUG, "text_encoder.path=nowhere/t5"], "nowhere/t5"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, "launch/train.py", *arguments, f"run.dir={tmp_path / 'runs'}")


def test_misspelt_key(tmp_path: Path) -> None:
    command = ("launch/train.py", *DEBUG, f"run.dir={tmp_path / 'runs'}", "optim.lrr=1")
    assert 'optim.lrr: unknown key; did you mean "optim.lr"?' in refused(tmp_path, *command, start=run)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.width=96"], "model.width: 64 in the checkpoint, 96 now; it is part of what the run is"),
        (["mup.base_width=16"], "mup.base_width: 32 in the checkpoint, 16 now; it is part of what the run is"),
        (["train.seed=1"], "train.seed: 0 in the checkpoint, 1 now; it is part of what the run is"),
        (["optim.lr=1e-3"], "add 'run.allow_change=[optim.lr]'"),
        (["run.resume=false"], "run.resume is false"),
    ],
)
def test_bad_resume(source: Path, overrides: list[str], message: str) -> None:
    names = (f"run.dir={source.parent}", f"run.name={source.name}")
    assert message in refused(source.parent, "launch/train.py", *DEBUG, *SHORT, *names, *overrides)


def test_init_from_another_model(source: Path, tmp_path: Path) -> None:
    overrides = (f"run.dir={tmp_path}", f"run.init_from={source}", "model.width=96")
    text = refused(tmp_path, "launch/train.py", *DEBUG, *overrides)
    assert f"{source}/checkpoints/step_00000003 is of another model" in text
    assert "[128, 64] in the checkpoint" in text or "[256] in the checkpoint" in text


def test_damaged_checkpoints(source: Path, tmp_path: Path) -> None:
    """Each is named; nothing is touched. (One that is good is resumed from: tests/faults.)"""
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    files = sorted((folder / "checkpoints").glob("*/*.distcp"))
    for file in files:
        os.truncate(file, 100)
    text = refused(tmp_path, "launch/train.py", *DEBUG, *SHORT, f"run.dir={tmp_path}", "run.name=damaged")
    assert f"no checkpoint of {folder} is undamaged" in text
    assert len(files) == 2
    assert all(f"{file} is damaged: 100 bytes" in text for file in files)
    sampling = ("launch/sample.py", "--prompt", "a", "--output", tmp_path / "a.png", "--checkpoint", folder)
    assert f"{files[1]} is damaged" in refused(tmp_path, *sampling)


@pytest.mark.parametrize(
    ("images", "message"),
    [("empty", "no image in this folder"), ("a.txt", "there is no such folder")],
)
def test_shard_without_images(images: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a file")
    output = ("--output", tmp_path / "shards" / "train")
    text = refused(tmp_path, "launch/shard.py", "--images", tmp_path / images, *output, start=run)
    assert message in text
    assert str(tmp_path / images) in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_shard_of_an_unreadable_folder(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o000)
    output = ("--output", tmp_path / "shards" / "train")
    done = run("launch/shard.py", "--images", tmp_path / "locked", *output)
    assert done.returncode == 2
    assert "this folder cannot be read" in done.stderr


def test_sample_without_checkpoint(tmp_path: Path) -> None:
    command = ("launch/sample.py", "--checkpoint", tmp_path, "--prompt", "a", "--output", tmp_path / "a.png")
    assert f'no complete checkpoint in "{tmp_path}"' in refused(tmp_path, *command)


def test_one_message_under_torchrun(tmp_path: Path) -> None:
    """Of two processes with the same mistake one speaks; what follows is torchrun's own report."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(*torchrun, "launch/train.py", *DEBUG, f"run.dir={tmp_path / 'runs'}", "optim.lrr=1")
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count('optim.lrr: unknown key; did you mean "optim.lr"?') == 1
    ours, _, torchruns = done.stderr.partition('did you mean "optim.lr"?')
    assert "Traceback" not in ours
    assert torchruns.count("Traceback") <= 1
    assert contents(tmp_path) == {}
