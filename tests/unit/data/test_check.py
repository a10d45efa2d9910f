"""launch/shard.py check: what a run will see, counted against what lies in the shards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launch import shard
from tests.unit.data.test_index import png, write_tar


def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """(exit code, what was printed) of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["shard.py", "check", *map(str, words)])
    return shard.main(), capsys.readouterr().out


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """cats/0 ... cats/15 of 40 x 20 pixels in one shard, dogs/x and a second cats/0 in another; captions of all cats
    but three, and of an image that is nowhere."""
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", {f"cats/{i}.png": png(size=(40, 20)) for i in range(16)})
    write_tar(tmp_path / "b.tar", {"dogs/x.png": png(size=(20, 20)), "cats/0.png": b"no image"})
    lines = [{"key": f"cats/{i}", "caption": "a cat" + " that sleeps" * i} for i in range(13)]
    lines += [{"key": "birds/7", "caption": "<b>"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_what_is_found(shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("data.text_lengths=[16, 48]", "data.characters_per_token=1", "data.resolution=32")
    words = (".", "--captions", "c.jsonl", "--config", "mmdit_debug_mup", "--json", *lengths)
    encoder = f"text_encoder.path={Path(__file__).parents[3] / '.cache' / 'debug' / 't5'}"
    code, said = check(monkeypatch, capsys, *words, encoder)
    found = json.loads(said)
    assert code == 0, "five bad samples are no share yet"
    assert (found["samples"], found["shards"]) == (18, 2)
    assert found["images"]["shorter_side"] == {"least": 20, "median": 20, "95 %": 20, "most": 20}
    assert found["images"]["of_unknown_size"] == 1
    assert found["captions"]["with"] == 14
    assert found["captions"]["examples_without"] == ["a/cats/13", "a/cats/14", "a/cats/15"]
    [file] = found["captions_files"]
    assert (file["samples_reached"], file["images_without_sample"]) == (14, 1)
    assert file["examples_without_sample"] == ["birds/7"]
    assert found["duplicate_keys"] == {"samples": 1, "examples": [["a/cats/0", "b/cats/0"]]}
    assert found["unreadable"] == {
        "of": 18,
        "reasons": {"caption: missing": 4, "image: unreadable": 1},
        "examples": {
            "caption: missing": found["unreadable"]["examples"]["caption: missing"],
            "image: unreadable": "b/cats/0",
        },
    }
    # ByT5: a token for each byte and one for the end; "a cat" + 12 i characters for i in 0 ... 12.
    assert found["tokens"]["share_above"] == {"16": round(12 / 13, 4), "48": round(9 / 13, 4)}
    assert found["tokens"]["share_cut"] == round(9 / 13, 4)
    page = Path(found["page"]).read_text()
    assert page.count("<img") == 13
    assert "a cat that sleeps" in page


def test_what_would_stop_a_run(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = check(monkeypatch, capsys, "a.tar,b.tar")
    assert code == 1
    assert "problem: no sample has a caption: give data.captions" in said
    assert "problem: 18 of 18 samples are unreadable, more than data.max_bad_share 1.00%" in said
    (shards / "c.jsonl").write_text('{"key": "nobody", "caption": "x"}\n')
    assert "problem: c.jsonl reaches no sample" in check(monkeypatch, capsys, "a.tar", "--captions", "c.jsonl")[1]
    code, said = check(monkeypatch, capsys, "a.tar", "--captions", "c.jsonl", "data.filter.min_side=20", "--samples=3")
    assert "data.filter keeps 16 of 16 samples" in said
