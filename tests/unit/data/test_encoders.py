"""Text encoders and autoencoders: shapes, padding, cache, scale and shift, clear errors."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file

from data.config import AutoencoderConfig, TextEncoderConfig
from data.debug import ensure_debug_assets
from data.encoders.autoencoder import Autoencoder, PixelAutoencoder, load_autoencoder
from data.encoders.dino import load_feature_encoder
from data.encoders.text import TextEncoder, load_text_encoder
from data.errors import DataError
from data.index import ImageTextIndex
from data.storage import open_shards
from tests.helpers.paths import ROOT
from trainer.config.load import parse
from trainer.errors import ConfigError
from trainer.evaluate.clip import Clip
from trainer.provenance import rooms


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_debug_assets(tmp_path_factory.mktemp("cache") / "debug")


def t5(assets: Path, dtype: torch.dtype = torch.float32, **options: Any) -> TextEncoder:
    cfg = TextEncoderConfig(**{"path": str(assets / "t5"), "max_length": 64, "width": 64} | options)
    return load_text_encoder(cfg, "cpu", dtype)


CAPTIONS = ["a red circle", "a green cross on a black background", "", "a red circle"]


@pytest.mark.slow
def test_debug_assets_are_drawn_once(assets: Path, tmp_path: Path) -> None:
    index = ImageTextIndex(open_shards(str(assets / "train-{000000..000001}.tar")))
    assert index.shard_sizes == [256, 256]
    assert len(ImageTextIndex(open_shards(str(assets / "val-*.tar")))) == 64
    assert set(index.width) == {32}
    state = torch.get_rng_state()
    again = ensure_debug_assets(tmp_path / "debug")
    assert torch.equal(torch.get_rng_state(), state)
    assert (again / "train-000001.tar").read_bytes() == (assets / "train-000001.tar").read_bytes()
    before = {p: p.stat().st_mtime_ns for p in again.rglob("*")}
    ensure_debug_assets(tmp_path / "debug")
    assert {p: p.stat().st_mtime_ns for p in again.rglob("*")} == before
    assert t5(again).fingerprint == t5(assets).fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["debug"]


@pytest.mark.slow
def test_states_and_mask_have_true_lengths(assets: Path) -> None:
    encoder = t5(assets)
    states, mask = encoder.encode(CAPTIONS)
    assert states.shape == (4, 64, 64)
    assert mask.shape == (4, 64)
    assert mask.sum(1).tolist() == [len(c) + 1 for c in CAPTIONS]  # ByT5: a token a byte, and the end token
    assert (states[~mask] == 0).all()
    assert (states[mask] != 0).any(-1).all()
    assert not states.requires_grad
    assert torch.equal(states[0], states[3])
    long_states, long_mask = encoder.encode(["x" * 500])
    assert long_mask.all()
    assert long_states.shape == (1, 64, 64)


def test_padding_does_not_change_a_caption(assets: Path) -> None:
    encoder = t5(assets)
    together, _ = encoder.encode(CAPTIONS)
    alone = torch.cat([encoder.encode([c])[0] for c in CAPTIONS])
    assert torch.allclose(together, alone, atol=1e-5)
    exact = t5(assets, torch.float64)
    together, _ = exact.encode(CAPTIONS)
    alone = torch.cat([exact.encode([c])[0] for c in CAPTIONS])
    assert together.dtype == torch.float64
    assert torch.equal(together, alone)
    half, _ = t5(assets, torch.bfloat16).encode(CAPTIONS)
    assert half.dtype == torch.bfloat16


def test_the_empty_caption_is_encoded_once_and_equal_ones_together(assets: Path) -> None:
    encoder = t5(assets)
    with mock.patch.object(encoder.model, "forward", wraps=encoder.model.forward) as forward:
        encoder.encode(CAPTIONS)
        sizes = [len(call.kwargs["input_ids"]) for call in forward.call_args_list]
        assert sizes == [1, 2]  # "" alone, then two distinct captions
        encoder.encode(["", ""])
        encoder.encode(["", "a red circle"])
        sizes = [len(call.kwargs["input_ids"]) for call in forward.call_args_list]
        assert sizes == [1, 2, 1]


def test_fingerprint_is_of_the_weights_not_the_path_or_precision(assets: Path, tmp_path: Path) -> None:
    shutil.copytree(assets / "t5", tmp_path / "moved")
    encoder = t5(assets)
    moved = load_text_encoder(
        TextEncoderConfig(path=str(tmp_path), subfolder="moved", max_length=8, width=64), "cpu", torch.bfloat16
    )
    assert moved.fingerprint == encoder.fingerprint
    with torch.no_grad():
        next(encoder.model.parameters())[0, 0] += 1
    encoder.model.save_pretrained(tmp_path / "moved")  # type: ignore[reportCallIssue]
    changed = load_text_encoder(
        TextEncoderConfig(path=str(tmp_path / "moved"), max_length=8, width=64), "cpu", torch.float32
    )
    assert changed.fingerprint != moved.fingerprint


def test_text_encoder_errors_name_key_and_remedy(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"text_encoder\.width is 4096, but .* has width 64: set it to 64"):
        t5(assets, width=4096)
    with pytest.raises(DataError, match=r"text_encoder\.path: there is no folder '.*gone'"):
        t5(assets, path=str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"text_encoder\.path: .* cannot be loaded"):
        t5(assets, path=str(tmp_path))
    with pytest.raises(DataError, match=r"text_encoder\.path is 'none'"):
        t5(assets, path="none")
    shutil.copytree(assets / "t5", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"\*\.safetensors"):
        t5(assets, path=str(tmp_path / "pickled"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoConfig", "AutoTokenizer", "known config"])
def test_code_beside_the_weights_never_runs(
    name: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where transformers would ask on standard input, and the answer is yes."""
    folder, ran = tmp_path / "t5", tmp_path / "ran"
    shutil.copytree(assets / "t5", folder)
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    every = {"AutoConfig": "evil.A", "AutoModel": "evil.B", "AutoTokenizer": ["evil.C", None]}
    kind = {} if name == "known config" else {"model_type": "unknown"}
    for file in ("config.json", "tokenizer_config.json"):
        path = folder / file
        stored = json.loads(path.read_text()) | {"auto_map": every} | ({} if name == "AutoTokenizer" else kind)
        path.write_text(json.dumps(stored | ({"tokenizer_class": "Unknown"} if name == "AutoTokenizer" else {})))
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    if name == "known config":
        t5(assets, path=str(folder))
    else:
        with pytest.raises(DataError, match=r"text_encoder.path: .* cannot be loaded"):
            t5(assets, path=str(folder))
    with pytest.raises(DataError):
        load_feature_encoder(str(folder), 64, "cpu", torch.float32)
    with contextlib.suppress(DataError):
        Clip(str(folder))
    assert not ran.exists()


@pytest.mark.slow
def test_no_call_of_transformers_lets_code_run() -> None:
    for path in sorted(p for room in rooms() for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (call := ast.unparse(node)).partition("(")[0].endswith("from_pretrained"):
                asked = "trust_remote_code=False" in call or call.startswith(("AutoencoderKL.", "autoencoder_class."))
                assert asked, f"{path}:{node.lineno}: {call}"


def vae_folder(folder: Path, drop: str | None = None, **options: Any) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    model = AutoencoderKL(**sizes | options)
    model.save_pretrained(folder)
    if drop is not None:
        config = json.loads((folder / "config.json").read_text())
        del config[drop]
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def vae(folder: Path, **options: Any) -> Autoencoder:
    cfg = AutoencoderConfig(**{"path": str(folder), "channels": 4, "downsample": 2} | options)
    loaded = load_autoencoder(cfg, "cpu", torch.float32)
    assert isinstance(loaded, Autoencoder)
    return loaded


def test_latents_are_shifted_and_scaled(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    plain = vae(vae_folder(tmp_path / "plain", scaling_factor=1.0))
    scaled = vae(vae_folder(tmp_path / "scaled", scaling_factor=1.5, shift_factor=0.25))
    assert (plain.channels, plain.downsample, scaled.scale, scaled.shift) == (4, 2, 1.5, 0.25)
    a, b = plain.encode(images), scaled.encode(images)
    assert a.logvar is not None
    assert b.logvar is not None
    assert a.mean.shape == (2, 4, 8, 8)
    assert not a.mean.requires_grad
    assert torch.allclose(b.mean, (a.mean - 0.25) * 1.5)
    assert torch.allclose(b.logvar, a.logvar + 2 * math.log(1.5))
    decoded = scaled.decode(b.mean)
    assert torch.allclose(decoded, plain.decode(a.mean), atol=1e-5)
    assert decoded.shape == (2, 3, 16, 16)
    assert decoded.abs().max() <= 1
    assert plain.fingerprint != scaled.fingerprint
    shutil.copytree(tmp_path / "plain", tmp_path / "copy")
    assert vae(tmp_path / "copy").fingerprint == plain.fingerprint


def test_autoencoder_errors(tmp_path: Path) -> None:
    folder = vae_folder(tmp_path / "vae")
    with pytest.raises(DataError, match=r"autoencoder\.channels is 16, .* has 4: set it to 4"):
        vae(folder, channels=16)
    with pytest.raises(DataError, match=r"autoencoder\.downsample is 8, .* has 2"):
        vae(folder, downsample=8)
    with pytest.raises(DataError, match="has no scaling_factor"):
        vae(vae_folder(tmp_path / "unscaled", drop="scaling_factor"))
    with pytest.raises(DataError, match=r"autoencoder\.path: there is no folder"):
        vae(tmp_path / "gone")
    assert vae(vae_folder(tmp_path / "unshifted", drop="shift_factor")).shift == 0.0


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _rewritten(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        change(tensors, max(tensors, key=lambda name: tensors[name].numel()))
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


DAMAGES = [
    pytest.param(_cut, r"model\.safetensors' is damaged", id="cut"),
    pytest.param(
        lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n"),
        r"model\.safetensors' is a pointer of git-lfs",
        id="git-lfs",
    ),
    pytest.param(lambda file: file.write_bytes(b"\xff" * 5000), r"model\.safetensors' is damaged", id="garbage"),
    pytest.param(
        _rewritten(lambda tensors, name: tensors.pop(name)),
        "weights (of the model are not there|have another shape)",
        id="absent",
    ),
    pytest.param(
        _rewritten(lambda tensors, name: tensors.update({name: torch.cat([tensors[name]] * 2)})),
        "weights (of the model are not there|have another shape)",
        id="shape",
    ),
    pytest.param(
        _rewritten(lambda tensors, name: tensors[name].fill_(math.nan)), "weights are not finite numbers", id="nan"
    ),
    pytest.param(
        lambda file: file.with_name("config.json").write_text("[1]"),
        r"config\.json and \*\.safetensors|config\.json holds no",
        id="config",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_files_give_one_message(
    damage: Callable[[Path], object], message: str, assets: Path, tmp_path: Path
) -> None:
    """The libraries fill up what is missing with random numbers, or end in errors of their own."""
    vae_folder(tmp_path / "vae", scaling_factor=1.0)
    for part in ("t5", "dinov2"):
        shutil.copytree(assets / part, tmp_path / part)
    loads = {
        "t5": lambda: t5(assets, path=str(tmp_path / "t5")),
        "vae": lambda: vae(tmp_path / "vae"),
        "dinov2": lambda: load_feature_encoder(str(tmp_path / "dinov2"), 32, "cpu", torch.float32),
    }
    for part, load in loads.items():
        load()
        damage(next((tmp_path / part).glob("*.safetensors")))
        with pytest.raises(DataError, match=message):
            load()


def test_a_flipped_bit_in_any_weight_changes_the_digest(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint knows the first 16 values of each weight. The digest is remembered until a file changes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("data.encoders.loading._REMEMBERED_BYTES", 1)
    shutil.copytree(assets / "t5", tmp_path / "t5")
    here, there = (t5(assets, path=str(folder)) for folder in (assets / "t5", tmp_path / "t5"))
    assert here.weights == there.weights
    remembered = sorted((tmp_path / "cache").rglob("*"))
    assert t5(assets, path=str(tmp_path / "t5")).weights == here.weights
    assert sorted((tmp_path / "cache").rglob("*")) == remembered != []
    _rewritten(lambda tensors, name: tensors[name].view(-1)[1000].neg_())(tmp_path / "t5" / "model.safetensors")
    flipped = t5(assets, path=str(tmp_path / "t5"))
    assert flipped.fingerprint == here.fingerprint
    assert flipped.weights != here.weights
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such")
    assert t5(assets).weights == here.weights, "without a cache folder it is computed"


@pytest.mark.slow
def test_the_scale_of_files_older_than_its_field(tmp_path: Path) -> None:
    """sd-vae-ft-ema was written by diffusers 0.4.2; the 4x upscaler's autoencoder has three blocks."""

    def written_by(name: str, version: str | None, blocks: int) -> Path:
        kinds = {
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
            "block_out_channels": (8,) * blocks,
        }
        folder = vae_folder(tmp_path / name, drop=None if version is None else "scaling_factor", **kinds)
        if version is not None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "_diffusers_version": version}))
        return folder

    old = vae(written_by("old", "0.4.2", 4), downsample=8)
    assert old.scale == 0.18215
    stated = vae(written_by("stated", None, 4), downsample=8)
    assert (stated.scale, stated.fingerprint) == (old.scale, old.fingerprint), "the same weights and the same scale"
    for name, version, blocks in (("upscaler", "0.4.2", 3), ("new", "0.13.0", 4), ("unknown", "", 4)):
        with pytest.raises(DataError, match="has no scaling_factor"):
            vae(written_by(name, version, blocks), downsample=2 ** (blocks - 1))


def test_autoencoders_take_few_images_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the micro-batch is: the same latents and images in parts that bound its memory."""
    loaded = vae(vae_folder(tmp_path / "vae"))
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    whole = loaded.encode(images)
    decoded = loaded.decode(whole.mean)
    sizes: list[int] = []
    real = loaded.model.encode
    monkeypatch.setattr(loaded.model, "encode", lambda x: sizes.append(len(x)) or real(x))
    monkeypatch.setattr("data.encoders.autoencoder._PIXELS", 2 * 16 * 16)
    parts = loaded.encode(images)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.logvar, whole.logvar)
    torch.testing.assert_close(loaded.decode(whole.mean), decoded)


def test_pixels_are_their_own_latents() -> None:
    pixels = load_autoencoder(AutoencoderConfig(channels=3, downsample=1), "cpu", torch.bfloat16)
    assert isinstance(pixels, PixelAutoencoder)
    images = torch.arange(0, 192, dtype=torch.uint8).reshape(1, 3, 8, 8)
    moments = pixels.encode(images)
    assert moments.logvar is None
    assert moments.mean.dtype == torch.float32
    assert torch.equal(moments.mean, images.float() / 127.5 - 1)
    assert torch.equal(pixels.decode(moments.mean * 3), (moments.mean * 3).clamp(-1, 1))
    with pytest.raises(DataError, match=r"autoencoder\.channels is 4"):
        load_autoencoder(AutoencoderConfig(channels=4, downsample=1), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"text_encoder": {"dropout": 2.0}}, r"text_encoder\.dropout must be between 0 and 1, got 2\.0"),
        ({"autoencoder": {"downsample": 0}}, r"autoencoder\.downsample must be at least 1, got 0"),
    ],
)
def test_ranges_are_checked(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(data, "test")
