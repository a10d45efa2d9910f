"""Build shards from images and captions, or the index of existing shards.

python launch/shard.py --images DIR --output PREFIX          DIR holds NAME.jpg and NAME.txt (or NAME.json)
python launch/shard.py --manifest FILE.jsonl --output PREFIX lines {"image": path, "caption": "..."}
python launch/shard.py index SHARD... [--workers N]          shards, folders, patterns or URLs
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data.config import DataConfig
from data.errors import DataError, SampleError
from data.images import IMAGE_EXTENSIONS, image_size, load_rgb
from data.shard_index import ABSENT, captions_from_bytes, load_index
from data.storage import Shard, open_shards
from data.write_shards import write_shards
from launch.common import run

MAX_KEY = 80  # characters, within the 100 that every tar reader takes
JPEG_QUALITY = 95


class Source(NamedTuple):
    """One captioned image on disk; key is its name in the shard."""

    key: str
    image: Path
    caption: str


def _key(name: str, used: set[str]) -> str:
    """A key that is safe in every tar and free of dots, which end a WebDataset key; unique by a hash."""
    key = re.sub(r"[^A-Za-z0-9_/-]", "_", name)
    if key != name or len(key) > MAX_KEY or key in used:
        key = f"{key[:MAX_KEY]}-{hashlib.sha256(f'{name}/{len(used)}'.encode()).hexdigest()[:8]}"
    used.add(key)
    return key


def _caption_beside(image: Path) -> str:
    """Caption in the .txt or .json file of the image's name; SampleError where there is none."""
    for extension in ("txt", "json"):
        path = image.with_suffix(f".{extension}")
        if path.is_file():
            return captions_from_bytes(path.read_bytes(), is_json=extension == "json").texts[0]
    raise SampleError("caption: missing")


def sources_in_folder(folder: Path, skipped: Counter[str]) -> list[Source]:
    """Captioned images below a folder, sorted by path; those without a usable caption are counted."""
    if not folder.is_dir():
        raise DataError(f"--images {folder}: there is no such folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"--images {folder}: this folder cannot be read; check its permissions")
    extensions = {f".{e}" for e in IMAGE_EXTENSIONS}
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in extensions and p.is_file())
    if not images:
        raise DataError(f"--images {folder}: no image in this folder; expected {', '.join(sorted(extensions))}")
    sources, used = [], set[str]()
    for image in images:
        try:
            caption = _caption_beside(image)
        except SampleError as error:
            skipped[str(error)] += 1
            continue
        name = image.relative_to(folder).with_suffix("").as_posix()
        sources.append(Source(_key(name, used), image, caption))
    if not sources:
        raise DataError(
            f"--images {folder}: none of the {len(images)} images has a caption; expected NAME.txt or NAME.json "
            '({"caption": "..."}) beside NAME.jpg'
        )
    return sources


def sources_in_manifest(manifest: Path) -> list[Source]:
    """Captioned images of a manifest; image paths are relative to its folder. A bad line is an error."""
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--manifest {manifest} cannot be read: {error}") from error
    sources, used = [], set[str]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, caption = manifest.parent / entry["image"], entry["caption"].strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{manifest}, line {number}: expected {{"image": "path", "caption": "text"}}, got {line[:100]!r}'
            ) from error
        if not caption:
            raise DataError(f"{manifest}, line {number}: the caption is empty")
        if not image.is_file():
            raise DataError(f"{manifest}, line {number}: there is no image {image}")
        sources.append(Source(_key(Path(entry["image"]).with_suffix("").as_posix(), used), image, caption))
    if not sources:
        raise DataError(f"--manifest {manifest} is empty")
    return sources


def _resized(data: bytes, side: int) -> tuple[bytes, str]:
    """(image file, extension) with the shorter side reduced to `side`; JPEG stays JPEG, others become PNG."""
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
    sources: list[Source], resize: int | None, skipped: Counter[str]
) -> Iterator[tuple[str, bytes, str, str]]:
    """(key, image file, extension, caption) of readable images; the others are counted."""
    used = 0
    for source in sources:
        extension = source.image.suffix[1:].lower()
        try:
            data = source.image.read_bytes()
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
        yield source.key, data, extension, source.caption
    if not used:
        raise DataError(f"none of the {len(sources)} images can be read: {dict(skipped)}; nothing was written")


def build_shards(args: argparse.Namespace) -> None:
    """Write the shards that the command line asks for."""
    if (args.images is None) == (args.manifest is None):
        raise DataError("give either --images DIR or --manifest FILE.jsonl (see --help)")
    if args.output is None:
        raise DataError("give --output PREFIX: shards become PREFIX-000000.tar ...")
    if args.resize is not None and args.resize < 1:
        raise DataError(f"--resize must be at least 1 pixel, got {args.resize}")
    skipped: Counter[str] = Counter()
    sources = sources_in_folder(args.images, skipped) if args.images else sources_in_manifest(args.manifest)
    paths = write_shards(read_samples(sources, args.resize, skipped), args.output, args.per_shard)
    written = sum(load_index(path).table.num_rows for path in paths)
    print(f"{written} samples in {len(paths)} shards: {paths[0]} ... {paths[-1].name}")
    for reason, count in sorted(skipped.items()):
        print(f"skipped {count}: {reason}")


def _index_shard(shard: Shard, cache: Path) -> str:
    """Build the index of a shard anew; says what is in it, or what is wrong (raising it would end the others)."""
    try:
        table = load_index(shard, cache, rebuild=True).table
    except DataError as error:
        return f"error: {error}"
    width, caption, label = (table.column(name).to_numpy() for name in ("width", "caption_length", "label"))
    has = {"a readable image": width > 0, "a caption": caption != ABSENT, "a class label": label >= 0}
    counts = [f"{int(rows.sum())} with {what}" for what, rows in has.items()]
    return f"{shard}: {table.num_rows} samples, {', '.join(counts)}"


def index_shards(specs: list[str], workers: int, cache: Path) -> None:
    """Build the index of every shard anew, several at a time. DataError in the end where some have none."""
    if workers < 1:
        raise DataError(f"--workers must be at least 1, got {workers}")
    shards = [shard for spec in specs for shard in open_shards(spec, "SHARD")]
    failed = []
    with contextlib.ExitStack() as stack:
        apply = map
        if workers > 1:  # forked from a server, not from here, where the listing of URLs may have left threads
            context = get_context("forkserver")
            context.set_forkserver_preload(["launch.shard"])  # the imports once, not in each of them
            processes = ProcessPoolExecutor(min(workers, len(shards)), context)
            apply = stack.enter_context(processes).map
        for line in apply(_index_shard, shards, [cache] * len(shards)):
            if line.startswith("error: "):
                failed.append(line.removeprefix("error: "))
            print(line, flush=True)
    if failed:
        raise DataError(f"{len(failed)} of {len(shards)} shards have no index; the first: {failed[0]}")


def main() -> None:
    """Parse the command line and run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images with captions beside them")
    parser.add_argument("--manifest", type=Path, help="JSON lines with image and caption")
    parser.add_argument("--output", type=Path, help="prefix of the shards, e.g. shards/train")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples a shard (default 1000)")
    parser.add_argument("--resize", type=int, help="reduce the shorter side to this many pixels")
    commands = parser.add_subparsers(dest="command", metavar="index SHARD...")
    index = commands.add_parser("index", help="build the index of existing shards")
    index.add_argument("shards", nargs="+", help="shards, folders, patterns or URLs")
    index.add_argument("--workers", type=int, default=1, help="shards indexed at the same time")
    index.add_argument("--cache", type=Path, default=Path(DataConfig.index_cache), help="for indexes of URLs")
    args = parser.parse_args()
    if args.command == "index":
        index_shards(args.shards, args.workers, args.cache)
    else:
        build_shards(args)


if __name__ == "__main__":
    run(main)
