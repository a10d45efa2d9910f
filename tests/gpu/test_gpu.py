"""What only a CUDA device can show; `make gpu-check` runs these, offline."""

import gc
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from models.attention_probe import Choice
from models.layers import time_sinusoids
from tests.distributed.runs import exact, train
from tests.helpers.steps import built, state_of
from tests.helpers.traces import attention_faults
from trainer.build.attention import attention_choice
from trainer.build.engine import build_mup_table
from trainer.build.float8 import token_linears
from trainer.config.load import load_config
from trainer.diffusion.random import normal
from trainer.estimate import simulation as estimate
from trainer.estimate.memory import Memory
from trainer.loop import train_step
from trainer.parallel.dcp import AsyncSaver
from trainer.parallel.mesh import open_world
from trainer.run import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # CUDA and the compiler warn of what they are, once each
]
CONFIG = "mmdit_0.18b_mup.yaml"
SMALL = (
    "data.shards=synthetic", "model.width=128", "model.depth=2", "train.global_batch_size=8",
    "text_encoder.max_length=16", "data.text_lengths=[]", "text_encoder.width=64", "objective.repa_layer=1",
)  # fmt: skip
TINY = (
    *SMALL, "train.steps=6", "train.log_every=1", "train.validate_every=6", "train.checkpoint_every=3",
    "optim.warmup_steps=1", "train.deterministic=true",
)  # fmt: skip
BACKBONES = ("mmdit", "pixart", "dit", "uvit")
# One of each backbone, with the head dimension that it is shipped with, and few heads.
SHIPPED = {
    "mmdit_0.18b_mup.yaml": SMALL,
    "pixart_0.04b_mup.yaml": (*SMALL[2:], "model.width=144"),
    "dit_proxy_mup.yaml": ("model.width=144", "model.depth=2", "train.global_batch_size=8"),
    "uvit_proxy_mup.yaml": ("model.width=144", "model.depth=2", "train.global_batch_size=8"),
}


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def steps(run: Run) -> Iterator[int]:
    """Take steps without end; yields the number of each after it."""
    for micro_batches in run.batches():
        train_step(run, micro_batches)
        yield run.state.step - 1


def take(stream: Iterator[int], count: int) -> None:
    for _ in itertools.islice(stream, count):
        pass


def test_draws_are_those_of_the_cpu() -> None:
    keys = torch.arange(64)
    ours = normal(keys.cuda(), (4, 32, 32), "noise").cpu()
    torch.testing.assert_close(ours, normal(keys, (4, 32, 32), "noise"), rtol=0, atol=1e-12)


def test_sinusoids_stay_float32_under_bf16() -> None:
    """Of angles up to 900, whose last bit is 6e-5; in bf16 they would differ by 1."""
    t = torch.tensor([0.9001, 0.9012])
    torch.testing.assert_close(time_sinusoids(t.cuda()).cpu(), time_sinusoids(t), rtol=0, atol=3e-4)


@pytest.mark.parametrize("way", ["compile=false", "compile=true", "cpu_offload=true"])
def test_trains_in_bf16_and_resumes_exactly(tmp_path: Path, way: str) -> None:
    """Six steps against three and three more, with deterministic algorithms: equal to the last bit."""
    settings = (*TINY, f"parallel.{way}")
    whole = train(1, tmp_path / "whole", *settings, config=CONFIG)
    train(1, tmp_path / "parts", *settings, "train.steps=3", config=CONFIG)
    parts = train(1, tmp_path / "parts", *settings, "run.allow_change=[train.steps]", config=CONFIG)
    assert exact(parts)[4:] == exact(whole)[4:]
    assert whole[-1]["val_loss"] < whole[0]["val_loss"]


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    """Losses of the same steps; compiled, and by other kernels of attention."""
    ways = ("precision=fp32", "precision=bf16", "compile=true", "attention=efficient", "attention=cudnn")
    expected, *others = (train(1, tmp_path / way, *TINY, f"parallel.{way}", config=CONFIG) for way in ways)
    for lines in others:
        assert [line["loss"] for line in lines[1:]] == pytest.approx([line["loss"] for line in expected[1:]], rel=0.02)
        assert exact(lines) != exact(expected)


def test_fp8_is_near_bf16_and_goes_on_from_it(tmp_path: Path) -> None:
    """Losses of the same steps, and a run in bf16 that is continued in fp8."""
    fp8, bf16 = "parallel.precision=fp8", "parallel.precision=bf16"
    expected, lines = (train(1, tmp_path / way, *TINY, way, config=CONFIG) for way in (bf16, fp8))
    assert [line["loss"] for line in lines[1:]] == pytest.approx([line["loss"] for line in expected[1:]], rel=0.03)
    assert exact(lines) != exact(expected)
    train(1, tmp_path / "parts", *TINY, bf16, "train.steps=3", config=CONFIG)
    parts = train(1, tmp_path / "parts", *TINY, fp8, "run.allow_change=[train.steps]", config=CONFIG)
    assert parts[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=0.03)


# ------------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("way", ["compile=false", "compile=true", "cuda_graph=true"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_no_step_waits_for_the_device(kind: str, way: str, tmp_path: Path) -> None:
    """Also not at a log step, whose health figures are made on the device."""
    settings = ["train.global_batch_size=8", "train.micro_batch_size=4", "train.log_every=2", "optim.clip_norm=1"]
    settings += ["optim.spike_threshold=6", f"parallel.{way}"]
    with built(f"{kind}_debug_mup.yaml", tmp_path, *settings) as run:
        stream = steps(run)
        take(stream, 4)
        try:
            torch.cuda.set_sync_debug_mode("error")
            take(stream, 4)
            with pytest.raises(RuntimeError, match="synchroniz"):
                run.state.totals.sum().item()  # the mode does see a wait
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_three_token_counts_are_compiled_once(tmp_path: Path) -> None:
    """Batches of three lengths of text: after one of each nothing is compiled again."""
    lengths = [text.replace("lengths=[]", "lengths=[4,8,16]") for text in SMALL]
    with built(CONFIG, tmp_path, *lengths, "parallel.compile=true") as run:
        stream = steps(run)
        take(stream, 12)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs > 0
        take(stream, 12)
        assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_recorded_passes_are_the_plain_ones(kind: str, compiled: str, tmp_path: Path) -> None:
    """With deterministic algorithms losses and weights are equal to the last bit, also with two lengths of text and
    several micro-batches."""
    settings = ["train.global_batch_size=8", "train.micro_batch_size=0.0625", "train.log_every=100"]
    settings += ["train.deterministic=true", "optim.clip_norm=0.5", f"parallel.compile={compiled}"]
    if kind in ("mmdit", "pixart"):
        settings += ["text_encoder.max_length=16", "data.text_lengths=[8,16]"]
    found = []
    for graph in ("false", "true"):
        with built(f"{kind}_debug_mup.yaml", tmp_path / graph, *settings, f"parallel.cuda_graph={graph}") as run:
            try:
                take(steps(run), 16)
            finally:
                torch.use_deterministic_algorithms(False)
            found.append(state_of(run))
    plain, recorded = found
    assert recorded["totals"][0].isfinite()
    assert [name for name in plain if not torch.equal(plain[name], recorded[name])] == []


def test_a_recorded_step_is_few_launches(tmp_path: Path) -> None:
    launches = []
    for graph in ("false", "true"):
        settings = ("model.depth=8", "train.log_every=100", f"parallel.cuda_graph={graph}")
        with built("mmdit_debug_mup.yaml", tmp_path / graph, *settings) as run:
            names = [event.get("name", "") for event in profiled(run, tmp_path)]
        launches.append(sum(name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")) for name in names))
    assert launches[1] < launches[0] / 2


def profiled(run: Run, folder: Path) -> list[dict[str, Any]]:
    """Events of two steps, after others."""
    stream = steps(run)
    take(stream, 3)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        take(stream, 2)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    return json.loads((folder / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("config", SHIPPED)
def test_attention_is_flash(config: str, compiled: str, tmp_path: Path) -> None:
    """With padded text and without text: as shipped, no backbone takes a kernel that is not of FlashAttention."""
    with built(config, tmp_path, *SHIPPED[config], f"parallel.compile={compiled}") as run:
        assert not attention_faults(profiled(run, tmp_path))


@pytest.mark.parametrize("config", SHIPPED)
def test_fp8_is_what_is_multiplied(config: str, tmp_path: Path) -> None:
    """By each backbone, three times for each of its TokenLinears in a step (forward, and two gradients)."""
    with built(config, tmp_path, *SHIPPED[config], "parallel.precision=fp8") as run:
        layers = len(token_linears(run.engine.model))
        names = [event.get("name", "") for event in profiled(run, tmp_path)]
    assert names.count("aten::_scaled_mm") == 2 * 3 * layers


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("config", SHIPPED)
def test_the_kernel_of_choice_is_found_right(config: str, precision: str) -> None:
    """The probe at the start finds no fault in the kernel of each shipped shape, all heads."""
    with open_world(1) as world:
        choice = attention_choice(load_config(config, [f"parallel.precision={precision}"]), world)
    assert choice == Choice("varlen" if precision == "bf16" else "efficient", {})


def test_batches_come_on_a_stream_of_their_own(tmp_path: Path) -> None:
    """Copies of the next batch's latents and text states run beside the kernels of the step."""
    with built(CONFIG, tmp_path, *SMALL) as run:
        events = profiled(run, tmp_path)
    large = [e for e in events if "Memcpy HtoD" in e.get("name", "") and e["args"].get("bytes", 0) > 4096]
    copies = {e["args"]["stream"] for e in large}
    kernels = [e["args"]["stream"] for e in events if e.get("cat") == "kernel"]
    main = max(set(kernels), key=kernels.count)
    assert copies
    assert main not in copies


# ---------------------------------------------------------------------------------------------- memory and checkpoints


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("mmdit_18b_mup.yaml", ("model.depth=2", "train.global_batch_size=4")),
        ("mmdit_18b_mup.yaml", ("model.depth=4", "train.global_batch_size=2")),
        ("mmdit_2b_mup.yaml", ("train.global_batch_size=8",)),
    ],
)
def test_memory_is_what_was_estimated(config: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Within 10 %, at the peak of a step; of what tensors hold."""
    settings = (
        *overrides,
        "data.shards=synthetic",
        "objective.repa_weight=0",
        "text_encoder.max_length=128",
        "data.text_lengths=[]",
    )
    resolved = load_config(config, list(settings))
    rows = resolved.train.global_batch_size
    expected = Memory(estimate.profile(resolved, 1), build_mup_table(resolved)).total(1, rows, False)
    if expected > 0.93 * torch.cuda.get_device_properties(0).total_memory:
        pytest.skip(f"needs {expected / 2**30:.0f} GiB")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with built(config, tmp_path, *settings, "train.log_every=1") as run:
        torch.cuda.reset_peak_memory_stats()
        take(steps(run), 2)
        most = torch.cuda.max_memory_allocated() - before
    assert most == pytest.approx(expected, rel=0.1), f"{most / 2**30:.2f} GiB, estimated {expected / 2**30:.2f}"


def test_a_save_copies_to_pinned_memory_and_lets_training_go_on(tmp_path: Path) -> None:
    with built(CONFIG, tmp_path, *SMALL) as run:
        stream = steps(run)
        take(stream, 2)
        at_save = {name: shard.clone() for name, shard in run.engine.master_shards().items()}
        saver = AsyncSaver(run.world.device, run.world.checkpoint)
        staged = saver._stager.stage({name: run.engine.master_shards()[name] for name in at_save})
        assert isinstance(staged, dict)
        assert all(_local(tensor).is_pinned() for tensor in staged.values())
        future = run.engine.save(tmp_path / "saved", run.ema.tensors())
        take(stream, 2)  # writes into the weights while the copy is written to disk
        future.result()
        moved = run.engine.master_shards()
        assert not all(torch.equal(moved[name], at_save[name]) for name in at_save)
        run.engine.load(tmp_path / "saved", run.ema.tensors())
        loaded = run.engine.master_shards()
        assert all(torch.equal(loaded[name], at_save[name]) for name in at_save)


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
