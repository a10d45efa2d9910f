"""The memory of a step as a function of shard count and micro-batch, fitted to simulated steps."""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..config.schema import ParallelConfig
from ..mup.table import MuTable
from .simulation import (
    ACCUMULATED,
    ACTIVATIONS,
    GATHERED,
    GRADIENTS,
    MOST_ROWS,
    SHARDED,
    UPDATE,
    ZERO_BUCKET,
    ZERO_GATHERED,
    Profile,
)

_KINDS = (*SHARDED, ACTIVATIONS, GATHERED, ACCUMULATED)


def equal_parts(share: int, most: int) -> int:
    """Samples of the micro-batches of a share of which `most` fit at once, all of one size but for the last."""
    return -(-share // -(-share // most))


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank for any shard count and micro-batch, from a profile. encoders: bytes of the frozen ones.
    parallel: the engine, and where the state lives."""

    profile: Profile
    table: MuTable
    encoders: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes [moments, kinds] of a step: at no sample, per sample, and of the gradients that accumulation keeps.

        A moment is a point of the step, known by the bytes of the SHARDED kinds that are held there (see
        simulation.Rank): they are the same whatever the micro-batch, so that moments of several steps can be paired.
        """
        # At each moment the bytes are base + rows x sample: two steps of unlike micro-batches give the line. The third
        # step has the smaller micro-batch and another one before it: what it holds more are the gradients of that one.
        small, large = self.profile.steps
        kept = self.profile.accumulating
        common = sorted(small.peaks.keys() & large.peaks.keys() & kept.peaks.keys())
        one, two, more = (
            torch.tensor([[step.peaks[m][kind] for kind in _KINDS] for m in common], dtype=torch.float64)
            for step in (small, large, kept)
        )
        sample = (two - one) / (large.rows - small.rows)
        return one - small.rows * sample, sample, more - one

    def parts(self, shard: int, rows: int, accumulates: bool) -> dict[str, int]:
        """Bytes of a GPU by part, at the moment of the step that holds most."""
        p, held = self.profile, self._held(shard, rows, accumulates)
        state = 0.0 if self.parallel.cpu_offload else self._scale(shard)
        if self.parallel.cpu_offload:
            held[:, : len(SHARDED)] = 0
        peak = dict(zip(_KINDS, held[held.sum(1).argmax()].tolist(), strict=True))
        parts = {
            "parameters": p.parameters * state,
            "gradients": peak[GRADIENTS] + peak[ACCUMULATED],
            "optimizer": p.optimizer * state,
            "ema": p.ema * state,
            "activations": peak[ACTIVATIONS] + peak[UPDATE] + p.other,
            "gather_buffers": peak[GATHERED],
            "encoders": self.encoders,
        }
        if self.parallel.engine == "zero":
            parts |= self._zero_parts(parts["parameters"], shard)
        return {part: round(size) for part, size in parts.items()}

    def host(self, shard: int, rows: int, accumulates: bool) -> int:
        """Bytes in the host's memory for each GPU: under cpu_offload the state, the gradients and their update."""
        if not self.parallel.cpu_offload:
            return 0
        p, held = self.profile, self._held(shard, rows, accumulates)
        state = (p.parameters + p.optimizer + p.ema) * self._scale(shard)
        return round(state + float(held[:, : len(SHARDED)].sum(1).max()))

    def _zero_parts(self, masters: float, shard: int) -> dict[str, float]:
        """What DeepSpeed's ZeRO holds differently, by its rules and not by simulation: weights in the compute type
        beside the fp32 masters (stage 3: a part of them), and gradients in fp32 (stage 1: whole, and once more in the
        compute type), in buffers of its own."""
        numbers, stage = self._shard_bytes(1) // 4, self.parallel.zero_stage
        width = 4 if self.parallel.precision == "fp32" else 2
        weights = numbers * width / (shard if stage == 3 else 1)
        gathered = {1: 0, 2: ZERO_BUCKET * width, 3: 4 * ZERO_BUCKET + width * min(numbers, ZERO_GATHERED)}[stage]
        gradients = (4 + width) * numbers if stage == 1 else 4 * numbers / shard
        return {"parameters": masters + weights, "gradients": gradients, "gather_buffers": gathered}

    @property
    def copy_alone(self) -> int:
        """Bytes of the bf16 weights that a GPU alone holds (trainer.parallel.single), where the profile, of several
        ranks, does not have them."""
        alone = self.profile.shard == 1 or self.parallel.engine == "zero" or self.parallel.cpu_offload
        return 0 if alone or self.parallel.precision not in (None, "bf16", "fp8") else self._shard_bytes(1) // 2

    def _held(self, shard: int, rows: int, accumulates: bool) -> Tensor:
        """Bytes [moments of a step, kinds]. What is sharded grows or shrinks with this rank's part of the weights."""
        base, sample, kept = self._moments
        held = base + rows * sample + accumulates * kept
        held[:, : len(SHARDED)] *= self._scale(shard)
        if self.parallel.cuda_graph:
            # What graphs compute with is theirs, also while the weights are updated, and while the first call of a
            # further shape, or a validation, needs as much of its own.
            held[:, _KINDS.index(ACTIVATIONS)] = 2 * held[:, _KINDS.index(ACTIVATIONS)].max()
        return held

    def _scale(self, shard: int) -> float:
        return self._shard_bytes(shard) / self._shard_bytes(self.profile.shard)

    def _shard_bytes(self, shard: int) -> int:
        """fp32 weights of a rank: each parameter's first dimension is cut into `shard` chunks of equal, padded size."""
        return sum(4 * math.ceil(row.shape[0] / shard) * math.prod(row.shape[1:]) for row in self.table.rows.values())

    def largest_rows(self, shard: int, limit: int, accumulates: bool) -> int:
        """The largest micro-batch whose bytes stay within `limit`; 0 where not even one sample fits."""
        return bisect_right(range(1, MOST_ROWS + 1), limit, key=lambda rows: self.total(shard, rows, accumulates))

    def fitting_rows(self, shard: int, share: int, limit: int) -> int:
        """The largest micro-batch of a rank's `share` of the batch whose bytes stay within `limit`; 0 where not even
        one sample fits. A share that is taken in parts keeps gradients between them."""
        if self.total(shard, share, False) <= limit:
            return share
        return min(share - 1, self.largest_rows(shard, limit, True))

    def total(self, shard: int, rows: int, accumulates: bool) -> int:
        return sum(self.parts(shard, rows, accumulates).values())
