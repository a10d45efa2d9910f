"""What an engine is built with."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from models.attention_probe import Choice
from tests.helpers import varlen
from tests.helpers.steps import built
from tests.helpers.varlen import varlen_on_cpu
from trainer.build.engine import build_engine, build_mup_table
from trainer.config.load import load_config
from trainer.loop import train_step
from trainer.parallel.mesh import World


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mmdit", "pixart"])
def test_a_run_of_packed_rows_takes_the_same_steps(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine, with texts of different lengths, some of them dropped: the weights after three steps in
    float64. Packed is what is computed: the operation is called."""
    calls = []

    def counted(*inputs: Any) -> Any:
        calls.append(len(inputs))
        return varlen.forward(*inputs)

    def weights() -> dict[str, torch.Tensor]:
        overrides = ("parallel.precision=fp64", "train.global_batch_size=4")
        with built(f"{kind}_debug_mup.yaml", tmp_path, *overrides, f"run.name=after_{len(calls)}") as run:
            for micro_batches in itertools.islice(run.batches(), 3):
                train_step(run, micro_batches)
            return {name: shard.clone() for name, shard in run.engine.master_shards().items()}

    masked = weights()
    assert not calls
    monkeypatch.setattr("trainer.build.engine.attention_choice", lambda *_: Choice("varlen", {}))
    with varlen_on_cpu(counted):
        packed = weights()
    assert len(calls) == 3 * load_config(f"{kind}_debug_mup.yaml", []).model.depth
    assert all(torch.allclose(packed[name], masked[name], rtol=1e-6, atol=1e-9) for name in masked)


def test_each_optimizer_trains_the_rows_that_the_table_gives_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rates are right: AdamW that has all groups is found before the first step."""
    config = load_config("mmdit_debug_mup.yaml", ["optim.kind=muon", "optim.muon.lr=0.03"])
    table = build_mup_table(config)
    engine = build_engine(config, table, world)
    settings = engine.optimizer_settings()
    of_muon = {name for name, row in table.rows.items() if row.optimizer == "muon"}
    assert of_muon
    assert {name for name, state in engine.state().items() if "momentum" in state} == of_muon
    assert {settings[name] for name in of_muon} == {(0.03, 0.0, 0.0)}
    monkeypatch.setattr("trainer.parallel.update._of", lambda kind, groups: groups if kind == "adamw" else [])
    with pytest.raises(AssertionError, match=r"^blocks\.0\.image\.\S+: the table has muon for it"):
        build_engine(config, table, world)
