"""Make the demo's shards: Fluent emoji on coloured backgrounds, captioned "a hot dog on a teal background".

Pictures: Fluent 3D emoji (MIT); names: emojibase-data (MIT); both come as npm packages.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data.errors import DataError
from data.write_shards import write_shards
from examples.archives import Archive, make_once
from examples.palette import PALETTE
from launch.common import run

VERSION = "1"  # of what this script writes: shards of another version are made anew
EMOJI_ARCHIVE = Archive(
    "@lobehub/fluent-emoji-3d@1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
NAMES_ARCHIVE = Archive(
    "emojibase-data@17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
EMOJI_SHARE = 0.8  # of the image's side, so that its border shows the background
HELD_OUT_SHARE = 0.05  # of the emoji
PER_SHARD = 1000
WORKERS = 2


class Emoji(NamedTuple):
    """One emoji: its code points ("1f32d"), its caption without the background, and its webp file."""

    code: str
    name: str
    webp: bytes


def _code(name: str) -> str:
    """Code points in one spelling: in lower case, with dashes, without variation selectors."""
    return name.lower().replace("_", "-").replace("-fe0f", "")


def article(noun: str) -> str:
    """The article of a noun with a space behind it, "a " or "an "; "" for a plural."""
    head = re.split(r" (?:with|in|of|on|behind|holding|not|up|down|together) ?|, ", noun)[0].split()[-1]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is", "ous"))
    if plural or head in ("people", "men", "women"):
        return ""
    starts_with_vowel = noun[0] in "aeiou8" and not noun.startswith(("uni", "euro", "one"))
    return "an " if starts_with_vowel or noun.startswith("hour") else "a "


def readable(label: str) -> str:
    """An emoji's label in words: in lower case, "flag: France" as "flag of france", without quotes and brackets."""
    text = re.sub(r" \(.*?\)|[“”!]", "", label.lower()).replace("’", "'")
    head, _, tail = text.partition(": ")
    if not tail:
        return text
    if head == "keycap":
        return f"keycap {tail}"
    if tail == "bald":
        return f"bald {head}"
    return f"{head} {'with' if head in ('man', 'woman', 'person') else 'of'} {tail}"


def read_emoji(archives: Path) -> list[Emoji]:
    """All emoji that have a name, without variants of skin tone. The archives are read, not unpacked to disk."""
    with tarfile.open(archives / NAMES_ARCHIVE.file_name) as tar:
        member = tar.extractfile("package/en/data.json")
        assert member is not None
        # Variants are listed under "skins" of the emoji, so the top level has none.
        labels = {_code(entry["hexcode"]): entry["label"] for entry in json.load(member)}
    emoji: dict[str, Emoji] = {}  # by code: the codes of two emoji come in two spellings
    with tarfile.open(archives / EMOJI_ARCHIVE.file_name) as tar:
        for info in tar:
            match = re.fullmatch(r"package/assets/([0-9a-zA-Z_-]+)\.webp", info.name)
            if match is None or _code(match[1]) not in labels:
                continue
            member = tar.extractfile(info)
            assert member is not None
            code = _code(match[1])
            emoji.setdefault(code, Emoji(code, readable(labels[code]), member.read()))
    return list(emoji.values())


def draw(webp: bytes, size: int) -> list[bytes]:
    """PNG files of size x size pixels: an emoji on each colour of the palette, in its order."""
    side = round(size * EMOJI_SHARE)
    corner = ((size - side) // 2, (size - side) // 2)
    with Image.open(io.BytesIO(webp)) as image:
        small = image.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    files = []
    for colour in PALETTE.values():
        frame = Image.new("RGBA", (size, size), colour)
        frame.alpha_composite(small, corner)
        buffer = io.BytesIO()
        frame.convert("RGB").save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def is_held_out(code: str) -> bool:
    """Whether an emoji belongs to the validation split."""
    return _hash(code) < HELD_OUT_SHARE


def _samples(emoji: list[Emoji], drawn: list[list[bytes]], held_out: bool) -> Iterator[tuple[str, bytes, str, str]]:
    """The samples of one split for write_shards, in an order by hash, so that neighbours are different emoji.

    drawn: the files of each emoji, as of `draw`. held_out: of the validation split.
    """
    keyed = [
        (f"{e.code}_{colour}", png, f"{article(e.name)}{e.name} on {article(colour)}{colour} background")
        for e, files in zip(emoji, drawn, strict=True)
        if is_held_out(e.code) == held_out
        for colour, png in zip(PALETTE, files, strict=True)
    ]
    for key, png, caption in sorted(keyed, key=lambda sample: _hash(sample[0])):
        yield key, png, "png", caption


def write(downloads: Path, folder: Path, size: int) -> None:
    """Draw all pictures and write the shards of both splits into `folder`."""
    emoji = read_emoji(downloads)
    with ProcessPoolExecutor(WORKERS) as pool:
        drawn = list(pool.map(draw, [e.webp for e in emoji], [size] * len(emoji), chunksize=32))
    for split, held_out in (("train", False), ("val", True)):
        paths = write_shards(_samples(emoji, drawn, held_out), folder / split, PER_SHARD)
        number = sum(is_held_out(e.code) == held_out for e in emoji)
        print(f"{split}: {number} emoji x {len(PALETTE)} backgrounds in {len(paths)} shards")


def main() -> None:
    """Parse the command line and make the demo's shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(".cache/emoji"), help="folder of the shards")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default 32)")
    parser.add_argument("--archives", type=Path, help="folder that holds, or gets, the two npm archives")
    args = parser.parse_args()
    if args.size < 8:
        raise DataError(f"--size must be at least 8 pixels, got {args.size}")
    version = json.dumps({"version": VERSION, "size": args.size})
    archives = (EMOJI_ARCHIVE, NAMES_ARCHIVE)
    make_once(args.output, version, archives, args.archives, partial(write, size=args.size))


if __name__ == "__main__":
    run(main)
