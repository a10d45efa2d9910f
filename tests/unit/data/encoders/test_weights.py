"""Encoders whose weights or tokenizer are not what their config says: right, or refused; never random in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.config import AutoencoderConfig, TextEncoderConfig
from data.debug import ensure_debug_assets
from data.encoders.autoencoder import load_autoencoder
from data.encoders.dino import FeatureEncoder, load_feature_encoder
from data.encoders.text import TextEncoder, load_text_encoder
from data.errors import DataError
from tests.helpers.paths import ROOT

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_debug_assets(tmp_path_factory.mktemp("cache") / "debug")


def t5(folder: Path) -> TextEncoder:
    return load_text_encoder(TextEncoderConfig(path=str(folder), max_length=64, width=64), "cpu", torch.float32)


def dinov2(folder: Path) -> FeatureEncoder:
    return load_feature_encoder(str(folder), 32, "cpu", torch.float32)


def edited(source: Path, folder: Path, edit: Callable[[Weights], Weights]) -> Path:
    """A copy of an encoder's folder with other weights in it."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in edit(load_file(path)).items()}, path, {"format": "pt"})
    return folder


def with_prefix(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "text_encoders.t5xxl.transformer."])
def test_a_prefix_of_all_names_is_understood(prefix: str, assets: Path, tmp_path: Path) -> None:
    assert t5(edited(assets / "t5", tmp_path / "t5", with_prefix(prefix))).fingerprint == t5(assets / "t5").fingerprint
    renamed = edited(assets / "dinov2", tmp_path / "dinov2", with_prefix(prefix))
    assert dinov2(renamed).fingerprint == dinov2(assets / "dinov2").fingerprint


def test_a_module_that_was_saved_alone_is_understood(assets: Path, tmp_path: Path) -> None:
    def without_holder(weights: Weights) -> Weights:
        return {name.removeprefix("encoder."): tensor for name, tensor in weights.items() if name != "shared.weight"}

    def named_twice(weights: Weights) -> Weights:
        return without_holder(weights) | {"embed_tokens.weight": weights["shared.weight"]}

    assert t5(edited(assets / "t5", tmp_path / "t5", named_twice)).fingerprint == t5(assets / "t5").fingerprint


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: dict(list(w.items())[:-3]), r"[34] weights of the model are not there: "),
        (lambda w: w | {"encoder.extra": torch.zeros(1)}, r"1 weights there are not the model's: encoder\.extra"),
        (lambda w: {n: t[:1] if t.ndim == 2 else t for n, t in w.items()}, r"have another shape: .* and not "),
    ],
)
@pytest.mark.parametrize("kind", ["t5", "dinov2"])
def test_weights_without_a_place_are_refused(
    kind: str, edit: Callable[[Weights], Weights], message: str, assets: Path, tmp_path: Path
) -> None:
    folder = edited(assets / kind, tmp_path / kind, edit)
    load = {"text_encoder.path": t5, "objective.repa_encoder": dinov2}
    key = {"t5": "text_encoder.path", "dinov2": "objective.repa_encoder"}[kind]
    with pytest.raises(DataError, match=rf"{key}: the weights in .*{message}"):
        load[key](folder)


@pytest.mark.slow
def test_a_real_encoder_has_all_its_weights() -> None:
    cfg = TextEncoderConfig(path=str(ROOT / ".cache/minilm"), max_length=18, width=384)
    load_text_encoder(cfg, "cpu", torch.float32)


def test_a_tokenizer_beside_the_encoder_is_found(assets: Path, tmp_path: Path) -> None:
    encoder, tokenizer = tmp_path / "text_encoder_3", tmp_path / "tokenizer_3"
    shutil.copytree(assets / "t5", encoder)
    tokenizer.mkdir()
    for path in encoder.iterdir():
        if "token" in path.name:
            path.rename(tokenizer / path.name)
    assert t5(encoder).fingerprint == t5(assets / "t5").fingerprint


def test_an_encoder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes a tokenizer that knows no word out of a T5's config.json alone."""
    folder = tmp_path / "minilm"
    shutil.copytree(ROOT / ".cache/minilm", folder)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(DataError, match=r"text_encoder\.path: .*(tokenizer|cannot be loaded)"):
        load_text_encoder(TextEncoderConfig(path=str(folder), max_length=18, width=384), "cpu", torch.float32)


def test_states_that_are_not_finite_are_refused(assets: Path, tmp_path: Path) -> None:
    folder = edited(assets / "t5", tmp_path / "t5", lambda w: {name: tensor * torch.nan for name, tensor in w.items()})
    with pytest.raises(DataError, match="weights are not finite numbers"):
        t5(folder)


def test_another_kind_of_autoencoder_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny", "scaling_factor": 1.0}))
    with pytest.raises(
        DataError, match=r"autoencoder\.path: .* is a AutoencoderTiny; only these are supported: AutoencoderKL"
    ):
        load_autoencoder(AutoencoderConfig(path=str(tmp_path), channels=4, downsample=8), "cpu", torch.float32)
