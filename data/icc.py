"""ICC profiles: pixels whose colours are in another space than sRGB become sRGB.

A profile whose transform changes nothing is one of sRGB, whatever its name, and costs no more than being compared with
those that were seen before. An image without a profile is sRGB; gAMA and cHRM chunks of PNG are not looked at.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by a profile's colour space: the mode of its pixels
_CLASSES = ("mntr", "scnr", "prtr", "spac")  # of profiles that describe pixels
_MOST_BYTES = 4 << 20  # of a profile; those of presses have up to three million
_MOST_PROFILES = 16  # that are remembered, in each process
_NO_DIFFERENCE = 3  # of 255: profiles of sRGB differ by so much from each other

ToSrgb = Callable[[Image.Image], Image.Image]
"""An image in the space of a profile -> in sRGB, mode RGB. An image of mode RGB is changed in place."""


class ProfileError(ValueError):
    """A profile that is damaged, or of another kind than its image."""


def to_srgb(image: Image.Image) -> ToSrgb | None:
    """How the pixels of an open image become sRGB by its profile; None where they are that already.

    Raises ProfileError where the profile cannot be used.
    """
    if "icc_profile" not in image.info:
        return None
    profile = image.info["icc_profile"]
    if not profile or len(profile) > _MOST_BYTES:
        raise ProfileError("damaged, or too large")
    mode, transform = _transform(profile)
    grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    # A grey image may well have a profile of RGB: its colours are those with equal parts.
    if not {"RGB": image.mode != "CMYK", "L": grey, "CMYK": image.mode == "CMYK"}[mode]:
        raise ProfileError(f"of {mode}, for an image of {image.mode}")
    return None if transform is None else partial(_apply, transform)


@lru_cache(maxsize=_MOST_PROFILES)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """(the mode of a profile's pixels, their transform to sRGB; None where it changes nothing)."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        about: Any = source.profile
        mode = _MODES[about.xcolor_space]
        if about.device_class not in _CLASSES:
            raise ProfileError("not of pixels")
        transform = ImageCms.ImageCmsTransform(
            source, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except Exception as error:  # what lcms and its binding raise: OSError, ValueError, KeyError here
        raise ProfileError("damaged") from error
    if mode == "CMYK":
        return mode, transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)  # [1, 18 ** 3, 3]
    if mode == "L":
        colours = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)  # [1, 256, 3]
    found = np.asarray(_apply(transform, Image.fromarray(colours)))
    same = np.abs(found.astype(int) - colours).max() <= _NO_DIFFERENCE
    return mode, None if same else transform


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    pixels = image if image.mode == transform.input_mode else image.convert(transform.input_mode)
    return transform.apply_in_place(pixels) if pixels.mode == "RGB" else transform.apply(pixels)
