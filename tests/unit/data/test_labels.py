"""Class labels from the shard to the model, and the keys of objective and sampler that go with them."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import AutoencoderConfig, DataConfig, TextEncoderConfig
from data.debug import CLASSES as DEBUG_CLASSES
from data.debug import ensure_debug_assets
from data.errors import DataError
from data.index import ImageTextIndex
from data.reader import ImageTextReader, validation_batches
from data.shard_index import ABSENT, UNREADABLE, label_from_bytes
from data.storage import open_shards
from data.synthetic import SyntheticReader
from data.write_shards import write_shards
from examples import archives, cifar_data
from models.layers import ClassCondition
from trainer.build.engine import build_objective, build_sampler
from trainer.config.keys import plain
from trainer.config.load import parse
from trainer.config.resolve import resolve
from trainer.config.resume import check_resume
from trainer.config.schema import TrainConfig
from trainer.diffusion.ddpm import DDPM
from trainer.diffusion.ddpm_sampling import DDPMSampler
from trainer.diffusion.sampling import Euler
from trainer.errors import ConfigError
from trainer.input.encoding import Encoders
from trainer.parallel.mesh import World

from .test_index import png, write_tar

CLASSES = 5
CFG = DataConfig(shards="unused", resolution=8, num_workers=0, label_dropout=0.3)


# ------------------------------------------------------------------------------------------------- shards and readers
@pytest.mark.parametrize(
    ("data", "label"),
    [
        (b"3", 3), (b"0", 0), (b" 12\n", 12), (b"007", 7), (b"2147483647", 2**31 - 1), (b"2147483648", UNREADABLE),
        (b"", UNREADABLE), (b"-1", UNREADABLE), (b"cat", UNREADABLE), (b"3.0", UNREADABLE), (b"9" * 5000, UNREADABLE),
        ("٣".encode(), UNREADABLE), (b"\xff", UNREADABLE),
    ],
)  # fmt: skip
def test_label_of_a_member(data: bytes, label: int) -> None:
    assert label_from_bytes(data) == label


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageTextIndex:
    samples = [(f"{i:03d}", png(), "png", f"caption {i}", i % CLASSES) for i in range(40)]
    return ImageTextIndex(write_shards(samples, tmp_path_factory.mktemp("labels") / "train", 30))


def test_index_holds_labels(index: ImageTextIndex, tmp_path: Path) -> None:
    assert index.label.tolist() == [i % CLASSES for i in range(40)]
    same = [(f"{i:03d}", png(), "png", f"caption {i}", (i + 1) % CLASSES) for i in range(40)]
    other = ImageTextIndex(write_shards(same, tmp_path / "train", 30))
    assert other.fingerprint != index.fingerprint, "labels are part of what the data are"
    plain_shard = ImageTextIndex(write_shards([sample[:4] for sample in same], tmp_path / "plain" / "train", 30))
    assert set(plain_shard.label.tolist()) == {ABSENT}


def labels_of(index: ImageTextIndex, classes: int | None, steps: int = 20, **world: int) -> list[tuple[str, int]]:
    rank, size, micro = world.get("rank", 0), world.get("size", 1), world.get("micro", 8)
    reader = ImageTextReader(index, CFG, 5, 8, 0.0, rank, size, micro, classes)
    found = []
    for _, batches in islice(reader.batches(0), steps):
        for b in batches:
            assert b.labels.dtype == torch.int64
            found += [(n, label) for n, label in zip(b.names, b.labels.tolist(), strict=True) if n]
    return found


def test_labels_of_batches(index: ImageTextIndex) -> None:
    rows = labels_of(index, CLASSES, steps=60)
    own = [label == int(name[-3:]) % CLASSES for name, label in rows]
    assert all(label == CLASSES for (_, label), is_own in zip(rows, own, strict=True) if not is_own)
    assert abs(1 - np.mean(own) - 0.3) < 4 * (0.3 * 0.7 / len(rows)) ** 0.5
    per_name: dict[str, set[bool]] = {}
    for (name, _), is_own in zip(rows, own, strict=True):
        per_name.setdefault(name, set()).add(is_own)
    assert any(len(seen) == 2 for seen in per_name.values()), "dropped by position, not by sample"


def test_dropout_depends_on_the_key_alone(index: ImageTextIndex) -> None:
    whole = labels_of(index, CLASSES)
    parts = [labels_of(index, CLASSES, rank=r, size=2, micro=3) for r in range(2)]
    dealt = [step[4 * i : 4 * i + 4] for i in range(20) for step in parts]
    assert [row for part in dealt for row in part] == whole


def test_labels_beside_captions(index: ImageTextIndex) -> None:
    """A model of captions has the labels as they are; one of labels reads no captions."""
    assert all(label == int(name[-3:]) % CLASSES for name, label in labels_of(index, None))
    [text] = validation_batches(index, CFG, 10, 0, 1, 10)
    assert all(text.full_captions)
    [batch] = validation_batches(index, CFG, 10, 0, 1, 12, CLASSES)
    assert batch.labels[:10].tolist() == [int(name[-3:]) % CLASSES for name in batch.names[:10]], "none is dropped"
    assert batch.labels[10:].tolist() == [ABSENT] * 2
    assert set(batch.captions) == {""}


def test_bad_labels_are_holes(tmp_path: Path) -> None:
    good = {"a.png": png(), "a.cls": b"4", "b.png": png(), "b.txt": b"no label", "c.png": png(), "c.cls": b"cat"}
    path = write_tar(tmp_path / "t.tar", good | {"d.png": png(), "d.cls": b"5", "e.cls": b"1"})
    index = ImageTextIndex([path])
    [batch] = validation_batches(index, CFG, 5, 0, 1, 5, CLASSES)
    rows = dict(zip(batch.names, zip(batch.labels.tolist(), batch.weight.tolist(), strict=True), strict=True))
    assert rows == {"t/a": (4, 1.0), **dict.fromkeys(("t/b", "t/c", "t/d", "t/e"), (ABSENT, 0.0))}
    assert sorted(batch.holes) == [
        "image: missing", "label: missing", "label: not a number", "label: not below model.num_classes 5",
    ]  # fmt: skip
    [batch] = validation_batches(index, CFG, 5, 0, 1, 5)
    assert batch.weight.sum() == 1, "only b has a caption"


def test_synthetic_labels() -> None:
    parts = (DataConfig(resolution=8), TextEncoderConfig(), AutoencoderConfig(channels=4, downsample=1))

    def collect(size: int) -> list[int]:
        ranks = [list(islice(SyntheticReader(*parts, 1, 8, r, size, 8, CLASSES).batches(0), 30)) for r in range(size)]
        rows = []
        for step in zip(*ranks, strict=True):
            for _, [batch] in step:
                assert batch.text_states is None
                rows += batch.labels[batch.weight > 0].tolist()
        return rows

    whole = collect(1)
    assert len(whole) == 240
    assert set(whole) == {*range(CLASSES), CLASSES}
    assert 0.02 < np.mean(np.array(whole) == CLASSES) < 0.2
    assert collect(3) == whole


@pytest.mark.slow
def test_debug_data_have_labels(tmp_path: Path) -> None:
    folder = ensure_debug_assets(tmp_path / "debug")
    index = ImageTextIndex(open_shards(str(folder)))
    assert set(index.label.tolist()) == set(range(DEBUG_CLASSES))
    [batch] = validation_batches(index, DataConfig(shards="x", resolution=32), 60, 0, 1, 60)
    named = {int(label): caption.split(" on ")[0] for label, caption in zip(batch.labels, batch.captions, strict=True)}
    assert len(set(named.values())) == len(named)
    next(folder.glob("version-*")).unlink()  # as older code left it, without labels
    (folder / "junk").touch()
    ensure_debug_assets(folder)
    assert not (folder / "junk").exists()


# --------------------------------------------------------------------------------------------------- config and build
def config(**sections: object) -> TrainConfig:
    """A small DiT on class labels of pixels."""
    base: dict[str, object] = {
        "model": {"kind": "dit", "width": 32, "depth": 1, "head_dim": 16, "patch_size": 4, "num_classes": CLASSES},
        "mup": {"base_width": 32},
        "objective": {"kind": "ddpm"},
        "data": {"shards": "x.tar", "resolution": 8},
        "autoencoder": {"channels": 3, "downsample": 1},
    }
    return parse(base | sections, "test")


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"objective": {}}, "model.learn_sigma needs objective.kind ddpm"),
        (
            {"sample": {"sampler": "euler"}},
            "sampler euler does not fit objective.kind ddpm: use ancestral, ddim, dpm_solver or",
        ),
        (
            {"objective": {}, "sample": {"sampler": "ddim"}},
            "ddim does not fit objective.kind rectified_flow: use",
        ),
        ({"sample": {"sampler": "ancestral", "steps": 1001}}, "sample.steps 1001 is more than the 1000"),
        ({"sample": {"steps": 1000}}, "sample.steps 1000 is more than the 999 of sample.sampler dpm_solver"),
        ({"sample": {"sampler": "ddim", "steps": 30}}, "sample.steps 30 must divide 1000"),
        ({"sample": {"guidance_channels": 4}}, "sample.guidance_channels 4 is more than autoencoder.channels 3"),
        ({"sample": {"guidance_channels": 0}}, "sample.guidance_channels"),
        ({"sample": {"prompts": ["4", "5", "cat"]}}, "numbers from 0 to 4, got ['5', 'cat']"),
        ({"objective": {"kind": "ddpm", "beta_schedule": "cosine"}}, "objective.beta_schedule"),
        ({"data": {"shards": "x.tar", "resolution": 8, "label_dropout": 1.5}}, "data.label_dropout must be between 0"),
    ],
)
def test_conflicts(sections: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**sections)
    assert problem in str(error.value)


def test_built_as_configured() -> None:
    """text_encoder.path stays "none": classes need no text."""
    c = config(objective={"kind": "ddpm", "beta_schedule": "scaled_linear"}, sample={"prompts": ["4"]})
    resolved = resolve(c, 1)
    assert c.label_classes == CLASSES
    assert build_objective(c, resolved) == DDPM("scaled_linear", learned_sigma=True)
    assert build_sampler(c, resolved) == DDPMSampler(DDPM("scaled_linear", True), "dpm_solver", 50)
    c = config(sample={"sampler": "ancestral", "steps": 250})
    assert build_sampler(c, resolved) == DDPMSampler(DDPM("linear", True), "ancestral", 250)
    flow = TrainConfig()
    assert flow.label_classes is None
    assert build_sampler(flow, resolve(flow, 1)) == Euler(50, resolve(flow, 1).time_shift)


def test_keys_that_are_newer_than_a_checkpoint() -> None:
    old = plain(TrainConfig())
    del old["objective"]["beta_schedule"], old["data"]["label_dropout"], old["sample"]["sampler"]
    assert check_resume(old, TrainConfig(), 4) == []
    changed = TrainConfig.model_validate({"objective": {"beta_schedule": "scaled_linear"}})
    with pytest.raises(ConfigError, match="beta_schedule: linear in the checkpoint, scaled_linear now"):
        check_resume(old, changed, 4)


def test_conditions(index: ImageTextIndex) -> None:
    nobody: Any = None  # no process group is needed to encode
    encoders = Encoders(config(), World(0, 1, torch.device("cpu"), nobody, nobody, nobody))
    [batch] = validation_batches(index, CFG, 3, 0, 1, 5, CLASSES)
    encoded = encoders.encode(batch)
    assert isinstance(encoded.condition, ClassCondition)
    assert encoded.condition.labels.tolist() == [*batch.labels[:3].tolist(), CLASSES, CLASSES], "a label for any row"
    assert float(encoded.text_tokens) == 0
    assert "text_encoder" not in encoders.fingerprints()
    prompts = encoders.encode_prompts(["3", "", "0"])
    assert isinstance(prompts, ClassCondition)
    assert prompts.labels.tolist() == [3, CLASSES, 0]
    for bad in ("5", "cat", "-1"):
        with pytest.raises(DataError, match=f'prompt "{bad}": the model knows classes, give a number below 5'):
            encoders.encode_prompts([bad])


# ------------------------------------------------------------------------------------------------------------ CIFAR-10
def test_cifar_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From an archive of the published layout, with four photographs a file."""
    rng = np.random.default_rng(0)
    sheets = {
        name: rng.integers(0, 256, (4, 1024, 3), np.uint8) for files, _ in cifar_data.SPLITS.values() for name in files
    }
    train = [i % 10 for i in range(20)]
    members = {"train_lables.json": json.dumps(train).encode(), "test_lables.json": b"[9, 0, 3, 1]"}
    for name, pixels in sheets.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        members[name] = buffer.getvalue()
    archive = tmp_path / cifar_data.ARCHIVE.file_name
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    output = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["cifar_data.py", "--output", str(output), "--archives", str(tmp_path)])
    with pytest.raises(DataError, match=r"has sha256 .* expected 141f061f"):
        cifar_data.main()
    assert not output.exists(), "nothing half-written"
    monkeypatch.setattr(archives, "fetch", lambda *_: None)
    cifar_data.main()
    index = ImageTextIndex(open_shards(f"{output}/train-*.tar"))
    assert index.label.tolist() == train
    val = ImageTextIndex(open_shards(f"{output}/val-*.tar"))
    [batch] = validation_batches(val, DataConfig(shards="x", resolution=32), 4, 0, 1, 4)
    captions = {
        9: "a photo of a truck",
        0: "a photo of an airplane",
        3: "a photo of a cat",
        1: "a photo of an automobile",
    }
    assert dict(zip(batch.labels.tolist(), batch.captions, strict=True)) == captions
    assert batch.images is not None
    row = [9, 0, 3, 1].index(int(batch.labels[0]))
    assert (batch.images[0].numpy() == sheets["test_batch.png"][row].reshape(32, 32, 3).transpose(2, 0, 1)).all()
    assert "4 photographs of 10 classes" in capsys.readouterr().out
    cifar_data.main()
    assert "is complete" in capsys.readouterr().out
    (output / ".complete").unlink()
    with pytest.raises(DataError, match="holds other files"):
        cifar_data.main()
