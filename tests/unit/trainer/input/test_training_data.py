"""What identifies the training data of a run, and with it what a run may go on with."""

import io
from pathlib import Path

import pytest
from PIL import Image

from data.images import IMAGE_RULES
from data.write_shards import write_shards
from tests.helpers.icc_profiles import DISPLAY_P3, rgb_profile, srgb_curve
from trainer.checkpoint.compatible import check_same_contents
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.errors import CheckpointError
from trainer.input.training_data import TrainingData
from trainer.parallel.mesh import World


def data_of(folder: Path, world: World, profile: bytes | None, name: str, val: str = "") -> TrainingData:
    """Training data of 40 images; the last one has a profile."""
    samples = []
    for i in range(40):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32)).save(buffer, "PNG", icc_profile=profile if i == 39 else None)
        samples.append((f"{i}", buffer.getvalue(), "png", "x"))
    write_shards(samples, folder / name / "s", 40)
    overrides = [f"data.shards={folder / name}", f"data.index_cache={folder / 'cache'}", "train.global_batch_size=4"]
    overrides.append(f"data.val_shards={folder / val if val else 'null'}")
    config = load_config("mmdit_debug_mup", [*overrides, "data.resolution=32", "validation.samples=8"])
    return TrainingData(config, resolve(config, 1), world)


def test_a_run_that_saw_other_colours_is_refused_and_one_without_profiles_goes_on(tmp_path: Path, world: World) -> None:
    plain = data_of(tmp_path, world, None, "plain")
    assert plain.fingerprints == {"data": plain.fingerprint}
    assert plain.validation_fingerprint == f"{plain.fingerprint}/8"
    other = data_of(tmp_path, world, rgb_profile(DISPLAY_P3, srgb_curve), "other", val="plain")
    assert other.fingerprints == {"data": other.fingerprint, "images": IMAGE_RULES}
    assert other.validation_fingerprint == plain.validation_fingerprint
    again = data_of(tmp_path / "b", world, rgb_profile(DISPLAY_P3, srgb_curve), "other")
    assert again.validation_fingerprint == f"{other.fingerprint}/8/{IMAGE_RULES}"

    checkpoint = tmp_path / "step_00000004"
    check_same_contents({"fingerprints": other.fingerprints}, other.fingerprints, checkpoint)
    before = {"fingerprints": {"data": other.fingerprint}, "commit": "abc"}
    with pytest.raises(CheckpointError, match=r"ICC profiles of images.*commit abc.*run\.init_from"):
        check_same_contents(before, other.fingerprints, checkpoint)
