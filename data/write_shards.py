"""Captioned images on disk -> WebDataset shards with their indexes."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from webdataset.writer import TarWriter

from .captions import CaptionChoice, NoCaption, captions_from_bytes, captions_of_entry
from .config import DataConfig
from .errors import DataError, SampleError
from .files import held, parse_json, temporary_beside
from .images import IMAGE_EXTENSIONS, UNREAD_EXTENSIONS, image_size, load_rgb
from .shard_index import index_path, load_index

MAX_KEY = 80  # characters, within the 100 that every reader of tars takes
JPEG_QUALITY = 95
# Key, image file, its extension, caption or captions, and the class label where there is one.
Sample = tuple[str, bytes, str, str | CaptionChoice] | tuple[str, bytes, str, str | CaptionChoice, int]


def write_shards(samples: Iterable[Sample], prefix: Path, per_shard: int) -> list[Path]:
    """Write samples to PREFIX-000000.tar ... and index each shard.

    The same samples give the same bytes. Shards have temporary names until all are complete, so a failure, of the
    iterable too, leaves nothing. Returns the paths. Raises DataError where the folder holds shards of this prefix
    already: a shorter set would mix with the rest of the older one.
    """
    if per_shard < 1:
        raise DataError(f"--per-shard must be at least 1, got {per_shard}")
    existing = sorted(prefix.parent.glob(f"{prefix.name}-*.tar")) if prefix.parent.is_dir() else []
    if existing:
        raise DataError(f"{existing[0]} exists: remove the older shards or choose another output prefix")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{prefix.parent} cannot be made ({error}): choose another output prefix") from error

    paths: list[Path] = []
    iterator = iter(samples)
    with contextlib.ExitStack() as complete:  # its end gives all shards their names; a failure removes them
        if complete.enter_context(held(prefix.parent)):
            for leftover in prefix.parent.glob(f".{glob.escape(prefix.name)}-*.tar.*.tmp"):
                leftover.unlink()  # of a killed process
        for number in itertools.count():
            first = next(iterator, None)
            if first is None:
                break
            paths.append(prefix.with_name(f"{prefix.name}-{number:06d}.tar"))
            temporary = complete.enter_context(temporary_beside(paths[-1]))
            with (
                open(temporary, "wb") as file,
                TarWriter(file, user="mudit", group="mudit", mode=0o644, mtime=0) as tar,
            ):
                for sample in itertools.chain([first], itertools.islice(iterator, per_shard - 1)):
                    key, image, extension, caption, *label = sample
                    members = {"cls": str(label[0])} if label else {}
                    tar.write({"__key__": key, extension: image, **_caption_member(caption), **members})
        for path in paths:
            index_path(path).unlink(missing_ok=True)  # of an older shard of that name
    for path in paths:
        load_index(path)
    return paths


# ------------------------------------------------------------------------------------------------ what is on disk


class CaptionedImage(NamedTuple):
    """An image file, its captions, and the key that it gets in the shard."""

    key: str
    image: Path
    captions: CaptionChoice


def _key(name: str, used: set[str]) -> str:
    """A key that is safe in every tar and without dots, which end a WebDataset key. A hash makes it unique."""
    key = re.sub(r"[^A-Za-z0-9_/-]", "_", name)
    if key != name or len(key) > MAX_KEY or key in used:
        key = f"{key[:MAX_KEY]}-{hashlib.sha256(f'{name}/{len(used)}'.encode()).hexdigest()[:8]}"
    used.add(key)
    return key


def _caption_member(captions: str | CaptionChoice) -> dict[str, str]:
    """The member that holds a caption, or several with their weights, by its extension."""
    if isinstance(captions, str):
        return {"txt": captions}
    if len(captions.texts) == 1:
        return {"txt": captions.texts[0]}
    return {"json": json.dumps({"captions": captions.texts, "weights": captions.weights})}


def _captions_beside(image: Path) -> CaptionChoice:
    """The captions in the .txt or .json file of the image's name. Raises SampleError where there is none."""
    for extension in ("txt", "json"):
        path = image.with_suffix(f".{extension}")
        if path.is_file():
            return captions_from_bytes(path.read_bytes(), is_json=extension == "json")
    raise SampleError("caption: missing")


def images_in_folder(folder: Path, skipped: Counter[str]) -> list[CaptionedImage]:
    """The captioned images below a folder, sorted by path. Those without a usable caption are counted in `skipped` by
    reason. Raises DataError where there are none."""
    if not folder.is_dir():
        raise DataError(f"--images {folder}: there is no such folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"--images {folder}: this folder cannot be read; check its permissions")
    extensions = {f".{e}" for e in IMAGE_EXTENSIONS}
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    images = [path for path in files if path.suffix.lower() in extensions]
    unread = Counter(path.suffix[1:].lower() for path in files if path.suffix[1:].lower() in UNREAD_EXTENSIONS)
    skipped.update({f"image: {extension}, expected jpeg, png or webp": number for extension, number in unread.items()})
    if not images:
        others = f" (but {unread.total()} of {', '.join(unread)}, which are not read)" if unread else ""
        raise DataError(f"--images {folder}: no image in this folder{others}; expected {', '.join(sorted(extensions))}")
    found, used = [], set[str]()
    for image in images:
        try:
            captions = _captions_beside(image)
        except SampleError as error:
            skipped[str(error)] += 1
            continue
        name = image.relative_to(folder).with_suffix("").as_posix()
        found.append(CaptionedImage(_key(name, used), image, captions))
    if not found:
        raise DataError(
            f"--images {folder}: none of the {len(images)} images has a caption; expected NAME.txt or NAME.json "
            '({"caption": "..."}) beside NAME.jpg'
        )
    return found


def images_in_manifest(manifest: Path) -> list[CaptionedImage]:
    """The captioned images of a manifest; paths are relative to its folder. DataError where a line is bad."""
    try:
        lines = manifest.read_text(encoding="utf-8-sig").split("\n")  # not splitlines, for which U+2028 ends a line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--manifest {manifest} cannot be read: {error}") from error
    found, used = [], set[str]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
            image, captions = manifest.parent / entry["image"], captions_of_entry(entry)
        except NoCaption:
            raise DataError(f"{manifest}, line {number}: the caption is empty") from None
        except (SampleError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{manifest}, line {number}: expected {{"image": "path", "caption": "text"}}, got {line[:100]!r}'
            ) from error
        if not image.is_file():
            raise DataError(f"{manifest}, line {number}: there is no image {image}")
        found.append(CaptionedImage(_key(Path(entry["image"]).with_suffix("").as_posix(), used), image, captions))
    if not found:
        raise DataError(f"--manifest {manifest} is empty")
    return found


def _resized(data: bytes, side: int) -> tuple[bytes, str]:
    """(image file, its extension) with the shorter side reduced to `side` pixels: JPEG as JPEG, others as PNG."""
    extension = "jpg" if data.startswith(b"\xff\xd8") else "png"
    image = load_rgb(data, DataConfig.max_image_pixels, at_least=side)
    scale = side / min(image.size)
    if scale < 1:
        size = max(side, round(image.width * scale)), max(side, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    buffer = io.BytesIO()
    if extension == "jpg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue(), extension


def read_samples(
    images: Sequence[CaptionedImage], resize: int | None, skipped: Counter[str]
) -> Iterator[tuple[str, bytes, str, CaptionChoice]]:
    """(key, image file, extension, captions) of each readable image, as write_shards takes it; the others are counted
    in `skipped` by reason. resize: the most pixels of the shorter side; None keeps the files as they are. Raises
    DataError where no image is readable."""
    used = 0
    for each in images:
        extension = each.image.suffix[1:].lower()
        try:
            data = each.image.read_bytes()
            if resize is None:
                image_size(data)
            else:
                data, extension = _resized(data, resize)
        except SampleError as error:
            skipped[str(error)] += 1
            continue
        except OSError:
            skipped["image: cannot be read"] += 1
            continue
        used += 1
        yield each.key, data, extension, each.captions
    if not used:
        raise DataError(f"none of the {len(images)} images can be read: {dict(skipped)}; nothing was written")
