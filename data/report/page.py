"""The report on a set of samples as one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..buckets import assign
from ..check import duplicate_keys
from ..config import Bucket, DataConfig
from ..errors import DataError, SampleError
from ..files import temporary_beside
from ..index import ImageTextIndex, open_index
from ..templates import render
from .charts import HEIGHT, WIDTH, Chart, chart
from .counts import Counts
from .duplicates import BITS, group
from .of_index import OfIndex, read_index
from .of_sample import OfSample, Pair, SampleReader, random_rows, read_samples

_PAIRS, _GROUPS, _OF_A_GROUP = 24, 20, 6
_ASPECTS = [(a / b, f"{a}:{b}") for a, b in ((1, 4), (1, 2), (2, 3), (1, 1), (3, 2), (2, 1), (4, 1))]
_SIDE = 160  # pixels of a picture on the page


class Settings(NamedTuple):
    """What a config says beside its section data. name: of the config, None where there is none. buckets and lengths of
    captions in tokens; both empty without a config. tokens_of: the number of tokens of each caption, None where there
    is no tokenizer. classes: of a model that is conditioned on labels."""

    name: str | None = None
    buckets: Sequence[Bucket] = ()
    global_batch_size: int = 1
    lengths: Sequence[int] = ()
    tokens_of: Callable[[list[str]], list[int]] | None = None
    classes: int | None = None


class Group(NamedTuple):
    """Near duplicates: how many, and some of them."""

    size: int
    shown: list[Pair]


def write_report(
    path: Path, cfg: DataConfig, settings: Settings, count: int, seed: int, workers: int
) -> dict[str, Any]:
    """Read the shards of a config, all by their index and `count` samples by decoding them in worker processes, and
    write the page.

    -> the figures, as JSON data. Raises DataError where the shards cannot be read, or hold no images.
    """
    index = open_index(cfg)
    if index.dataset is not None:
        raise DataError(
            f"{cfg.shards} holds precomputed latents: report on the shards of images that they were made of"
        )
    whole = read_index(index, settings.buckets, cfg.characters_per_token, settings.global_batch_size)
    reader, rows = SampleReader(index, cfg, settings.classes), random_rows(index, count, seed)
    sample = read_samples(reader, rows, workers, settings.tokens_of or _words)
    groups = group(sample.hashes, sample.colours)
    figures = _figures(index, whole, sample, groups, settings, cfg.characters_per_token)
    text = render(
        Path(__file__).with_name("templates") / "report.html",
        f=figures,
        s=settings,
        shards=cfg.shards,
        charts=_charts(whole, sample, settings),
        groups=_groups(reader, sample, groups),
        pairs=_pairs(reader, rows, _PAIRS),
        picture=picture,
        seed=seed,
        bits=BITS,
        width=WIDTH,
        height=HEIGHT,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return figures


def _words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


# ---------------------------------------------------------------------------------------------------------- figures


def _figures(
    index: ImageTextIndex,
    whole: OfIndex,
    sample: OfSample,
    groups: np.ndarray,
    settings: Settings,
    characters_per_token: float,
) -> dict[str, Any]:
    kinds, sizes = np.unique(groups, return_counts=True)
    repeated = sizes[sizes > 1]
    keys = duplicate_keys(index)
    return {
        "samples": whole.samples,
        "shards": whole.shards,
        "image_bytes": whole.bytes,
        "megapixels": whole.pixels / max(1, len(whole.sides)) / 1e6,
        "unknown_size": whole.unknown_size,
        "labelled": whole.labelled,
        "filter": index.filtered,
        "remarks": index.remarks,
        "side": _spread(whole.sides),
        "captions": {"with": len(whole.characters), "characters": _spread(whole.characters)},
        "lengths": _lengths(sample, settings, characters_per_token),
        "buckets": _buckets(whole),
        "joined": whole.joined,
        "text_lengths": {
            length: sum(one.samples for bucket, one in whole.buckets.items() if bucket.text_length == length)
            for length in settings.lengths
        },
        "decoded": sample.of,
        "holes": {reason: [count, sample.examples[reason]] for reason, count in sample.reasons.most_common()},
        "near_duplicates": {
            "groups": len(repeated),
            "images": int(repeated.sum()),
            "largest": int(repeated.max(initial=0)),
            "kinds": len(kinds),
            "pair_seen": (sample.of / max(1, whole.samples)) ** 2,
        },
        "duplicate_keys": {"samples": keys["samples"], "examples": [" = ".join(names) for names in keys["examples"]]},
    }


def _buckets(whole: OfIndex) -> list[dict[str, Any]]:
    """A row for each size of image, from tall to wide; buckets of all lengths of text together."""
    sizes = sorted({bucket[:2] for bucket in whole.buckets}, key=lambda size: size[1] / size[0])
    of_size = {size: [one for bucket, one in whole.buckets.items() if bucket[:2] == size] for size in sizes}
    return [
        {
            "size": f"{width} x {height}",
            "samples": (samples := sum(one.samples for one in taken)),
            "upscaled": sum(one.upscaled for one in taken),
            "cut": sum(one.cut for one in taken) / samples,
        }
        for (height, width), taken in of_size.items()
    ]


def _spread(counts: Counts) -> dict[str, int]:
    """{} where there are none."""
    quantiles = {"least": 0.0, "median": 0.5, "95 %": 0.95, "most": 1.0}
    return {name: counts.quantile(share) for name, share in quantiles.items()} if len(counts) else {}


def _lengths(sample: OfSample, settings: Settings, characters_per_token: float) -> dict[str, Any] | None:
    """The captions' lengths in tokens, and the share that the run cuts; None where there are no captions."""
    if not len(sample.lengths):
        return None
    found: dict[str, Any] = {"unit": "tokens" if settings.tokens_of else "words", "captions": len(sample.lengths)}
    found |= {"spread": _spread(_counted(sample.lengths))}
    if settings.tokens_of and settings.lengths:
        square = np.ones_like(sample.lengths)
        buckets = [Bucket(1, 1, length) for length in settings.lengths]
        own = np.array(settings.lengths)[assign(square, square, sample.characters, buckets, characters_per_token)]
        found["above"] = {length: float((sample.lengths > length).mean()) for length in settings.lengths}
        found["cut"] = float((sample.lengths > own).mean())
        found["characters_per_token"] = float(sample.characters.sum() / max(1, sample.lengths.sum()))
    return found


def _counted(values: np.ndarray) -> Counts:
    counts = Counts(int(values.max(initial=0)))
    counts.add(values)
    return counts


# --------------------------------------------------------------------------------------------------------- pictures


def _charts(whole: OfIndex, sample: OfSample, settings: Settings) -> dict[str, Chart]:
    charts, cut = {}, max(settings.lengths, default=np.inf) if settings.tokens_of else np.inf
    if len(whole.sides):
        sizes = {min(bucket[:2]) for bucket in settings.buckets[:1]}
        charts["sides"] = chart(whole.sides.bins(), "pixels", [(side, f"square bucket: {side}") for side in sizes])
        charts["aspects"] = chart(whole.aspect_bins(), "width / height", ticks=_ASPECTS, written="{:.2f}")
    if len(whole.characters):
        charts["characters"] = chart(whole.characters.bins(), "characters")
    if len(sample.lengths):
        marks = [(length + 1, f"{length}") for length in settings.lengths] if settings.tokens_of else []
        unit = "tokens" if settings.tokens_of else "words"
        charts["lengths"] = chart(_counted(sample.lengths).bins(), unit, marks, cut + 1)
    return charts


def _groups(reader: SampleReader, sample: OfSample, groups: np.ndarray) -> list[Group]:
    """The largest groups of near duplicates."""
    kinds, sizes = np.unique(groups, return_counts=True)
    found = []
    for place in np.argsort(-sizes, kind="stable")[:_GROUPS]:
        if sizes[place] < 2:
            break
        members = np.flatnonzero(groups == kinds[place])
        found.append(Group(int(sizes[place]), _pairs(reader, sample.rows[members], _OF_A_GROUP)))
    return found


def _pairs(reader: SampleReader, rows: np.ndarray, count: int) -> list[Pair]:
    """The first `count` of these samples that can be read."""
    pairs: list[Pair] = []
    for row in rows:
        if len(pairs) == count:
            break
        try:
            pairs.append(reader.pair(int(row), _SIDE))
        except SampleError:
            continue
    return pairs


def picture(image: Image.Image) -> str:
    """An image as an address that holds the image itself."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
