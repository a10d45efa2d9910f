"""Trials of a proxy search an hour: one after another, side by side in processes (--workers), and as stacked models.

    python -m benchmarks.proxies --output benchmarks/results/proxies_cpu.json
    python -m benchmarks.proxies --output FILE --dry-run

The same study is run by launch/search.py with 1, 2, 4 (on a GPU also 8) workers on one device, each time from nothing;
start-up is in the figures. On a GPU it is run once more with 1 and 4 workers that replay CUDA graphs
(parallel.cuda_graph). Stacked: forward and backward passes of models that one program computes together
(torch.func.vmap over their weights), beside the same passes one model after another.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import write
from models.backbone import build_model
from models.layers import TextCondition
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.search.study import Study

STACKED = 4


class Case(NamedTuple):
    """A search of `trials` trials of a proxy, and the numbers of workers that share one device."""

    config: str
    overrides: tuple[str, ...]
    trials: int
    workers: tuple[int, ...]
    graph_workers: tuple[int, ...] = ()
    """Those with which it is run once more under parallel.cuda_graph, which a CPU refuses."""


_QUIET = ("train.checkpoint_every=0", "train.sample_every=0", "run.keep_last=1")
_SEARCH = """
name: study
config: {config}
overrides: [{overrides}]
trials: {trials}
space:
  optim.lr: {{log_uniform: [1e-4, 1e-3]}}
"""
CASES = {
    "cpu": Case(
        "mmdit_demo_mup.yaml",
        ("data.shards=synthetic", "model.width=128", "train.global_batch_size=32", "train.steps=60",
         "optim.warmup_steps=10", "train.validate_every=60", "validation.samples=32", *_QUIET),
        4,
        (1, 2, 4),
    ),
    "gpu": Case(
        "mmdit_0.18b_mup.yaml",
        ("data.shards=synthetic", "train.global_batch_size=32", "train.steps=200", "text_encoder.max_length=64",
         "data.text_lengths=[]",
         "text_encoder.width=256", "optim.warmup_steps=10", "objective.repa_weight=0", "parallel.compile=true",
         "train.validate_every=200", "validation.samples=64", *_QUIET),
        8,
        (1, 2, 4, 8),
        (1, 4),
    ),
    "dry_run": Case(
        "mmdit_debug_mup.yaml",
        ("data.shards=synthetic", "train.global_batch_size=2", "train.steps=3", "train.validate_every=3",
         "validation.samples=2", "text_encoder.max_length=4", *_QUIET),
        2,
        (2,),
    ),
}  # fmt: skip


def run_study(case: Case, workers: int, folder: Path) -> tuple[float, list[float]]:
    """(seconds, loss of each trial) of the whole study by so many workers on one device."""
    file = folder / "search.yaml"
    overrides = ", ".join((*case.overrides, f"run.dir={folder}"))
    file.write_text(_SEARCH.format(config=case.config, overrides=overrides, trials=case.trials))
    command = [sys.executable, "launch/search.py", "run", "--config", str(file), "--workers", str(workers)]
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    values = [trial.value for trial in Study.load(str(folder / "study")).trials()]
    losses = [value for value in values if value is not None]
    assert len(losses) == case.trials, values
    return seconds, losses


def side_by_side(case: Case) -> dict[str, Any]:
    """Trials an hour by number of workers ("4", or "4, cuda_graph"); their losses must be the same, to rounding by the
    number of threads."""
    graphs = case._replace(overrides=(*case.overrides, "parallel.cuda_graph=true"))
    studies = {str(workers): (case, workers) for workers in case.workers}
    studies |= {f"{workers}, cuda_graph": (graphs, workers) for workers in case.graph_workers}
    found: dict[str, Any] = {}
    first: list[float] = []
    for name, (study, workers) in studies.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds, losses = run_study(study, workers, Path(folder))
        first = first or losses
        found[name] = {
            "seconds": round(seconds, 1),
            "trials_per_h": 3600 * case.trials / seconds,
            "largest_difference_of_losses": max(abs(a / b - 1) for a, b in zip(losses, first, strict=True)),
        }
    slowest = found[str(case.workers[0])]["trials_per_h"]
    best = max(found, key=lambda name: found[name]["trials_per_h"])
    return {"workers": found, "best": best, "best_over_first": found[best]["trials_per_h"] / slowest}


def stacked(config: TrainConfig, repeats: int) -> dict[str, float]:
    """Model passes (forward and backward) a second of STACKED models, as one program and one after another."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    channels, width, length = config.autoencoder.channels, config.text_encoder.width, config.text_encoder.max_length
    models = [build_model(config.model, channels, width).to(device, dtype) for _ in range(STACKED)]
    rows, side = config.train.global_batch_size, config.latent_size
    x, target = (torch.randn(rows, channels, side, side, device=device, dtype=dtype) for _ in range(2))
    t, states = torch.rand(rows, device=device), torch.randn(rows, length, width, device=device, dtype=dtype)
    mask = torch.ones(rows, length, dtype=torch.bool, device=device)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], model: nn.Module, mask: Tensor) -> Tensor:
        prediction, _ = functional_call(model, (parameters, buffers), (x, t, TextCondition(states, mask)))
        return F.mse_loss(prediction, target)

    def in_turn() -> None:
        for model in models:
            torch.autograd.grad(loss(dict(model.named_parameters()), {}, model, mask), [*model.parameters()])

    # Each has a mask of its own: the rule that stacks attention on a GPU takes none that they share.
    whole = *stack_module_state(models), mask.expand(STACKED, -1, -1)
    one = models[0]

    def together() -> None:
        vmap(grad(lambda parameters, buffers, mask: loss(parameters, buffers, one, mask)))(*whole)

    rates = {}
    # The CPU's flash attention cannot be stacked.
    kernels = SDPBackend.MATH if not cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for name, work in (("one_after_another", in_turn), ("stacked", together)):
        seconds = []
        for _ in range(1 + repeats):
            began = time.perf_counter()
            with sdpa_kernel(kernels):
                work()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        rates[name] = STACKED / min(seconds[1:])
    return {**rates, "stacked_over_one_after_another": rates["stacked"] / rates["one_after_another"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="a study of seconds: does it all work?")
    arguments = parser.parse_args()
    name = "dry_run" if arguments.dry_run else "gpu" if torch.cuda.is_available() else "cpu"
    case = CASES[name]
    config = load_config(case.config, list(case.overrides))
    found = {"case": name, **case._asdict(), "side_by_side": side_by_side(case)}
    write(arguments.output, found)  # what took minutes is kept whatever comes
    write(arguments.output, {**found, "passes_per_s": stacked(config, repeats=1 if arguments.dry_run else 5)})


if __name__ == "__main__":
    main()
