"""A run in this process, for tests that look into single steps."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from trainer.build.run import build_run
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.parallel.mesh import init_world
from trainer.run import Run

QUIET = (
    "data.shards=synthetic", "train.validate_every=0", "train.sample_every=0", "train.checkpoint_every=0",
)  # fmt: skip


@contextmanager
def built(name: str, folder: Path, *overrides: str) -> Iterator[Run]:
    """The run of a config on synthetic data, in a process group of one, which ends with it."""
    config = load_config(name, [*QUIET, *overrides, f"run.dir={folder}"])
    with ExitStack() as stack:
        world = init_world(resolve(config, 1).shard)
        stack.callback(dist.destroy_process_group)
        run = build_run(config, world)
        stack.callback(run.metrics.close)
        assert run.lock is not None
        stack.enter_context(run.lock)
        yield run


def state_of(run: Run) -> dict[str, Tensor]:
    """Weights, moments, counts of updates, averages, and the sums of losses and gradient norms."""
    state = {f"{key}/{name}": t for name, tensors in run.engine.state().items() for key, t in tensors.items()}
    return {key: tensor.clone() for key, tensor in (state | run.ema.tensors() | run.state.tensors()).items()}
