"""Precomputed shards: the same bytes however they are made, the same batches as from images, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import json
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.compat import WebDataset

from data.batch import Batch
from data.config import FilterConfig
from data.debug import ensure_debug_assets
from data.encoders.autoencoder import Autoencoder, load_autoencoder
from data.encoders.dino import load_feature_encoder
from data.encoders.text import load_text_encoder
from data.errors import DataError
from data.index import ImageTextIndex
from data.precomputed_format import Dataset, check_images, check_same_kind, npy
from data.precomputed_write import Precompute, bytes_in_tar
from data.reader import ImageTextReader, validation_batches
from data.shard_index import load_index
from data.storage import open_shards
from models.layers import TextCondition
from tests.helpers.servers import serve
from trainer.build.engine import build_alignment, build_objective
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.input.encoding import Encoders
from trainer.parallel.mesh import World

from .test_encoders import vae_folder
from .test_index import write_tar

BATCH, SEED = 6, 3
BAD = {5: "image: unreadable", 11: "caption: missing", 23: "caption: weights do not fit"}


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def members(number: int) -> dict[str, bytes]:
    """One caption, or three of which the last is never taken; and the bad samples."""
    if number in (5, 11, 23):
        return [
            {"png": b"no image", "txt": b"x"}, {"png": picture(number)},
            {"png": picture(number), "json": b'{"captions": ["a", "b"], "weights": [1]}'},
        ][[5, 11, 23].index(number)]  # fmt: skip
    if number % 3:
        return {"png": picture(number), "txt": f"caption {number}".encode(), "cls": str(number % 4).encode()}
    texts = [f"first of {number}", f"a second, longer caption of {number}", "never"]
    return {"png": picture(number), "json": json.dumps({"captions": texts, "weights": [1, 3, 0]}).encode()}


def write_source(folder: Path) -> list[Path]:
    folder.mkdir()
    return [
        write_tar(
            folder / f"s{shard}.tar",
            {f"{i:03d}.{ext}": data for i in numbers for ext, data in members(i).items()},
        )
        for shard, numbers in enumerate((range(20), range(20, 32)))
    ]


@dataclasses.dataclass
class Made:
    config: TrainConfig
    source: ImageTextIndex
    task: Precompute
    index: ImageTextIndex


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("precompute")
    assets = ensure_debug_assets(folder / "debug")
    vae = vae_folder(folder / "vae", scaling_factor=1.5, shift_factor=0.1)
    config = load_config(
        "mmdit_debug_mup",
        [
            f"data.shards={folder / 'source'}", f"text_encoder.path={assets}/t5", "data.flip=0.5",
            f"autoencoder={{path: {vae}, channels: 4, downsample: 2}}",
            f"train.seed={SEED}", "text_encoder.dropout=0.2",
            f"objective.repa_encoder={assets}/dinov2", "objective.repa_weight=0.5", "objective.repa_layer=1",
            "objective.repa_width=32", "objective.repa_hidden=48",
        ],
    )  # fmt: skip
    source = ImageTextIndex(write_source(folder / "source"))
    task = precompute(config, source, folder / "out" / "train")
    holes = task.run(0, 1, lambda _: None)
    assert holes == dict.fromkeys(BAD.values(), 1)
    return Made(config, source, task, ImageTextIndex(open_shards(str(folder / "out"))))


def precompute(config: TrainConfig, index: ImageTextIndex, prefix: Path, **options: Any) -> Precompute:
    vae = load_autoencoder(config.autoencoder, "cpu", torch.float32)
    assert isinstance(vae, Autoencoder)
    text = load_text_encoder(config.text_encoder, "cpu", torch.float32)
    features = load_feature_encoder(config.objective.repa_encoder, 32, "cpu", torch.float32)
    task = Precompute(index, config.data, vae, text, None, prefix, None, True, 8, "fp32", features, 4)
    return dataclasses.replace(task, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def batches(index: ImageTextIndex, config: TrainConfig, steps: int = 20) -> list[Batch]:
    part = (config.text_encoder.dropout, 0, 1, BATCH)
    reader = ImageTextReader(index, config.data, SEED, BATCH, *part, features=True)
    return [batch for _, [batch] in islice(reader.batches(0), steps)]


@pytest.mark.slow
def test_a_store_that_fails_makes_no_holes(made: Made, tmp_path: Path) -> None:
    """What is stored as a hole stays one: the command ends, and goes on when the shard can be read again."""
    source = ImageTextIndex(write_source(tmp_path / "source"))
    task = dataclasses.replace(made.task, index=source, prefix=tmp_path / "out" / "train")
    second = (tmp_path / "source" / "s1.tar").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"s1\.tar.*: sample .*: store: cannot be opened: make it readable"):
        task.run(0, 1, lambda _: None)
    assert not (tmp_path / "out" / "train-000001.tar").exists()
    second.rename(tmp_path / "source" / "s1.tar")
    task.run(0, 1, lambda _: None)
    shards = [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert shards == [path.read_bytes() for path in sorted(made.task.prefix.parent.glob("*.tar"))]


@pytest.mark.slow
def test_too_many_holes_end_it_and_what_is_filtered_out_is_none(made: Made, tmp_path: Path) -> None:
    """3 of 32 samples are unreadable, one of them for want of a caption; a restart counts the shards that are there."""
    task = dataclasses.replace(made.task, prefix=tmp_path / "out" / "train")
    most = dataclasses.replace(made.task.data, max_bad_share=0.0)
    with pytest.raises(DataError, match=r"1 of the 6 samples read are unreadable \(16\.67%\), more than data\.max_bad"):
        dataclasses.replace(task, data=most).run(0, 1, lambda _: None)
    assert not list((tmp_path / "out").glob("*.tar"))
    task.run(0, 1, lambda _: None)
    (tmp_path / "out" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"2 of the 21 samples .*in the last shard none"):
        dataclasses.replace(task, data=most).run(0, 1, lambda _: None)

    keep = FilterConfig(has_caption=True)
    index = ImageTextIndex(made.source.paths, keep=keep)
    data = dataclasses.replace(made.task.data, filter=keep)
    kept = dataclasses.replace(task, index=index, data=data, prefix=tmp_path / "kept" / "train")
    assert kept.run(0, 1, lambda _: None) == {reason: 1 for reason in BAD.values() if reason != "caption: missing"}
    assert kept.declared()["filters"]["filter"]["has_caption"] is True
    assert len(ImageTextIndex(open_shards(str(tmp_path / "kept")))) == 31


@pytest.mark.slow
def test_a_set_that_was_begun_when_images_were_read_otherwise_is_not_gone_on_with(made: Made, tmp_path: Path) -> None:
    task = dataclasses.replace(made.task, prefix=tmp_path / "out" / "train", per_shard=7)
    task.run(0, 2, lambda _: None)
    index = copy.copy(made.task.index)
    index.image_rules = "2"
    with pytest.raises(DataError, match=r"source"):
        dataclasses.replace(task, index=index).run(0, 1, lambda _: None)
    task.run(0, 1, lambda _: None)


@pytest.mark.slow
def test_bytes_do_not_depend_on_processes_and_stops(made: Made, tmp_path: Path) -> None:
    task = dataclasses.replace(made.task, prefix=tmp_path / "one" / "train", per_shard=7)
    task.run(0, 1, lambda _: None)
    whole = contents(tmp_path / "one")
    assert sum(name.endswith(".tar") for name in whole) == 5
    assert set(whole) == {f"train-{i:06d}.tar{end}" for i in range(5) for end in ("", ".index.parquet")} | {
        "dataset.json", "empty_caption.npy", ".lock",
    }  # fmt: skip
    split = dataclasses.replace(task, prefix=tmp_path / "split" / "train")
    split.run(2, 3, lambda _: None)
    assert not (tmp_path / "split" / "dataset.json").exists()
    with pytest.raises(DataError, match=r"dataset\.json cannot be read: finish launch/precompute\.py"):
        ImageTextIndex(open_shards(str(tmp_path / "split")))
    left = tmp_path / "split" / ".train-000000.tar.tmp"  # of a process that was killed
    left.write_bytes(b"half a shard")
    for name in ("train-000001.tar.index.parquet", "dataset.json", ".precompute.json"):
        (tmp_path / "split" / f".{name}.a1b2.tmp").write_bytes(b"half a file")
    (tmp_path / "split" / "train-000002.tar.index.parquet").unlink()
    for rank in (1, 0):
        split.run(rank, 2, lambda _: None)
    assert contents(tmp_path / "split") == whole
    rows = ImageTextIndex(open_shards(str(tmp_path / "one")))
    names = [rows.name(*rows.locate(row)) for row in range(len(rows))]
    assert [name.partition("/")[2] for name in names] == [f"s{i // 20}/{i:03d}" for i in range(32)], "each once"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_it(made: Made) -> None:
    decoded: Any = WebDataset([str(path) for path in made.index.paths], shardshuffle=False).decode()
    read = list(decoded)
    assert [sample["__key__"] for sample in read] == [f"{i:03d}" for i in range(32)]
    sample, hole = read[3], read[5]
    assert sample["latents.npy"].shape == (2, 2, 4, 16, 16)
    assert sample["latents.npy"].dtype == np.float16
    assert sample["features.npy"].shape == (2, 16, 32)
    assert sample["features.npy"].dtype == np.float16
    entry = sample["json"]
    assert entry["captions"] == ["first of 3", "a second, longer caption of 3", "never"]
    assert (entry["weights"], entry["width"], entry["height"]) == ([1, 3, 0], 32, 32)
    assert sample["text.npy"].shape == (sum(entry["tokens"]), 64)
    assert entry["tokens"] == [len(text) + 1 for text in entry["captions"]]
    assert bytes(hole["hole"]).decode() == BAD[5]
    assert read[4]["cls"] == 0
    assert made.index.width[3] == 32
    assert made.index.caption_length[3] == len("a second, longer caption of 3")
    gc.collect()


def test_features_take_the_bytes_that_a_dry_run_counts(made: Made) -> None:
    bare = dataclasses.replace(made.task, feature_encoder=None)
    [more], [less] = ([bytes_in_tar(x) for x in task.encoded([(0, range(1))])] for task in (made.task, bare))
    assert more - less == 512 + -(-(128 + 2 * 16 * 32 * 2) // 512) * 512


def test_a_sample_is_one_range_of_bytes(made: Made) -> None:
    with tarfile.open(str(made.index.paths[0])) as tar:
        keys = [member.name.partition(".")[0] for member in tar]
    assert keys == sorted(keys)


@pytest.mark.slow
def test_batches_are_those_of_the_images(made: Made) -> None:
    """Everything but rounding: fp16 has 11 bits, bf16 8."""
    nobody: Any = None
    world = World(0, 1, torch.device("cpu"), nobody, nobody, nobody)
    online = Encoders(made.config, world, align=True)
    bare = made.config.model_copy(
        update={
            "objective": made.config.objective.model_copy(update={"repa_encoder": "none"}),
            "autoencoder": dataclasses.replace(made.config.autoencoder, path="none"),
            "text_encoder": dataclasses.replace(made.config.text_encoder, path="none"),
        }
    )
    stored = Encoders(bare, world, dataset=made.index.dataset, align=True)
    assert stored.without_images == "autoencoder.path and text_encoder.path are needed for them"
    assert Encoders(made.config, world, dataset=made.index.dataset, align=True).without_images is None
    for part, fingerprint in online.fingerprints().items():
        if part.endswith("_weights"):  # of the encoders that are loaded, and here none is
            continue
        assert stored.fingerprints()[part] == fingerprint
    objective = build_objective(made.config, resolve(made.config, 1))
    kept, made_now = build_alignment(bare, stored), build_alignment(bare, online)
    assert kept is not None
    assert made_now is not None
    projected = torch.randn(BATCH, 16, 32, generator=torch.Generator().manual_seed(0))
    chosen, dropped, holes = set(), 0, 0
    for ours, theirs in zip(batches(made.index, bare), batches(made.source, made.config), strict=True):
        assert [name[-3:] for name in ours.names] == [name[-3:] for name in theirs.names]
        assert (ours.captions, ours.full_captions, ours.holes) == (theirs.captions, theirs.full_captions, theirs.holes)
        assert torch.equal(ours.weight, theirs.weight)
        real = ours.weight > 0
        assert torch.equal(ours.labels[real], theirs.labels[real])
        a, b = stored.encode(ours), online.encode(theirs)
        assert torch.allclose(a.x0[real], b.x0[real], rtol=1e-3, atol=2e-3)
        assert isinstance(a.condition, TextCondition)
        assert isinstance(b.condition, TextCondition)
        assert torch.equal(a.condition.mask, b.condition.mask)
        assert torch.allclose(a.condition.states.float()[real], b.condition.states[real], rtol=2**-8, atol=1e-6)
        assert a.condition.mask.any(1).all(), "attention needs a token, also in a hole"
        assert torch.equal(a.text_tokens, b.text_tokens)
        draws = [objective.draw(x.x0, x.keys) for x in (a, b)]
        losses = [objective.loss(torch.zeros_like(x.x0), draw) for x, draw in zip((a, b), draws, strict=True)]
        assert torch.allclose(losses[0][real], losses[1][real], rtol=1e-3)
        assert ours.features is not None
        moved = dataclasses.replace(ours, features=ours.features.roll(1, 1))
        repa = [
            align.losses(projected, align.features(x))[real]
            for align, x in ((kept, ours), (made_now, theirs), (kept, moved))
        ]
        assert torch.allclose(repa[0], repa[1], atol=1e-4)
        assert not torch.allclose(repa[2], repa[1], atol=1e-3), "it would see features at other tokens"
        chosen |= set(ours.full_captions)
        dropped += sum(
            not caption and bool(full) for caption, full in zip(ours.captions, ours.full_captions, strict=True)
        )
        holes += len(ours.holes)
    assert {"first of 3", "a second, longer caption of 3"} <= chosen
    assert "never" not in chosen
    assert dropped > 5
    assert holes > 5
    first = [next(validation_batches(index, bare.data, 9, 0, 1, 9)) for index in (made.index, made.source)]
    assert first[0].full_captions == first[1].full_captions


def test_draws_do_not_depend_on_workers_or_world(made: Made) -> None:
    def rows(workers: int, world: int) -> list[tuple[object, ...]]:
        data = dataclasses.replace(made.config.data, num_workers=workers)
        parts = [(0.2, rank, world, 2) for rank in range(world)]
        readers = [ImageTextReader(made.index, data, SEED, BATCH, *part, features=True) for part in parts]
        found = []
        for step in islice(zip(*(reader.batches(4) for reader in readers), strict=True), 4):
            for batch in (batch for _, parts in step for batch in parts):
                assert batch.latents is not None
                assert batch.text_states is not None
                assert batch.features is not None
                for i in np.flatnonzero([bool(name) for name in batch.names]):
                    state = batch.text_states[i].float().numpy().tobytes()
                    images = batch.latents[i].numpy().tobytes() + batch.features[i].numpy().tobytes()
                    found.append((batch.names[i], images, state, batch.captions[i]))
        return found

    whole = rows(0, 1)
    assert len(whole) == 4 * BATCH
    assert rows(2, 1) == whole
    assert rows(0, 4) == whole


@pytest.mark.slow
def test_reading_behind_a_url(made: Made, tmp_path: Path) -> None:
    folder = made.task.prefix.parent
    with serve(lambda name: folder / name) as server:
        index = ImageTextIndex(open_shards(f"{server.url}/train-{{000000..000001}}.tar"), tmp_path)
        assert index.dataset is not None
        assert made.index.dataset is not None
        assert index.dataset.digest == made.index.dataset.digest
        for ours, local in zip(batches(index, made.config, 3), batches(made.index, made.config, 3), strict=True):
            assert ours.holes == local.holes
            for name in ("latents", "logvar", "text_states", "text_mask", "features"):
                assert torch.equal(getattr(ours, name), getattr(local, name))


def damaged(made: Made, tmp_path: Path, kind: str, offset: int = 0) -> list[Batch]:
    """Batches from a copy whose first shard ends inside a member of its last sample."""
    shutil.copytree(made.task.prefix.parent, tmp_path / "copy")
    index = ImageTextIndex(open_shards(str(tmp_path / "copy")))
    with open(str(index.paths[0]), "r+b") as file:
        file.truncate(int(getattr(index, f"{kind}_offset")[19]) + int(getattr(index, f"{kind}_size")[19]) - 5)
    return batches(index, made.config)


@pytest.mark.parametrize("kind", ["features", "image", "text"])
def test_a_cut_shard_gives_clean_holes(made: Made, tmp_path: Path, kind: str) -> None:
    cut = [batch for batch in damaged(made, tmp_path, kind) if "shard: short read" in batch.holes]
    assert cut
    for batch in cut:
        empty = batch.weight == 0
        assert batch.latents is not None
        assert batch.logvar is not None
        assert batch.text_mask is not None
        assert batch.text_states is not None
        assert (batch.latents[empty] == 0).all()
        assert (batch.logvar[empty] == 0).all()
        assert batch.features is not None
        assert (batch.features[empty] == 0).all()
        assert (batch.text_mask[empty].sum(1) == 1).all()
        assert (batch.text_states[~batch.text_mask] == 0).all()


def test_refusals(made: Made, tmp_path: Path) -> None:
    dataset, c = made.index.dataset, made.config
    assert dataset is not None
    replace = dataclasses.replace
    for match, data, vae, text in (
        (
            "data.resolution is 64, .* precomputed with 32",
            replace(c.data, resolution=64),
            c.autoencoder,
            c.text_encoder,
        ),
        ("autoencoder.channels is 16, .* 4", c.data, replace(c.autoencoder, channels=16), c.text_encoder),
        ("text_encoder.max_length is 99, .* 48", c.data, c.autoencoder, replace(c.text_encoder, max_length=99)),
    ):
        with pytest.raises(DataError, match=match):
            dataset.check(data, vae, text, None)
    dataset.check(c.data, c.autoencoder, c.text_encoder, None)
    without = Dataset("set", dataset.declared | {"flips": False}, "", dataset.empty_caption)
    with pytest.raises(DataError, match=r"data\.flip is 0\.5, but set holds no latents of flipped images"):
        without.check(c.data, c.autoencoder, c.text_encoder, None)
    with pytest.raises(
        DataError, match=r"autoencoder\.path holds an encoder with fingerprint aaaa, but .* precomputed"
    ):
        dataset.check_encoder("autoencoder", "aaaa")
    with pytest.raises(DataError, match="of classes and holds no text"):
        Dataset("set", dataset.declared, "", None).check(c.data, c.autoencoder, c.text_encoder, None)
    with pytest.raises(DataError, match=r"data\.val_shards holds images and data\.shards precomputed samples"):
        check_same_kind(dataset, None)
    dataset.check_features(4, 32)
    with pytest.raises(DataError, match=r"objective\.repa_width: 768, but .* features for 32"):
        dataset.check_features(4, 768)
    with pytest.raises(DataError, match=r"by data\.resolution and model\.patch_size\): 8, but .* features for 4"):
        dataset.check_features(8, 32)
    with pytest.raises(DataError, match=r"objective\.repa_encoder holds an encoder with fingerprint bbbb, but"):
        dataset.check_encoder("repa_encoder", "bbbb")
    older = {key: said for key, said in dataset.declared.items() if key != "repa_encoder"}
    with pytest.raises(DataError, match="set was precomputed without: set it to 0, or precompute with --repa-features"):
        Dataset("set", older, "", dataset.empty_caption).check_features(4, 32)
    without_encoder = replace(c.text_encoder, path="none"), replace(c.autoencoder, path="none")
    with pytest.raises(DataError, match=r"text_encoder\.path is none: it is needed to encode captions"):
        check_images(c.autoencoder, without_encoder[0], None)
    with pytest.raises(DataError, match=r"autoencoder\.path is none: it is needed to turn images into latents"):
        check_images(without_encoder[1], c.text_encoder, None)
    with pytest.raises(DataError, match="holds precomputed latents and shard s1 images"):
        ImageTextIndex([*made.index.paths, made.source.paths[1]])
    with pytest.raises(DataError, match=r"dataset\.json: the set there has flips True, this one False"):
        replace(made.task, flips=False).run(0, 1, lambda _: None)
    with pytest.raises(DataError, match="needs a folder of its own"):
        replace(made.task, prefix=Path(str(made.source.paths[0])).with_name("train")).run(0, 1, lambda _: None)
    shutil.copytree(made.task.prefix.parent, tmp_path / "copy")
    (tmp_path / "copy" / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match=r"is no dataset\.json of layout 1"):
        ImageTextIndex(open_shards(str(tmp_path / "copy")))


@pytest.mark.slow
def test_another_encoder_is_refused_and_sets_that_differ(made: Made, tmp_path: Path) -> None:
    other = vae_folder(tmp_path / "vae", scaling_factor=1.6, shift_factor=0.1)
    vae = dataclasses.replace(made.config.autoencoder, path=str(other))
    nobody: Any = None
    world = World(0, 1, torch.device("cpu"), nobody, nobody, nobody)
    with pytest.raises(DataError, match=r"autoencoder\.path holds an encoder with fingerprint"):
        Encoders(made.config.model_copy(update={"autoencoder": vae}), world, dataset=made.index.dataset)
    task = precompute(made.config.model_copy(update={"autoencoder": vae}), made.source, tmp_path / "other" / "train")
    task.run(0, 1, lambda _: None)
    with pytest.raises(DataError, match=r"different values of autoencoder: .*1\.5.*1\.6"):
        ImageTextIndex(open_shards(f"{made.task.prefix.parent},{tmp_path / 'other'}"))


def test_classes_need_no_text(made: Made, tmp_path: Path) -> None:
    task = dataclasses.replace(
        made.task, text_encoder=None, classes=4, prefix=tmp_path / "out" / "train", flips=False, per_shard=10,
        data=dataclasses.replace(made.task.data, max_bad_share=1.0),
    )  # fmt: skip
    holes = task.run(0, 1, lambda _: None)
    assert holes["label: missing"] == 14  # those with several captions, and the bad ones
    index = ImageTextIndex(open_shards(str(tmp_path / "out")))
    assert not (tmp_path / "out" / "empty_caption.npy").exists()
    data = dataclasses.replace(made.config.data, flip=0.0, label_dropout=0.0)
    ours = [next(ImageTextReader(i, data, SEED, 32, 0.0, 0, 1, 32, 4).batches(0))[1][0] for i in (index, made.source)]
    assert ours[0].text_states is None
    assert sorted(ours[0].holes) == sorted(ours[1].holes)
    label_of = [{name[-3:]: label for name, label in zip(b.names, b.labels.tolist(), strict=True)} for b in ours]
    assert label_of[0] == label_of[1]


def test_the_index_of_a_precomputed_shard_is_rebuilt_alike(made: Made) -> None:
    path = made.index.paths[1]
    assert load_index(path, rebuild=True).table.equals(load_index(path).table)


def test_damage_of_what_lies_beside_the_shards_is_named(made: Made, tmp_path: Path) -> None:
    """An empty caption without tokens would train every dropped caption on nothing. Precompute makes it anew."""
    folder = tmp_path / "copy"
    shutil.copytree(made.task.prefix.parent, folder)
    genuine, said = (folder / "empty_caption.npy").read_bytes(), (folder / "dataset.json").read_text()
    flipped = bytearray(genuine)
    flipped[-1] ^= 64

    def opened() -> Dataset | None:
        return ImageTextIndex(open_shards(str(folder))).dataset

    array = np.load(io.BytesIO(genuine))
    for content in (b"", genuine[:128], genuine[:-1], bytes(flipped), npy(array[:0]), npy(array.repeat(99, 0))):
        (folder / "empty_caption.npy").write_bytes(content)
        with pytest.raises(
            DataError, match=r"empty_caption\.npy is missing or damaged .*run launch/precompute\.py again"
        ):
            opened()
    for content in (genuine[:128], bytes(flipped)):
        (folder / "empty_caption.npy").write_bytes(content)
        dataclasses.replace(made.task, prefix=folder / "train").run(0, 1, lambda _: None)
        assert (folder / "empty_caption.npy").read_bytes() == genuine
    for content, match in (
        (said.replace('"precision": "fp32"', '"precision": "bf16"'), "is damaged: it does not have its digest"),
        (said.replace('"width": 64', '"width": "64"'), "is no dataset.json"),
        (said.replace('"resolution": 32', '"resolution": -32'), "is no dataset.json"),
        ("[" * 100_000, "is no dataset.json"),
        (said + " " * (1 << 20), "cannot be read"),
    ):
        assert content != said
        (folder / "dataset.json").write_text(content)
        with pytest.raises(DataError, match=match):
            opened()
    older = {key: value for key, value in json.loads(said).items() if key not in ("digest", "empty_caption_sha256")}
    (folder / "dataset.json").write_text(json.dumps(older))
    assert made.index.dataset is not None
    dataset = opened()
    assert dataset is not None
    assert dataset.digest == made.index.dataset.digest, "the identity that checkpoints have stored"
