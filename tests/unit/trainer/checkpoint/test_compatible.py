"""Whether data and encoders are those that a checkpoint was trained with."""

from pathlib import Path

import pytest

from trainer.checkpoint.compatible import check_same_contents
from trainer.errors import CheckpointError

CHECKPOINT = Path("runs/a/checkpoints/step_00000004")


def test_other_contents_are_refused_and_damaged_weights() -> None:
    older = {"data": "a", "text_encoder": "b"}
    now = {**older, "text_encoder_weights": "c"}
    check_same_contents({"fingerprints": older}, now, CHECKPOINT)  # from before there was a digest of all weights
    check_same_contents({"fingerprints": now}, now, CHECKPOINT)
    for part, said in (
        ("data", "other data contents .* another run.name"),
        ("text_encoder", "other text encoder contents"),
        ("text_encoder_weights", "other text encoder contents .* a file is damaged"),
    ):
        with pytest.raises(CheckpointError, match=said):
            check_same_contents({"fingerprints": now}, {**now, part: "x"}, CHECKPOINT)
    with pytest.raises(CheckpointError, match="other text encoder contents"):
        check_same_contents({"fingerprints": {"data": "a"}}, older, CHECKPOINT)


def test_a_run_of_several_sources_under_their_older_order_is_refused_with_the_reason() -> None:
    check_same_contents({"fingerprints": {"data": "a", "order": "2"}}, {"data": "a", "order": "2"}, CHECKPOINT)
    meta = {"fingerprints": {"data": "a"}, "commit": "abc"}
    check_same_contents(meta, {"data": "a"}, CHECKPOINT)  # of one source: its order has not changed
    with pytest.raises(CheckpointError, match=r"another order.*commit abc.*branch.py --new-data.*run.init_from"):
        check_same_contents(meta, {"data": "a", "order": "2"}, CHECKPOINT)
