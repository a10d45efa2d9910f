"""The micro-batch that train.micro_batch_size=auto takes: the largest for which the model of memory finds room."""

import contextlib
import json
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import torch

from data.errors import DataError

from ..build.engine import build_mup_table
from ..config.resolve import buckets_of, least_rows, micro_batch_rows, micro_batch_size, resolve
from ..config.schema import TrainConfig
from ..errors import ConfigError, DeviceMemoryError
from ..files import write_atomically
from ..loop import train_step
from ..parallel.mesh import rank
from .cluster import GIB, RESERVED_GIB
from .memory import Memory, equal_parts
from .report import T5_PARAMETERS, encoder_bytes
from .simulation import profile

_RECORD = "micro_batch.json"
WORKERS_PER_GPU = "MUDIT_WORKERS_PER_GPU"
"""In the environment: how many processes share each GPU, evenly."""


class Fitting(NamedTuple):
    """A micro-batch that fits. size: at 256² pixels, as config.resolve takes it. rows: of square images. parts: bytes
    of a GPU at the peak. usable: bytes that tensors may take. halved: less than fits, as more was too much before."""

    size: float
    rows: int
    micro_batches: int
    parts: dict[str, int]
    usable: int
    halved: bool = False

    def describe(self) -> str:
        """A line for the start of the run."""
        parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in self.parts.items())
        return (
            f"train.micro_batch_size=auto: {self.rows} x {self.micro_batches} per GPU, at the peak "
            f"{sum(self.parts.values()) / GIB:.1f} of {self.usable / GIB:.1f} GiB (MODEL: {parts})"
            + (f"; at most half of what ran out of memory before ({_RECORD})" if self.halved else "")
        )


def fitting_micro_batch(config: TrainConfig, gpus: int, usable: int, too_large: float | None = None) -> Fitting:
    """The largest micro-batch on each of `gpus` GPUs of which tensors may take `usable` bytes; at most half of
    `too_large`, a size at 256² pixels. Raises ConfigError where not even one sample fits, and says what would.

    A simulation: some seconds, half a minute for 18B. It makes a process group of its own, so there must be none yet.
    """
    share, shard = -(-config.train.global_batch_size // gpus), resolve(config, gpus).shard
    memory = Memory(profile(config, gpus), build_mup_table(config), _encoder_bytes(config), config.parallel)
    rows = fitting = memory.fitting_rows(shard, share, usable)
    if too_large is not None:
        rows = min(rows, int(too_large / micro_batch_size(config, 1) / 2 + 1e-9))
    if rows < (least := least_rows(config)):
        raise ConfigError(_what_would_fit(config, memory, gpus, shard, share, usable))
    halved, rows = rows < fitting, _rows(config, gpus, equal_parts(share, rows))
    count = -(-share // rows)
    size = micro_batch_size(config, max(rows, least))
    return Fitting(size, rows, count, memory.parts(shard, rows, count > 1), usable, halved)


def _rows(config: TrainConfig, gpus: int, most: int) -> int:
    """Samples of a micro-batch with room for `most` square images: fewer where those would part a pair."""
    return micro_batch_rows(config, buckets_of(config)[0], gpus, micro_batch_size(config, most))


def _encoder_bytes(config: TrainConfig) -> int:
    """Of the frozen encoders that a run loads; one of unknown size is taken for the largest T5."""
    if config.data.synthetic:
        return 0
    try:
        return sum(encoder_bytes(config).values())
    except ConfigError:
        return round(2 * max(T5_PARAMETERS.values()))


def _what_would_fit(config: TrainConfig, memory: Memory, gpus: int, shard: int, share: int, usable: int) -> str:
    parallel, least = config.parallel, least_rows(config)
    alone = memory.parts(shard, least, share > least)
    largest = max(alone, key=lambda part: alone[part])
    advice = []
    if parallel.activation_checkpointing != "full":
        advice.append("parallel.activation_checkpointing=full")
    if shard < gpus:
        advice.append("parallel.shard=0, which shards the weights over all GPUs")
    if memory.encoders:
        advice.append("precomputed text (launch/precompute.py), without text_encoder.path")
    advice.append("more GPUs")
    samples = "one sample" if least == 1 else f"{least} samples"
    return (
        f"not even a micro-batch of {samples} fits: {sum(alone.values()) / GIB:.1f} of {usable / GIB:.1f} GiB, of "
        f"which {largest.replace('_', ' ')} {alone[largest] / GIB:.1f} (MODEL). What would help: {'; '.join(advice)}. "
        "launch/estimate.py --plan compares them; a number in train.micro_batch_size skips this check"
    )


def find_fitting(config: TrainConfig, gpus: int, folder: Path) -> Callable[[], Fitting | None]:
    """What train.micro_batch_size=auto takes on this machine's GPU; None where the key is a number, and on a CPU.

    folder: of the run or the study, which remembers what was too large. It is found now and on rank 0 alone, which must
    then give it to all, or its error: call the result for that.
    """
    if config.train.micro_batch_size is not None or not torch.cuda.is_available() or rank() != 0:
        return lambda: None
    found: Future[Fitting | None] = Future()
    try:
        fitting = fitting_micro_batch(config, gpus, usable_here(), _recorded(folder, _place(config, gpus)))
        print(fitting.describe(), flush=True)
        found.set_result(fitting)
    except (ConfigError, DataError, OSError) as error:
        found.set_exception(error)
    return found.result


@contextlib.contextmanager
def telling_out_of_memory(config: TrainConfig, fitting: Fitting | None, gpus: int, folder: Path) -> Iterator[None]:
    """Raise DeviceMemoryError where a run needs more memory than its GPU has. If that was in a training step, and
    train.micro_batch_size is null, the next start takes half the micro-batch. folder: as of find_fitting."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        if any(frame.name == train_step.__name__ for frame in traceback.extract_tb(error.__traceback__)):
            raise DeviceMemoryError(_remedy(config, fitting, gpus, folder, reason)) from error
        raise DeviceMemoryError(
            f"out of memory, and not in a training step: {reason}. Make less of what the run did then: sample.count, "
            "the evaluation's batch, or the model itself (launch/estimate.py tells what fits)"
        ) from error


def _remedy(config: TrainConfig, fitting: Fitting | None, gpus: int, folder: Path, reason: str) -> str:
    rows = resolve(config, gpus, fitting and fitting.size).micro_batch_rows
    least, half = least_rows(config), _rows(config, gpus, max(1, rows // 2))
    told = f"out of memory with micro-batches of {rows} samples: {reason}. "
    if config.train.micro_batch_size is not None:
        return told + f"Set train.micro_batch_size={micro_batch_size(config, max(half, least)):g}, or auto"
    if rows // 2 < least:
        return told + "launch/estimate.py --plan tells what fits"
    record = {"place": _place(config, gpus), "too_large": micro_batch_size(config, rows)}
    with contextlib.suppress(OSError):  # a full disk, say
        write_atomically(folder / _RECORD, json.dumps(record))
    return told + f"Start it again: it goes on from its newest checkpoint with {half}"


def usable_here() -> int:
    """Of the GPU that rank 0 has, as it is now: another process may hold a part of it, or be about to."""
    free, total = torch.cuda.mem_get_info(0)
    return round(min(free, total // int(os.environ.get(WORKERS_PER_GPU, "1"))) - RESERVED_GIB * GIB)


def _place(config: TrainConfig, gpus: int) -> str:
    """Where a micro-batch fits or does not: the GPUs, and how the model is spread over them."""
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return f"{card} x {gpus}, {config.parallel.model_dump_json()}"


def _recorded(folder: Path, place: str) -> float | None:
    """The size at 256² pixels that was too large in this place before, if any was."""
    try:
        found = json.loads((folder / _RECORD).read_text())
        return float(found["too_large"]) if found["place"] == place else None
    except (OSError, ValueError, LookupError, TypeError):  # none, or a damaged one: it is no more than a hint
        return None
