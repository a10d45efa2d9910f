"""Whole matrices out of shards, each on the one rank that computes with it, and their results back as shards.

FSDP2 shards a weight by its rows, and a polar factor needs the whole matrix. Every rank is given matrices to own, so
that all have about the same work, and two all-to-all exchanges for each bucket of parameters carry rows to the owners
and results back. With several copies of the weights (HSDP) the matrices are shared out among the copies as well, and
each copy hands its results to the others.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_OWNED_ELEMENTS = 2**26
"""Elements that a rank receives as an owner in one bucket (a bucket holds at least one parameter)."""


class Stacked(NamedTuple):
    """A parameter: `matrices` of equal shape [rows / matrices, columns] behind each other."""

    rows: int
    columns: int
    matrices: int


class Ranks(NamedTuple):
    """The ranks that share one copy of the weights, and those that hold the same shard of other copies; None: one."""

    shard: dist.ProcessGroup | None = None
    copies: dist.ProcessGroup | None = None


class _Matrix(NamedTuple):
    """One of a parameter's matrices: rows [start, end) of it. elements: of it in the shard of each rank."""

    name: str
    start: int
    end: int
    elements: tuple[int, ...]


@dataclass(frozen=True)
class _Bucket:
    """Parameters that are exchanged at once. owned: their matrices by copy, then by owner. theirs: elements of each
    owner's matrices that lie in this rank's shard; mine: elements of this rank's matrices in the shard of each rank."""

    owned: list[list[list[_Matrix]]]
    theirs: list[int]
    mine: list[int]


class Owners:
    """Who computes with which matrix: the same on every rank, as it follows from the shapes and the world alone.

    parameters: by name, sharded by rows over ranks.shard as torch.chunk cuts them. cost: of a matrix [rows, columns].
    device, dtype: where, and in which type, matrices are sent and given to the owner.
    """

    def __init__(
        self,
        parameters: Mapping[str, Stacked],
        ranks: Ranks,
        cost: Callable[[int, int], float],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._parameters, self._ranks = dict(parameters), ranks
        self._device, self._dtype = device, dtype
        self._size, self._rank = _place(ranks.shard)
        self._copies, self._copy = _place(ranks.copies)
        loads = [(0.0, copy, owner) for owner in range(self._size) for copy in range(self._copies)]
        heapq.heapify(loads)
        self._buckets = [self._bucket(names, loads, cost) for names in self._cut_into_buckets()]

    def _cut_into_buckets(self) -> Iterator[list[str]]:
        names: list[str] = []
        elements = 0
        for name, stacked in self._parameters.items():
            size = stacked.rows * stacked.columns
            if names and elements + size > _OWNED_ELEMENTS * self._size * self._copies:
                yield names
                names, elements = [], 0
            names.append(name)
            elements += size
        if names:
            yield names

    def _bucket(
        self, names: Sequence[str], loads: list[tuple[float, int, int]], cost: Callable[[int, int], float]
    ) -> _Bucket:
        """The most costly matrix first, each to the rank with the least work so far."""
        costs: list[tuple[float, _Matrix]] = []
        for name in names:
            stacked = self._parameters[name]
            rows = stacked.rows // stacked.matrices
            for start in range(0, stacked.rows, rows):
                costs.append((cost(rows, stacked.columns), self._matrix(name, start, start + rows)))
        owned: list[list[list[_Matrix]]] = [[[] for _ in range(self._size)] for _ in range(self._copies)]
        for work, matrix in sorted(costs, key=lambda pair: -pair[0]):
            load, copy, owner = heapq.heappop(loads)
            heapq.heappush(loads, (load + work, copy, owner))
            owned[copy][owner].append(matrix)
        own = owned[self._copy]
        theirs = [sum(matrix.elements[self._rank] for matrix in each) for each in own]
        mine = [sum(matrix.elements[rank] for matrix in own[self._rank]) for rank in range(self._size)]
        return _Bucket(owned, theirs, mine)

    def _matrix(self, name: str, start: int, end: int) -> _Matrix:
        columns = self._parameters[name].columns
        bounds = [self._rows_in_shard(name, start, end, rank) for rank in range(self._size)]
        return _Matrix(name, start, end, tuple((last - first) * columns for first, last in bounds))

    def _rows_in_shard(self, name: str, start: int, end: int, rank: int) -> tuple[int, int]:
        """The part of the rows [start, end) that is in the shard of `rank`, as [first, last)."""
        rows = math.ceil(self._parameters[name].rows / self._size)
        first = max(start, rank * rows)
        return first, max(first, min(end, (rank + 1) * rows))

    def computed(
        self, shards: Mapping[str, Tensor], compute: Callable[[Tensor], Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's rows of compute(each matrix), by parameter name, a bucket at a time.

        shards: this rank's rows of each parameter. compute: of matrices of one shape, [M, R, C] -> [M, R, C]. While one
        bucket is computed, the next one comes and the one before goes back. Results are of type `dtype`, on `device`.
        """
        coming: list[_Exchange] = []
        leaving: list[tuple[_Bucket, _Exchange]] = []
        for number, bucket in enumerate(self._buckets):
            coming += [self._to_owners(each, shards) for each in self._buckets[number + len(coming) : number + 2]]
            results = _by_shape(self._assembled(bucket, coming.pop(0).wait()), compute)
            leaving.append((bucket, self._to_shards(bucket, results)))
            if number:
                yield self._in_shards(*leaving.pop(0))
        for each in leaving:
            yield self._in_shards(*each)

    def _to_owners(self, bucket: _Bucket, shards: Mapping[str, Tensor]) -> "_Exchange":
        """Each owner is sent this rank's rows of its matrices."""
        pieces: list[Tensor] = []
        for matrix in (matrix for owned in bucket.owned[self._copy] for matrix in owned):
            shard_start, _ = self._rows_in_shard(matrix.name, 0, self._parameters[matrix.name].rows, self._rank)
            first, last = self._rows_in_shard(matrix.name, matrix.start, matrix.end, self._rank)
            pieces.append(shards[matrix.name][first - shard_start : last - shard_start].reshape(-1))
        return self._exchange(bucket, pieces, to_owners=True)

    def _assembled(self, bucket: _Bucket, received: Tensor) -> dict[_Matrix, Tensor]:
        """The matrices that this rank owns, from the rows of all ranks, which lie rank after rank."""
        mine = bucket.owned[self._copy][self._rank]
        pieces = received.split([matrix.elements[rank] for rank in range(self._size) for matrix in mine])
        return {
            matrix: torch.cat(pieces[number :: len(mine)]).view(matrix.end - matrix.start, -1)
            for number, matrix in enumerate(mine)
        }

    def _to_shards(self, bucket: _Bucket, results: Mapping[_Matrix, Tensor]) -> "_Exchange":
        """This rank's rows of the results of this copy's owners, owner after owner."""
        pieces: list[Tensor] = []
        for rank in range(self._size):
            for matrix in bucket.owned[self._copy][self._rank]:
                first, last = self._rows_in_shard(matrix.name, matrix.start, matrix.end, rank)
                pieces.append(results[matrix][first - matrix.start : last - matrix.start].reshape(-1))
        return self._exchange(bucket, pieces, to_owners=False)

    def _exchange(self, bucket: _Bucket, pieces: Sequence[Tensor], to_owners: bool) -> "_Exchange":
        sent = torch.cat(list(pieces)) if pieces else torch.empty(0)
        sent = sent.to(self._device, self._dtype)
        if self._ranks.shard is None or not any(bucket.owned[self._copy]):
            return _Exchange(sent, sent, None)
        to, given = (bucket.theirs, bucket.mine) if to_owners else (bucket.mine, bucket.theirs)
        received = sent.new_empty(sum(given))
        work = dist.all_to_all_single(received, sent, given, to, group=self._ranks.shard, async_op=True)
        return _Exchange(sent, received, work)

    def _in_shards(self, bucket: _Bucket, exchange: "_Exchange") -> dict[str, Tensor]:
        """Results by parameter, once every copy has those of the others."""
        received = exchange.wait()
        found: dict[str, dict[int, Tensor]] = {}
        for copy, owners in enumerate(bucket.owned):
            matrices = [matrix for owned in owners for matrix in owned]
            sizes = [matrix.elements[self._rank] for matrix in matrices]
            rows = received if copy == self._copy else received.new_empty(sum(sizes))
            if self._ranks.copies is not None and rows.numel():
                dist.broadcast(rows, group=self._ranks.copies, group_src=copy)
            for matrix, piece in zip(matrices, rows.split(sizes), strict=True):
                parts = found.setdefault(matrix.name, {})
                parts[matrix.start] = piece.view(-1, self._parameters[matrix.name].columns)
        return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in found.items()}


class _Exchange(NamedTuple):
    """Under way: `sent` must live until `received` is there. work: None where nothing travels."""

    sent: Tensor
    received: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.received


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(size, this rank) of a group; None is this process alone."""
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))


def _by_shape(matrices: Mapping[_Matrix, Tensor], compute: Callable[[Tensor], Tensor]) -> dict[_Matrix, Tensor]:
    """compute of each matrix; those of one shape are computed at once."""
    shapes: dict[torch.Size, list[_Matrix]] = {}
    for matrix, tensor in matrices.items():
        shapes.setdefault(tensor.shape, []).append(matrix)
    results: dict[_Matrix, Tensor] = {}
    for same in shapes.values():
        results.update(zip(same, compute(torch.stack([matrices[each] for each in same])), strict=True))
    return results
