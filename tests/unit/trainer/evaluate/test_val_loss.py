"""The fixed bank that losses are compared on: a run does not start with another one because a store was slow."""

from types import SimpleNamespace
from typing import Any

import pytest

from data.errors import DataError
from trainer.config.load import load_config
from trainer.input.training_data import validation_bank
from trainer.parallel.mesh import World


def bank(world: World, holes: list[str], read: int, *overrides: str) -> list[str]:
    """The notes that a bank of one batch leaves."""
    names = [(f"val-000000/a/{number}", reason) for number, reason in enumerate(holes)]
    batch, notes = SimpleNamespace(holes=holes, read=read, unreadable=lambda: names), []
    batches: Any = [batch]
    data = load_config("mmdit_debug_mup", overrides).data
    assert validation_bank(batches, lambda batch: batch, data, world, notes) == [batch]
    return notes


def test_unreadable_samples(world: World) -> None:
    assert bank(world, [], 256) == []
    [note] = bank(world, ["image: truncated"] * 2 + ["caption: empty"], 256)
    assert note.startswith(
        "warning: 3 of 256 validation samples are unreadable (caption: empty: 1, image: truncated: 2)"
    )
    assert bank(world, ["shard: short read", "shard: member too large"], 256), "faults of the data stay"
    for holes, read in (
        (["store: timed out"], 256),  # another bank than the last start's
        (["image: truncated"] * 11, 256),  # more than data.max_bad_share of 1000
        (["image: truncated"] * 4, 4),  # nothing is left
    ):
        with pytest.raises(DataError, match=r"data\.val_shards: .* validation samples are unreadable"):
            bank(world, holes, read)
    assert bank(world, ["image: truncated"] * 11, 256, "data.max_bad_share=0.1")


def test_what_a_missing_caption_was_looked_for_by(world: World) -> None:
    for overrides, message in (
        ([], r"val-000000\.tar has neither a/0\.txt nor a/0\.json with a caption, and data\.captions is not set"),
        (["data.captions=c.jsonl"], r"c\.jsonl has no image 'a/0', nor one of that last part alone"),
    ):
        with pytest.raises(DataError, match=message):
            bank(world, ["caption: missing"] * 4, 4, *overrides)
