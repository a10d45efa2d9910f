"""ICC profiles of version 2, written out by the specification (ICC.1:2001-04), and the colours that they stand for."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

# Columns: red, green and blue in XYZ under D50. Of sRGB and Display P3 as their published profiles have them.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
_D50 = (0.9642, 1.0, 0.8249)
Curve = Callable[[np.ndarray], np.ndarray]


def srgb_curve(encoded: np.ndarray) -> np.ndarray:
    """sRGB's values in [0, 1] -> light."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def gamma(power: float) -> Curve:
    """A curve of one power."""
    return lambda encoded: encoded**power


def rgb_profile(primaries: np.ndarray, curve: Curve, kind: bytes = b"mntr") -> bytes:
    """The profile of a screen."""
    tags = {name + b"XYZ": _xyz(primaries[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}
    return _profile(b"RGB ", b"XYZ ", kind, tags | {name + b"TRC": _curve(curve) for name in (b"r", b"g", b"b")})


def grey_profile(curve: Curve) -> bytes:
    """The profile of a grey screen."""
    return _profile(b"GRAY", b"XYZ ", b"mntr", {b"kTRC": _curve(curve)})


def cmyk_profile(colours: dict[tuple[int, int, int, int], tuple[float, float, float]]) -> bytes:
    """The profile of a press. colours: {(c, m, y, k) of 0 or 1: Lab}; the other corners are white."""
    steps = np.arange(256, dtype=np.uint8).tobytes()
    table = b""
    for corner in np.ndindex(2, 2, 2, 2):
        lightness, a, b = colours.get(corner, (100.0, 0.0, 0.0))  # pyright: ignore[reportCallIssue, reportArgumentType]
        table += bytes([round(lightness * 2.55), round(a) + 128, round(b) + 128])
    identity = struct.pack(">9i", *(np.eye(3).ravel() * 65536).astype(int).tolist())
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + steps * 4 + table + steps * 3
    return _profile(b"CMYK", b"Lab ", b"prtr", {b"A2B0": lut, b"A2B1": lut})


def in_srgb(pixels: np.ndarray, primaries: np.ndarray, curve: Curve) -> np.ndarray:
    """uint8 [..., 3] of a space -> what is seen, as sRGB, float [..., 3] in [0, 255]."""
    light = curve(pixels / 255.0) @ (np.linalg.inv(SRGB) @ primaries).T
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _xyz(values: object) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(v) * 65536) for v in np.asarray(values)))


def _curve(curve: Curve) -> bytes:
    table = np.round(curve(np.linspace(0, 1, 1024)) * 65535).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(table)) + table.tobytes()


def _profile(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"a test's profile\0"
    tags = tags | {b"wtpt": _xyz(_D50), b"cprt": b"text" + bytes(4) + text}
    tags[b"desc"] = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    table, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = bytes(8) + struct.pack(">I", 0x02100000) + kind + space + connection + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">3i", *(round(v * 65536) for v in _D50))
    content = header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(content)) + content[4:]
