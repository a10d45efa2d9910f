"""Who owns which matrix, on one process; on several: tests/distributed/test_muon.py."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from trainer.parallel.owners import Owners, Ranks, Stacked

PARAMETERS = {"qkv": Stacked(12, 4, 3), "out": Stacked(4, 4, 1), "up": Stacked(16, 4, 1), "down": Stacked(4, 16, 1)}


def owners(size: int = 1) -> Owners:
    """As rank 0 of `size` ranks sees them."""
    with mock.patch("trainer.parallel.owners._place", side_effect=[(size, 0), (1, 0)]):
        return Owners(PARAMETERS, Ranks(), lambda r, c: r * c * min(r, c), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("elements", [1, 50, 2**26])
def test_each_matrix_is_computed_once_and_comes_back_to_its_place(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.parallel.owners._OWNED_ELEMENTS", elements)
    weights = {name: torch.randn(p.rows, p.columns) for name, p in PARAMETERS.items()}
    given: list[torch.Size] = []

    def compute(matrices: Tensor) -> Tensor:
        given.extend(matrix.shape for matrix in matrices)
        return matrices / matrices.sum((1, 2), keepdim=True)

    found: dict[str, Tensor] = {}
    for part in owners().computed(weights, compute):
        assert not found.keys() & part.keys()
        found.update(part)
    assert sorted(given) == [(4, 4)] * 4 + [(4, 16), (16, 4)]
    for name, p in PARAMETERS.items():
        parts = weights[name].chunk(p.matrices)
        assert torch.equal(found[name], torch.cat([part / part.sum() for part in parts])), name


def test_the_work_is_shared_evenly() -> None:
    [bucket] = owners(2)._buckets
    work = [sum(4 * sum(matrix.elements) for matrix in owned) for owned in bucket.owned[0]]
    assert work == [2 * 64 + 256] * 2


def test_rows_of_shards_are_those_of_chunk() -> None:
    [bucket] = owners(3)._buckets
    matrices = {(m.name, m.start): m.elements for owned in bucket.owned[0] for m in owned}
    shards = [len(rows) for rows in torch.arange(4).chunk(3)]
    assert matrices["out", 0] == tuple(4 * rows for rows in (*shards, 0))
    assert matrices["qkv", 4] == (0, 16, 0)
