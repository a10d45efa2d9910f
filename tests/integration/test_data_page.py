"""docs/data.md: its walks end in trained runs, and its settings load. benchmarks.walks has the other loaders' own."""

import json
from pathlib import Path

import pytest

from data.index import ImageTextIndex
from data.storage import open_shards
from tests.helpers import walks
from tests.helpers.paths import ROOT
from tests.helpers.servers import serve
from trainer.config.load import load_config


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, pairs = tmp_path_factory.mktemp("walked"), walks.pairs()
    (folder / "shards").mkdir()
    walks.photos(folder / "photos", pairs)
    walks.parquet(folder / "parquet", pairs)
    with serve(folder / "served") as server:
        walks.sa_1b(folder, folder / "served", server.url, pairs)
        tools = {"img2dataset": lambda _: walks.img2dataset_folder(folder / "web", pairs)}
        (folder / "said.json").write_text(json.dumps(walks.walk(folder, tools, {"streaming": "", "litdata": ""})))
    return folder


def test_every_run_of_the_page_is_trained(walked: Path) -> None:
    ended = {path.parent.name: json.loads(path.read_text()) for path in (walked / "runs").glob("*/status.json")}
    assert {name: (status["state"], status["step"]) for name, status in ended.items()} == {
        "NAME": ("finished", 3), "run_1": ("finished", 3), "run_2": ("finished", 3), "run_3": ("finished", 3),
        "NAME-more": ("finished", 6),
    }  # fmt: skip


def test_the_samples_are_those_of_the_downloads(walked: Path) -> None:
    wanted = {(pair.jpeg, pair.caption) for pair in walks.pairs()}
    index = ImageTextIndex(open_shards(str(walked / "shards" / "parquet-000000.tar")))
    assert len(index) == 16
    tar = (walked / "shards" / "parquet-000000.tar").read_bytes()
    assert all(jpeg in tar and caption.encode() in tar for jpeg, caption in wanted)
    assert sum(map(len, (ImageTextIndex([shard]) for shard in open_shards(str(walked / "data" / "sa1b"))))) == 16
    said = " ".join(json.loads((walked / "said.json").read_text()))
    assert "captions.jsonl: reaches 16 of 16 samples; of its 16 images 0 have no sample" in said
    assert "captions: 15 samples with, 0 without" in said, "of the web's, where one was not downloaded"
    assert "data.filter keeps 8 of 15 samples (left out: 7 with aesthetic below 5" in said, said[-3000:]
    assert said.count("unreadable: 0 of") == 3


def test_settings_of_the_data_page(tmp_path: Path) -> None:
    for block in walks.blocks():
        if block.language == "yaml":
            (tmp_path / "a.yaml").write_text(f"extends: {ROOT}/configs/mmdit_2b_mup.yaml\n{block.text}")
            load_config(str(tmp_path / "a.yaml"))
