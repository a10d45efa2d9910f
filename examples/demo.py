"""The demo: train on captioned emoji, get killed in the middle, resume, and show the outcome on one page.

make demo          (leaves runs/demo with report.html)
make demo FAST=1   (half the width and half the steps: sooner, with worse pictures)
"""

import itertools
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.index import ImageTextIndex
from data.reader import validation_batches
from data.storage import open_shards
from data.templates import render
from examples.palette import PALETTE
from launch.common import command, run
from launch.processes import kill_tree
from trainer.build.inference import Inference, build_inference
from trainer.build.run import base_rates
from trainer.checkpoint.find import find_checkpoint
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.evaluate.captions import caption_margins, sign_flip_p
from trainer.evaluate.generate import save_grid
from trainer.monitor.metrics import read_metrics
from trainer.parallel.mesh import open_world
from trainer.parallel.precision import multiplies
from trainer.search.page import inline_png

SUBJECTS = (
    "a grinning face",
    "a cat face",
    "a red heart",
    "a full moon",
    "a flag of japan",
    "a keycap 4",
    "a woman",
    "a blue square",
)
EXACT_KEYS = ("loss", "grad_norm", "lr")
PAIRED_IMAGES = 256
MOST_THREADS = 8  # of a process: more wait for each other in a model of this size
FAST = ("model.width=128", "train.steps=300", "train.validate_every=300", "train.sample_every=300")


@dataclass
class Check:
    """One promise of the demo, with what was measured."""

    name: str
    measured: str
    passed: bool


def main() -> int:
    parser = command(__doc__, config=False)
    parser.add_argument("--config", default="mmdit_demo_mup.yaml", help="a path, or a name under configs/")
    parser.add_argument("--processes", type=int, default=1, help="that train together and share the cores (default: 1)")
    parser.add_argument("--fast", action="store_true", help=f"sooner, with worse pictures: {' '.join(FAST)}")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        raise ConfigError(f"--processes must be at least 1, got {arguments.processes}")
    began = time.monotonic()
    given = {text.partition("=")[0] for text in arguments.overrides}
    sooner = [text for text in FAST if arguments.fast and text.partition("=")[0] not in given]
    config = load_config(arguments.config, [*arguments.overrides, *sooner])
    overrides = [*arguments.overrides, *sooner, *faster_precision(config)]
    config = load_config(arguments.config, overrides)
    folder = config.run.folder
    if folder.exists():
        kept = folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(kept)
        print(f"an earlier run was kept as {kept}")
    training = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(arguments.processes)),
        *("launch/train.py", "--config", arguments.config, *overrides),
    ]
    threads = max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // arguments.processes))
    checks = [train_with_a_kill(training, config, folder, threads)]
    with open_world(1) as world:
        model = build_inference(config, find_checkpoint(folder), world)
        checks += [loss_check(folder), colour_check(model, folder), *caption_checks(model)]
    minutes = (time.monotonic() - began) / 60
    write_report(folder, model, checks, minutes)
    print()
    for check in checks:
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.measured}")
    print(f"{minutes:.1f} minutes; look at {folder / 'report.html'}")
    return 0 if all(check.passed for check in checks) else 1


def faster_precision(config: TrainConfig) -> list[str]:
    """bf16 where this processor is faster in it than in fp32, and the config leaves the precision open."""
    if config.parallel.precision is not None or not multiplies("bf16", torch.device("cpu")):
        return []
    # A processor may know bf16 and be slow in it. With AMX it multiplies several times as fast as in fp32; with
    # AVX512-BF16 alone as fast, and the rest of a step (casts, attention) made the demo's steps 1.5 times as long.
    seconds = layer_seconds(config.model.width)
    return ["parallel.precision=bf16"] if seconds[torch.bfloat16] < 0.75 * seconds[torch.float32] else []


def layer_seconds(width: int) -> dict[torch.dtype, float]:
    """The least time of a layer [width -> 4 width] and its gradients for 2,048 tokens, by type; taken by turns."""
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _, dtype in itertools.product(range(8), seconds):
        layer, tokens = torch.nn.Linear(width, 4 * width, dtype=dtype), torch.ones(2048, width, dtype=dtype)
        began = time.perf_counter()
        layer(tokens.requires_grad_()).sum().backward()
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return seconds


# ------------------------------------------------------------------------------------------------ train, kill, resume
def train_with_a_kill(command: list[str], config: TrainConfig, folder: Path, threads: int) -> Check:
    """Run `command`; kill all its processes some steps after the middle checkpoint; run it again to the end.

    What was logged after that checkpoint and before the kill is the uninterrupted run; the resumed one must log
    the same. threads: of each process, equal for both, since the order of sums depends on it.
    """
    every, steps = config.train.checkpoint_every, config.train.steps
    checkpoint = max(every, steps // 2 // every * every) if every else 0
    kill_at = checkpoint + 2 * config.train.log_every
    if not 0 < checkpoint < kill_at < steps:
        raise ConfigError(f"train.steps {steps} and checkpoint_every {every} leave no step for the demo's kill")
    killed = _run_until(command, folder, threads, kill_at)
    before = _exact_figures(folder, after=checkpoint)
    if killed:
        print(f"--- killed (SIGKILL) at step {max(before)}; the same command again ---", flush=True)
        _run_until(command, folder, threads, None)
    after = _exact_figures(folder, after=checkpoint)
    same = [step for step in before if before[step] == after.get(step)]
    return Check(
        "killed and resumed, the same steps log the same losses, bit for bit",
        f"{len(same)} of {len(before)} logged steps identical (steps {min(before)} to {max(before)}, "
        f"resumed from step {checkpoint})",
        killed and len(same) == len(before) > 0,
    )


def _run_until(command: list[str], folder: Path, threads: int, step: int | None) -> bool:
    """Run a command; at `step` kill all of its processes. Returns whether it was killed; a failure raises."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if step is not None and max((r["step"] for r in read_metrics(folder)), default=0) >= step:
                kill_tree(process.pid)
                process.wait()
                return True
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    if process.returncode != 0:
        raise SystemExit(f"training ended with exit code {process.returncode}; its message is above")
    return False


def _exact_figures(folder: Path, after: int) -> dict[int, list[Any]]:
    records = [r for r in read_metrics(folder) if r["step"] > after]
    return {r["step"]: [r.get(key) for key in EXACT_KEYS] for r in records}


# ------------------------------------------------------------------------------------------------------------- checks
def loss_check(folder: Path) -> Check:
    records = read_metrics(folder)
    first = next(r["val_loss"] for r in records if "val_loss" in r)
    last = next(r["val_loss_ema"] for r in reversed(records) if "val_loss_ema" in r)
    return Check(
        "validation loss of the EMA weights, as a share of that before the first step (at most 25 %)",
        f"{first:.4f} -> {last:.4f}, {last / first:.1%}",
        last <= 0.25 * first,
    )


def nearest_colour(image: np.ndarray, border: int = 2) -> str:
    """Name of the palette colour nearest to the median of an image's border; image uint8 [H, W, 3]."""
    mask = np.ones(image.shape[:2], bool)
    mask[border:-border, border:-border] = False
    median = np.median(image[mask].astype(float), axis=0)
    return min(PALETTE, key=lambda name: float(np.square(median - np.array(PALETTE[name])).sum()))


def colour_check(model: Inference, folder: Path) -> Check:
    """Every subject on a background of every colour, one image each; the border must have the named colour."""
    named = [(subject, colour) for subject in SUBJECTS for colour in PALETTE]
    images = model.images([f"{subject} on {_article(colour)} {colour} background" for subject, colour in named], 0)
    save_grid(images, folder / "prompts.png", columns=len(PALETTE))
    right = sum(nearest_colour(image) == colour for image, (_, colour) in zip(images, named, strict=True))
    return Check(
        "samples whose border is nearest to the colour that their prompt names (at least 80 %)",
        f"{right} of {len(images)}",
        right >= 0.8 * len(images),
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption_checks(model: Inference) -> list[Check]:
    """The images' own captions against permuted ones, on training and on held-out images."""
    data = model.config.data
    checks = []
    for name, shards, required in (("training", data.shards, True), ("held-out", data.val_shards, False)):
        assert shards is not None, "the demo has held-out shards"
        index = ImageTextIndex(open_shards(shards))
        batches = list(validation_batches(index, data, PAIRED_IMAGES, 0, 1, 64))
        margins = caption_margins(model.model, model.objective, batches, model.encoders.encode)
        p = sign_flip_p(margins)
        note = "p < 0.001" if required else "reported"
        checks.append(
            Check(
                f"loss with another caption minus loss with its own, {len(margins)} {name} images ({note})",
                f"{margins.mean():+.4f}, own is better for {(margins > 0).mean():.0%}, p = {p:.2g}",
                bool(p < 0.001) or not required,
            )
        )
    return checks


# ------------------------------------------------------------------------------------------------------------- report
def write_report(folder: Path, model: Inference, checks: list[Check], minutes: float) -> None:
    """Write report.html, one page that needs no other file."""
    records = read_metrics(folder)
    grids = sorted((folder / "samples").glob("step_*.png"))
    prompts = folder / "samples" / "prompts.txt"
    text = render(
        Path(__file__).with_name("templates") / "demo.html",
        c=model.config,
        checks=checks,
        minutes=minutes,
        millions=sum(p.numel() for p in model.model.parameters()) / 1e6,
        subjects=SUBJECTS,
        colours=list(PALETTE),
        prompts_png=inline_png(folder / "prompts.png"),
        loss_png=inline_png(folder / "loss.png"),
        validated=[r for r in records if "val_loss" in r],
        prompts=prompts.read_text().splitlines() if prompts.is_file() else [],
        grids=[(int(path.stem.removeprefix("step_")), inline_png(path)) for path in grids],
        table=model.table.describe(base_rates(model.config)),
        folder=folder,
    )
    (folder / "report.html").write_text(text)


if __name__ == "__main__":
    run(main)
