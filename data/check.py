"""What a run will see of its shards, before it is started: sizes, captions, tokens, unreadable samples, duplicate keys,
and some pairs as a page.

Sizes, keys and the join of captions are of all samples, by the index; what has to be decoded is of a random part.
"""

from __future__ import annotations

import base64
import html
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .batch import Batch
from .buckets import assign
from .captions import CaptionFile, CaptionRules
from .config import Bucket, DataConfig
from .errors import too_many_unreadable
from .files import temporary_beside
from .index import ImageTextIndex, IndexSource, open_index, open_sources
from .reader import validation_batches
from .shard_index import load_index

_EXAMPLES, _PAIRS, _ROWS = 3, 20, 64
_PAGE = """<!doctype html><meta charset="utf-8"><title>What a run will see</title>
<style>body {{ font: 15px sans-serif; margin: 2em; max-width: 70em }} pre {{ white-space: pre-wrap }}
figure {{ display: inline-block; width: 16em; margin: .6em; vertical-align: top }} img {{ max-width: 100% }}
figcaption small {{ color: #666 }}</style>
<h1>What a run will see</h1><pre>{lines}</pre>{pairs}
"""


class Checked(NamedTuple):
    """report: the findings, as JSON data. lines: as text. problems: why a run would be stopped, or learn no captions.
    pairs: (image, caption, name) of some samples, at random."""

    report: dict[str, Any]
    lines: list[str]
    problems: list[str]
    pairs: list[tuple[Image.Image, str, str]]


def check_shards(
    cfg: DataConfig,
    count: int,
    lengths: Sequence[int],
    tokens_of: Callable[[list[str]], list[int]] | None = None,
    classes: int | None = None,
) -> Checked:
    """Check the shards of a config. count: samples that are decoded. lengths: of data.text_lengths, in tokens.
    tokens_of: the number of tokens of each caption; None where there is no tokenizer. classes: of a model that is
    conditioned on class labels. Raises DataError where the shards cannot be trained on at all."""
    index = open_index(cfg)
    batches = list(validation_batches(index, cfg, count, 0, 1, _ROWS, classes))
    report: dict[str, Any] = {
        "shards": len(index.paths),
        "samples": len(index),
        "filter": index.filtered,
        "images": _sizes(index),
        "captions": _captions(index),
        "duplicate_keys": duplicate_keys(index),
        "captions_files": [_reach(source, cfg) for source in open_sources(cfg) if source.captions],
        "unreadable": _unreadable(batches),
    }
    texts = [caption for batch in batches for caption in batch.full_captions if caption]
    if tokens_of is not None and texts:
        report["tokens"] = _tokens(texts, lengths, tokens_of, cfg.characters_per_token)
    return Checked(report, list(_lines(report)), list(_problems(report, cfg, classes)), _pairs(batches))


# ----------------------------------------------------------------------------------------------------- by the index


def _spread(values: np.ndarray) -> dict[str, float]:
    """{} where there are none."""
    if not len(values):
        return {}
    names = ("least", "median", "95 %", "most")
    return dict(zip(names, np.percentile(values, (0, 50, 95, 100), method="nearest").tolist(), strict=True))


def _sizes(index: ImageTextIndex) -> dict[str, Any]:
    width, height = np.asarray(index.width), np.asarray(index.height)
    known = (width > 0) & (height > 0)
    short, long = (of(width[known], height[known]) for of in (np.minimum, np.maximum))
    aspect = {name: round(value, 2) for name, value in _spread(long / short).items()}
    return {"shorter_side": _spread(short), "aspect": aspect, "of_unknown_size": int((~known).sum())}


def _captions(index: ImageTextIndex) -> dict[str, Any]:
    length = np.asarray(index.caption_length)
    without = np.flatnonzero(length <= 0)
    names = [index.name(*index.locate(int(row))) for row in without[:_EXAMPLES]]
    return {
        "with": int((length > 0).sum()),
        "without": len(without),
        "characters": _spread(length[length > 0]),
        "examples_without": names,
    }


def _keys(index: ImageTextIndex) -> Iterator[str]:
    for shard, size in enumerate(index.shard_sizes):
        yield from (index.key(row) for row in index.rows(shard, np.arange(size))) if size else ()


def duplicate_keys(index: ImageTextIndex) -> dict[str, Any]:
    """Samples whose key another one has, in whatever shard."""
    hashes = np.fromiter((hash(key) for key in _keys(index)), np.int64, len(index))
    kinds, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    repeated = np.flatnonzero(counts > 1)
    at = [np.flatnonzero(hashes == kinds[one])[:2] for one in repeated[np.argsort(first[repeated])][:_EXAMPLES]]
    return {
        "samples": int((counts[repeated] - 1).sum()),
        "examples": [[index.name(*index.locate(int(row))) for row in rows] for rows in at],
    }


def _reach(source: IndexSource, cfg: DataConfig) -> dict[str, Any]:
    """Which images of a source's captions have no sample."""
    with tempfile.TemporaryFile() as texts:
        captions = CaptionFile(
            source.captions, texts, rules=CaptionRules(key=cfg.caption_key, fields=cfg.caption_fields)
        )
        samples = reached = 0
        for shard in source.shards:
            keys = load_index(shard, Path(cfg.index_cache), fields=cfg.caption_fields).table.column("key").to_pylist()
            samples, reached = samples + len(keys), reached + int((captions.find(keys)["offset"] >= 0).sum())
        without, examples = captions.unreached(_EXAMPLES)
    said = {
        "file": ", ".join(map(str, source.captions)),
        "images": len(captions),
        "samples_reached": reached,
        "samples": samples,
    }
    return said | {"images_without_sample": without, "examples_without_sample": examples}


# ------------------------------------------------------------------------------------------------- by decoding a part


def _unreadable(batches: Sequence[Batch]) -> dict[str, Any]:
    reasons, examples = Counter[str](), dict[str, str]()
    for batch in batches:
        for name, reason in batch.unreadable():
            reasons[reason] += 1
            examples.setdefault(reason, name)
    return {"of": sum(batch.read for batch in batches), "reasons": dict(reasons.most_common()), "examples": examples}


def _tokens(
    texts: list[str], lengths: Sequence[int], tokens_of: Callable[[list[str]], list[int]], characters_per_token: float
) -> dict[str, Any]:
    tokens, characters = np.array(tokens_of(texts)), np.array([len(text) for text in texts])
    buckets = [Bucket(1, 1, length) for length in lengths]
    square = np.ones_like(tokens)
    own = np.array(lengths)[assign(square, square, characters, buckets, characters_per_token)]
    return {
        **_spread(tokens),
        "captions": len(texts),
        "characters_per_token": round(float(characters.sum() / tokens.sum()), 2),
        "share_above": {length: round(float((tokens > length).mean()), 4) for length in lengths},
        "share_cut": round(float((tokens > own).mean()), 4),
    }


def _pairs(batches: Sequence[Batch]) -> list[tuple[Image.Image, str, str]]:
    found = []
    for batch in batches:
        for row, weight in enumerate(batch.weight.tolist()):
            if weight and batch.images is not None and len(found) < _PAIRS:
                image = Image.fromarray(batch.images[row].permute(1, 2, 0).numpy())
                found.append((image, batch.full_captions[row], batch.names[row]))
    return found


# --------------------------------------------------------------------------------------------------------- the report


def _spoken(spread: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in spread.items()) or "none is known"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    images, captions, unreadable = report["images"], report["captions"], report["unreadable"]
    yield f"{report['samples']} samples in {report['shards']} shards"
    yield from report["filter"]
    yield f"shorter side in pixels: {_spoken(images['shorter_side'])}; {images['of_unknown_size']} of unknown size"
    yield f"longer side / shorter side: {_spoken(images['aspect'])}"
    without = f"{captions['without']} without{_such_as(captions['examples_without'])}"
    yield f"captions: {captions['with']} samples with, {without}"
    yield f"characters of a caption: {_spoken(captions['characters'])}"
    for file in report["captions_files"]:
        yield (
            f"{file['file']}: reaches {file['samples_reached']} of {file['samples']} samples; of its {file['images']} "
            f"images {file['images_without_sample']} have no sample{_such_as(file['examples_without_sample'])}"
        )
    if tokens := report.get("tokens"):
        spread = {name: value for name, value in tokens.items() if name in ("least", "median", "95 %", "most")}
        yield f"tokens of {tokens['captions']} captions: {_spoken(spread)}"
        yield f"  characters per token: {tokens['characters_per_token']}"
        for length, share in tokens["share_above"].items():
            yield f"  more than {length} tokens: {share:.2%}"
        yield f"  cut by the run: {tokens['share_cut']:.2%}"
    duplicates = report["duplicate_keys"]
    examples = [" and ".join(pair) for pair in duplicates["examples"]]
    yield f"samples whose key another one has: {duplicates['samples']}{_such_as(examples)}"
    bad = sum(unreadable["reasons"].values())
    yield f"unreadable: {bad} of {unreadable['of']} samples that were decoded"
    for reason, number in unreadable["reasons"].items():
        yield f"  {number} x {reason}, such as {unreadable['examples'][reason]}"


def _such_as(examples: Sequence[str]) -> str:
    return f" (such as {', '.join(examples)})" if examples else ""


def _problems(report: Mapping[str, Any], cfg: DataConfig, classes: int | None) -> Iterator[str]:
    unreadable, captions = report["unreadable"], report["captions"]
    bad = sum(unreadable["reasons"].values())
    if bad == unreadable["of"] or too_many_unreadable(bad, unreadable["of"], cfg.max_bad_share):
        allowed = f"data.max_bad_share {cfg.max_bad_share:.2%}"
        yield f"{bad} of {unreadable['of']} samples are unreadable, more than {allowed}: the run would stop"
    if classes is None and not captions["with"]:
        yield "no sample has a caption: give data.captions, or shards with KEY.txt or KEY.json"
    for file in report["captions_files"]:
        if not file["samples_reached"]:
            yield f"{file['file']} reaches no sample: its keys are not those of the shards"


def write_page(path: Path, checked: Checked) -> None:
    """The report and its pairs as one HTML file."""
    pairs = []
    for image, caption, name in checked.pairs:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        source = base64.b64encode(buffer.getvalue()).decode()
        pairs.append(
            f'<figure><img src="data:image/jpeg;base64,{source}"><figcaption>{html.escape(caption)}<br>'
            f"<small>{html.escape(name)}</small></figcaption></figure>"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _PAGE.format(lines=html.escape("\n".join([*checked.problems, *checked.lines])), pairs="\n".join(pairs))
    with temporary_beside(path) as temporary:
        temporary.write_text(text)
