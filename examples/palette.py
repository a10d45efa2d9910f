"""Background colours of the demo's images, named in their captions."""

from __future__ import annotations

# sRGB, well apart from one another: the demo measures to which of them the border of a sampled image is nearest.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 235, 60),
    "green": (30, 150, 50),
    "teal": (0, 190, 190),
    "blue": (35, 70, 225),
    "purple": (130, 0, 160),
    "pink": (255, 150, 210),
}
