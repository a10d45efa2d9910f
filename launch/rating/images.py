"""The images that raters compare: made from checkpoints or taken from folders, written alike for both runs."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.errors import DataError, SampleError
from data.files import temporary_beside
from data.images import IMAGE_EXTENSIONS, image_size, load_rgb
from launch.common import inference
from trainer.checkpoint.find import find_checkpoint

CHUNK = 32  # images that are made together; a stop loses no whole chunk
_MOST_PIXELS = 2**26


def find_source(path: Path) -> Path:
    """The folder itself where it holds images, else the checkpoint that it stands for."""
    return path if numbered_images(path) else find_checkpoint(path)


def numbered_images(folder: Path) -> dict[int, Path]:
    """{number of the prompt: file}"""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*")):
        if not path.stem.isdecimal() or path.suffix.lower().removeprefix(".") not in IMAGE_EXTENSIONS:
            continue
        if (other := found.setdefault(int(path.stem), path)) != path:
            raise DataError(f"{other} and {path} have the same number: expected one image per prompt")
    return found


def make_images(source: Path, study: dict[str, Any], folder: Path) -> None:
    """Write folder/00000.png ..., an image per prompt: those that are not there yet.

    All are encoded anew, so that neither name nor format tells where an image is from. The noise of a chunk comes from
    the study's seed plus the chunk's first number: it is the same for both runs, and after a stop.
    """
    prompts: list[str] = study["prompts"]
    folder.mkdir(exist_ok=True)
    missing = [number for number in range(len(prompts)) if not (folder / f"{number:05d}.png").is_file()]
    if not missing:
        return
    if given := numbered_images(source):
        if absent := [number for number in missing if number not in given]:
            raise DataError(
                f"{source} has no image {absent[0]}: expected one for each of {len(prompts)} prompts, from 0"
            )
        for number in missing:
            try:
                image = load_rgb(given[number].read_bytes(), _MOST_PIXELS)
            except SampleError as error:
                raise DataError(f"{given[number]}: {error}") from None
            write_image(np.asarray(image), folder / f"{number:05d}.png")
        return
    with inference(source, study["overrides"]) as (_, model):
        for start in sorted({number // CHUNK * CHUNK for number in missing}):
            chunk = prompts[start : start + CHUNK]
            for number, image in enumerate(model.images(chunk, study["seed"] + start), start):
                write_image(image, folder / f"{number:05d}.png")
            print(f"{source}: {start + len(chunk)} of {len(prompts)} images", flush=True)


def write_image(pixels: np.ndarray, path: Path) -> None:
    """Write a PNG, whole or not at all. pixels: uint8 [H, W, 3]."""
    with temporary_beside(path) as beside:
        Image.fromarray(pixels).save(beside, format="PNG")


def check_sizes(folder: Path, prompts: int) -> None:
    """Raise DataError where a pair's images differ in size, by which they would be known apart."""
    for number in range(prompts):
        a, b = (image_size((folder / run / f"{number:05d}.png").read_bytes()) for run in ("a", "b"))
        if a != b:
            raise DataError(
                f"image {number} has {a[0]} x {a[1]} pixels in RUN_A and {b[0]} x {b[1]} in RUN_B, which tells them "
                "apart: give folders of images of one size, and another --output"
            )
