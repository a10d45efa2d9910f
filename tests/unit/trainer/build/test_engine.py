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
from trainer.config.load import load_config
from trainer.loop import train_step


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
