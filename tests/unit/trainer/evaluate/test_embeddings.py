"""FD-DINOv2 and CMMD: pixels, positions and embeddings of small models against the libraries' own way there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, Dinov2Model

from data.debug import ensure_debug_assets
from data.errors import DataError
from tests.helpers.tiny_networks import pinned, save_clip, save_dino, save_inception
from tests.unit.trainer.evaluate.test_metrics import frechet
from trainer.evaluate import evaluation
from trainer.evaluate.embeddings import ClipImages, Dino, resize_positions
from trainer.evaluate.evaluation import Evaluation, prepare
from trainer.evaluate.suite import SuiteConfig
from trainer.parallel.mesh import World

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)


def pixels(side: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """As the papers' programs: by PIL, then scaled and normalised."""
    squares = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in IMAGES]
    scaled = np.stack([np.asarray(square) / 255 for square in squares])
    return torch.from_numpy((scaled - mean) / std).permute(0, 3, 1, 2).float()


def cubic(grid: np.ndarray, axis: int, cells: int, scale: float) -> np.ndarray:
    """Keys' cubic convolution (a = -0.75) along one axis: cell i is sampled at (i + 1/2) / scale - 1/2."""
    old, a, rows = grid.shape[axis], -0.75, []
    for cell in range(cells):
        place = (cell + 0.5) / scale - 0.5
        first = int(np.floor(place))
        total = np.zeros_like(np.take(grid, 0, axis))
        for near in range(first - 1, first + 3):
            d = abs(place - near)
            inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
            weight = inner if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            total = total + weight * np.take(grid, min(max(near, 0), old - 1), axis)
        rows.append(total)
    return np.stack(rows, axis)


def test_dino_sees_positions_and_pixels_of_its_own_code(tmp_path: Path) -> None:
    """Positions of 37 x 37 patches become 16 x 16 by the scale 16.1 / 37 of DINOv2's code."""
    model: Any = Dinov2Model.from_pretrained(save_dino(tmp_path / "dino"))
    positions = model.embeddings.position_embeddings.data[0].double().numpy()
    grid = positions[1:].reshape(37, 37, -1)
    expected = cubic(cubic(grid, 0, 16, 16.1 / 37), 1, 16, 16.1 / 37).reshape(256, -1)
    model.eval()
    plain = model(pixels(224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])).pooler_output
    resize_positions(model.embeddings, 16)
    np.testing.assert_allclose(model.embeddings.position_embeddings[0, 1:].detach(), expected, atol=1e-4)
    wanted = model(pixels(224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])).pooler_output
    network = Dino(str(tmp_path / "dino"))
    ours = network(torch.from_numpy(IMAGES)).pooled
    torch.testing.assert_close(ours, wanted.detach(), rtol=1e-3, atol=1e-3)
    assert network.widths[0] == ours.shape[1] == 24
    assert (ours - plain).abs().max() > 1e-2, "transformers' own positions are others"


def test_clip_embeddings_are_those_of_the_library(tmp_path: Path) -> None:
    model: Any = CLIPModel.from_pretrained(save_clip(tmp_path / "clip")).eval()
    seen = pixels(32, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    wanted = model.visual_projection(model.vision_model(pixel_values=seen).pooler_output).detach()
    network = ClipImages(str(tmp_path / "clip"))
    torch.testing.assert_close(network(torch.from_numpy(IMAGES)).pooled, wanted, rtol=1e-4, atol=1e-5)
    assert network.widths[0] == 16


def ready(world: World, **keys: Any) -> Evaluation:
    suite = SuiteConfig.model_validate({"guidance": 1.0, "rectified_flow": {"steps": 1}, "batch_size": 7, **keys})
    return prepare(suite, 32, None, world.device, world.control)


@pytest.mark.slow
def test_a_suite_of_both(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From images to figures, beside FID on Inception's features; each is that of its own network."""
    monkeypatch.setattr(evaluation, "_CACHE", tmp_path / "cache")
    shards = str(ensure_debug_assets() / "val-000000.tar")
    keys: dict[str, Any] = {
        "metrics": ["fd_dinov2", "cmmd"], "prompts": shards, "reference": shards,
        "dino": str(save_dino(tmp_path / "dino")), "cmmd_clip": str(save_clip(tmp_path / "clip")),
    }  # fmt: skip
    made = ready(world, **keys)
    real = evaluation.open_image_set(shards, "reference").pixels(range(64), 32)
    generated = np.random.default_rng(1).integers(0, 256, real.shape, dtype=np.uint8) // 2 + real // 2
    figures = made.measure(lambda batch: generated[list(made.batches[batch])])
    dino, clip = (
        [network(torch.from_numpy(images)).pooled.double().numpy() for images in (real, generated)]
        for network in (Dino(keys["dino"]), ClipImages(keys["cmmd_clip"]))
    )
    assert figures["fd_dinov2"].value == pytest.approx(frechet(*dino), rel=1e-3)
    x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in clip)
    gaussian = [np.exp(-np.square(p[:, None] - q).sum(-1) / 200).mean() for p, q in ((x, x), (y, y), (x, y))]
    assert figures["cmmd"].value == pytest.approx(1000 * (gaussian[0] + gaussian[1] - 2 * gaussian[2]), rel=1e-3)
    same = made.measure(lambda batch: real[list(made.batches[batch])])
    assert same["fd_dinov2"].value < 1e-6
    assert same["cmmd"].value < 1e-6
    assert set(made.contents) == {"prompts", "reference", "fd_dinov2", "cmmd"}
    assert len(list((tmp_path / "cache").iterdir())) == 2, "features of the reference are kept for each network"
    beside = ready(world, **{**keys, "metrics": ["fid", "fd_dinov2"], **pinned(save_inception(tmp_path / "i.pt"))})
    both = beside.measure(lambda batch: generated[list(beside.batches[batch])])
    assert both["fd_dinov2"].value == pytest.approx(figures["fd_dinov2"].value)
    assert both["fid"].value != both["fd_dinov2"].value
    np.savez(tmp_path / "images.npz", arr_0=real)
    file = ready(world, **{**keys, "reference": str(tmp_path / "images.npz")})
    again = file.measure(lambda batch: generated[list(file.batches[batch])])
    assert again["cmmd"].value == pytest.approx(figures["cmmd"].value)
    np.savez(tmp_path / "bare.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(DataError, match=r"bare\.npz has no images"):
        ready(world, **{**keys, "reference": str(tmp_path / "bare.npz")})
    with pytest.raises(DataError, match="is a clip; expected a DINOv2"):
        ready(world, **{**keys, "dino": keys["cmmd_clip"]})
