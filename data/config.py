"""Configuration of the data room: which shards, which text encoder, which autoencoder (stdlib only)."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

SYNTHETIC = "synthetic"
NONE = "none"
BUCKET_STEPS = 16  # sides of buckets are multiples of this part of data.resolution


class Bucket(NamedTuple):
    """What the samples of one step have in common: height and width in pixels, and the most tokens of a caption."""

    height: int
    width: int
    text_length: int


def _check(condition: bool, key: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{key} must be {expected}, got {value!r}")


# user:password@ of a URL, and values of a query that a store signs requests with.
_USER = re.compile(r"(?<=://)[^/@\s]+@")
_SIGNED = re.compile(r"((?:signature|sig|token|credential|key|password|secret)[^=&\s]*=)(?!\$\{)[^&\s]+", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with the secrets of its URLs replaced by ***."""
    return _SIGNED.sub(r"\1***", _USER.sub("***@", text))


def _check_no_secret(key: str, text: str | None) -> None:
    if text is not None and redact(text) != text:
        raise ValueError(
            f"{key} holds a password or a signed query ({redact(text)}), and the config is stored with the run: write "
            "${NAME} in its place, which is read from the environment, or use the store's own variables (AWS_PROFILE)"
        )


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources of samples.

    shards, captions: as data.shards and data.captions. weight: its share of the samples, relative to the others'.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    shards: str
    weight: float = 1.0
    captions: str | None = None

    def __post_init__(self) -> None:
        _check(
            self.shards.strip() not in ("", SYNTHETIC), "data.sources: shards", "a folder or .tar files", self.shards
        )
        _check(0 < self.weight < math.inf, "data.sources: weight", "a number above 0", self.weight)
        _check_no_secret("data.sources: shards", self.shards)
        _check_no_secret("data.sources: captions", self.captions)


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are read.

    shards: a folder of .tar files, a .tar path, a pattern of paths with commas, braces or wildcards
        (`dir/train-{000000..000004}.tar`), or `synthetic`. URLs (s3://, https://, ...) are read in ranges; ${NAME}
        stands for a variable of the environment. Shards of launch/precompute.py hold latents, text states and features.
    val_shards: the same for validation; None validates on the training shards.
    resolution: side of the square images in pixels.
    buckets: `aspect` trains on images of several aspect ratios (see bucket_sizes), `none` on squares.
    max_aspect: the longest bucket's longer side over its shorter one.
    text_lengths: most tokens of a caption, rising; each is a bucket of its own. The last one is
        text_encoder.max_length; none is that alone.
    characters_per_token: by which a caption's number of tokens is estimated when its bucket is chosen. At 1 (at least
        one character a token) no caption is cut that text_encoder.max_length would not cut.
    num_workers: reader processes a rank; 0 reads in the training process.
    crop: where the largest part of the wanted shape is cut from an image: at random, or its centre (always that of
        latents, and of what is validated on).
    flip: probability of a horizontal flip. A caption that says "left" is wrong of a flipped image.
    label_dropout: probability that a class label is replaced by "no class" (models of classes).
    epochs: how often the set is read; None repeats it for ever.
    max_bad_share: the run stops when more than this share of samples is unreadable.
    max_image_pixels: larger images are not decoded.
    sources: several sets, each with its weight, in place of shards.
    captions: .jsonl or .parquet of captions by image for shards that hold none (of val_shards as well).
    index_cache: folder for packed indexes, and for those of shards whose folder cannot be written.
    prefetch_mib: the most memory that a reader process (num_workers) holds in bytes read ahead from URLs.
    timeout_s: a read of a URL that takes longer is given up and tried again.
    retries: so often; then its samples are holes.
    cache_dir: folder that keeps what was read from URLs; None keeps nothing.
    cache_gib: the most that cache_dir holds; least recently used blocks go first.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    shards: str = SYNTHETIC
    val_shards: str | None = None
    resolution: int = 256
    buckets: Literal["none", "aspect"] = "none"
    max_aspect: float = 2.0
    text_lengths: tuple[int, ...] = ()
    characters_per_token: float = 1.0
    num_workers: int = 2
    crop: Literal["random", "center"] = "random"
    flip: float = 0.5
    label_dropout: float = 0.1
    epochs: int | None = None
    max_bad_share: float = 0.01
    max_image_pixels: int = 100_000_000
    sources: tuple[SourceConfig, ...] = ()
    captions: str | None = None
    index_cache: str = ".cache/index"
    prefetch_mib: int = 1024
    timeout_s: float = 60.0
    retries: int = 4
    cache_dir: str | None = None
    cache_gib: float = 100.0

    @property
    def synthetic(self) -> bool:
        """Whether samples are made, not read."""
        return self.shards == SYNTHETIC and not self.sources

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources that are read: `sources`, or the one that `shards` names."""
        own = () if self.shards == SYNTHETIC else (SourceConfig(self.shards, captions=self.captions),)
        return self.sources or own

    def bucket_sizes(self, multiple: int) -> list[tuple[int, int]]:
        """(height, width) in pixels of the images, the square first, then by rising aspect ratio.

        Areas are near resolution²: the shorter side falls in steps of resolution / 16 (of a multiple of `multiple`, the
        pixels along a token), and the longer one is the nearest such number. 256: 16 to a step, 256 x 256,
        240 x 272, 224 x 288, 208 x 320, 192 x 336 and the same on end.
        """
        sizes = [(self.resolution, self.resolution)]
        if self.buckets == "none":
            return sizes
        step = multiple * max(1, round(self.resolution / BUCKET_STEPS / multiple))
        for short in range(self.resolution - step, 0, -step):
            long = step * round(self.resolution**2 / short / step)
            if long > self.max_aspect * short:
                break
            sizes += [(short, long), (long, short)]
        return sizes

    def __post_init__(self) -> None:
        _check(self.shards.strip() != "", "data.shards", "a folder, .tar files or 'synthetic'", self.shards)
        _check(self.resolution >= 1, "data.resolution", "at least 1 (pixels)", self.resolution)
        _check(1 <= self.max_aspect <= 8, "data.max_aspect", "between 1 and 8", self.max_aspect)
        rising = all(a < b for a, b in itertools.pairwise((0, *self.text_lengths)))
        _check(rising, "data.text_lengths", "rising numbers of tokens from 1 on", list(self.text_lengths))
        _check(
            0 < self.characters_per_token < math.inf,
            "data.characters_per_token",
            "a number above 0",
            self.characters_per_token,
        )
        _check(self.num_workers >= 0, "data.num_workers", "at least 0", self.num_workers)
        _check(0.0 <= self.flip <= 1.0, "data.flip", "between 0 and 1", self.flip)
        _check(0.0 <= self.label_dropout <= 1.0, "data.label_dropout", "between 0 and 1", self.label_dropout)
        _check(self.epochs is None or self.epochs >= 1, "data.epochs", "at least 1, or null", self.epochs)
        _check(0.0 <= self.max_bad_share <= 1.0, "data.max_bad_share", "between 0 and 1", self.max_bad_share)
        _check(self.max_image_pixels >= 1, "data.max_image_pixels", "at least 1", self.max_image_pixels)
        if self.sources and self.shards != SYNTHETIC:
            raise ValueError("data.shards and data.sources exclude each other: name the shards in data.sources")
        for key, text in (("shards", self.shards), ("val_shards", self.val_shards), ("captions", self.captions)):
            _check_no_secret(f"data.{key}", text)
        _check(self.prefetch_mib >= 1, "data.prefetch_mib", "at least 1", self.prefetch_mib)
        _check(0 < self.timeout_s < math.inf, "data.timeout_s", "a number of seconds above 0", self.timeout_s)
        _check(self.retries >= 0, "data.retries", "at least 0", self.retries)
        _check(0 < self.cache_gib < math.inf, "data.cache_gib", "a number of GiB above 0", self.cache_gib)


@dataclass(frozen=True)
class TextEncoderConfig:
    """The frozen text encoder.

    path: a local folder or hub id; `none` where text states come with the data.
    subfolder: folder below path, as in a diffusers pipeline (`text_encoder_3`).
    max_length: tokens a caption; longer captions are cut.
    dropout: probability that a caption is replaced by the empty one, before it is encoded.
    width: hidden size of the encoder, checked against the one that is loaded.
    device: `cpu` keeps it in the host's memory and computes there; None is where the model is.
    shard: over the processes of a node, each of which otherwise holds a whole copy.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str = NONE
    subfolder: str | None = None
    max_length: int = 256
    dropout: float = 0.1
    width: int = 4096
    device: Literal["cpu"] | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        _check(self.max_length >= 1, "text_encoder.max_length", "at least 1 (tokens)", self.max_length)
        _check(0.0 <= self.dropout <= 1.0, "text_encoder.dropout", "between 0 and 1", self.dropout)
        _check(self.width >= 1, "text_encoder.width", "at least 1", self.width)


@dataclass(frozen=True)
class AutoencoderConfig:
    """The frozen image autoencoder.

    path: a local folder or hub id of a diffusers AutoencoderKL; `none` trains on pixels (channels 3, downsample 1),
        or on synthetic latents.
    subfolder: folder below path (`vae`).
    channels: latent channels; downsample: pixels a latent side. Both are checked against the one loaded.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str = NONE
    subfolder: str | None = None
    channels: int = 16
    downsample: int = 8

    def __post_init__(self) -> None:
        _check(self.channels >= 1, "autoencoder.channels", "at least 1", self.channels)
        _check(self.downsample >= 1, "autoencoder.downsample", "at least 1", self.downsample)
