"""launch/shard.py and examples/demo_data.py as a user runs them: exit codes, messages, nothing half-written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data.index import ImageTextIndex
from data.shard_index import index_path, load_index
from data.storage import open_shards
from examples import demo_data
from examples.palette import PALETTE
from launch import shard
from tests.helpers.paths import ROOT
from tests.unit.data.test_index import png, write_tar


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, as a user runs it."""
    command = [sys.executable, str(ROOT / "launch" / "shard.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The script's main in this process: fast."""
    monkeypatch.setattr(sys, "argv", ["shard.py", *map(str, arguments)])
    shard.main()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "a.b.png").write_bytes(png(size=(30, 20)))
    (images / "a.b.txt").write_text("first")
    (images / "sub" / "two.png").write_bytes(png(size=(10, 40)))
    (images / "sub" / "two.json").write_text('{"captions": ["second", "another"], "weights": [1, 3]}')
    (images / "no_caption.png").write_bytes(png())
    (images / "broken.png").write_bytes(b"junk")
    (images / "phone.HEIC").write_bytes(b"x")
    (images / "broken.txt").write_text("third")
    return images


def test_a_folder_becomes_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(monkeypatch, "--images", folder, "--output", tmp_path / "out" / "train", "--per-shard", 1, "--resize", 8)
    index = ImageTextIndex(open_shards(str(tmp_path / "out")))
    assert index.shard_sizes == [1, 1]
    assert index.name(0, 0).startswith("train-000000/a_b-")
    assert index.name(1, 0) == "train-000001/sub/two"
    assert list(zip(index.width.tolist(), index.height.tolist(), strict=True)) == [(12, 8), (8, 32)]
    printed = capsys.readouterr().out
    assert "2 samples in 2 shards" in printed
    assert "skipped 1: caption: missing" in printed
    assert "skipped 1: image: unreadable" in printed


def test_a_manifest_becomes_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = folder / "list.jsonl"
    entries = [{"image": "sub/two.png", "caption": "zwei"}, {"image": "a.b.png", "caption": " eins "}] * 2
    manifest.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    main(monkeypatch, "--manifest", manifest, "--output", tmp_path / "train")
    index = ImageTextIndex(open_shards(str(tmp_path / "train-*.tar")))
    assert index.shard_sizes == [4]
    assert index.caption_length.tolist() == [4] * 4
    assert len({index.name(0, i) for i in range(4)}) == 4


def test_index_builds_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(tmp_path / "s.tar", {"a.png": png(), "a.txt": b"x", "b.png": png()})
    main(monkeypatch, "index", path)
    assert index_path(path).is_file()
    assert "2 samples, 2 with a readable image, 1 with a caption, 0 with a class label" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "DIR/gone"], "there is no such folder"),
        (["--images", "DIR/empty"], "no image in this folder"),
        (["--images", "DIR/bare"], "none of the 1 images has a caption"),
        (["--images", "DIR/junk"], "none of the 1 images can be read"),
        (["--manifest", "DIR/gone.jsonl"], "cannot be read"),
        (["--manifest", "DIR/bad.jsonl"], r"bad.jsonl, line 2: expected"),
        (["--manifest", "DIR/lost.jsonl"], r"lost.jsonl, line 1: there is no image"),
        ([], "give either --images"),
        (["--images", "DIR/good", "--per-shard", "0"], "--per-shard must be at least 1"),
        (["--images", "DIR/good", "--resize", "0"], "--resize must be at least 1"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    for name in ("empty", "bare", "junk", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bare" / "a.png").write_bytes(png())
    (tmp_path / "junk" / "a.png").write_bytes(b"junk")
    (tmp_path / "junk" / "a.txt").write_text("x")
    (tmp_path / "good" / "a.png").write_bytes(png())
    (tmp_path / "good" / "a.txt").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"image": "good/a.png", "caption": "x"}\n{"image": 3}\n')
    (tmp_path / "lost.jsonl").write_text('{"image": "lost.png", "caption": "x"}\n')
    before = sorted(tmp_path.rglob("*"))
    filled = [a.replace("DIR", str(tmp_path)) for a in arguments]
    with pytest.raises(ValueError, match=message):
        main(monkeypatch, *filled, "--output", tmp_path / "train")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_exit_codes(folder: Path, tmp_path: Path) -> None:
    result = call("--images", folder, "--output", tmp_path / "train")
    assert result.returncode == 0
    assert "2 samples" in result.stdout


@pytest.mark.slow
def test_shards_are_indexed_by_several_processes(tmp_path: Path) -> None:
    """One that cannot be read ends none of the others, and is named."""
    paths = [write_tar(tmp_path / f"s{i}.tar", {f"{i}.png": png(), f"{i}.txt": b"x"}) for i in range(5)]
    (tmp_path / "s3.tar").write_bytes(b"no tar" * 1000)
    result = call("index", tmp_path, "--workers", 2)
    assert result.returncode == 2
    assert "1 of 5 shards have no index; the first:" in result.stderr
    assert "s3.tar" in result.stderr
    assert "Traceback" not in result.stderr
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [
        "error" if i == 3 else str(path) for i, path in enumerate(paths)
    ]
    for i in (0, 1, 2, 4):
        before = index_path(paths[i]).read_bytes()
        table = load_index(paths[i], rebuild=True).table
        assert table.column("key").to_pylist() == [str(i)]
        assert index_path(paths[i]).read_bytes() == before


def test_demo_captions_read_like_english() -> None:
    def phrase(label: str) -> str:
        name = demo_data.readable(label)
        return demo_data.article(name) + name

    assert phrase("hot dog") == "a hot dog"
    assert phrase("umbrella") == "an umbrella"
    assert phrase("unicorn") == "a unicorn"
    assert phrase("glasses") == "glasses"
    assert phrase("people with bunny ears") == "people with bunny ears"
    assert phrase("octopus") == "an octopus"
    assert phrase("face with rolling eyes") == "a face with rolling eyes"
    assert phrase("flag: France") == "a flag of france"
    assert phrase("keycap: 8") == "a keycap 8"
    assert phrase("woman: red hair") == "a woman with red hair"
    assert phrase("man: bald") == "a bald man"
    assert phrase("UP! button") == "an up button"
    assert phrase("Japanese “secret” button") == "a japanese secret button"


def test_demo_pictures_show_the_background_at_the_border() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), (1, 2, 3, 255)).save(buffer, "WEBP", lossless=True)
    files = demo_data.draw(buffer.getvalue(), 48)
    assert len(files) == len(PALETTE)
    for file, colour in zip(files, PALETTE.values(), strict=True):
        image = Image.open(io.BytesIO(file))
        assert image.size == (48, 48)
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == colour
        assert image.getpixel((24, 24)) == (1, 2, 3)
    assert 0.03 < sum(demo_data.is_held_out(f"{i:x}") for i in range(2000)) / 2000 < 0.07
