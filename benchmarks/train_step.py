"""Time, images/s, model FLOP/s and peak memory of a whole training step (clip, AdamW and EMA inside), beside diffusers.

    python -m benchmarks.train_step --output benchmarks/results/train_step_cpu.json     # all cases of this device
    python -m benchmarks.train_step --output FILE --case mmdit_2b [--profile DIR]
    python -m benchmarks.train_step --output FILE --peer      # the CPU's MMDiT alone: exit code 1 where ours is slower
    python -m benchmarks.train_step --output FILE --dry-run   # the GPU's cases at tiny sizes, anywhere

Our model and its twin of diffusers are trained by the same engine and loop at equal shapes and precision, eager and (on
a GPU) compiled, and in one case ours by Muon and by AdamW, in one with a route of tokens and without; they take turns
on the device, and between them the rate of matrix products is measured. Latents and text states are synthetic, so that
no encoder is in the figures, and captions fill their length, as with data.text_lengths they nearly do. On a GPU the
micro-batch is as many rows as the model of memory finds room for, halved where that was too much; beside our steps
stands the time that the model of time gives them. On a CPU a step's time is that of this process on one core: others'
load does not count. FLOPs: forward + 2 x backward.
"""

import argparse
import gc
import io
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from benchmarks.estimates import card_named, modelled_step, rows_that_fit
from benchmarks.machine import matmul_rate, write
from benchmarks.twins import build_twin
from data.batch import Batch, concatenate
from data.synthetic import SyntheticReader
from trainer.build.run import build_run
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.estimate.micro_batch import usable_here
from trainer.loop import train_step
from trainer.parallel.mesh import World, init_world
from trainer.parallel.precision import DTYPES, precision_of
from trainer.run import Run

OURS, OURS_COMPILED, TWIN, TWIN_COMPILED = "ours", "ours_compiled", "diffusers", "diffusers_compiled"
OURS_MUON, OURS_TREAD, OURS_SPRINT = "ours_muon", "ours_tread", "ours_sprint"
EAGER, ALL = (OURS, TWIN), (OURS_COMPILED, OURS, TWIN, TWIN_COMPILED)
ROUTES = {OURS_TREAD: (0.5, "none"), OURS_SPRINT: (0.75, "sprint")}  # from the second block to the last but one, of 6
WARM_UP = 3
QUIET = (
    "data.shards=synthetic", "train.log_every=1000000", "train.validate_every=0", "train.sample_every=0",
    "train.checkpoint_every=0",
)  # fmt: skip


class Case(NamedTuple):
    """A config at a micro-batch of `rows` (None: as many as fit); its variants are on the device together."""

    config: str
    rows: int | None
    variants: tuple[str, ...]
    overrides: tuple[str, ...] = ()


PEER = "mmdit_384"
_NO_REPA = "objective.repa_weight=0"  # it reads images, which are not cached
_SHALLOW = ("model.depth=6",)
_SHORT = ("text_encoder.max_length=32", "data.text_lengths=[]")
ON_CPU = {
    PEER: Case(
        "mmdit_0.18b_mup.yaml",
        8,
        EAGER,
        (*_SHALLOW, "model.width=384", "mup.base_width=384", "text_encoder.width=384", *_SHORT, _NO_REPA),
    ),
    "mmdit_384_muon": Case(
        "mmdit_0.18b_mup.yaml",
        16,
        (OURS, OURS_MUON),
        (*_SHALLOW, "model.width=384", "mup.base_width=384", "text_encoder.width=384", *_SHORT, _NO_REPA),
    ),
    "mmdit_384_route": Case(
        "mmdit_0.18b_mup.yaml",
        8,
        (OURS, OURS_TREAD, OURS_SPRINT),
        (*_SHALLOW, "model.width=384", "mup.base_width=384", "text_encoder.width=384", *_SHORT, _NO_REPA),
    ),
    "pixart_288": Case("pixart_0.04b_mup.yaml", 8, EAGER, (*_SHALLOW, *_SHORT)),
    "dit_288": Case("dit_proxy_mup.yaml", 8, EAGER, _SHALLOW),
    "uvit_288": Case("uvit_proxy_mup.yaml", 8, (OURS,), _SHALLOW),
}
# 2 B leaves no room for a second model on an H100, so its twin takes part at 4 of the 19 blocks.
_TEXT = ("text_encoder.max_length=128", "data.text_lengths=[]", _NO_REPA)
ON_GPU = {
    "mmdit_0.18b": Case("mmdit_0.18b_mup.yaml", None, ALL, _TEXT),
    "mmdit_0.7b": Case("mmdit_0.7b_mup.yaml", None, ALL, _TEXT),
    "mmdit_2b": Case("mmdit_2b_mup.yaml", None, (OURS_COMPILED,), _TEXT),
    "mmdit_2b_fp8": Case("mmdit_2b_mup.yaml", None, (OURS_COMPILED,), (*_TEXT, "parallel.precision=fp8")),
    "mmdit_2b_muon": Case("mmdit_2b_mup.yaml", None, (OURS_COMPILED,), (*_TEXT, "optim.kind=muon")),
    "mmdit_2b_4_blocks": Case("mmdit_2b_mup.yaml", None, ALL, (*_TEXT, "model.depth=4")),
    "pixart_0.61b": Case("pixart_0.61b_mup.yaml", None, ALL),
    "dit_xl_2": Case("dit_xl_2_mup.yaml", None, ALL),
    "uvit_h_2": Case("uvit_h_2_mup.yaml", None, (OURS_COMPILED, OURS)),
}
synthetic_batches = SyntheticReader.batches


class Variant:
    """A run that takes steps one at a time.

    seconds: of the timed steps; gradients: of their part before the update (on a CPU). peak: bytes that a step held
    beside what is there between steps (on a GPU).
    """

    def __init__(self, config: TrainConfig, run: Run, state: int) -> None:
        self.config, self.run, self.state = config, run, state
        self.seconds: list[float] = []
        self.gradients: list[float] = []
        self.peak = 0
        self._batches, self._updating = run.batches(), 0.0
        update = run.engine.step

        def marked(*arguments: Any) -> Any:
            self._updating = time.process_time()
            return update(*arguments)

        run.engine.step = marked  # type: ignore[method-assign]

    def step(self) -> None:
        train_step(self.run, next(self._batches))

    def measure(self) -> None:
        device = self.run.world.device
        before = allocated(device, reset_peak=True)
        began = clock(device)
        self.step()
        self.seconds.append(clock(device) - began)
        self.gradients.append(self._updating - began)
        if device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(device) - before)

    @property
    def flops(self) -> float:
        """Of an image in a step."""
        text_tokens = 0 if self.config.label_classes else self.config.text_encoder.max_length
        return self.run.plan.image_flops(text_tokens, None, True)

    def figures(self, matmul_flops: float, card: str | None) -> dict[str, Any]:
        """card: whose step is modelled, of a variant that is ours."""
        seconds, rows = statistics.median(self.seconds), self.config.train.global_batch_size
        flops = self.flops * rows / seconds
        peak_flops, cuda = self.run.plan.peak_flops, self.run.world.device.type == "cuda"
        found = {
            "parameters": sum(p.numel() for p in self.run.engine.model.parameters()),
            "step_time_s": seconds,
            "images_per_s": rows / seconds,
            "flops_per_image": self.flops,
            "model_tflops_per_s": flops / 1e12,
            "of_matmul_rate": flops / matmul_flops,
            "mfu": flops / peak_flops if peak_flops else None,
            "peak_memory_gib": (self.state + self.peak) / 2**30 if cuda else None,
        }
        if card is not None and self.config.run.name in (OURS, OURS_COMPILED):
            model = modelled_step(self.config, card)
            found["MODEL"] = {**model, "measured_over_model": seconds / model["step_time_s"]}
        return found

    def faster_than(self, other: "Variant") -> dict[str, float]:
        """How many times as fast: median over the rounds."""
        found = {"step": ratio(other.seconds, self.seconds)}
        if self.run.world.device.type == "cpu":
            found["forward_and_backward"] = ratio(other.gradients, self.gradients)
        return found


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def allocated(device: torch.device, reset_peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    if reset_peak:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def full_batches(reader: SyntheticReader, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
    """Two steps again and again, as cached features come: pinned, text in bf16; all captions fill their length."""
    steps = []
    for _, micro_batches in itertools.islice(synthetic_batches(reader, 0), 2):
        for batch in micro_batches:
            if batch.text_states is not None and batch.text_mask is not None:
                batch.text_states, batch.text_mask = batch.text_states.bfloat16(), torch.ones_like(batch.text_mask)
        steps.append([concatenate([batch], pinned=torch.cuda.is_available()) for batch in micro_batches])
    for step in itertools.count(first_step):
        yield step, steps[step % 2]


def build(name: str, case: Case, settings: Sequence[str], world: World) -> Variant:
    config = configured(case, settings, name)
    gc.collect()
    before = allocated(world.device)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))  # the muP table
        if name in (TWIN, TWIN_COMPILED):
            stack.enter_context(mock.patch("trainer.build.run.build_engine", build_twin))
        run = build_run(config, world)
    return Variant(config, run, allocated(world.device) - before)


def configured(case: Case, overrides: Sequence[str], name: str = OURS_COMPILED) -> TrainConfig:
    """The config of a variant, on synthetic data."""
    compiled = f"parallel.compile={str(name in (OURS_COMPILED, TWIN_COMPILED)).lower()}"
    rows = f"train.global_batch_size={case.rows or 1}"
    keys = [*QUIET, rows, *case.overrides, *overrides, f"run.name={name}", compiled]
    if name == OURS_MUON:
        keys.append("optim.kind=muon")
    if name in (OURS_TREAD, OURS_SPRINT):
        depth, (share, fuse) = load_config(case.config, keys).model.depth, ROUTES[name]
        route = {"share": share, "start": depth // 6, "end": depth - 1, "fuse": fuse}
        keys += [f"model.route.{key}={value}" for key, value in route.items()]
    return load_config(case.config, keys)


def with_rows(case: Case, overrides: Sequence[str], usable: int) -> Case:
    """The case at the rows for which `usable` bytes of a GPU do, while all of its variants are on it."""
    config = configured(case._replace(rows=64), overrides)  # the simulation looks at steps of so many, and of half
    return case._replace(rows=max(1, rows_that_fit(config, usable, len(case.variants))))


def halving(case: Case, figures: Callable[[Case], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a case, at half its rows as long as memory is not enough: diffusers' models may hold more."""
    rows = case.rows or 1
    while rows:
        try:
            return {"rows_at_first": case.rows, **figures(case._replace(rows=rows))}
        except torch.OutOfMemoryError as error:
            print(f"{rows} rows: {str(error).partition('. ')[0]}", flush=True)
        rows //= 2
        gc.collect()
        torch.cuda.empty_cache()
    raise SystemExit(f"{case.config}: not even one row fits")


def measure(
    label: str, rounds: int, overrides: Sequence[str], traces: Path | None, card: str | None, case: Case
) -> dict[str, Any]:
    """Steps of all variants by turns, in an order by chance, and matrix products between; medians."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(SyntheticReader, "batches", full_batches))
        settings = [*overrides, f"run.dir={folder}"]
        config = configured(case, settings)
        world = init_world(resolve(config, 1).shard)
        stack.callback(dist.destroy_process_group)
        variants = {name: build(name, case, settings, world) for name in case.variants}
        for variant in variants.values():
            stack.callback(variant.run.metrics.close)
            if variant.run.lock is not None:
                stack.enter_context(variant.run.lock)
            for _ in range(WARM_UP):
                variant.step()
        precision = precision_of(config.parallel.precision, world.device)
        graphs, rates, chance = counters["stats"]["unique_graphs"], [], random.Random(0)
        for _ in range(rounds):
            for name in chance.sample(list(variants), len(variants)):
                variants[name].measure()
            rates.append(matmul_rate(world.device, DTYPES[precision], clock))
        again = counters["stats"]["unique_graphs"] - graphs
        if traces is not None:
            for name, variant in variants.items():
                trace(variant, traces / f"{label}_{name}")
        rate = statistics.median(rates)
        best = OURS_COMPILED if OURS_COMPILED in variants else OURS
        return {
            "config": case.config,
            "overrides": [*case.overrides, *overrides],
            "micro_batch": resolve(config, 1).micro_batch_rows,
            "image_tokens": config.image_tokens,
            "text_tokens": 0 if config.label_classes else config.text_encoder.max_length,
            "precision": precision,
            "matmul_tflops_per_s": rate / 1e12,
            "variants": {name: variant.figures(rate, card) for name, variant in variants.items()},
            "compiled_again_after_warm_up": again,
            f"{best}_is_so_many_times_as_fast_as": {
                name: variants[best].faster_than(variant) for name, variant in variants.items() if name != best
            },
            f"flops_over_those_of_{best}": {
                name: variant.flops / variants[best].flops for name, variant in variants.items() if name != best
            },
        }


def trace(variant: Variant, path: Path) -> None:
    """Two steps: PATH.json for chrome://tracing or Perfetto, PATH.txt with the costs, the largest first."""
    cuda = variant.run.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        variant.step()
        variant.step()
        clock(variant.run.world.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path.with_suffix(".json")))
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = profiler.key_averages(group_by_input_shape=True).table(sort_by=order, row_limit=40)
    path.with_suffix(".txt").write_text(table)


def tiny(case: Case) -> Case:
    """The same way at a size of seconds."""
    head = load_config(case.config).model.head_dim
    small = ("model.depth=2", f"model.width={2 * head}", f"mup.base_width={head}", "data.resolution=64")
    if case.config.startswith("uvit"):
        small += ("model.input_size=4",)
    if load_config(case.config).label_classes is None:
        small += ("text_encoder.width=16", "text_encoder.max_length=8", "data.text_lengths=[]")
    return case._replace(rows=2, overrides=(*case.overrides, *small))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--case", choices=[*ON_CPU, *ON_GPU], action="append", help="may be given several times")
    parser.add_argument("--peer", action="store_true", help=f"the case {PEER} alone; exit code 1 where ours is slower")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", type=Path, metavar="DIR", help="a trace of each variant and a table of its costs")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes, compiled without a compiler: does it all work?"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    names = [PEER] if arguments.peer else arguments.case or [*(ON_GPU if cuda or arguments.dry_run else ON_CPU)]
    cases, rounds = {name: (ON_CPU | ON_GPU)[name] for name in names}, arguments.rounds
    if arguments.dry_run:
        cases, rounds = {name: tiny(case) for name, case in cases.items()}, 1
        # Traced, but not compiled: that takes half a minute a variant.
        compile_ = torch.compile
        torch.compile = lambda forward, **settings: compile_(forward, **{**settings, "backend": "eager"})
    if not cuda:
        torch.set_num_threads(1)
        if any(case.rows is None for case in cases.values()):
            parser.error("the rows of a GPU's case follow from its memory: without a GPU give --dry-run")
    card = card_named(torch.cuda.get_device_name()) if cuda else "h200" if arguments.dry_run else None
    found = {}
    for name, case in cases.items():
        sized = case if case.rows else with_rows(case, arguments.overrides, usable_here())
        found[name] = halving(sized, partial(measure, name, rounds, arguments.overrides, arguments.profile, card))
    about = "wall, device synchronised" if cuda else "of the process, on one core"
    write(arguments.output, {"seconds": about, "rounds": rounds, "dry_run": arguments.dry_run, "cases": found})
    if arguments.peer:
        return 0 if found[PEER]["ours_is_so_many_times_as_fast_as"][TWIN]["forward_and_backward"] >= 1 else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
