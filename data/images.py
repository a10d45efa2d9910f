"""The bytes of an image file -> uint8 pixels of one size. Hostile files are refused before they are decoded."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import SampleError
from .icc import ProfileError, ToSrgb, to_srgb
from .image_parts import check_parts, exif_at_end, has_more_scans

IMAGE_RULES = "2"  # version of what an image with an ICC profile, or a PNG with an EXIF orientation, is taken for
TAIL_BYTES = 1 << 16  # of a PNG, in which EXIF behind its pixels is looked for
FORMATS = ("JPEG", "PNG", "WEBP")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
UNREAD_EXTENSIONS = ("heic", "heif", "avif", "gif", "tif", "tiff", "bmp", "jxl", "jp2", "svg")  # only counted
_SIGNATURES = (
    (rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", "heic"), (rb"....ftyp(avif|avis)", "avif"), (rb"GIF8", "gif"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "tiff"), (rb"BM.{4}\0{4}", "bmp"), (rb"\xff\x0a|\0{3}\x0cJXL ", "jxl"),
    (rb"\0{3}\x0cjP  ", "jp2"), (rb"\s*(<\?xml[^>]*>\s*)?<svg", "svg"), (rb"\s*<(!doctype html|html)", "a web page"),
)  # fmt: skip
_ORIENTATION_TAG = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# A JPEG is decoded at no less than this multiple of the target's size. Measured at 1500 x 2250 -> 256: as near to a
# full decode as a gap of 2 (a mean difference of 3.1 of 255 on noise), in two thirds of the time.
_DRAFT_GAP = 1.4
# Decoding one image takes 10 bytes per pixel of data.max_image_pixels at most; libwebp takes 16 per pixel.
_WEBP_COST = 1.6
_BAND_PIXELS = 1 << 22  # that are converted at once
# libjpeg decodes all pixels once per scan. Encoders write about ten scans: an image of the most pixels may have these.
_SCANS = 10
# An image of many pixels in few bytes is flat, and made to fill memory: photographs have 1 to 50 pixels per byte.
_MOST_PIXELS_PER_BYTE, _FEW_PIXELS = 256, 1 << 25
_REDUCING_GAP = 2.0  # of PIL's resize, as in its thumbnail


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Open an image, of which PIL reads the header alone. PIL's own limit of its size is off: data.max_image_pixels is
    checked here instead. Errors of the block, too, become SampleError."""
    if not data:
        raise SampleError("image: empty")
    check_parts(data)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(f"image: {_kind(data)}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError ...
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise SampleError(f"image: {reason}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _kind(data: bytes) -> str:
    """What a file is that is none of FORMATS."""
    kinds = (kind for signature, kind in _SIGNATURES if re.match(signature, data[:512], re.DOTALL | re.IGNORECASE))
    kind = next(kinds, None)
    return "unreadable" if kind is None else f"{kind}, expected jpeg, png or webp"


class ImageHeader(NamedTuple):
    """What the header of an image says of it: width and height in pixels, upright; whether it is a PNG that its EXIF
    turns by a quarter; what becomes of its ICC profile ("" where there is none, or one of sRGB)."""

    width: int
    height: int
    is_turned_png: bool
    profile: Literal["", "converted", "unusable"]


def _is_transposed(exif: Image.Exif) -> bool:
    return exif.get(_ORIENTATION_TAG) in _TRANSPOSED


def _exif(image: Image.Image, tail: bytes = b"") -> Image.Exif:
    """The EXIF of an open image. tail: of a PNG, in which it may lie behind the pixels."""
    if image.info.get("exif"):
        return image.getexif()
    exif = Image.Exif()
    if image.format == "PNG" and (data := exif_at_end(tail)):
        exif.load(b"Exif\0\0" + data)
    return exif


def read_header(data: bytes, tail: bytes | None = None) -> ImageHeader:
    """The header of an image, which is not decoded. Raises SampleError where it is unreadable.

    data: the file, or its beginning. tail: its last TAIL_BYTES, where `data` does not hold them.
    """
    with _open(data) as image:
        width, height = image.size
        transposed = _is_transposed(_exif(image, data[-TAIL_BYTES:] if tail is None else tail))
        if transposed:
            width, height = height, width
        try:
            profile = "" if to_srgb(image) is None else "converted"
        except ProfileError:
            profile = "unusable"
        return ImageHeader(width, height, transposed and image.format == "PNG", profile)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an upright image in pixels, from its header alone. SampleError where it is unreadable."""
    return read_header(data)[:2]


def _check_size(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Raise SampleError where an image that is open, but not decoded, would take too much memory or time."""
    pixels = image.width * image.height
    if pixels * (_WEBP_COST if image.format == "WEBP" else 1) > max_pixels:
        raise SampleError("image: too large")
    if pixels > max(_FEW_PIXELS, _MOST_PIXELS_PER_BYTE * len(data)):
        raise SampleError("image: too large for its bytes")
    if has_more_scans(data, _SCANS * max_pixels // pixels):
        raise SampleError("image: too many scans")


def _to_rgb(image: Image.Image, convert: ToSrgb | None) -> Image.Image:
    """An image of any mode in RGB: its colours are converted, transparency is composited on white, 16-bit grey is
    scaled to 8 bits."""
    if image.mode.startswith("I"):  # 16-bit PNG: PIL's own conversion clips instead of scaling
        return _in_bands(image, lambda band: convert(_high_byte(band)) if convert else _high_byte(band))
    if image.has_transparency_data:
        return _in_bands(image, lambda band: _on_white(band, convert))
    return image.convert("RGB") if convert is None else _in_bands(image, convert)


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `convert` makes of the rows of an image, a few at a time: its steps take several times their memory."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(image.height, top + rows))
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def _high_byte(grey: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(grey).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image, convert: ToSrgb | None) -> Image.Image:
    rgba = image.convert("RGBA")
    if convert is not None:
        alpha = rgba.getchannel("A")
        rgba = convert(rgba.convert("RGB"))
        rgba.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _load(
    data: bytes, max_pixels: int, at_least: int | tuple[int, int] | None, convert_colours: bool
) -> tuple[Image.Image, ToSrgb | None]:
    """(an upright RGB image, what makes sRGB of it; None where it is that). Arguments as of load_rgb. What can be
    converted after it was made smaller is left to the caller: it takes as long as decoding a JPEG."""
    with _open(data) as image:
        _check_size(image, data, max_pixels)
        width, height = image.size
        if at_least is not None:
            rows, columns = (at_least, at_least) if isinstance(at_least, int) else at_least
            if _is_transposed(_exif(image)):
                rows, columns = columns, rows
            scale = max(_DRAFT_GAP * rows / height, _DRAFT_GAP * columns / width)
            image.draft(None, (int(width * scale), int(height * scale)))
        image.load()
        convert = None
        with suppress(ProfileError):
            convert = to_srgb(image) if convert_colours else None
        upright = ImageOps.exif_transpose(image) if image.info.get("exif") else image
        if upright.mode == "RGB" and not upright.has_transparency_data:
            return upright, convert
        return _to_rgb(upright, convert), None


def load_rgb(
    data: bytes, max_pixels: int, at_least: int | tuple[int, int] | None = None, convert_colours: bool = True
) -> Image.Image:
    """Decode an image file to an upright image in sRGB. Raises SampleError where it cannot be.

    data: a JPEG, PNG or WebP file. max_pixels: a larger image is refused before it is decoded.
    at_least: the shorter side, or the (height, width), in pixels that the caller needs. A JPEG may come back smaller
    than it is stored, but not smaller than that. convert_colours: to sRGB, by the file's ICC profile; a profile that
    cannot be used is ignored. Else the numbers in the file are taken for sRGB.
    """
    image, convert = _load(data, max_pixels, at_least, convert_colours)
    image = convert(image) if convert else image
    image.info.pop("icc_profile", None)  # else PIL would write it into a PNG
    return image


def decode_image(
    data: bytes, size: int | tuple[int, int], max_pixels: int, crop: tuple[float, float] | None, flip: bool
) -> np.ndarray:
    """Decode an image file, crop it to its largest part of the wanted shape, and resize that. -> uint8 [3, height,
    width].

    data: a JPEG, PNG or WebP file. size: (height, width) in pixels, or the side of a square. max_pixels: of the file.
    crop: where the part lies along x and y, each in [0, 1); None takes the centre. flip: mirror it left to right.
    Raises SampleError where the file cannot be decoded or holds more than max_pixels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    image, convert = _load(data, max_pixels, (height, width), convert_colours=True)
    # The part has the whole width or the whole height of the image; its other side is rounded.
    part_width = min(image.width, max(1, round(image.height * width / height)))
    part_height = min(image.height, max(1, round(image.width * height / width)))
    spare_x, spare_y = image.width - part_width, image.height - part_height
    if crop is None:
        x, y = spare_x // 2, spare_y // 2
    else:
        x, y = int(crop[0] * (spare_x + 1)), int(crop[1] * (spare_y + 1))
    # Cropping before resizing bounds the work: a 1 x 100000 image would grow to 256 x 25600000.
    box = (x, y, x + part_width, y + part_height)
    if (part_height, part_width) == (height, width):
        part = image.crop(box)
    else:
        part = image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=_REDUCING_GAP)
    part = convert(part) if convert else part
    pixels = np.asarray(part).transpose(2, 0, 1)  # [3, height, width]
    return np.ascontiguousarray(pixels[:, :, ::-1] if flip else pixels)
