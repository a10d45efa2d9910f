"""Sets of images and of prompts that evaluation reads and writes: folders, shards, prompt files."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from .config import DataConfig
from .errors import DataError, SampleError
from .files import json_digest, parse_json, temporary_beside
from .images import IMAGE_EXTENSIONS, load_rgb
from .index import ImageTextIndex
from .order import mix
from .samples import RawSample, SampleFiles, captions_of
from .storage import LocalBytes, open_shards
from .tar import members

ImageFormat = Literal["png", "jpeg"]
_SUBSET_SEED = 0x5E7


@dataclass(frozen=True)
class ImageSet:
    """Images by number. name: what messages call the set. fingerprint: identifies which images it holds."""

    name: str
    fingerprint: str
    size: int
    _load: Callable[[int], Image.Image]
    _caption: Callable[[int], str] | None = None

    def __len__(self) -> int:
        return self.size

    def pixels(self, numbers: Sequence[int], side: int) -> np.ndarray:
        """uint8 [n, side, side, 3]: the largest square in the centre of each image, resized by PIL's Lanczos filter
        where it has another size. Raises DataError where an image cannot be read: a hole would change every figure."""
        return np.stack([self._square(number, side) for number in numbers])

    def _square(self, number: int, side: int) -> np.ndarray:
        try:
            image = self._load(number)
        except (SampleError, OSError) as error:
            raise DataError(
                f"{self.name}: image {number} cannot be read ({error}): replace it, or leave it out"
            ) from None
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        square = image.crop((left, top, left + short, top + short))
        return np.asarray(square if short == side else square.resize((side, side), Image.Resampling.LANCZOS))

    def captions(self) -> list[str]:
        """The first caption of each image. Raises DataError where the set has none."""
        if self._caption is None:
            raise DataError(f"{self.name} is a folder of images, which have no captions: give shards, or a prompt file")
        return [self._caption(number) for number in range(self.size)]


def open_image_set(spec: str, key: str, count: int | None = None) -> ImageSet:
    """A folder of images, subfolders included, or shards. key: the config key or option that names them.

    count: images of a fixed subset, which depends on the number of images alone; None takes all. Raises DataError where
    there are fewer, or none.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir() and not any(folder.glob("*.tar")):
        return _folder(folder, key, count)
    index = ImageTextIndex(open_shards(spec, key))
    if index.dataset is not None:
        raise DataError(f"{key}: {spec} holds latents, no images: name the shards they were made from")
    files = SampleFiles(index, DataConfig(), images_only=False)
    chosen = _subset(len(index), count, key, spec)

    def sample(number: int) -> RawSample:
        return files.sample(*index.locate(int(chosen[number])))

    def caption(number: int) -> str:
        try:
            return captions_of(index, sample(number)).texts[0]
        except SampleError as error:
            raise DataError(f"{key}: {spec}: image {number} has no caption that can be read ({error})") from None

    def load(number: int) -> Image.Image:
        return _as_stored(sample(number).member("image"))

    return ImageSet(f"{key}: {spec}", json_digest([index.fingerprint, len(chosen)]), len(chosen), load, caption)


def _as_stored(data: bytes) -> Image.Image:
    """An image with the numbers that its file holds, whatever its ICC profile: so do the programs whose figures are
    compared with."""
    return load_rgb(data, DataConfig().max_image_pixels, convert_colours=False)


def resized_bicubic(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 [n, H, W, 3] -> uint8 [n, side, side, 3], by PIL's bicubic filter."""
    if images.shape[1:3] == (side, side):
        return images
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    )


def image_files(folder: Path, key: str, count: int | None) -> list[Path]:
    """The images of a folder that open_image_set takes, in its order."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not found:
        raise DataError(f"{key}: {folder} holds neither images ({', '.join(IMAGE_EXTENSIONS)}) nor .tar shards")
    return [found[int(i)] for i in _subset(len(found), count, key, str(folder))]


def _folder(folder: Path, key: str, count: int | None) -> ImageSet:
    paths = image_files(folder, key, count)
    identity = [(str(path.relative_to(folder)), path.stat().st_size) for path in paths]

    def load(number: int) -> Image.Image:
        return _as_stored(paths[number].read_bytes())

    return ImageSet(f"{key}: {folder}", json_digest(identity), len(paths), load)


def open_npz_images(path: Path, key: str) -> ImageSet:
    """The images uint8 [n, H, W, 3] that an .npz holds as arr_0."""
    (images,) = read_npz(path, key, ["arr_0"], "has no images", "an array arr_0 beside its statistics")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DataError(f"{key}: arr_0 of {path} is {images.dtype} {images.shape}; expected uint8 [n, H, W, 3]")
    identity = hashlib.sha256(images[:: max(1, len(images) // 100)].tobytes()).hexdigest()
    fingerprint = json_digest([identity, images.shape])
    return ImageSet(f"{key}: {path}", fingerprint, len(images), lambda number: Image.fromarray(images[number]))


def read_npz(path: Path, key: str, names: Sequence[str], lacks: str, expected: str) -> list[np.ndarray]:
    """The arrays `names` of an .npz. Raises DataError where the file is damaged or holds none of a name. lacks,
    expected: what that message says of the file."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except KeyError as error:
        raise DataError(f"{key}: {path} {lacks}: {error.args[0]}; expected {expected}") from None
    # What numpy raises for files that are cut, empty, or no .npz at all.
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{key}: {path} cannot be read ({error}); docs/evaluate.md says where to get it") from None


def _subset(size: int, count: int | None, key: str, spec: str) -> np.ndarray:
    """The `count` numbers below size with the smallest hashes, in rising order."""
    if count is None:
        return np.arange(size)
    if count > size:
        raise DataError(f"{key}: {spec} holds {size} images, {count} are wanted")
    return np.sort(np.argsort(mix(_SUBSET_SEED, np.arange(size)), kind="stable")[:count])


# ------------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """text: untruncated. facts: what else the file says of it."""

    text: str
    facts: Mapping[str, Any]


def read_prompts(path: str, key: str) -> list[Prompt]:
    """The prompts of a file, in its order. Raises DataError that names an entry without a prompt.

    .txt: one prompt per line. .jsonl: objects with "prompt" or "caption". .json: a list of such objects, or an object
    whose values they are. Anything else: shards, whose samples' first captions are the prompts.
    """
    file = Path(path).expanduser()
    if file.suffix not in (".txt", ".jsonl", ".json"):
        return [Prompt(caption, {}) for caption in open_image_set(path, key).captions()]
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            return [Prompt(line.strip(), {}) for line in text.split("\n") if line.strip()]
        if file.suffix == ".jsonl":
            entries = [parse_json(line) for line in text.split("\n") if line.strip()]
        else:
            loaded = parse_json(text)
            entries = list(loaded.values()) if isinstance(loaded, dict) else loaded
    except (OSError, ValueError) as error:
        raise DataError(f"{key}: {file} cannot be read ({error}); docs/evaluate.md says what it is") from None
    if not isinstance(entries, list):
        raise DataError(f"{key}: {file} is neither a list nor an object of prompts; docs/evaluate.md says what it is")
    return [_prompt(entry, f"{key}: {file}: entry {number}") for number, entry in enumerate(entries, 1)]


def _prompt(entry: Any, where: str) -> Prompt:
    text = (entry.get("prompt") or entry.get("caption")) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where} has no "prompt" and no "caption"')
    return Prompt(text, entry)


# ----------------------------------------------------------------------------------------------------- written batches


def write_images(
    path: Path, numbers: Sequence[int], images: np.ndarray, prompts: Sequence[Prompt], kind: ImageFormat, quality: int
) -> None:
    """Write images uint8 [n, H, W, 3], their numbers and untruncated prompts as a shard: complete or absent."""
    with (
        temporary_beside(path) as temporary,
        open(temporary, "wb") as file,
        TarWriter(file, user="mudit", group="mudit", mode=0o644, mtime=0) as tar,
    ):
        for number, pixels, prompt in zip(numbers, images, prompts, strict=True):
            facts = {"json": json.dumps(dict(prompt.facts)).encode()} if prompt.facts else {}
            tar.write({"__key__": f"{number:08d}", kind: _encoded(pixels, kind, quality), "txt": prompt.text, **facts})


def _encoded(pixels: np.ndarray, kind: ImageFormat, quality: int) -> bytes:
    buffer = io.BytesIO()
    if kind == "png":
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def as_read_back(images: np.ndarray, kind: ImageFormat, quality: int) -> np.ndarray:
    """The images, uint8 [n, H, W, 3], that read_images would return after write_images."""
    if kind == "png":
        return images
    return np.stack([np.asarray(load_rgb(_encoded(pixels, kind, quality), 1 << 30)) for pixels in images])


def read_images(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """The images uint8 [n, H, W, 3] of a shard of write_images. Raises DataError where it does not hold just these
    numbers."""
    try:
        with open(path, "rb") as file:
            reader = LocalBytes(file.fileno())
            found = {m.name: reader.read_at(m.offset, m.size) for m in members(reader)}
        files = {name: data for name, data in found.items() if name.endswith((".png", ".jpeg"))}
        images = {int(name.partition(".")[0]): np.asarray(load_rgb(data, 1 << 30)) for name, data in files.items()}
    except (OSError, ValueError, SampleError) as error:  # TarError is a ValueError
        raise DataError(f"{path} cannot be read ({error}): remove it, and its images are made again") from None
    if sorted(images) != sorted(numbers):
        raise DataError(f"{path} holds other images than the suite's: remove it, and they are made again")
    return np.stack([images[number] for number in numbers])
