"""Random SIGKILLs of the commands that write much (index, precompute, export), each started again until it ends.

What it wrote must be, byte for byte, what an unbroken one writes.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from data.debug import ensure_debug_assets
from launch.processes import kill_tree
from tests.helpers.exports import config_of, random_checkpoint
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT

KILLS_A_COMMAND = 5
PATIENCE_S = 600.0


class Subject(NamedTuple):
    """A command that is killed. prepare: makes what the command finds in its new folder. arguments: of the command that
    writes into that folder; they may differ from start to start."""

    name: str
    prepare: Callable[[Path], None]
    arguments: Callable[[Path], list[str]]


def small_autoencoder(folder: Path) -> Path:
    """A seeded random AutoencoderKL with 4 channels and a downsampling of 2."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 1.5,
        "shift_factor": 0.1,
    }
    AutoencoderKL(**sizes).save_pretrained(folder)
    return folder


def precompute_settings(assets: Path, autoencoder: Path) -> list[str]:
    """Overrides of the debug config: its drawn shapes, and this autoencoder."""
    return [
        f"data.shards={assets}/train-{{000000..000001}}.tar", f"text_encoder.path={assets}/t5",
        f"autoencoder={{path: {autoencoder}, channels: 4, downsample: 2}}",
    ]  # fmt: skip


def precompute(prefix: Path, processes: int, overrides: list[str], *options: str) -> list[str]:
    """Arguments of python that precompute the debug data."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = ["launch/precompute.py", "--config", "mmdit_debug_mup", "--output", str(prefix), *options, *overrides]
    return [*(launcher if processes > 1 else []), *command]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output[-3000:]
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without hidden ones: what a killed process leaves under a temporary name is hidden."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p): (folder / p).read_bytes() for p in paths if not any(part.startswith(".") for part in p.parts)}


def subjects(scratch: Path, chance: random.Random) -> list[Subject]:
    """The three commands, on the debug data; precompute on one process or two, by chance."""
    assets = ensure_debug_assets(scratch / "debug")
    overrides = precompute_settings(assets, small_autoencoder(scratch / "autoencoder"))
    options = ["--samples-per-shard", "16", "--flips", "--batch-size", "4"]
    encoders = (f"text_encoder.path={assets}/t5", "text_encoder.width=64")
    random_checkpoint(scratch / "checkpoint", config_of("mmdit", "model.width=256", "model.depth=4", *encoders))

    def shards(folder: Path) -> None:
        """Copies that keep the times of their files, which an index holds."""
        for number in range(24):
            shutil.copy2(assets / f"train-{number % 2:06d}.tar", folder / f"s-{number:06d}.tar")

    return [
        Subject("index", shards, lambda folder: ["launch/shard.py", "index", str(folder), "--workers", "2"]),
        Subject(
            "precompute",
            lambda _: None,
            lambda folder: precompute(folder / "train", chance.choice((1, 2)), overrides, *options),
        ),
        Subject(
            "export",
            lambda _: None,
            lambda folder: [
                "launch/export.py", "--checkpoint", str(scratch / "checkpoint"), "--output", str(folder / "exported"),
                "--max-shard-gib", "0.001",
            ],
        ),
    ]  # fmt: skip


def kills(
    seed: int, count: int, scratch: Path, names: tuple[str, ...] = ("index", "precompute", "export")
) -> Iterator[dict[str, Any]]:
    """`count` kills of the commands in turn: each kill with the command as its moment, and for each command that came
    to its end whether what it wrote was equal."""
    chance = random.Random(seed)
    chosen = [subject for subject in subjects(scratch, chance) if subject.name in names]
    unbroken: dict[str, tuple[dict[str, bytes], float]] = {}
    for subject in chosen:
        folder, began = scratch / "unbroken" / subject.name, time.monotonic()
        folder.mkdir(parents=True)
        subject.prepare(folder)
        finish(start(subject.arguments(folder)))
        unbroken[subject.name] = contents(folder), time.monotonic() - began
    done = number = 0
    while done < count:
        subject = chosen[number % len(chosen)]
        folder, number = scratch / f"set_{number}", number + 1
        folder.mkdir()
        subject.prepare(folder)
        expected, seconds = unbroken[subject.name]
        ended = False
        for _ in range(min(KILLS_A_COMMAND, count - done)):
            process = start(subject.arguments(folder))
            try:
                process.wait(chance.uniform(0.3, seconds))
                finish(process)
                ended = True
                break
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
                process.communicate()
                done += 1
                yield {"moment": subject.name}
                if ended := contents(folder) == expected:  # killed on its way out
                    break
        if not ended:
            finish(start(subject.arguments(folder)))
        yield {"equal": contents(folder) == expected}
        shutil.rmtree(folder)
