"""The exported pipeline's use of each class of autoencoder, against that of training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from export.diffusers_folder import _write_encoders, against_stock
from export.pipeline import MuDiTPipeline, latent_form
from tests.helpers.exports import config_of
from tests.unit.data.encoders.test_autoencoder_classes import MADE, loaded, saved


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_the_pipeline_decodes_as_training_does(name: str, tmp_path: Path) -> None:
    model, (_, channels, downsample) = saved(tmp_path, name), MADE[name]
    latents = torch.randn(2, channels, 4, 6, generator=torch.Generator().manual_seed(1))
    pipe: Any = SimpleNamespace(vae=model)
    images = MuDiTPipeline._finish(pipe, latents, "pt")
    assert latent_form(model).downsample == downsample
    assert images.shape == (2, 3, 4 * downsample, 6 * downsample)
    torch.testing.assert_close(images, (loaded(tmp_path, name).decode(latents) + 1) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_an_exported_folder_names_the_class(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "from", name)
    vae = loaded(tmp_path / "from", name)
    where = f"autoencoder={{path: {tmp_path / 'from'}, channels: {vae.channels}, downsample: {vae.downsample}}}"
    config = config_of("dit", where, "data.resolution=32", "objective.kind=ddpm")
    parts, sources = _write_encoders(config, tmp_path, vae, "copy")
    assert (parts["vae"], sources) == (["diffusers", name], {})
    copy = loaded(tmp_path / "vae", name)
    assert (copy.fingerprint, copy.weights) == (vae.fingerprint, vae.weights)
    _, sources = _write_encoders(config, tmp_path, vae, "reference")
    assert sources["vae_source"] == [str(tmp_path / "from"), None, name]
    said = "ignores the autoencoder's latents_mean" if name == "AutoencoderKL" else f"not this model's {name}"
    assert any(said in reason for reason in against_stock(config, vae))


def test_a_pipeline_loads_the_class_that_its_folder_names(tmp_path: Path) -> None:
    """A folder from before there were several names none."""
    parts: dict[str, Any] = dict.fromkeys(("transformer", "scheduler", "vae", "text_encoder", "tokenizer"))
    for name in ("AutoencoderDC", "AutoencoderKL"):
        saved(tmp_path / name, name)
        for source in (
            [str(tmp_path / name), None, name],
            *([[str(tmp_path / name), None]] * (name == "AutoencoderKL")),
        ):
            assert type(MuDiTPipeline(**parts, vae_source=source).vae).__name__ == name
