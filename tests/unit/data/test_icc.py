"""Images whose colours are in another space than sRGB are what a person sees of them, wherever images come in."""

from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import images, index, shard_index
from data.captions import CaptionChoice
from data.errors import SampleError
from data.image_sets import open_image_set
from data.images import IMAGE_RULES, decode_image, load_rgb, read_header
from data.index import ImageTextIndex
from data.storage import Shard
from data.write_shards import CaptionedImage, read_samples, write_shards
from tests.helpers.icc_profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    Curve,
    cmyk_profile,
    gamma,
    grey_profile,
    in_srgb,
    rgb_profile,
    srgb_curve,
)  # fmt: skip

COLOUR = (90, 160, 60)
P3 = rgb_profile(DISPLAY_P3, srgb_curve)
PRESS = cmyk_profile({(1, 0, 0, 0): (50.0, 0.0, 0.0), (0, 0, 0, 1): (0.0, 0.0, 0.0)})


def file_of(image: Image.Image, kind: str, profile: bytes | None, **options: Any) -> bytes:
    """An image file; its pixels are as exact as its format has them."""
    options |= {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    if profile is not None:
        options["icc_profile"] = profile
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes, **options: Any) -> np.ndarray:
    """The first pixel of an image as it is read."""
    image = load_rgb(data, 10**6, **options)
    assert image.mode == "RGB"
    assert "icc_profile" not in image.info, "a file that is written from it would be converted twice"
    return np.asarray(image)[0, 0].astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("primaries", "curve"), [(DISPLAY_P3, srgb_curve), (ADOBE_RGB, gamma(2.2))])
def test_colours_are_converted_to_srgb(kind: str, primaries: np.ndarray, curve: Curve) -> None:
    data = file_of(Image.new("RGB", (64, 48), COLOUR), kind, rgb_profile(primaries, curve))
    seen = in_srgb(np.array(COLOUR), primaries, curve)
    assert np.abs(seen - COLOUR).max() > 15
    assert pixel(data) == pytest.approx(seen, abs=2)
    assert decode_image(data, 16, 10**6, None, False)[:, 0, 0] == pytest.approx(seen, abs=2)
    assert pixel(data, convert_colours=False) == pytest.approx(COLOUR, abs=2)
    assert read_header(data) == (64, 48, False, "converted")


def test_every_mode_of_an_image_is_converted() -> None:
    seen = in_srgb(np.array(COLOUR), DISPLAY_P3, srgb_curve)
    clear = file_of(Image.new("RGBA", (8, 8), (*COLOUR, 51)), "PNG", P3)
    assert pixel(clear) == pytest.approx(0.2 * seen + 0.8 * 255, abs=2)
    palette = Image.new("RGB", (8, 8), COLOUR).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixel(file_of(palette, "PNG", P3)) == pytest.approx(seen, abs=2)
    assert pixel(file_of(Image.new("L", (8, 8), 77), "PNG", P3)) == pytest.approx(77, abs=1), "grey stays grey"
    lighter = in_srgb(np.array([77, 77, 77]), SRGB, gamma(1.0))
    assert lighter[0] > 140
    for grey in (Image.new("L", (8, 8), 77), Image.fromarray(np.full((8, 8), 77 * 257, np.uint16))):
        assert pixel(file_of(grey, "PNG", grey_profile(gamma(1.0)))) == pytest.approx(lighter, abs=2)
    transparent = file_of(Image.new("LA", (8, 8), (77, 0)), "PNG", grey_profile(gamma(1.0)))
    assert (pixel(transparent) == 255).all()
    cyan = file_of(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", PRESS)
    assert pixel(cyan) == pytest.approx([118.9] * 3, abs=2), "as the profile says, Lab 50, 0, 0"
    assert pixel(cyan, convert_colours=False)[0] < 10


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_srgb_stays_bit_for_bit_whatever_its_profile_is_called(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    data = file_of(noise, kind, rgb_profile(SRGB, srgb_curve))
    assert read_header(data).profile == ""
    assert load_rgb(data, 10**6).tobytes() == load_rgb(file_of(noise, kind, None), 10**6).tobytes()


@pytest.mark.parametrize(
    "profile",
    [
        b"junk", P3[:200], P3[:128] + bytes(len(P3) - 128), grey_profile(gamma(1.8)), PRESS,
        rgb_profile(DISPLAY_P3, srgb_curve, b"link"), P3 + bytes(5 << 20),
    ],
    ids=["junk", "cut", "empty", "of grey", "of a press", "a link", "too large"],
)  # fmt: skip
def test_a_profile_that_cannot_be_used_is_ignored_and_told(profile: bytes) -> None:
    image = Image.new("RGB", (8, 8), COLOUR)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = file_of(image, kind, profile)
        if kind == "PNG" and len(profile) > 1 << 20:  # PIL does not open it
            with pytest.raises(SampleError):
                load_rgb(data, 10**6)
            continue
        assert pixel(data) == pytest.approx(COLOUR, abs=2)
        assert read_header(data) == (8, 8, False, "unusable")


def test_the_index_tells_what_is_converted_and_keeps_its_fingerprint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, other, damaged = (file_of(Image.new("RGB", (9, 8), COLOUR), "PNG", p) for p in (None, P3, b"junk"))
    size = len(max(plain, other, damaged, key=len))

    def indexed(name: str, *files: bytes) -> ImageTextIndex:
        samples = [(f"{i}", data + bytes(size - len(data)), "png", "x") for i, data in enumerate(files)]
        shards: list[Shard] = [*write_shards(samples, tmp_path / name / "s", 10)]
        return ImageTextIndex(shards)

    before, now = indexed("before", plain, plain, plain), indexed("now", plain, other, damaged)
    assert (before.remarks, before.image_rules) == ([], None)
    assert now.fingerprint == before.fingerprint, "that of bytes and names, which runs have stored"
    assert now.image_rules == IMAGE_RULES
    assert "images with an ICC profile, which are converted to sRGB: 1, the first in 's-000000.tar': '1'" in caplog.text
    assert "damaged or does not fit them, which are read as sRGB: 1, the first in 's-000000.tar': '2'" in caplog.text
    assert indexed("damaged", plain, damaged).image_rules is None, "they are read as they always were"


def test_shards_keep_the_file_or_hold_the_converted_colours(tmp_path: Path) -> None:
    choice = CaptionChoice(["x"], [1.0])
    for kind, extension in (("JPEG", "jpg"), ("PNG", "png")):
        path = tmp_path / f"a.{extension}"
        path.write_bytes(file_of(Image.new("RGB", (64, 64), COLOUR), kind, P3))
        found = [CaptionedImage("a", path, choice)]
        [(_, kept, *_)] = read_samples(found, None, Counter())
        assert kept == path.read_bytes()
        [(_, resized, *_)] = read_samples(found, 32, Counter())
        with Image.open(io.BytesIO(resized)) as image:
            assert (image.size, image.info.get("icc_profile")) == ((32, 32), None)
            seen = in_srgb(np.array(COLOUR), DISPLAY_P3, srgb_curve)
            assert np.asarray(image)[9, 9] == pytest.approx(seen, abs=3)


def test_evaluation_takes_the_numbers_of_a_file(tmp_path: Path) -> None:
    """As the programs do with whose figures its own are compared."""
    (tmp_path / "a.png").write_bytes(file_of(Image.new("RGB", (8, 8), COLOUR), "PNG", P3))
    assert open_image_set(str(tmp_path), "reference").pixels([0], 8)[0, 0, 0].tolist() == list(COLOUR)


# ---------------------------------------------------------------------------------------------------- EXIF orientation


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def behind_the_pixels(png: bytes) -> bytes:
    """A PNG with its eXIf chunk moved behind its pixels, as some editors write it."""
    at = png.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(png[at : at + 4], "big")
    return png[:at] + png[end:-12] + png[at:end] + png[-12:]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG, behind", "WEBP"])
@pytest.mark.parametrize("side", [4, 300])
def test_the_index_has_the_sides_of_the_image_that_is_decoded(
    tmp_path: Path, kind: str, number: int, side: int
) -> None:
    """Of 300 x 400 pixels of noise no file is read whole by the index."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side + 100, 3), np.uint8))
    data = file_of(noise, kind.partition(",")[0], None, exif=orientation(number))
    data = behind_the_pixels(data) if "behind" in kind else data
    [shard] = write_shards([("a", data, kind.partition(",")[0].lower(), "x")], tmp_path / "s", 10)
    found = ImageTextIndex([shard])
    sides = (side, side + 100) if number >= 5 else (side + 100, side)
    assert (int(found.width[0]), int(found.height[0])) == sides == load_rgb(data, 10**6).size
    assert (found.image_rules is not None) == (number >= 5 and kind.startswith("PNG"))


def test_an_index_from_before_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(Image.new("RGB", (40, 20)), "PNG", None, exif=orientation(6))
    shards: list[Shard] = [*write_shards([("a", data, "png", "x")], tmp_path / "s", 10)]
    with monkeypatch.context() as before:
        before.setattr(shard_index, "_FORMAT", b"7")
        before.setattr(index, "_PACKED_VERSION", 8)
        before.setattr(images, "_is_transposed", lambda _: False)
        old = ImageTextIndex(shards, tmp_path / "cache")
        assert (old.width[0], old.height[0], old.image_rules) == (40, 20, None)
    now = ImageTextIndex(shards, tmp_path / "cache")
    assert (now.width[0], now.height[0], now.image_rules) == (20, 40, IMAGE_RULES)
    assert now.fingerprint == old.fingerprint


def test_what_looks_like_exif_is_not_taken_for_it_and_costs_little() -> None:
    data = file_of(Image.new("RGB", (40, 20)), "PNG", None, exif=orientation(6))
    damaged = behind_the_pixels(data)
    at = damaged.index(b"eXIf") + 8
    damaged = damaged[:at] + b"\xff" + damaged[at + 1 :]
    assert read_header(damaged)[:2] == (40, 20)
    plain = file_of(Image.new("RGB", (40, 20)), "PNG", None)
    began = time.perf_counter()
    assert read_header(plain, b"\0\0\x7f\0eXIf" * (1 << 13))[:2] == (40, 20)
    assert time.perf_counter() - began < 0.1
