"""Random SIGKILLs of launch/precompute.py, started again each time: shards and index must equal an unbroken run's.

python -m benchmarks.kills_precompute --kills 10 --output benchmarks/results/kills_precompute.json
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from benchmarks.machine import write
from data.debug import ensure_debug_assets
from launch.processes import kill_tree
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT

SHARDS, PER_SHARD, PATIENCE_S = 32, 16, 600.0


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


def settings(assets: Path, autoencoder: Path) -> list[str]:
    """Overrides of the debug config: its drawn shapes, and this autoencoder."""
    return [
        f"data.shards={assets}/train-{{000000..000001}}.tar", f"text_encoder.path={assets}/t5",
        f"autoencoder={{path: {autoencoder}, channels: 4, downsample: 2}}",
    ]  # fmt: skip


def start(prefix: Path, processes: int, overrides: list[str], *options: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "launch/precompute.py", "--config", "mmdit_debug_mup",
         "--output", str(prefix), *options, *overrides],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output[-3000:]
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def complete(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*-*.tar"))


def kill(prefix: Path, overrides: list[str], options: list[str], chance: random.Random) -> dict[str, Any]:
    """Start on one or two processes, kill all of them at a random moment of the writing; what was there then."""
    processes, before = chance.choice((1, 2)), complete(prefix.parent)
    process = start(prefix, processes, overrides, *options)
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and not (complete(prefix.parent) > before or list(prefix.parent.glob(".*.tar.tmp"))):
        assert time.monotonic() < deadline, "nothing is written"
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.3))
    early = process.poll() is None
    kill_tree(process.pid)
    process.communicate()
    half = len(list(prefix.parent.glob(".*.tar.tmp")))
    return {"processes": processes, "in_mid_run": early, "shards": complete(prefix.parent), "half_shards_left": half}


def run(kills: int, seed: int, scratch: Path, report: Any = print) -> dict[str, Any]:
    """An unbroken run on one process, and one with `kills` kills, dealt to as many sets as are needed."""
    chance = random.Random(seed)
    overrides = settings(ensure_debug_assets(scratch / "debug"), small_autoencoder(scratch / "autoencoder"))
    options = ["--samples-per-shard", str(PER_SHARD), "--flips", "--batch-size", "4"]
    finish(start(scratch / "whole" / "train", 1, overrides, *options))
    whole = contents(scratch / "whole")
    assert complete(scratch / "whole") == SHARDS
    table: list[dict[str, Any]] = []
    equal, sets = True, 0
    while sum(entry["in_mid_run"] for entry in table) < kills:
        prefix = scratch / f"set_{sets}" / "train"
        prefix.parent.mkdir()
        while complete(prefix.parent) < SHARDS and sum(entry["in_mid_run"] for entry in table) < kills:
            table.append({"set": sets, **kill(prefix, overrides, options, chance)})
            report(table[-1])
        finish(start(prefix, 1, overrides, *options))
        equal &= contents(prefix.parent) == whole
        sets += 1
    return {"sets": sets, "all_bytes_equal": equal, "kills": table}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(arguments.kills, arguments.seed, Path(scratch))
    write(arguments.output, {"passed": result["all_bytes_equal"], **result})
    return 0 if result["all_bytes_equal"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
