"""launch/precompute.py as it is run: kills, training from what it wrote, messages."""

from pathlib import Path

import pytest

from benchmarks.kills_commands import contents, finish, kills, precompute, precompute_settings, small_autoencoder, start
from data.debug import ensure_debug_assets
from tests.distributed.runs import train
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.meta import read_meta


def test_two_kills_lose_nothing(tmp_path: Path) -> None:
    entries = list(kills(1, 2, tmp_path, names=("precompute",)))
    assert [entry for entry in entries if "moment" in entry] == [{"moment": "precompute"}] * 2
    assert all(entry.get("equal", True) for entry in entries)


def test_training_from_it_equals_training_from_images(tmp_path: Path) -> None:
    """Losses agree within what fp16 latents and features and bf16 text states round: 2^-11 and 2^-8 of a value, less in
    a mean. Features are stored because the config trains with REPA."""
    assets = ensure_debug_assets(tmp_path / "debug")
    repa = (
        "objective.repa_weight=0.5",
        "objective.repa_layer=1",
        "objective.repa_width=32",
        "objective.repa_hidden=48",
    )
    overrides = precompute_settings(assets, small_autoencoder(tmp_path / "autoencoder"))
    overrides += [*repa, f"objective.repa_encoder={assets}/dinov2"]
    estimate = finish(start(precompute(tmp_path / "out" / "train", 1, overrides, "--dry-run", "--images-per-s", "100")))
    assert not (tmp_path / "out").exists()
    assert "512 samples in 2 shards: 0.00" in estimate
    assert "0.001 GPU-hours at 100.0 images/s per process (given)" in estimate
    finish(start(precompute(tmp_path / "out" / "train", 1, overrides, "--flips")))
    assert len(contents(tmp_path / "out")) == 6  # two shards, their indexes, dataset.json and the empty caption

    short = (
        "data.val_shards=null", "data.flip=0.5", "train.steps=5", "train.checkpoint_every=5", "train.validate_every=5",
        "train.sample_every=5", "optim.lr=1e-3",
    )  # fmt: skip
    online = train(1, tmp_path / "online", *overrides, *short, "train.sample_every=0")
    vae = "autoencoder={path: none, channels: 4, downsample: 2}"
    stored = train(
        1, tmp_path / "stored", f"data.shards={tmp_path / 'out'}", "text_encoder.path=none", vae, *repa, *short
    )  # fmt: skip
    for name in ("loss", "repa_loss", "grad_norm", "val_loss"):
        ours, theirs = ([line[name] for line in lines if name in line] for lines in (stored, online))
        assert ours, name
        assert ours == pytest.approx(theirs, rel=1e-3), name
        assert ours != theirs, "they round differently"
    prints = [read_meta(find_checkpoint(tmp_path / name))["fingerprints"] for name in ("stored", "online")]
    for part in ("autoencoder", "text_encoder", "repa_encoder"):
        assert prints[0][part] == prints[1][part]
    assert len(prints[0]["precomputed_dataset"]) == 64
    with pytest.raises(AssertionError, match=r"error: text_encoder\.max_length is 40, but .* was precomputed with 48"):
        train(1, tmp_path / "b", f"data.shards={tmp_path / 'out'}", "text_encoder={path: none, max_length: 40}", vae)
