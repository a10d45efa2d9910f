"""meta.json: a fixed list of fields, a digest of them, and the step that the folder's name says."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import meta_of
from trainer.checkpoint.meta import read_meta, seal
from trainer.errors import CheckpointError

WHOLE = meta_of(
    20,
    engine={"name": "zero", "stage": 2, "world_size": 4},
    validation=None,
    versions={"torch": "2.13.0"},
    commit="",
    reads=[[{"image: unreadable\n": 3}, 64], [{}, 64]],
    jumps=[[4, 2, "NaN"]],
    averages_only=False,
    files={"zero/a_states.pt": {"bytes": 3, "sha256": "0" * 64}},
)


def folder_of(tmp_path: Path, text: str) -> Path:
    folder = tmp_path / "step_00000020"
    folder.mkdir()
    (folder / "meta.json").write_text(text)
    return folder


def test_what_is_sealed_is_read(tmp_path: Path) -> None:
    """Tuples and numbers of any kind too: the digest is that of what a reader finds."""
    meta = {**WHOLE, "jumps": [(4, 2, "NaN")], "config": {"ema": {"decays": (0.1, 1e-12, 1e300)}, "run": {"name": "é"}}}
    read = read_meta(folder_of(tmp_path, seal(meta)))
    assert {name: value for name, value in read.items() if name != "digest"} == json.loads(json.dumps(meta))


def test_one_from_before_there_was_a_digest_is_checked_all_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, json.dumps(WHOLE))
    assert read_meta(folder) == WHOLE
    folder.rename(folder.with_name("step_00000060"))
    with pytest.raises(CheckpointError, match="is of step 20: its folder is renamed"):
        read_meta(folder.with_name("step_00000060"))


def test_any_change_breaks_the_digest(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "")
    for name in WHOLE:
        changed = json.loads(seal(WHOLE))
        changed[name] = {"commit": "x", "step": 20.0, "validation": "x", "averages_only": True}.get(
            name, changed["digest"]
        )
        (folder / "meta.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="is damaged"):
            read_meta(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": -1}, "'step' is not of the form"),
        ({"step": True}, "'step' is not of the form"),
        ({"step": None}, "'step' is not of the form"),
        ({"other": 1}, "has the field 'other'"),
        ({"config": {}}, "'config' is not of the form"),
        ({"config": {"ema": {"decays": ["x"]}}}, "'config' is not of the form"),
        (
            {"mup": {"sha256": "", "settings": {"parametrization": "mup"}, "rows": {"a": {"shape": "x"}}}},
            "'mup' is not",
        ),
        ({"fingerprints": {"data": 1}}, "'fingerprints' is not of the form"),
        ({"commit": "\x1b[2J"}, "'commit' is not of the form"),
        ({"reads": [[{}, 1, 2]]}, "'reads' is not of the form"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "'files' is not of the form"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "'files' is not of the form"),
        ({"files": {"a": {"bytes": 1}}}, "'files' is not of the form"),
    ],
)
def test_other_fields_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Whoever made the digest."""
    with pytest.raises(CheckpointError, match=said):
        read_meta(folder_of(tmp_path, seal({**WHOLE, **changes})))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"step": ' + "9" * 5000 + "}",
        "[]",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
        "",
    ],
)
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"meta\.json cannot be read"):
        read_meta(folder_of(tmp_path, text))
