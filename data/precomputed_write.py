"""Shards of images and captions -> shards of latents, text states and features (data.precomputed_format says what is
in them).

The bytes of a shard follow from its samples, the encoders and the batch size alone, not from the number of processes or
from how often they were stopped. A shard is complete or absent. `dataset.json` is written when all shards are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from webdataset.writer import TarWriter

from .captions import CaptionChoice
from .config import DataConfig, FilterConfig
from .encoders.autoencoder import Autoencoder
from .encoders.dino import FeatureEncoder
from .encoders.joined import AnyTextEncoder
from .errors import DataError, SampleError, StoreError, too_many_unreadable
from .files import naming, open_plain, parse_json, temporary_beside
from .images import decode_image
from .index import ImageTextIndex
from .lock_file import LockedError, locked
from .order import END_OF_DATA, Chunk
from .precomputed_format import DATASET, EMPTY_CAPTION, empty_caption_of, layout_of, npy, pooled_rows, sealed
from .samples import RawSample, SampleFiles, captions_of
from .shard_index import ABSENT, FEATURES, HOLE, LATENTS, TEXT, index_path, load_index

_CHUNK = 64  # samples that are read together
_BATCHES_AHEAD = 2  # batches that are decoded while one is encoded
_UNFINISHED = ".precompute.json"  # the name of dataset.json until all shards are there
_PROBE, _PROBE_S = 64, 60.0  # `estimate` encodes so many samples, or for so many seconds, whichever is less
Samples = Sequence[tuple[int, range]]  # (input shard, its samples)


class _Decoded(NamedTuple):
    """A sample before it is encoded. pixels: uint8 [3, R, R], or None for a hole, of which `hole` is the reason."""

    key: str
    row: np.void
    hole: str
    label: int
    pixels: np.ndarray | None
    captions: CaptionChoice


@dataclass(frozen=True)
class Precompute:
    """A set of precomputed shards: what it is made of, how, and where it goes.

    prefix: of PREFIX-000000.tar ...; a folder holds one set. text_encoder: None for a model of `classes` classes.
    per_shard: samples per output shard; None makes one output shard of each input shard, so that training reads the
    samples in the same order as from those. flips: latents of the flipped images are stored as well. batch_size:
    images, and captions, that are encoded together. precision: of the encoders, by its name in the config.
    feature_encoder: the encoder that REPA aligns the model's tokens with, of which there are tokens_a_side²; None
    stores no features.
    """

    index: ImageTextIndex
    data: DataConfig
    autoencoder: Autoencoder
    text_encoder: AnyTextEncoder | None
    classes: int | None
    prefix: Path
    per_shard: int | None
    flips: bool
    batch_size: int
    precision: str
    feature_encoder: FeatureEncoder | None = None
    tokens_a_side: int = 0

    def declared(self) -> dict[str, Any]:
        """The content of dataset.json."""
        vae, text, features = self.autoencoder, self.text_encoder, self.feature_encoder
        return {
            "layout": layout_of(text.pooled_width if text else 0),
            "autoencoder": {
                "fingerprint": vae.fingerprint,
                "channels": vae.channels,
                "downsample": vae.downsample,
                **vae.declared(),
            },
            "text_encoder": text and {
                "fingerprint": text.fingerprint,
                "width": text.width,
                "max_length": text.max_length,
                **({"pooled_width": text.pooled_width} if text.pooled_width else {}),
            },
            "repa_encoder": features and {
                "fingerprint": features.fingerprint,
                "width": features.width,
                "layer": "last",
                "tokens_a_side": self.tokens_a_side,
            },
            "resolution": self.data.resolution,
            "crop": "center",
            "flips": self.flips,
            "captions": text and "all of an image, cut at max_length tokens",
            "classes": self.classes,
            "filters": {"max_image_pixels": self.data.max_image_pixels} | self._filter(),
            "precision": self.precision,
            "batch_size": self.batch_size,
            "source": {"fingerprint": self.index.fingerprint, "samples": len(self.index)} | self._image_rules(),
            "samples_per_shard": self.per_shard,
            "name": self.prefix.name,
            "shards": len(self.shards()),
        }  # fmt: skip

    def _filter(self) -> dict[str, Any]:
        """data.filter where it is set; sets that were made without have no such entry."""
        filter = self.data.filter
        return {} if filter == FilterConfig() else {"filter": dataclasses.asdict(filter)}

    def _image_rules(self) -> dict[str, str]:
        """How images are read, where it matters: a set that was begun otherwise is not gone on with."""
        return {} if self.index.image_rules is None else {"image_rules": self.index.image_rules}

    def shards(self) -> list[Samples]:
        """The samples of each output shard."""
        sizes = self.index.shard_sizes
        if self.per_shard is None:
            return [[(shard, range(size))] for shard, size in enumerate(sizes) if size]  # data.filter may leave none
        ends = np.cumsum(sizes)
        found: list[Samples] = []
        for first in range(0, len(self.index), self.per_shard):
            last, parts = min(first + self.per_shard, len(self.index)), []
            while first < last:
                shard = int(np.searchsorted(ends, first, side="right"))
                start = int(ends[shard]) - sizes[shard]
                end = min(last, int(ends[shard]))
                parts.append((shard, range(first - start, end - start)))
                first = end
            found.append(parts)
        return found

    def path(self, number: int) -> Path:
        """The path of an output shard."""
        return self.prefix.with_name(f"{self.prefix.name}-{number:06d}.tar")

    def run(self, rank: int, world: int, report: Callable[[str], None]) -> Counter[str]:
        """Write those of this process's shards that are not there yet. -> the number of holes by their reason.

        The process that finds all shards complete writes dataset.json. report: is called with a line per shard. Raises
        DataError where the folder holds another set, or one that was made in another way, and where more samples of
        this process are unreadable than data.max_bad_share allows: then the last shard is not written.
        """
        shards, holes = self.shards(), Counter[str]()
        unreadable = read = 0
        own = range(rank, len(shards), world)
        self._make_folder()
        with self._locked():
            self._open_set()
        names = {self.path(number).name for number in own}
        for leftover in self.prefix.parent.glob(".*.tar.*.tmp"):  # of a process that was killed while it wrote an index
            if leftover.name[1:].partition(".tar.")[0] + ".tar" in names:
                leftover.unlink(missing_ok=True)
        for number in own:
            path = self.path(number)
            there = path.exists()
            if not there:
                found = self._write_shard(path, shards[number], unreadable, read)
                holes += found
            table = load_index(path).table  # made where a kill came between shard and index
            bad = int((table.column("image_offset").to_numpy() == ABSENT).sum())
            unreadable, read = unreadable + bad, read + table.num_rows
            report(f"{path} is there" if there else f"{path}: {table.num_rows} samples, {bad} of them holes")
        if all(self.path(number).exists() for number in range(len(shards))):
            with self._locked():
                self._write_declared(DATASET)
                (self.prefix.parent / _UNFINISHED).unlink(missing_ok=True)
        return holes

    def _make_folder(self) -> None:
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.prefix.parent} cannot be made ({error}): choose another --output") from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the set's own files (all but the shards), and remove what killed processes left of them."""
        folder = self.prefix.parent
        with open_plain(folder / ".lock", "a") as lock_file, locked(lock_file):
            for name in (DATASET, _UNFINISHED, EMPTY_CAPTION):
                for leftover in folder.glob(f".{name}.*.tmp"):
                    leftover.unlink()
            yield

    def _open_set(self) -> None:
        """Begin the set, or go on with it. Raises DataError where the folder holds something else."""
        folder, wanted = self.prefix.parent, self.declared()
        for name in (DATASET, _UNFINISHED):
            try:
                there = parse_json((folder / name).read_text())
            except FileNotFoundError:
                continue
            except ValueError:
                there = {}
            there = there if isinstance(there, dict) else {}  # or damaged
            for key in wanted:
                if there.get(key) != wanted[key]:
                    raise DataError(
                        f"{folder / name}: the set there has {key} {there.get(key)}, this one {wanted[key]}: choose "
                        "another folder for --output, or remove that set"
                    )
            self._make_empty_caption(there)
            return
        if shards := sorted(folder.glob("*.tar")):
            raise DataError(
                f"{shards[0]} is there: a precomputed set needs a folder of its own, choose another --output"
            )
        self._make_empty_caption(wanted)
        self._write_declared(_UNFINISHED)

    def _make_empty_caption(self, declared: dict[str, Any]) -> None:
        """Write the file of the empty caption where it is missing or damaged, by what dataset.json says."""
        path = self.prefix.parent / EMPTY_CAPTION
        if self.text_encoder is None:
            return
        with contextlib.suppress(OSError, ValueError, EOFError):
            empty_caption_of(path.read_bytes(), declared)
            return
        with temporary_beside(path) as temporary:
            temporary.write_bytes(npy(next(self._texts([""]))[0]))

    def _write_declared(self, name: str) -> None:
        empty = None if self.text_encoder is None else (self.prefix.parent / EMPTY_CAPTION).read_bytes()
        with temporary_beside(self.prefix.parent / name) as temporary:
            temporary.write_text(sealed(self.declared(), empty))

    def _write_shard(self, path: Path, samples: Samples, unreadable: int, read: int) -> Counter[str]:
        """Write one output shard and rename it when it is complete. -> its holes by reason.

        unreadable, read: samples of the shards before it.
        """
        holes: Counter[str] = Counter()
        # Always the same name, not temporary_beside's: so it can be locked, and what a kill left is overwritten.
        beside = path.with_name(f".{path.name}.tmp")
        with contextlib.ExitStack() as held:
            file = held.enter_context(open_plain(beside, "ab"))
            try:
                held.enter_context(locked(file, wait=False))
            except LockedError:
                raise DataError(f"{path} is being written by another process: start each set once at a time") from None
            if path.exists():  # another process has just finished it
                beside.unlink(missing_ok=True)
                return holes
            file.truncate(0)
            with naming(path):
                with TarWriter(file, user="mudit", group="mudit", mode=0o644, mtime=0) as tar:
                    for sample in self.encoded(samples):
                        tar.write(sample)
                        if HOLE in sample:
                            holes[sample[HOLE]] += 1
                        read += 1
                        self._check_share(unreadable + holes.total(), read, holes)
                file.flush()
                os.fsync(file.fileno())
            index_path(path).unlink(missing_ok=True)
            os.replace(beside, path)
        return holes

    def _check_share(self, unreadable: int, read: int, holes: Counter[str]) -> None:
        if too_many_unreadable(unreadable, read, self.data.max_bad_share):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in holes.most_common())
            raise DataError(
                f"{unreadable} of the {read} samples read are unreadable ({unreadable / read:.2%}), more than "
                f"data.max_bad_share {self.data.max_bad_share:.2%} (in the last shard {reasons or 'none'}): make them "
                "readable, leave them out by data.filter, or raise data.max_bad_share, and give the command again"
            )

    def estimate(self, images_per_s: float | None) -> str:
        """What the whole set takes: terabytes and GPU-hours, by encoding a few samples of one shard.

        images_per_s: the rate of a process; None measures it on those samples. Raises DataError where there are none.
        """
        sizes: list[int] = []
        begin = time.perf_counter()
        for members in self.encoded([(shard, part[:_PROBE]) for shard, part in self.shards()[0][:1]]):
            sizes.append(bytes_in_tar(members))
            if time.perf_counter() - begin > _PROBE_S:
                break
        if not sizes:
            raise DataError("data.shards: the first shard holds no sample")
        rate, source = len(sizes) / (time.perf_counter() - begin), f"measured here on {len(sizes)}"
        if images_per_s is not None:
            rate, source = images_per_s, "given"
        samples, mean = len(self.index), sum(sizes) / len(sizes)
        return (
            f"{samples} samples in {len(self.shards())} shards: {samples * mean / 1e12:.6f} TB ({mean:.0f} bytes per "
            f"sample, mean of {len(sizes)}), {samples / rate / 3600:.3f} GPU-hours at {rate:.1f} images/s per process "
            f"({source})"
        )

    def encoded(self, samples: Samples) -> Iterator[dict[str, Any]]:
        """For each sample its members by their extensions, and its key under "__key__"."""
        for batch in self._batches(samples):
            images = [sample.pixels for sample in batch if sample.pixels is not None]
            latents, features = self._latents(images), self._features(images)
            texts = self._texts([text for sample in batch for text in sample.captions.texts])
            for sample in batch:
                members: dict[str, Any] = {"__key__": sample.key}
                if sample.label != ABSENT:
                    members["cls"] = str(sample.label)
                if sample.pixels is None:
                    members[HOLE] = sample.hole
                else:
                    members[LATENTS] = npy(next(latents))
                    if self.feature_encoder is not None:
                        members[FEATURES] = npy(next(features))
                    size = {"width": int(sample.row["width"]), "height": int(sample.row["height"])}
                    if self.text_encoder is not None:
                        rows, tokens = zip(*itertools.islice(texts, len(sample.captions.texts)), strict=True)
                        members[TEXT] = npy(np.concatenate(rows))
                        size |= sample.captions._asdict() | {"tokens": list(tokens)}
                        size["captions"] = size.pop("texts")
                    members["json"] = json.dumps(size)
                yield members

    def _batches(self, samples: Samples) -> Iterator[list[_Decoded]]:
        """Decoded samples in batches, some of them ahead, by threads: decoders let go of Python's lock."""
        # PIL's limit is global, and images.py switches it off and on again, which would race between threads.
        Image.MAX_IMAGE_PIXELS = None
        raws = self._raws(samples)
        with ThreadPoolExecutor(max(1, self.data.num_workers)) as threads:
            ahead: deque[list[Future[_Decoded]]] = deque()
            while True:
                while len(ahead) <= _BATCHES_AHEAD and (
                    batch := [threads.submit(self._decode, raw) for raw in itertools.islice(raws, self.batch_size)]
                ):
                    ahead.append(batch)
                if not ahead:
                    return
                yield [future.result() for future in ahead.popleft()]

    def _raws(self, samples: Samples) -> Iterator[RawSample]:
        chunks = [
            Chunk(shard, np.array(part[first : first + _CHUNK]))
            for shard, part in samples
            for first in range(0, len(part), _CHUNK)
        ]
        files = SampleFiles(self.index, self.data, images_only=self.text_encoder is None)
        queue = itertools.chain(chunks, itertools.repeat(Chunk(END_OF_DATA, np.array([END_OF_DATA]))))
        for raw in files.streams([queue])[0]:
            if raw is None:
                return
            yield raw

    def _decode(self, raw: RawSample) -> _Decoded:
        key = self.index.key(raw.row)
        if self.per_shard is not None:  # samples of several shards may have the same key
            key = f"{self.index.names[raw.shard]}/{key}"
        nothing = CaptionChoice([], [])
        try:
            captions = captions_of(self.index, raw) if self.text_encoder is not None else nothing
            label = raw.label(self.classes)
            pixels = decode_image(
                raw.member("image"), self.data.resolution, self.data.max_image_pixels, crop=None, flip=False
            )
        except StoreError as error:  # it may pass, and what is stored as a hole stays one
            raise DataError(
                f"{self.index.paths[raw.shard]}: sample {self.index.key(raw.row)}: {error}: make it readable "
                f"{error.remedy and f'({error.remedy}) '}and give the same command again, it goes on"
            ) from None
        except SampleError as error:
            return _Decoded(key, raw.row, str(error), ABSENT, None, nothing)
        return _Decoded(key, raw.row, "", label, pixels, captions)

    def _latents(self, pixels: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """fp16 [V, 2, C, h, w] of each image, uint8 [3, R, R]; [V, 1, C, h, w] where latents have no variance."""
        variants = []
        for images in self._variants(pixels):
            mean, logvar = self.autoencoder.encode(images)
            variants.append(torch.stack([mean] if logvar is None else [mean, logvar], 1))
        return _by_image(variants)

    def _features(self, pixels: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """fp16 [V, N, F] of each image, uint8 [3, R, R]; nothing where there is no feature encoder."""
        encoder, side = self.feature_encoder, self.tokens_a_side
        return _by_image([encoder.encode(images, side, side) for images in self._variants(pixels)] if encoder else [])

    def _variants(self, pixels: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """uint8 [b, 3, R, R]: the images, and where they are wanted the flipped ones."""
        if not pixels:
            return []
        images = torch.from_numpy(np.stack(pixels))
        return [images, images.flip(-1)] if self.flips else [images]

    def _texts(self, captions: list[str]) -> Iterator[tuple[np.ndarray, int]]:
        """For each caption the bits of its bf16 states and pooled vector, uint16 [T + R, D], see Dataset; and T."""
        for first in range(0, len(captions), self.batch_size):
            assert self.text_encoder is not None
            states, mask, pooled = self.text_encoder.encode_pooled(captions[first : first + self.batch_size])
            rows, width = pooled_rows(self.text_encoder.width, pooled.shape[-1]), states.shape[-1]
            filled = F.pad(pooled, (0, rows * width - pooled.shape[-1])).reshape(len(pooled), rows, width)
            for state, vector, tokens in zip(_bf16(states), _bf16(filled), mask.sum(1).tolist(), strict=True):
                yield torch.cat([state[:tokens], vector]).view(torch.uint16).numpy(), tokens


def _by_image(variants: list[torch.Tensor]) -> Iterator[np.ndarray]:
    """V tensors [b, ...] -> fp16 [V, ...] of each of the b images."""
    return iter(torch.stack(variants, 1).to("cpu", torch.float16).numpy() if variants else ())


def _bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", torch.bfloat16)


def bytes_in_tar(members: dict[str, Any]) -> int:
    """The bytes that a sample takes in a tar: a header per member, and the member in whole blocks of 512 bytes."""
    sizes = [
        len(value.encode() if isinstance(value, str) else value) for key, value in members.items() if key[0] != "_"
    ]
    return sum(512 + -(-size // 512) * 512 for size in sizes)
