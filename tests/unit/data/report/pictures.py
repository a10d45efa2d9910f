"""Pictures that differ, and their files."""

import io

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth colours, as in a photograph out of focus."""
    grid = np.random.default_rng(seed).integers(0, 255, (7, 7, 3), np.uint8)
    return Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
