"""A command on two processes verifies a checkpoint once, and none of them loads before both know the verdict."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.helpers.forked import finished
from tests.helpers.paths import ROOT

RUN = ROOT / "tests/integration/run_of_0db30ff"  # written by one process, so that one rank reads all of it


def opened(path: Path) -> list[dict[str, Any]]:
    done = finished("-m", "tests.distributed.verify_checks", path, processes=2)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line) for line in lines]


def test_each_file_is_read_once_for_all_ranks_and_a_verdict_is_that_of_all(tmp_path: Path) -> None:
    shutil.copytree(RUN, tmp_path / "run")
    older = tmp_path / "run/checkpoints/step_00000004"
    listed = json.loads((older / "meta.json").read_bytes())["files"]
    size = sum(file["bytes"] for file in listed.values())
    assert size > 500_000
    expected = {"bytes": [size, 0], "loaded": older.name, "refused": ""}
    assert opened(tmp_path / "run") == [expected, expected]

    tensors = older / "__0_0.distcp"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    for found in opened(older):  # rank 1 has read nothing of it
        assert "__0_0.distcp is damaged: its SHA-256 is" in found["refused"]
        assert not found["loaded"]
