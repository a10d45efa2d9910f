"""The engine of one process beside FSDP2Engine on one process: equal bit for bit. (parallel.cpu_offload, which on a CPU
does nothing else, keeps a single process with FSDP2.)"""

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.steps import built, state_of
from trainer.loop import train_step
from trainer.parallel.fsdp import FSDP2Engine
from trainer.parallel.single import SingleEngine

FSDP2 = "parallel.cpu_offload=true"
SMALL = ("train.log_every=1", "optim.clip_norm=0.5", "optim.lr=3e-3", "ema.decays=[0.9]", "train.global_batch_size=6")
pytestmark = pytest.mark.slow  # 21 s of CPU together, and what counts FLOPs starts a process
ENGINES = {FSDP2: FSDP2Engine, None: SingleEngine}


def trained(folder: Path, config: str, engine: str | None, *more: str) -> dict[str, Tensor]:
    """The state after six steps."""
    with built(config, folder, *SMALL, *more, *([engine] if engine else [])) as run:
        assert isinstance(run.engine, ENGINES[engine])
        for batches in islice(run.batches(), 6):
            assert len(batches) == (3 if any("micro_batch" in key for key in more) else 1)
            train_step(run, batches)
        return state_of(run)


CASES = {
    "mmdit_debug_mup.yaml": (
        "objective.repa_weight=0.5",
        "objective.repa_layer=1",
        "objective.repa_width=16",
        "objective.repa_hidden=24",
    ),
    "pixart_debug_mup.yaml": (),
    "dit_debug_mup.yaml": (
        "model.route.share=0.5",
        "model.route.start=0",
        "model.route.end=1",
        "model.route.fuse=sprint",
    ),
    "uvit_debug_mup.yaml": (),
}
SETTINGS = {  # micro-batches of 2 samples of 32 pixels
    "fp32": ("parallel.precision=fp32",),
    "bf16": ("parallel.precision=bf16",),
    "bf16, accumulating": ("parallel.precision=bf16", "train.micro_batch_size=0.03125"),
    "fp64, accumulating": ("parallel.precision=fp64", "train.micro_batch_size=0.03125"),
    "bf16, recomputing": ("parallel.precision=bf16", "parallel.activation_checkpointing=full"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("config", "more"), CASES.items(), ids=CASES)
def test_it_trains_as_fsdp2_does(tmp_path: Path, config: str, more: tuple[str, ...], settings: tuple[str, ...]) -> None:
    theirs = trained(tmp_path / "fsdp2", config, FSDP2, *more, *settings)
    ours = trained(tmp_path / "single", config, None, *more, *settings)
    assert ours["totals"][0].isfinite()
    assert ours["totals"][0] > 0
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("to", [FSDP2, None], ids=["to fsdp2", "from fsdp2"])
def test_a_checkpoint_of_one_goes_on_in_the_other(tmp_path: Path, to: str | None) -> None:
    """The next step after loading is that of the run that saved."""
    found: list[dict[str, Tensor]] = []
    for number, engine in enumerate((None if to else FSDP2, to)):
        more = ("parallel.precision=bf16", *([engine] if engine else []))
        with built("mmdit_debug_mup.yaml", tmp_path / str(number), *SMALL, *more) as run:
            batches = [*islice(run.batches(), 4)]
            extra = run.ema.tensors() | run.state.tensors()
            if number == 0:
                for each in batches[:3]:
                    train_step(run, each)
                (tmp_path / "checkpoint").mkdir()
                run.engine.save(tmp_path / "checkpoint", extra).result()
            else:
                run.engine.load(tmp_path / "checkpoint", extra)
                run.state.step = 3
            train_step(run, batches[3])
            found.append(state_of(run))
    saves, loads = found
    assert [key for key in saves if not torch.equal(saves[key], loads[key])] == []


def test_the_model_computes_with_the_weights_that_the_engine_has(tmp_path: Path) -> None:
    """Under bf16 the model has a copy: it follows wherever the master weights change."""
    with built("mmdit_debug_mup.yaml", tmp_path / "run", *SMALL, "parallel.precision=bf16") as run:
        *batches, (last, *_) = islice(run.batches(), 4)
        for each in batches:
            train_step(run, each)
        engine, encoded = run.engine, last.encoded()
        inputs = (encoded.x0, torch.linspace(0.1, 0.9, len(encoded.x0)), encoded.condition)

        def follows() -> bool:
            parameters = dict(engine.model.named_parameters())
            return all(torch.equal(parameters[n].detach(), m.bfloat16()) for n, m in engine.master_shards().items())

        assert follows()
        live = engine.model(*inputs)[0]
        with engine.swapped(run.ema.shards[0.9]):
            assert follows()
            assert not torch.equal(engine.model(*inputs)[0], live)
        assert torch.equal(engine.model(*inputs)[0], live)
        (tmp_path / "checkpoint").mkdir()
        engine.save(tmp_path / "checkpoint", run.ema.tensors()).result()
        engine.load_weights(tmp_path / "checkpoint", "ema_0.9")
        assert follows()
        assert all(torch.equal(run.ema.shards[0.9][name], shard) for name, shard in engine.master_shards().items())
