"""Data and encoders for debug runs: captioned shapes drawn with PIL, and a small T5 and DINOv2 with random weights."""

from __future__ import annotations

import hashlib
import io
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import ByT5Tokenizer, Dinov2Config, Dinov2Model, T5Config, T5EncoderModel

from .encoders.loading import quieten
from .files import folder_once
from .write_shards import write_shards

SIDE = 32  # pixels
TRAIN_SAMPLES, VAL_SAMPLES, PER_SHARD = 512, 64, 256
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (250, 220, 60),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
CLASSES = len(SHAPES) * len(COLOURS)  # a label stands for a shape and its colour
T5_SEED = DINOV2_SEED = 0
_MARKER = "version-3"  # an empty file; a folder without it was made by older code


def ensure_debug_assets(folder: Path = Path(".cache/debug")) -> Path:
    """Make train-00000{0,1}.tar, val-000000.tar, t5/ and dinov2/ in `folder`, unless they are there. -> the folder.

    Several processes may call it at the same time: the folder is complete or absent.
    """
    if folder.is_dir() and not (folder / _MARKER).is_file():
        shutil.rmtree(folder)
    if not folder.is_dir():
        with folder_once(folder) as temporary:
            samples = _samples()
            write_shards(itertools.islice(samples, TRAIN_SAMPLES), temporary / "train", PER_SHARD)
            write_shards(itertools.islice(samples, VAL_SAMPLES), temporary / "val", PER_SHARD)
            _save_t5(temporary / "t5")
            _save_dinov2(temporary / "dinov2")
            (temporary / _MARKER).touch()
    return folder


def _samples() -> Iterator[tuple[str, bytes, str, str, int]]:
    """All samples (key, image, "png", caption, label), in an order by hash so that neighbours differ."""
    places = [(x, y, radius) for radius in (7, 10) for x in (12, 16, 20) for y in (12, 16, 20)]
    drawings = [
        (shape, colour, background, *place)
        for shape, colour, background, place in itertools.product(SHAPES, COLOURS, COLOURS, places)
        if colour != background
    ]
    drawings.sort(key=lambda drawing: hashlib.sha256(repr(drawing).encode()).digest())
    for number, (shape, colour, background, x, y, radius) in enumerate(drawings):
        image = Image.new("RGB", (SIDE, SIDE), COLOURS[background])
        _draw(ImageDraw.Draw(image), shape, COLOURS[colour], x, y, radius)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        label = SHAPES.index(shape) * len(COLOURS) + list(COLOURS).index(colour)
        yield f"{number:06d}", buffer.getvalue(), "png", f"a {colour} {shape} on a {background} background", label


def _draw(draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: int, y: int, radius: int) -> None:
    """Draw a filled shape of a radius in pixels around (x, y)."""
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=colour)
    else:
        arm = radius // 3
        draw.rectangle((x - arm, top, x + arm, bottom), fill=colour)
        draw.rectangle((left, y - arm, right, y + arm), fill=colour)


def _save_t5(folder: Path) -> None:
    """Save a T5 encoder of width 64 with seeded random weights, and ByT5's tokenizer, which reads bytes."""
    quieten()
    tokenizer = ByT5Tokenizer()
    config = T5Config(
        vocab_size=384,  # 3 special tokens, 256 bytes, 125 sentinels
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    # The state of the caller's generator must not depend on whether the assets were there already.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(T5_SEED)
        model = T5EncoderModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_dinov2(folder: Path) -> None:
    """Save a DINOv2 of 32 features for 8 x 8 patches of 14 pixels, with seeded random weights."""
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=112, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DINOV2_SEED)
        model = Dinov2Model(config)
    model.save_pretrained(folder)
