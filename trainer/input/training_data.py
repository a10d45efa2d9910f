"""Training and validation data of a config; rank 0 asks a store first, the others take its answers."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from data.batch import Batch, micro_batch_shape
from data.config import DataConfig
from data.debug import ensure_debug_assets
from data.errors import DataError, too_many_unreadable
from data.index import ImageTextIndex, open_index, open_validation_index
from data.order import MIXED_ORDER
from data.precomputed_format import check_images, check_same_kind
from data.reader import ImageTextReader, validation_batches
from data.stages import Begin
from data.storage import FileVersion
from data.synthetic import SyntheticReader

from ..collectives import on_rank_0
from ..config.resolve import Resolved, buckets_of, least_rows, micro_batch_rows, micro_batch_size
from ..config.schema import TrainConfig
from ..errors import ConfigError
from ..parallel.mesh import World
from .begin import BeginData, begin_of

_VALIDATION_SEED = 0x5EED  # of synthetic data: differs from any that a user is likely to train with
_DEBUG_ASSETS = ".cache/debug"
T = TypeVar("T")


class TrainingData:
    """Training and validation data of a config: the reader of each rank, and what identifies the data.

    config: of a stage of the run. begin: where its data begin; None: of a run of one stage. aligned: whether it has
    REPA's alignment, where the config has it. Raises DataError where the
    data cannot be read or are not of the kind that the config says, and ConfigError where they are too few for
    train.steps, or where micro-batches would part what objective.contrastive_weight pairs.
    """

    def __init__(
        self,
        config: TrainConfig,
        resolved: Resolved,
        world: World,
        begin: BeginData | None = None,
        aligned: bool = True,
    ) -> None:
        self._config, self._resolved, self._world = config, resolved, world
        self._features = aligned and config.projector is not None
        self._begin = begin or begin_of(config, 0)
        if config.objective.contrastive_weight:
            _check_pairs(config, resolved)
        self._index: ImageTextIndex | None = None
        self.steps: int | None = None
        """Steps that the data hold; None where they have no end."""
        if not config.data.synthetic:
            self._index = self._shared_index()
            self._check_length(self._index)
            _check_kind(config, self._index)
        self._begin_of_index = self._begin_with_indexes()
        self.dataset = None if self._index is None else self._index.dataset
        """What precomputed training shards say about themselves; None for other data."""
        if self.dataset is not None and self._features:
            self.dataset.check_features(config.latent_size // config.model.patch_size, config.objective.repa_width)
        reader = self.reader(world.rank, world.size)
        self.batches, self.fingerprint = reader.batches, reader.fingerprint
        self.fingerprints = {"data": reader.fingerprint}
        """Identities of the data; of where a later stage begins in them; of the order of several sources, as that of a
        single one is the same for ever; and of how images are read, where there are some that were once read
        otherwise."""
        if (begin_identity := self._begin_of_index.identity()) is not None:
            self.fingerprints["begin"] = begin_identity
        if self._index is not None and len(self._index.sources) > 1:
            self.fingerprints["order"] = MIXED_ORDER
        if self._index is not None and self._index.image_rules is not None:
            self.fingerprints["images"] = self._index.image_rules

    def _begin_with_indexes(self) -> Begin:
        begin = self._begin
        if self._index is None:
            return Begin(begin.step, begin.position, begin.number)
        return begin.of_index(self._config, self._index, lambda data: self._shared_index(data=data))

    def _shared_index(self, validation: bool = False, data: DataConfig | None = None) -> ImageTextIndex:
        """The index of the training or the validation data. Rank 0 alone asks for each shard's size and version, which
        otherwise a store would be asked for by every rank. data: of an earlier stage."""
        data, world = data or self._config.data, self._world
        first = on_rank_0(world, lambda: _open_index(data, validation))
        told: list[Any] = [None if first is None else (first.versions, first.fingerprint)]
        dist.broadcast_object_list(told, src=0, group=world.control)
        versions, fingerprint = told[0]
        index = _open_index(data, validation, versions) if first is None else first
        if index.fingerprint != fingerprint:
            raise DataError("data.shards hold other samples here than on rank 0: give every process the same files")
        return index

    @property
    def notes(self) -> list[str]:
        """What data.filter left out of the training data, in words."""
        return [] if self._index is None else self._index.filtered

    def reader(self, rank: int, size: int) -> ImageTextReader | SyntheticReader:
        """The reader of one rank in a world of `size`."""
        c, rows, most = self._config, self._resolved.micro_batch_rows, self._resolved.micro_batch_size
        seed, batch = c.train.seed, c.train.global_batch_size
        buckets = {bucket: micro_batch_rows(c, bucket, size, most) for bucket in buckets_of(c)}
        part = (rank, size, rows, c.label_classes, buckets)
        if self._index is None:
            return SyntheticReader(c.data, c.text_encoder, c.autoencoder, seed, batch, *part, self._begin_of_index)
        features, begin = self._features, self._begin_of_index
        return ImageTextReader(self._index, c.data, seed, batch, c.text_encoder.dropout, *part, features, begin)

    def validation(self) -> list[Batch]:
        """This rank's micro-batches of the fixed validation bank."""
        c, world, count = self._config, self._world, self._config.validation.samples
        rows = max(1, min(self._resolved.micro_batch_rows, 64))
        if self._index is None:
            text = dataclasses.replace(c.text_encoder, dropout=0.0)
            data = dataclasses.replace(c.data, label_dropout=0.0)
            part = (world.rank, world.size, rows, c.label_classes)
            return next(SyntheticReader(data, text, c.autoencoder, _VALIDATION_SEED, count, *part).batches(0))[1]
        index = self._validation_index
        return list(validation_batches(index, c.data, count, world.rank, world.size, rows, c.label_classes))

    @property
    def validation_fingerprint(self) -> str:
        """Identity of the validation bank, of which each stage has its own: losses of two do not compare."""
        index = None if self._index is None else self._validation_index
        rules, number = None if index is None else index.image_rules, self._begin.number
        parts = [index.fingerprint if index else self.fingerprint, str(self._config.validation.samples)]
        return "/".join([*parts, *([rules] if rules else []), *([f"stage {number + 1}"] if number else [])])

    def validation_prompts(self, count: int) -> list[str]:
        """Captions, or class numbers as text, of the first `count` samples of the bank, the same on all ranks."""
        classes = self._config.label_classes
        [batch] = validation_batches(self._validation_index, self._config.data, count, 0, 1, count, classes)
        if classes is None:
            return [caption for caption in batch.full_captions if caption]
        return [str(label) for label in batch.labels.tolist() if label >= 0]

    @cached_property
    def _validation_index(self) -> ImageTextIndex:
        if self._config.data.val_shards is None:
            assert self._index is not None
            return self._index
        index = self._shared_index(validation=True)
        _check_kind(self._config, index)
        check_same_kind(self.dataset, index.dataset)
        return index

    def _check_length(self, index: ImageTextIndex) -> None:
        c = self._config
        if c.data.epochs is None:
            return
        epoch = index.samples_until_first_end()
        self.steps = most = c.data.first_step + epoch * c.data.epochs // c.train.global_batch_size
        if c.train.steps > most:
            first_end = ", when the first source ends" if len(index.sources) > 1 else ""
            raise ConfigError(
                f"train.steps {c.train.steps} needs more than data.epochs {c.data.epochs} of {epoch} samples"
                f"{first_end}: at most {most} steps of {c.train.global_batch_size}"
            )


def check_later_stage(config: TrainConfig, resolved: Resolved, aligned: bool) -> None:
    """Raise, on this process alone, what TrainingData would of a stage that is to come: whose shards are missing, say.
    aligned: as of TrainingData."""
    if config.objective.contrastive_weight:
        _check_pairs(config, resolved)
    if not config.data.synthetic:
        index = _open_index(config.data)
        _check_kind(config, index)
        if index.dataset is not None and aligned and config.projector is not None:
            index.dataset.check_features(config.latent_size // config.model.patch_size, config.objective.repa_width)


def _check_kind(c: TrainConfig, index: ImageTextIndex) -> None:
    if index.dataset is None:
        check_images(c.autoencoder, c.text_encoder, c.label_classes)
    else:
        index.dataset.check(c.data, c.autoencoder, c.text_encoder, c.label_classes)


def _check_pairs(c: TrainConfig, resolved: Resolved) -> None:
    """Raise ConfigError unless slots 0 and 1, 2 and 3, ... of every batch come in one micro-batch each, so that no loss
    depends on how a batch is spread over ranks and micro-batches."""
    batch, world, most = c.train.global_batch_size, resolved.world_size, resolved.micro_batch_size
    pairs = "objective.contrastive_weight compares the samples of a batch in pairs, which stay together"
    if batch % (2 * world):
        nearest = max(1, round(batch / (2 * world))) * 2 * world
        raise ConfigError(
            f"{pairs} on a process: train.global_batch_size must be a multiple of 2 x {world} processes, got {batch}; "
            f"the nearest is {nearest}"
        )
    rows = [micro_batch_shape(batch, world, micro_batch_rows(c, bucket, world, most))[1] for bucket in buckets_of(c)]
    if any(count % 2 for count in rows):
        raise ConfigError(
            f"{pairs} in a micro-batch, and one of train.micro_batch_size {most} has no room for two samples: the "
            f"least is {micro_batch_size(c, least_rows(c))}"
        )


def is_debug(path: str) -> bool:
    """Whether a path lies in the debug configs' folder, whose contents are made when they are first used."""
    return Path(path).is_relative_to(_DEBUG_ASSETS)


def _open_index(
    data: DataConfig, validation: bool = False, versions: Sequence[FileVersion] | None = None
) -> ImageTextIndex:
    if any(is_debug(shards) for shards in (data.val_shards, *(s.shards for s in data.all_sources())) if shards):
        ensure_debug_assets()
    return open_validation_index(data, versions) if validation else open_index(data, versions)


def _looked_for(data: DataConfig, first: Mapping[str, str]) -> str:
    """Where the missing captions of validation samples were looked for. first: a sample's "shard/key" by reason."""
    name = first.get("caption: missing")
    if name is None:
        return ""
    shard, _, key = name.partition("/")
    sources = data.all_sources() if data.val_shards is None else ()
    files = [source.captions for source in sources if source.captions] or [data.captions] * bool(data.captions)
    if not files:
        return f"; {shard}.tar has neither {key}.txt nor {key}.json with a caption, and data.captions is not set"
    return f"; {', '.join(map(str, files))} has no image {key!r}, nor one of that last part alone"


def validation_bank(
    batches: Iterable[Batch], encode: Callable[[Batch], T], data: DataConfig, world: World, notes: list[str]
) -> list[T]:
    """This rank's batches of the fixed bank, encoded. A note is added where some samples are unreadable.

    Raises DataError, on all ranks, where a store does not give samples or too many are unreadable, because validation
    losses are compared across runs and starts, and must be of the same samples.
    """
    bank, holes, read, first = [], Counter[str](), 0, dict[str, str]()
    for batch in batches:
        holes.update(batch.holes)
        for name, reason in batch.unreadable():
            first.setdefault(reason, name)
        read += batch.read
        bank.append(encode(batch))
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, (holes, read, first), group=world.control)
    holes, read = sum((part for part, *_ in parts), Counter[str]()), sum(number for _, number, _ in parts)
    first = {reason: name for *_, names in parts for reason, name in names.items()}
    if holes:
        unreadable = f"{holes.total()} of {read} validation samples are unreadable (" + ", ".join(
            f"{reason}: {count}" for reason, count in sorted(holes.items())
        )
        too_many = holes.total() == read or too_many_unreadable(holes.total(), read, data.max_bad_share)
        if too_many or any(reason.startswith("store: ") for reason in holes):
            key = "data.shards" if data.val_shards is None else "data.val_shards"
            raise DataError(f"{key}: {unreadable}){_looked_for(data, first)}: make them readable and start again")
        notes.append(f"warning: {unreadable}): validation losses are of the others")
    return bank
