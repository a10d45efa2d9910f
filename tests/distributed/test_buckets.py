"""Runs over buckets of aspect ratio and text length: every backbone, one process against two, and resume."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.shard_index import load_index
from data.storage import open_shards
from data.write_shards import write_shards
from launch import data_order
from tests.helpers.forked import finished
from tests.helpers.language_models import save
from tests.helpers.servers import serve
from trainer.monitor.metrics import read_metrics

from .buckets_checks import BACKBONES, COMMON, STEPS, TEXT, sources
from .runs import assert_close, exact

SIZES = ((44, 24), (36, 28), (40, 40), (28, 36), (26, 50))  # width, height of images, a bucket each
BUCKETS = {(24, 44), (28, 36), (32, 32), (36, 28), (44, 24)}  # height, width of buckets at resolution 32


def draw_shards(folder: Path, name: str, count: int) -> None:
    """Images of all sizes with short and long captions, in an order by chance."""
    rng = np.random.default_rng(0)

    def samples() -> Any:
        for i in range(count):
            width, height = SIZES[rng.integers(len(SIZES))]
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
            yield f"{i:04d}", buffer.getvalue(), "png", f"picture {i}" + " of many words" * int(rng.integers(2)), i % 24

    write_shards(samples(), folder / name, count)


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(folder) if "loss" in record}


def start(processes: int, *arguments: str) -> str:
    """A module of the tests; returns its output."""
    done = finished(*arguments, processes=processes, timeout_s=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("buckets")
    draw_shards(path / "shards", "train", 160)
    draw_shards(path / "shards", "more", 80)
    save("qwen3", path / "qwen3")
    save("clip", path / "clip", ends="eos")
    start(1, "-m", "tests.distributed.buckets_checks", str(path), "no URL")
    with serve(path / "shards") as server:
        shards = open_shards(f"{server.url}/{{train,more}}-000000.tar")
        for shard in shards:
            load_index(shard, path / "index")
        server.heads.clear()
        start(2, "-m", "tests.distributed.buckets_checks", str(path), server.url)
        (path / "heads").write_text("\n".join(server.heads))
    return path


@pytest.mark.parametrize("config", BACKBONES)
def test_two_processes_agree_with_one(folder: Path, config: str) -> None:
    one, two = (read_metrics(folder / f"{config}-{size}") for size in (1, 2))
    assert_close(one, two, 1e-9)
    assert len(one) == STEPS + 1
    assert one[-1]["val_loss"] != one[0]["val_loss"]


def test_a_run_goes_on_at_another_world_size(folder: Path) -> None:
    whole, resumed = (losses(folder / name) for name in ("mmdit_debug_mup.yaml-1", "resumed"))
    assert resumed == pytest.approx(whole, abs=1e-9)


def test_a_sharded_text_encoder_equals_a_whole_one(folder: Path) -> None:
    """Alone, with a rank that has only empty captions, and in a run."""
    assert all(float((folder / f"difference-{rank}").read_text()) < 1e-6 for rank in (0, 1))
    assert_close(read_metrics(folder / "mmdit_debug_mup.yaml-2"), read_metrics(folder / "sharded"), 1e-9)


def test_encoding_ahead_changes_no_bit(folder: Path) -> None:
    ahead, not_ahead = (read_metrics(folder / name) for name in ("mmdit_debug_mup.yaml-1", "not_ahead"))
    assert exact(ahead) == exact(not_ahead)


def test_several_sources_behind_a_web_server(folder: Path) -> None:
    """Reader processes of two ranks against files in one process. Rank 0 alone asks for sizes and versions, once for
    training and once for validation."""
    assert_close(read_metrics(folder / "sources-2"), read_metrics(folder / "sources-1"), 1e-9)
    assert losses(folder / "sources-1") != losses(folder / "mmdit_debug_mup.yaml-1")
    asked = (folder / "heads").read_text().split()
    assert sorted(asked) == ["/more-000000.tar", "/more-000000.tar", "/train-000000.tar"]


@pytest.mark.parametrize(("name", "processes", "tolerance"), [("compile", 1, 1e-9), ("zero", 2, 1e-5)])
def test_compiled_or_by_the_zero_engine_they_train_alike(
    folder: Path, name: str, processes: int, tolerance: float
) -> None:
    """The zero engine in fp32, against fp64."""
    found, wanted = losses(folder / name), losses(folder / f"mmdit_debug_mup.yaml-{processes}")
    assert [*found] == [*range(1, STEPS // 2 + 1)]
    assert found == pytest.approx({step: wanted[step] for step in found}, rel=tolerance)


def order(capsys: pytest.CaptureFixture[str], world: int, first: int, *settings: str) -> list[dict[str, Any]]:
    """What launch/data_order.py prints, up to step 24."""
    arguments = ["--config", "mmdit_debug_mup.yaml", "--world-size", str(world), "--from-step", str(first)]
    arguments += ["--to-step", "24", *COMMON, *TEXT, "model.pos_embed_max_size=11", *settings]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["data_order.py", *arguments])
        data_order.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_data_order_shows_the_bucket_of_a_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = f"data.shards={folder}/shards/train-000000.tar"
    whole = order(capsys, 1, 0, shards)
    assert whole[5:] == order(capsys, 3, 5, shards)
    assert {(line["bucket"]["height"], line["bucket"]["width"]) for line in whole} == BUCKETS
    assert {line["bucket"]["text_length"] for line in whole} == {24, 48}


def test_data_order_of_several_sources_behind_a_web_server(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = order(capsys, 1, 0, *sources(folder / "shards"))
    assert {key.partition("-")[0] for line in whole for key in line["keys"]} == {"train", "more"}
    with serve(folder / "shards") as server:
        remote = (*sources(server.url), f"data.index_cache={folder}/index")
        for world, first in ((2, 0), (6, 13)):
            assert order(capsys, world, first, *remote) == whole[first:]
