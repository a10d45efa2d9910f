"""The simulated step against a real one: state to the byte, FLOPs to the operation, the rest by the CPU's allocator."""

import dataclasses
import gc
import json
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from launch import estimate
from models.flops import forward_flops
from trainer.build.engine import build_engine, build_mup_table, build_objective
from trainer.build.flops import image_flops
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.config.schema import ParallelConfig, TrainConfig
from trainer.ema import EMA
from trainer.errors import ConfigError
from trainer.estimate import report
from trainer.estimate.cluster import CARDS, RESERVED_GIB, Cluster
from trainer.estimate.memory import Memory
from trainer.estimate.simulation import ACTIVATIONS, Profile, _batch, profile, simulated_config, simulated_world
from trainer.input.encoding import Encoders
from trainer.monitor.mup_health import Health, WatchedParameter
from trainer.parallel.mesh import World, init_world
from trainer.step import micro_batch_losses

SMALL = (
    "data.shards=synthetic", "text_encoder.path=none", "text_encoder.width=32", "text_encoder.max_length=16",
    "parallel.reshard_after_forward=true",
)  # fmt: skip
TOLERANCE = 0.001
CLUSTER = Cluster(4, dataclasses.replace(CARDS["h100"], peak_tflops=100.0), mfu=0.5, price=2.0)


def configured(name: str, *overrides: str) -> TrainConfig:
    return load_config(name, [*SMALL, *overrides])


@contextmanager
def real_world() -> Iterator[World]:
    world = init_world(1)
    torch.backends.cuda.enable_flash_sdp(True)  # as the simulation, which stands for a GPU
    try:
        yield world
    finally:
        torch.backends.cuda.enable_flash_sdp(False)
        dist.destroy_process_group()


def measured_step(config: TrainConfig, world: World, rows: int) -> tuple[int, int]:
    """(bytes of weights, optimizer and EMA; the most that a step held beside them), by the CPU's allocator."""
    objective = build_objective(config, resolve(config, world.size))
    encoders = Encoders(config, world)
    engine = build_engine(config, build_mup_table(config), world)
    ema = EMA(engine.master_shards(), config.ema.decays, config.ema.warmup)
    rows_of = build_mup_table(config).rows
    health = Health({name: WatchedParameter(row.role, config.optim.eps) for name, row in rows_of.items()}, replicas=1)
    numbers = sum(p.numel() for p in engine.model.parameters())
    state = 4 * numbers * (3 + len(config.ema.decays)) + 2 * numbers  # the model computes with a copy in bf16

    def one_step() -> None:
        batch = _batch(config, rows)
        encoded = encoders.encode(batch)
        losses = micro_batch_losses(engine.model, objective, None, encoded)
        engine.backward(losses.total, last=True)
        del batch, encoded, losses
        ema.update(0, engine.step(1e-3, health).skipped)

    one_step()
    gc.collect()  # what an earlier test left must not be given back within the measurement
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        one_step()
    assert profiled.profiler is not None
    results: Any = profiled.profiler.kineto_results
    held = most = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return state, most


def measured_alone(config: TrainConfig, rows: int) -> tuple[int, int]:
    # oneDNN takes buffers of its own for some products in bf16, on some processors and not on others.
    with real_world() as world, torch.backends.mkldnn.flags(enabled=False):
        return measured_step(config, world, rows)


class CPUsRMSNorm:
    """Seven operations, where a GPU has one kernel."""

    compute = staticmethod(F.rms_norm)

    @classmethod
    def apply(cls, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return cls.compute(x, x.shape[-1:], weight)


@pytest.mark.slow
def test_memory_of_a_step_is_what_the_allocator_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.estimate.simulation._FusedRMSNorm", CPUsRMSNorm)
    names = [f"{kind}_debug_mup.yaml" for kind in ("mmdit", "pixart", "dit", "uvit")]
    configs = [configured(name, "train.global_batch_size=16", "parallel.precision=bf16") for name in names]
    torch.backends.cuda.enable_flash_sdp(False)  # as a run on a CPU leaves it: the simulation is of a GPU all the same
    profiles = [profile(config, 1) for config in configs]
    # In a process of its own: what other tests have left in the allocator is no part of a step.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured = pool.starmap(measured_alone, [(config, 16) for config in configs])
    for config, found, (state, most) in zip(configs, profiles, measured, strict=True):
        table = build_mup_table(config)
        parts = Memory(found, table).parts(1, 16, False)
        scalars = 4 * len(table.rows)  # Adam's step counts
        assert parts["parameters"] + parts["optimizer"] + parts["ema"] == state + scalars
        transient = parts["gradients"] + parts["activations"] + parts["gather_buffers"]
        assert transient == pytest.approx(most, rel=TOLERANCE), config.run.name


def test_the_norm_of_a_gpu_keeps_its_input_and_a_number_a_row() -> None:
    """What stands for torch's kernel holds what that returns for the backward pass."""
    _, kept = torch.ops.aten._fused_rms_norm(torch.zeros(3, 5, 32, dtype=torch.bfloat16), [32], None, 1e-6)
    with simulated_world(1, 1) as (_, account):
        x = torch.zeros(3, 5, 32, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.ones(32, dtype=torch.bfloat16, requires_grad=True)
        account.kind = ACTIVATIONS
        y = F.rms_norm(x, (32,), weight)
        assert account.live[ACTIVATIONS] == y.nbytes + kept.nbytes == y.nbytes + 4 * 15
        y.backward(torch.zeros_like(y))
        assert x.grad is not None
        assert weight.grad is not None
        assert (x.grad.dtype, x.grad.shape, weight.grad.shape) == (x.dtype, x.shape, weight.shape)


@pytest.fixture(scope="module")
def simulated() -> Profile:
    return profile(configured("mmdit_debug_mup.yaml", "train.global_batch_size=16"), 4)


@pytest.mark.slow
def test_flops_are_the_formulas(simulated: Profile) -> None:
    c = configured("mmdit_debug_mup.yaml")
    text = c.text_encoder
    forward = forward_flops(c.model, c.autoencoder.channels, text.width, c.image_tokens, text.max_length)
    for step in simulated.steps:
        assert step.flops["forward"] == step.rows * forward
        assert step.flops["recompute"] == 0
        # The first layers need no gradient of their input.
        assert 0.9 * 2 * step.rows * forward < step.flops["backward"] <= 2 * step.rows * forward


@pytest.mark.slow
def test_traffic_is_the_weights(simulated: Profile) -> None:
    """Gathered for the forward pass, the blocks for the backward pass again, reduced once; three quarters of it from
    the other three ranks."""
    table = build_mup_table(configured("mmdit_debug_mup.yaml"))
    sizes = {name: torch.Size(row.shape).numel() for name, row in table.rows.items()}
    numbers, blocks = sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("blocks."))
    step = simulated.steps[0]
    gathered, reduced = step.traffic["_allgather_base_"], step.traffic["_reduce_scatter_base_"]
    assert (gathered.calls, reduced.calls) == (3 + 2, 3)  # two blocks and the rest
    assert gathered.bytes == pytest.approx(2 * (numbers + blocks) * 3 / 4, rel=0.02)  # bf16; a little is padding
    assert reduced.bytes == pytest.approx(4 * numbers * 3 / 4, rel=0.02)
    assert simulated.accumulating.traffic["_allgather_base_"].calls == 2 * (3 + 2)
    assert simulated.accumulating.traffic["_reduce_scatter_base_"].calls == 2 * 3


@pytest.mark.slow
def test_other_counts_and_batches_follow(simulated: Profile) -> None:
    """One profile tells what another simulation of another world says."""
    config = configured("mmdit_debug_mup.yaml", "train.global_batch_size=16")
    memory, other = (Memory(p, build_mup_table(config)) for p in (simulated, profile(config, 2)))
    for rows in (2, 8):
        told, found = memory.parts(2, rows, False), other.parts(2, rows, False)
        assert told["parameters"] == found["parameters"]
        assert sum(told.values()) == pytest.approx(sum(found.values()), rel=0.05)
    assert memory.total(4, 4, True) == pytest.approx(memory.total(4, 4, False), rel=0.01)  # gradients are kept in parts
    limit = memory.total(4, 9, False)
    assert memory.largest_rows(4, limit, False) == 9
    assert memory.largest_rows(4, limit - 1, False) == 8
    assert memory.largest_rows(4, 0, False) == 0


@pytest.mark.slow
def test_a_gpu_alone_has_a_copy_of_the_weights_in_bf16(simulated: Profile) -> None:
    config = configured("mmdit_debug_mup.yaml", "train.global_batch_size=16")
    table = build_mup_table(config)
    alone, of_four = Memory(profile(config, 1), table), Memory(simulated, table)
    assert alone.copy_alone == 0
    assert alone.parts(1, 16, False)["parameters"] == of_four.parts(1, 16, False)["parameters"] + of_four.copy_alone
    assert of_four.copy_alone * 2 == of_four.parts(1, 16, False)["parameters"]


@pytest.mark.slow
def test_gradients_kept_whole_are_counted() -> None:
    keep = ("train.global_batch_size=16", "parallel.reshard_after_forward=false")
    config = load_config("mmdit_debug_mup.yaml", [*SMALL[:-1], *keep])
    found = profile(config, 4)
    memory = Memory(found, build_mup_table(config))
    assert memory.total(4, 4, True) > memory.total(4, 4, False) + 2 * found.parameters


@pytest.mark.slow
def test_what_a_graph_keeps_is_counted() -> None:
    """Gradients keep their memory between steps; activations keep theirs during the update, which needs more than the
    passes do where a step is watched."""
    config = configured("mmdit_debug_mup.yaml", "train.global_batch_size=16", "parallel.cuda_graph=true")
    plain = config.model_copy(update={"parallel": config.parallel.model_copy(update={"cuda_graph": False})})
    without, recorded = (Memory(profile(c, 1), build_mup_table(c), 0, c.parallel) for c in (plain, config))
    for accumulates in (False, True):
        parts = recorded.parts(1, 16, accumulates)
        assert parts["gradients"] == parts["ema"]  # in fp32, as the average is
        # The graph's own, and those of the first call of another shape.
        assert parts["activations"] >= 2 * without.parts(1, 16, accumulates)["activations"]
    alike = Memory(recorded.profile, recorded.table, 0, plain.parallel)
    assert recorded.total(1, 16, False) > alike.total(1, 16, False) >= without.total(1, 16, False)
    assert recorded.total(1, 16, False) == recorded.total(1, 16, True)


@pytest.mark.slow
def test_state_in_the_host(simulated: Profile) -> None:
    table = build_mup_table(configured("mmdit_debug_mup.yaml"))
    plain, offloaded = (Memory(simulated, table, 0, ParallelConfig(cpu_offload=o)) for o in (False, True))
    on_gpu, state = offloaded.parts(4, 4, False), simulated.parameters + simulated.optimizer + simulated.ema
    assert on_gpu["parameters"] == on_gpu["optimizer"] == on_gpu["ema"] == 0
    assert on_gpu["activations"] == plain.parts(4, 4, False)["activations"]
    assert plain.host(4, 4, False) == 0
    # Beside the state at least the gradients, at most those and the copies of a watched update.
    assert state + simulated.parameters <= offloaded.host(4, 4, False) <= state + 4 * simulated.parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "buffers"),
    # Bytes a number on one rank, as counted in a real engine of each stage; and the buffers that it makes.
    [(1, 4 + 2, 4 + 2, 0), (2, 4 + 2, 4, 2 * 5e8), (3, 4 + 2, 4, 4 * 5e8)],
)
def test_zero_is_not_estimated_as_fsdp2(
    simulated: Profile, stage: Literal[1, 2, 3], weights: int, gradients: int, buffers: float
) -> None:
    table = build_mup_table(configured("mmdit_debug_mup.yaml"))
    memory = Memory(simulated, table, 0, ParallelConfig(engine="zero", zero_stage=stage))
    numbers = sum(torch.Size(row.shape).numel() for row in table.rows.values())
    one, four = memory.parts(1, 4, False), memory.parts(4, 4, False)
    assert one["parameters"] == weights * numbers
    assert one["gradients"] == gradients * numbers
    assert one["gather_buffers"] == buffers + (2 * numbers if stage == 3 else 0)
    assert four["parameters"] == pytest.approx(4 * numbers / 4 + 2 * numbers / (4 if stage == 3 else 1), rel=0.01)
    assert four["gradients"] == pytest.approx(gradients * numbers / (1 if stage == 1 else 4))
    config = configured("mmdit_debug_mup.yaml", "parallel.engine=zero", f"parallel.zero_stage={stage}")
    assert f"rules of ZeRO-{stage}" in "\n".join(report.estimate(config, CLUSTER, simulated)["advice"])


@pytest.mark.slow
def test_report(simulated: Profile) -> None:
    config = configured("mmdit_debug_mup.yaml", "train.global_batch_size=16", "train.steps=3600")
    found = report.estimate(config, CLUSTER, simulated)
    memory = found["memory_gib"]
    parts = ("parameters", "gradients", "optimizer", "ema", "activations", "gather_buffers", "encoders")
    assert memory["total"] == pytest.approx(sum(memory[part] for part in parts))
    assert memory["fits"] is True
    assert memory["smallest_gpus"]["80_gb"] == {"gpus": 1, "micro_batch": 16}
    seconds = 16 * (found["flops_per_image"] + found["text_encoder_flops_per_image"]) / (4 * 100e12 * 0.5)
    time, network = found["time"], found["collectives"]["seconds_at_network_rate"]
    assert time["arithmetic_s"] == pytest.approx(seconds)
    assert time["sum_s"] == pytest.approx(seconds + network)
    assert max(seconds, network) <= time["step_s"] == time["slower_s"] < time["sum_s"]
    assert time["dollars"] == pytest.approx(time["step_s"] * 4 * 2.0)  # 3600 steps: an hour per second of a step
    numbers = found["parameters"]
    assert found["checkpoint_gib"]["training"] == pytest.approx(16 * numbers / 2**30)  # weights, moments, one average
    text = report.describe(found, CLUSTER)
    assert "It fits" in text
    assert "MODEL, not measured" in text
    json.dumps(found)


def test_a_run_that_does_not_fit_is_told_what_would(simulated: Profile) -> None:
    config = configured("mmdit_debug_mup.yaml", "train.global_batch_size=16", "train.micro_batch_size=64")
    tiny = dataclasses.replace(CARDS["h100"], memory_gb=(RESERVED_GIB * 2**30 + 1.3e6) / 1e9)
    found = report.estimate(config, Cluster(4, tiny), simulated)
    assert found["memory_cached_gib"]["fits"] is False
    assert any("does not fit" in line for line in found["advice"])
    assert any("activation_checkpointing=full" in line for line in found["advice"])


@pytest.mark.slow
@pytest.mark.parametrize(("until", "said"), [(1, True), (9, False)])
def test_an_alignment_that_ends_is_priced_to_the_end_and_told(simulated: Profile, until: int, said: bool) -> None:
    keys = ("objective.repa_weight=0.5", "objective.repa_layer=1", "train.steps=9", f"objective.repa_until={until}")
    config = configured("mmdit_debug_mup.yaml", *keys)
    found = report.estimate(config, CLUSTER, simulated)
    assert found["flops_per_image"] == image_flops(config) > image_flops(config, aligned=False)
    less = 1 - image_flops(config, aligned=False) / image_flops(config)
    sentence = f"from objective.repa_until={until} on cost {less:.1%} fewer FLOPs"
    assert (sentence in "\n".join(found["advice"])) == said


def test_encoders_are_counted(tmp_path: Path) -> None:
    sd3 = load_config("mmdit_18b_mup.yaml")
    found = report.encoder_bytes(sd3)
    assert found["text_encoder"] == pytest.approx(9.5e9, rel=0.01)  # T5-XXL's encoder in bf16
    assert found["repa_encoder"] == pytest.approx(2 * 86.6e6, rel=0.05)  # DINOv2-B in bf16
    header = json.dumps({"w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}, "__metadata__": {}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(60))
    local = load_config("mmdit_18b_mup.yaml", [f"text_encoder.path={tmp_path}", "text_encoder.subfolder=null"])
    assert report.encoder_bytes(local)["text_encoder"] == 30
    with pytest.raises(ConfigError, match=r"text_encoder\.width 100"):
        report.encoder_bytes(load_config("mmdit_18b_mup.yaml", ["text_encoder.width=100"]))


def test_several_sources_need_no_file() -> None:
    config = load_config("mmdit_debug_mup", ["data.shards=synthetic", "data.sources=[{shards: nowhere}]"])
    assert simulated_config(config).data.synthetic


@pytest.mark.slow
def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["estimate.py", "--config", "mmdit_debug_mup.yaml", "--gpus", "2", "--json", *SMALL]
    monkeypatch.setattr(sys, "argv", command)
    assert estimate.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert {"parameters", "flops_per_image", "memory_gib"} <= found.keys()
    monkeypatch.setattr(sys, "argv", [*command, "--mfu", "2"])
    with pytest.raises(ConfigError, match="--mfu"):
        estimate.main()
