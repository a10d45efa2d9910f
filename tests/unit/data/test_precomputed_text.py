"""Precomputed text of several encoders, and pooled vectors: the same as from the encoders beside the training."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.config import TextEncoderConfig
from data.encoders.autoencoder import Autoencoder, load_autoencoder
from data.encoders.joined import load_text_encoders
from data.errors import DataError
from data.index import ImageTextIndex
from data.precomputed_format import Dataset, empty_caption_of, npy, open_dataset
from data.precomputed_write import Precompute
from data.reader import ImageTextReader
from data.samples import SampleFiles
from data.storage import RetryPolicy, open_shards
from models.layers import ClassCondition, PooledTextCondition
from tests.helpers.language_models import save_sd3, sd3_overrides
from trainer.config.load import load_config
from trainer.config.resolve import buckets_of
from trainer.config.schema import TrainConfig
from trainer.input.encoding import Encoders
from trainer.parallel.mesh import World

from .test_encoders import vae_folder
from .test_precomputed import write_source

BATCH = 6
NOBODY: Any = None
ALONE = World(0, 1, torch.device("cpu"), NOBODY, NOBODY, NOBODY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders and shards of images, of which one has three captions and three are holes."""
    made = tmp_path_factory.mktemp("text")
    save_sd3(made / "sd3")
    vae_folder(made / "vae", scaling_factor=1.5, shift_factor=0.1)
    write_source(made / "source")
    return made


def config_of(folder: Path, *text: str) -> TrainConfig:
    vae = f"autoencoder={{path: {folder / 'vae'}, channels: 4, downsample: 2}}"
    return load_config(
        "mmdit_debug_mup",
        [f"data.shards={folder / 'source'}", "data.flip=0", "objective.repa_weight=0", vae, *text,
         "text_encoder.dropout=0.2"],
    )  # fmt: skip


def precompute(config: TrainConfig, source: ImageTextIndex, prefix: Path) -> ImageTextIndex:
    vae = load_autoencoder(config.autoencoder, "cpu", torch.float32)
    assert isinstance(vae, Autoencoder)
    text = load_text_encoders(config.text_encoder, "cpu", torch.float32)
    Precompute(source, config.data, vae, text, None, prefix, None, False, 8, "fp32").run(0, 1, lambda _: None)
    return ImageTextIndex(open_shards(str(prefix.parent)))


def encoder(folder: Path, number: str, pooled: int = 24, length: int = 20) -> str:
    name = f"text_encoder_{number}" if number else "text_encoder"
    sizes = "max_length: 24, width: 96" if number == "3" else f"max_length: {length}, width: 32, pooled_width: {pooled}"
    return f"path: {folder / 'sd3'}, subfolder: {name}, {sizes}"


def two(folder: Path, first: str, second: str, join: str, pooled: int = 24) -> list[str]:
    """Two encoders of save_sd3."""
    one, other = (encoder(folder, number, pooled) for number in (first, second))
    return [f"text_encoder={{{one}, more: [{{{other}, join: {join}}}]}}"]


# Text encoders: overrides, (tokens, features, pooled features, rows of a pooled vector).
WAYS: dict[str, tuple[Callable[[Path], list[str]], tuple[int, int, int, int]]] = {
    "three": (lambda folder: sd3_overrides(folder / "sd3"), (44, 96, 48, 1)),
    "padded": (lambda folder: sd3_overrides(folder / "sd3", ", pad: true"), (44, 96, 48, 1)),
    "pooled beside T5": (lambda folder: two(folder, "3", "", "none"), (24, 96, 24, 1)),
    "pooled wider than states": (lambda folder: two(folder, "", "2", "none"), (20, 32, 48, 2)),
    "states alone": (lambda folder: two(folder, "", "2", "tokens", pooled=0), (40, 32, 0, 0)),
    "buckets": (lambda folder: [f"text_encoder={{{encoder(folder, '', 24, 40)}}}", "data.text_lengths=[12, 40]"],
                (40, 32, 24, 1)),
}  # fmt: skip


def without_paths(text: TextEncoderConfig) -> TextEncoderConfig:
    more = tuple(replace(one, path="none") for one in text.more)
    return replace(text, path="none", more=more)


def batches(index: ImageTextIndex, config: TrainConfig) -> list[Batch]:
    buckets = dict.fromkeys(buckets_of(config), BATCH)
    reader = ImageTextReader(index, config.data, 3, BATCH, config.text_encoder.dropout, 0, 1, BATCH, None, buckets)
    return [batch for _, [batch] in islice(reader.batches(0), 20)]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_is_conditioned_as_by_the_encoders(way: str, folder: Path, tmp_path: Path) -> None:
    """But for bf16's rounding: also where the caption is dropped, or one of several, and in holes."""
    make, (length, width, pooled, rows) = WAYS[way]
    config = config_of(folder, *make(folder))
    source = ImageTextIndex(open_shards(str(folder / "source")))
    index = precompute(config, source, tmp_path / "out" / "train")
    dataset = index.dataset
    assert dataset is not None
    dataset.check(config.data, config.autoencoder, config.text_encoder, None)
    assert dataset.declared["layout"] == (2 if pooled else 1)
    assert dataset.declared["text_encoder"].get("pooled_width", 0) == pooled
    raw = SampleFiles(index, config.data, images_only=False).sample(0, 3)
    entry = json.loads(raw.member("caption"))
    assert len(entry["captions"]) == 3
    assert np.load(io.BytesIO(raw.member("text"))).shape == (sum(entry["tokens"]) + 3 * rows, width)

    bare = config.model_copy(update={"text_encoder": without_paths(config.text_encoder)})
    online, stored = Encoders(config, ALONE), Encoders(bare, ALONE, dataset=dataset)
    again = Encoders(config, ALONE, dataset=dataset)  # whose text encoders are compared with those of the set
    assert again.fingerprints()["text_encoder"] == online.fingerprints()["text_encoder"]
    seen, lengths, holes, differs = set(), set(), 0, False
    for ours in batches(index, bare):
        a, b = (
            encoders._condition(batch)
            for encoders, batch in ((stored, ours), (online, replace(ours, text_states=None, text_pooled=None)))
        )
        assert not isinstance(a, ClassCondition)
        assert not isinstance(b, ClassCondition)
        assert type(a) is type(b)
        assert torch.equal(a.mask, b.mask), "a hole has the empty caption too"
        torch.testing.assert_close(a.states.float(), b.states, rtol=2**-8, atol=1e-5)
        if isinstance(a, PooledTextCondition) and isinstance(b, PooledTextCondition):
            assert b.pooled.shape == (BATCH, pooled)
            torch.testing.assert_close(a.pooled.float(), b.pooled, rtol=2**-8, atol=1e-5)
            differs |= not torch.equal(b.pooled, b.pooled[:1].expand_as(b.pooled))
        seen |= {*ours.captions}
        holes += len(ours.holes)
        lengths.add(a.mask.shape[1])
    assert "" in seen
    assert holes > 3
    assert differs == bool(pooled)
    assert all(any(each.startswith(begin) for each in seen) for begin in ("first of", "a second"))
    assert lengths == ({12, 40} if way == "buckets" else {length})


def test_a_set_without_pooled_vectors_and_one_with(folder: Path, tmp_path: Path) -> None:
    """Neither serves a config of the other; what is damaged is found."""
    config = config_of(folder, *sd3_overrides(folder / "sd3"))
    source = ImageTextIndex(open_shards(str(folder / "source")))
    dataset = precompute(config, source, tmp_path / "out" / "train").dataset
    assert dataset is not None
    data, vae, text = config.data, config.autoencoder, config.text_encoder
    older = {**dataset.declared, "layout": 1, "text_encoder": {"fingerprint": "f", "width": 96, "max_length": 44}}
    with pytest.raises(DataError, match=r"pooled_width of all encoders together is 48, but .* with 0: set it to 0"):
        Dataset("here", older, "", dataset.empty_caption).check(data, vae, text, None)
    without = config_of(folder, *[each.replace(", pooled_width: 24", "") for each in sd3_overrides(folder / "sd3")])
    Dataset("here", older, "", dataset.empty_caption).check(data, vae, without.text_encoder, None)
    with pytest.raises(DataError, match=r"pooled_width of all encoders together is 0, but .* with 48: set it to 48"):
        dataset.check(data, vae, without.text_encoder, None)
    shorter = {**dataset.declared, "text_encoder": dataset.declared["text_encoder"] | {"max_length": 43}}
    with pytest.raises(DataError, match=r"max_length of all encoders together is 44, but here .* with 43"):
        Dataset("here", shorter, "", dataset.empty_caption).check(data, vae, text, None)
    said = json.loads((tmp_path / "out" / "dataset.json").read_text())
    for changed in ({**said, "layout": 1}, {**said, "text_encoder": said["text_encoder"] | {"pooled_width": -1}}):
        (tmp_path / "out" / "dataset.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=r"is no dataset\.json of layout 1 or 2"):
            open_dataset([tmp_path / "out" / "train-000000.tar"], RetryPolicy())
    cut = np.load(tmp_path / "out" / "empty_caption.npy")[-1:]  # the pooled vector alone, and no token
    with pytest.raises(ValueError, match=r"it holds uint16 \[1, 96\]"):
        empty_caption_of(npy(cut), said)
