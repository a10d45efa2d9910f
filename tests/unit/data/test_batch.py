"""What workers read becomes one batch, byte for byte and in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data.batch import Batch, concatenate


def part(first: int, rows: int, holes: list[str]) -> Batch:
    """Like a worker's: bf16 text states, mean and logvar as views into one tensor, no sizes."""
    torch.manual_seed(first)
    moments = torch.randn(rows, 2, 4, 3, 3).half()
    return Batch.empty(
        torch.arange(first, first + rows),
        latents=moments[:, 0],
        logvar=moments[:, 1],
        text_states=torch.randn(rows, 5, 8).bfloat16(),
        text_mask=torch.rand(rows, 5) > 0.5,
        names=[f"shard/{i}" for i in range(first, first + rows)],
        captions=[f"caption {i}" for i in range(first, first + rows)],
        holes=holes,
        read=rows,
        sizes=None,
    )


@pytest.mark.parametrize("parts", [[part(0, 3, ["a", "b"]), part(3, 1, []), part(4, 2, ["c"])], [part(0, 3, ["a"])]])
def test_parts_are_copied_into_one_batch_in_order(parts: list[Batch]) -> None:
    whole = concatenate(parts)
    rows = sum(len(each.names) for each in parts)
    assert whole.keys.tolist() == list(range(rows))
    assert whole.names == [f"shard/{i}" for i in range(rows)]
    assert whole.captions == [f"caption {i}" for i in range(rows)]
    assert whole.holes == ["a", "b", "c"][: len(whole.holes)]
    assert len(whole.holes) == sum(len(each.holes) for each in parts)
    assert whole.read == rows
    assert whole.sizes is None
    for name in ("latents", "logvar", "text_states", "text_mask", "labels", "keys", "weight"):
        joined, expected = getattr(whole, name), torch.cat([getattr(each, name) for each in parts])
        assert joined.dtype == expected.dtype
        assert torch.equal(joined, expected)
        assert joined.is_contiguous()
        assert all(joined.data_ptr() != getattr(each, name).data_ptr() for each in parts), "shared memory is kept"


def test_page_locked_memory_is_asked_for_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = torch.empty, []

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = plain(*shape, **options)
        asked.append((pin_memory, made.data_ptr()))
        return made

    monkeypatch.setattr(torch, "empty", empty)
    for pinned in (True, False):
        asked.clear()
        whole = concatenate([part(0, 2, []), part(2, 2, [])], pinned)
        assert sorted(asked) == sorted((pinned, tensor.data_ptr()) for tensor in whole.tensors())
