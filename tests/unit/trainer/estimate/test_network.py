"""The collectives of a step against those of the simulated engine, and what the topology makes of them."""

import pytest

from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.estimate.cluster import Cluster
from trainer.estimate.network import Network, network
from trainer.estimate.simulation import profile
from trainer.estimate.step_time import Work

SMALL = ("data.shards=synthetic", "text_encoder.path=none", "train.global_batch_size=16")


def sent(micro_batches: int, *overrides: str, gpus: int = 4) -> Network:
    config = load_config("mmdit_debug_mup.yaml", [*SMALL, *overrides])
    work = Work(config)
    rest = work.parameters - sum(work.units)
    return network(config, Cluster(gpus), resolve(config, gpus), work.units, rest, micro_batches)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("reshard", ["true", "false"])
def test_the_engine_sends_as_much(mode: str, reshard: str) -> None:
    """Recomputation gathers nothing again: it finds its weights gathered for the backward pass."""
    overrides = (f"parallel.activation_checkpointing={mode}", f"parallel.reshard_after_forward={reshard}")
    simulated = profile(load_config("mmdit_debug_mup.yaml", [*SMALL, "parallel.precision=bf16", *overrides]), 4)
    for micro_batches, step in ((1, simulated.steps[0]), (2, simulated.accumulating)):
        told = sent(micro_batches, *overrides).collectives
        for name, found in (("allgather", "_allgather_base_"), ("reduce_scatter", "_reduce_scatter_base_")):
            assert told[name].calls == step.traffic[found].calls
            assert told[name].bytes == pytest.approx(step.traffic[found].bytes, rel=0.02)  # the engine pads a little


def test_replicas_reduce_their_shards_once() -> None:
    whole, halves, alone = (sent(3, f"parallel.shard={shard}").collectives for shard in (4, 2, 1))
    assert "allreduce" not in whole
    parameters = Work(load_config("mmdit_debug_mup.yaml", [*SMALL])).parameters
    assert halves["allreduce"].bytes == pytest.approx(2 * 4 * parameters / 2 / 2)  # half the shard, there and back
    assert halves["allreduce"].calls == 3
    assert alone.keys() == {"allreduce"}


def test_fp32_gathers_twice_the_bytes_and_reduces_the_same() -> None:
    bf16, fp32 = (sent(1, f"parallel.precision={precision}").collectives for precision in ("bf16", "fp32"))
    assert fp32["allgather"].bytes == 2 * bf16["allgather"].bytes
    assert fp32["reduce_scatter"] == bf16["reduce_scatter"]


def test_a_part_is_exposed() -> None:
    told = sent(1)
    assert 0 < told.exposed_s < told.seconds == sum(each.seconds for each in told.collectives.values())
