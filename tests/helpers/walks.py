"""docs/data.md, executed: its commands and scripts, from what stands in for a download to the first steps.

At debug size and in one process. Paths of the page lie in one folder.
"""

import io
import itertools
import json
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.kills_commands import small_autoencoder
from data.config import DataConfig
from data.debug import ensure_debug_assets
from data.index import ImageTextIndex
from data.samples import SampleFiles
from data.storage import open_shards
from tests.helpers.forked import environment, finished
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()
_SMALLER = {
    "mmdit_0.18b_mup": "mmdit_debug_mup", "mmdit_2b_mup": "mmdit_debug_mup", "pixart_0.61b_mup": "pixart_debug_mup",
    "..000999}": "..000000}", "--workers 16": "", "--workers 64": "", "--resize 512": "--resize 32",
    "torchrun --nproc-per-node 8": "python",
}  # fmt: skip
_STEPS = (
    "train.steps=3", "train.validate_every=3", "train.sample_every=0", "data.val_shards=null", "validation.samples=4",
)  # fmt: skip
_PATHS = re.compile(
    r"(?<![\w./-])(/data|photos|shards|web|captions\.jsonl|report\.html|latents|runs)(?=[/\s'\"]|$)", re.MULTILINE
)


class Pair(NamedTuple):
    """An image as the bytes of a file, and its caption."""

    jpeg: bytes
    caption: str


class Block(NamedTuple):
    """A fenced block of the page, and the heading above it."""

    heading: str
    language: str
    text: str


def blocks() -> list[Block]:
    found, heading = [], ""
    for title, language, text in re.findall(r"^## ([^\n]*)$|^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        heading = title or heading
        if language:
            found.append(Block(heading, language, text))
    return found


def pairs() -> list[Pair]:
    """Drawn images of the debug set."""
    index = ImageTextIndex(open_shards(str(ensure_debug_assets(ROOT / ".cache" / "debug") / "val-000000.tar")))
    files, found = SampleFiles(index, DataConfig(), images_only=False), []
    for i in range(16):
        sample, file = files.sample(0, i), io.BytesIO()
        Image.open(io.BytesIO(sample.member("image"))).save(file, "JPEG", quality=95)
        found.append(Pair(file.getvalue(), sample.member("caption").decode()))
    return found


def photos(folder: Path, each: list[Pair]) -> None:
    folder.mkdir()
    for i, pair in enumerate(each):
        (folder / f"{i}.jpg").write_bytes(pair.jpeg)
        (folder / f"{i}.txt").write_text(pair.caption)


def sa_1b(folder: Path, served: Path, url: str, each: list[Pair]) -> None:
    """Two of Meta's tars behind a server, the first one gzipped, the list of links, and the archive of captions."""
    served.mkdir()
    for number, half in enumerate((each[:8], each[8:])):
        with tarfile.open(served / f"sa_{number}.tar", "w:gz" if number == 0 else "w") as tar:
            for i, pair in enumerate(half, 8 * number):
                masks = {"image": {"image_id": i, "file_name": f"sa_{i}.jpg"}, "annotations": [{"area": 4}]}
                add(tar, f"./sa_{i}.jpg", pair.jpeg)
                add(tar, f"./sa_{i}.json", json.dumps(masks).encode())
    links = [f"sa_00000{number}.tar\t{url}/sa_{number}.tar\n" for number in range(2)]
    (folder / "sa1b_links.txt").write_text("file_name\tcdn_link\n" + "".join(links))
    with tarfile.open(folder / "SA1B_caption.tar.gz", "w:gz") as tar:
        for i, pair in enumerate(each):
            add(tar, f"captions/sa_{i}.txt", pair.caption.encode())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def parquet(folder: Path, each: list[Pair]) -> None:
    """As the hub stores image-text sets."""
    folder.mkdir()
    rows = [{"image": {"bytes": pair.jpeg, "path": f"{i}.jpg"}, "text": pair.caption} for i, pair in enumerate(each)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")


def img2dataset_folder(folder: Path, each: list[Pair]) -> None:
    """What img2dataset leaves, the failed download of key 3 included."""
    folder.mkdir()
    lines = []
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i, pair in enumerate(each):
            key, failed = f"{i:09d}", i == 3
            width, height = Image.open(io.BytesIO(pair.jpeg)).size
            line = {
                "aesthetic": 4 + i / 8, "caption": pair.caption, "url": f"http://host/{i}.jpg", "key": key,
                "status": "failed_to_download" if failed else "success",
                "error_message": "HTTP Error 404: File not found" if failed else None,
                "width": width, "height": height, "original_width": width, "original_height": height, "exif": "{}",
            }  # fmt: skip
            lines.append(line)
            if not failed:
                add(tar, f"{key}.jpg", pair.jpeg)
                add(tar, f"{key}.json", json.dumps(line, indent=4).encode())
                add(tar, f"{key}.txt", pair.caption.encode())
    pq.write_table(pa.Table.from_pylist(lines), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": len(each), "successes": len(each) - 1}))


def walk(folder: Path, tools: Mapping[str, Callable[[str], None]], scripts: Mapping[str, str | Path]) -> list[str]:
    """Run the page's blocks one after another; a command that fails is an AssertionError with its output.

    tools: what does the work of a program, given its command. scripts: the interpreter of a script by the package that
    it imports first, "" where it is left out; others run here. Returns the output of each command.
    """
    vae = f"autoencoder={{path: {small_autoencoder(folder / 'vae')}, channels: 4, downsample: 2}}"
    said, names = [], (f"run_{number}" if number else "NAME" for number in itertools.count())
    for block in blocks():
        if block.language == "python" and (python := scripts.get(block.text.split()[1], sys.executable)):
            said.append(_done([str(python), "-c", block.text], folder))
        for line in map(partial(_smaller, folder), block.text.splitlines() if block.language == "bash" else ()):
            command = shlex.split(line, comments=True)
            if command[0] in tools:
                tools[command[0]](line)
                continue
            if command[0] != "python":
                said.append(_done(["bash", "-c", f"set -eo pipefail; {line}"], folder))
                continue
            if command[1] == "launch/train.py" and "NAME-more" not in line:
                command += [*_STEPS, f"run.dir={folder / 'runs'}", f"run.name={next(names)}"]
            done = finished(*command[1:], *([vae] if "latents" in line else []))
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            said.append(done.stdout + done.stderr)
    return said


def _smaller(folder: Path, line: str) -> str:
    """A command of the page at debug size, with its paths in the folder."""
    for text, smaller in _SMALLER.items():
        line = line.replace(text, smaller)
    return _PATHS.sub(lambda found: f"{folder}/{found[1].strip('/')}", line)


def _done(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr
