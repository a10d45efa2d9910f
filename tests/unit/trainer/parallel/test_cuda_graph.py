"""Recorded passes beside the plain ones, on a CPU, where a tape of operations stands for the graph (tests/gpu has the
graph itself): equal bit for bit over steps, buckets and micro-batches."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention_probe import Choice
from tests.helpers.cuda_graph import TapeRecorder
from tests.helpers.steps import built, state_of
from tests.helpers.varlen import varlen_on_cpu
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.errors import ConfigError
from trainer.loop import train_step
from trainer.parallel.cuda_graph import CUDAGraphs
from trainer.run import Run

# 6 samples in micro-batches of 2 of 32 pixels.
SMALL = (
    "train.log_every=2", "optim.clip_norm=0.5", "optim.lr=3e-3", "ema.decays=[0.9]", "train.global_batch_size=6",
    "train.micro_batch_size=0.03125",
)  # fmt: skip
TEXTS = ("text_encoder.max_length=8", "data.text_lengths=[4,8]")
IMAGES = ("data.buckets=aspect", "data.max_aspect=1.3")
REPA = ("objective.repa_weight=0.5", "objective.repa_layer=1", "objective.repa_width=16", "objective.repa_hidden=24")
STEPS = 8


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    """Records the passes of every run with parallel.cuda_graph."""
    recorder = TapeRecorder()
    monkeypatch.setattr(
        "trainer.build.run.graph_recorder", lambda config, world: recorder if config.parallel.cuda_graph else None
    )
    return recorder


def steps(run: Run, spoil: int = -1) -> Iterator[int]:
    """The numbers of steps, each after it is taken. spoil: of one whose latents are not finite."""
    for step, micro_batches in enumerate(islice(run.batches(), STEPS)):
        if step == spoil:
            latents = micro_batches[0].batch.latents
            assert latents is not None
            latents[0, 0, 0, 0] = torch.nan
        train_step(run, micro_batches)
        yield step


def trained(folder: Path, config: str, graph: bool, *more: str, spoil: int = -1) -> dict[str, Tensor]:
    """The state after STEPS steps."""
    with built(config, folder, *SMALL, *more, f"parallel.cuda_graph={str(graph).lower()}") as run:
        for _ in steps(run, spoil):
            pass
        return state_of(run)


def different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    assert ours["totals"][0].isfinite()
    return [key for key in ours if not torch.equal(ours[key], theirs[key])]


# --------------------------------------------------------------------------------------------------- any function


def test_a_graph_for_each_shape() -> None:
    """The first call of a shape is made, the second one is recorded, and from then on the host does nothing."""
    recorder, written, calls = TapeRecorder(), torch.zeros(()), []

    def function(pair: tuple[Tensor, Tensor], third: Tensor) -> Tensor:
        calls.append(len(third))
        written.add_(third.sum())
        return pair[0] * pair[1] + third + len(calls)

    graphs = CUDAGraphs(function, recorder)
    total, given = 0.0, []
    for number, rows in enumerate((2, 2, 3, 2, 3, 3)):
        a, b, c = (torch.randn(rows) for _ in range(3))
        given.append((c, c.clone()))
        total += float(c.sum())
        result = graphs((a, b), c)
        counted = {0: 1, 1: 2, 2: 3, 3: 2, 4: 4, 5: 4}[number]  # of the shape's own call: a number of the host's stays
        assert torch.equal(result, a * b + c + counted)
        assert float(written) == pytest.approx(total, abs=1e-5)
    assert calls == [2, 2, 3, 3]
    assert all(torch.equal(tensor, as_it_was) for tensor, as_it_was in given)  # a graph's inputs are its own
    assert (recorder.warm_ups, recorder.replays) == (2, [2, 2])


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero()])
def test_what_waits_cannot_be_recorded(wait: Callable[[Tensor], object]) -> None:
    def function(x: Tensor) -> Tensor:
        wait(x)
        return x + 1

    graphs = CUDAGraphs(function, TapeRecorder())
    graphs(torch.ones(2))
    with pytest.raises(AssertionError, match=r"_local_scalar_dense|index by a mask|nonzero"):
        graphs(torch.ones(2))


# ------------------------------------------------------------------------------------------------------- training

ROUTE = tuple(f"model.route.{each}" for each in ("share=0.5", "start=0", "end=1", "fuse=sprint"))
CASES = {
    "mmdit bf16": ("mmdit", 2, ("parallel.precision=bf16", *TEXTS, *REPA)),
    "mmdit fp64": ("mmdit", 2, ("parallel.precision=fp64", *TEXTS)),
    "pixart fp32": ("pixart", 2, ("parallel.precision=fp32", *TEXTS)),
    "dit bf16": ("dit", 3, ("parallel.precision=bf16", *IMAGES)),
    "uvit bf16": ("uvit", 1, ("parallel.precision=bf16",)),
    "mmdit with a route": ("mmdit", 2, (*TEXTS, *ROUTE)),
    "full recomputation": ("mmdit", 2, (*TEXTS, "parallel.activation_checkpointing=full")),
    "selective recomputation": ("mmdit", 2, (*TEXTS, "parallel.activation_checkpointing=selective")),
}


@pytest.mark.parametrize(("kind", "buckets", "more"), CASES.values(), ids=CASES)
@pytest.mark.slow
def test_recorded_steps_are_the_plain_ones(
    tmp_path: Path, recorder: TapeRecorder, kind: str, buckets: int, more: tuple[str, ...]
) -> None:
    """Losses, gradient norms, weights, moments and averages; a graph for each bucket, whichever step it comes in."""
    plain = trained(tmp_path / "plain", f"{kind}_debug_mup.yaml", False, *more)
    assert recorder.warm_ups == 0
    recorded = trained(tmp_path / "recorded", f"{kind}_debug_mup.yaml", True, *more)
    assert different(recorded, plain) == []
    assert recorder.warm_ups == len(recorder.replays) == buckets
    assert sum(recorder.replays) + buckets >= 3 * STEPS  # in larger buckets a step has more micro-batches


@pytest.mark.slow
def test_packed_rows_can_be_recorded(tmp_path: Path, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; the lengths, which differ from row to row, stay on the device."""
    monkeypatch.setattr("trainer.build.engine.attention_choice", lambda *_: Choice("varlen", {}))
    with varlen_on_cpu():
        plain, recorded = (trained(tmp_path / str(on), "mmdit_debug_mup.yaml", on, *TEXTS) for on in (False, True))
    assert different(recorded, plain) == []
    assert sum(recorder.replays) > STEPS


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_and_leaves_nothing(
    tmp_path: Path, recorder: TapeRecorder, precision: str
) -> None:
    """Whether a step is skipped is known on the device alone; no NaN stays in the gradients' memory."""
    more = (f"parallel.precision={precision}", *TEXTS)
    plain, recorded = (trained(tmp_path / str(on), "mmdit_debug_mup.yaml", on, *more, spoil=5) for on in (False, True))
    assert different(recorded, plain) == []
    assert all(tensor.isfinite().all() for tensor in recorded.values())
    updates = {int(tensor) for name, tensor in recorded.items() if name.startswith("step/")}
    assert updates == {STEPS - 1}
    assert recorder.replays


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.slow
def test_what_a_graph_reads_and_writes_stays_where_it_is(
    tmp_path: Path, recorder: TapeRecorder, precision: str
) -> None:
    """Weights, also while others are swapped in and after a checkpoint is read; and gradients."""
    more = (f"parallel.precision={precision}", "parallel.cuda_graph=true", *TEXTS)
    with built("mmdit_debug_mup.yaml", tmp_path, *SMALL, *more) as run:
        stream = steps(run)
        next(stream)

        def addresses() -> dict[str, int]:
            engine: Any = run.engine
            kinds = dict(engine.model.named_parameters()), engine.master_shards(), engine._gradients
            return {f"{kind} {name}": t.data_ptr() for kind, each in enumerate(kinds) for name, t in each.items()}

        first = addresses()
        assert len(first) == 3 * len(run.engine.master_shards())
        next(stream)
        assert recorder.replays
        with run.engine.swapped(run.ema.shards[0.9]):
            assert addresses() == first
        (tmp_path / "checkpoint").mkdir()
        run.engine.save(tmp_path / "checkpoint", run.ema.tensors()).result()
        run.engine.load(tmp_path / "checkpoint", run.ema.tensors())
        next(stream)
        assert addresses() == first


@pytest.mark.slow
def test_no_forward_pass_is_timed_that_the_host_does_not_make(tmp_path: Path, recorder: TapeRecorder) -> None:
    with built("mmdit_debug_mup.yaml", tmp_path, *SMALL, "parallel.cuda_graph=true") as run:
        for _ in islice(steps(run), 2):
            pass
        figures = run.timer.figures(1.0)
    assert recorder.replays
    assert {name.removesuffix("_max_s") for name in figures if name.endswith("_max_s")} == {
        "perf/step",
        "perf/data_wait",
    }


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("more", ["parallel.engine=zero", "parallel.cpu_offload=true"])
def test_a_config_that_cannot_be_recorded(more: str) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.cuda_graph .*(fsdp2|cpu_offload)"):
        load_config("mmdit_debug_mup", ["parallel.cuda_graph=true", more])


def test_several_processes_cannot_be_recorded() -> None:
    config = load_config("mmdit_debug_mup", ["parallel.cuda_graph=true"])
    assert resolve(config, 1).world_size == 1
    with pytest.raises(ConfigError, match=r"parallel\.cuda_graph needs a run of one process, got 2"):
        resolve(config, 2)


def test_a_cpu_cannot_record(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"parallel\.cuda_graph needs a CUDA device"),
        built("mmdit_debug_mup.yaml", tmp_path, "parallel.cuda_graph=true"),
    ):
        pass
    assert not list(tmp_path.iterdir())
