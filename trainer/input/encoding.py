"""The parts that are not trained: a Batch becomes the tensors that the model sees, and the model's become images."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from data.config import NONE
from data.encoders.autoencoder import load_autoencoder
from data.encoders.dinov2 import load_feature_encoder
from data.encoders.text import TextEncoder, load_text_encoder
from data.errors import DataError
from data.precomputed_format import Dataset
from models.layers import ClassCondition, SizedTextCondition, TextCondition

from ..config.schema import TrainConfig
from ..diffusion.random import normal
from ..parallel.broadcast import spread
from ..parallel.mesh import World
from ..parallel.precision import DTYPES, at_least_fp32, precision_of
from ..run import Encoded
from .prefetch import Prefetcher

Batches = Callable[[int], Iterator[tuple[int, list[Batch]]]]
OnRank0 = Callable[[Callable[[], TextEncoder]], TextEncoder | None]


def read_text_encoder(config: TrainConfig, world: World, dtype: torch.dtype, on_rank_0: OnRank0 | None) -> TextEncoder:
    """The text encoder, whole or sharded; where on_rank_0 is given one rank reads it for all."""
    cfg = config.text_encoder
    device = torch.device(cfg.device) if cfg.device else world.device
    if world.size == 1 or on_rank_0 is None:
        return load_text_encoder(cfg, device, dtype)
    read = on_rank_0(lambda: load_text_encoder(cfg, "cpu", dtype))
    encoder = load_text_encoder(cfg, device, dtype, shapes_only=True)
    fingerprint = [read.fingerprint if read else ""]
    dist.broadcast_object_list(fingerprint, src=0, group=world.control)
    spread(read.model if read else None, encoder.model, device, cfg.shard)
    encoder.fingerprint, encoder.lockstep = fingerprint[0], cfg.shard
    return encoder


class Encoders:
    """Autoencoder and text encoder: what turns a Batch into tensors that the model sees, and back.

    With synthetic data neither is loaded: latents and text states come with the batch. So they do with precomputed
    shards (`dataset`): there an encoder is loaded where the config has one, for the sample grids. on_rank_0: does work
    on rank 0 alone, None elsewhere, and raises its errors on all ranks; without it every rank reads the text encoder,
    whole. align: also the encoder of REPA, where the config has one; beside precomputed features to be compared alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        on_rank_0: OnRank0 | None = None,
        dataset: Dataset | None = None,
        align: bool = False,
    ) -> None:
        precision = precision_of(config.parallel.precision, world.device)
        dtype, self.x0_dtype = DTYPES[precision], at_least_fp32(precision)
        self.device = world.device
        self._dataset = dataset
        self._classes, self._sized = config.label_classes, config.model.micro_conditions
        self._autoencoder = self._text_encoder = self._feature_encoder = None
        self._feature_width = config.objective.repa_width
        self._patch_size, self._downsample = config.model.patch_size, config.autoencoder.downsample
        own = not config.data.synthetic and dataset is None
        repa_path = config.objective.repa_encoder
        if align and config.projector is not None and (own or (dataset is not None and repa_path != NONE)):
            self._feature_encoder = load_feature_encoder(repa_path, self._feature_width, world.device, dtype)
        if own or (dataset is not None and config.autoencoder.path != NONE):
            self._autoencoder = load_autoencoder(config.autoencoder, world.device, self.x0_dtype)
        if self._classes is None and (own or (dataset is not None and config.text_encoder.path != NONE)):
            self._text_encoder = read_text_encoder(config, world, dtype, on_rank_0)
        if dataset is not None:
            for part, fingerprint in self._loaded_fingerprints().items():
                dataset.check_encoder(part, fingerprint)
            self._feature_encoder = None  # the features come with the data
        self._ahead = Prefetcher(world.device, in_thread="cpu" in (world.device.type, config.text_encoder.device))
        self._begun: dict[int, tuple[Batch, Callable[[], Encoded]]] = {}  # by id; the batch is kept, so ids are its own
        self._encodes = own
        self.without_images = None
        """Why no images can be sampled, where none can."""
        if config.data.synthetic:
            self.without_images = "synthetic data have no captions"
        elif self._autoencoder is None or (self._classes is None and self._text_encoder is None):
            self.without_images = "autoencoder.path and text_encoder.path are needed for them"

    def _loaded_fingerprints(self) -> dict[str, str]:
        loaded = {
            "autoencoder": self._autoencoder,
            "text_encoder": self._text_encoder,
            "repa_encoder": self._feature_encoder,
        }
        return {part: encoder.fingerprint for part, encoder in loaded.items() if encoder is not None}

    def fingerprints(self) -> dict[str, str]:
        return self._loaded_fingerprints() if self._dataset is None else self._dataset.fingerprints

    def ahead(self, batches: Batches) -> Batches:
        """The same batches, while those of the next step are being encoded, or copied to the GPU."""

        def following(first_step: int) -> Iterator[tuple[int, list[Batch]]]:
            self._finish()  # before reader processes are forked
            stream = batches(first_step)
            try:
                present = self._begin(next(stream))
                while True:
                    coming = self._begin(next(stream))
                    yield present
                    present = coming
            finally:
                self._finish()

        return following if self._encodes or self.device.type == "cuda" else batches

    def _begin(self, step: tuple[int, list[Batch]]) -> tuple[int, list[Batch]]:
        for batch in step[1]:
            self._begun[id(batch)] = batch, self._ahead.begin(partial(self._encode, batch))
        return step

    def _finish(self) -> None:
        """Wait for what was begun and is not wanted any more."""
        for _, take in self._begun.values():
            with suppress(Exception):  # it was for nothing anyway
                take()
        self._begun.clear()

    def encode(self, batch: Batch) -> Encoded:
        """A micro-batch on the device; of one that was begun ahead, the result."""
        _, take = self._begun.pop(id(batch), (batch, None))
        return take() if take else self._ahead.begin(partial(self._encode, batch))()

    @torch.no_grad()
    def _encode(self, batch: Batch) -> Encoded:
        keys = batch.keys.to(self.device, non_blocking=True)
        weight = batch.weight.to(self.device, non_blocking=True)
        if batch.latents is not None:
            mean, logvar = batch.latents.to(self.device, non_blocking=True), batch.logvar
        else:
            assert batch.images is not None
            assert self._autoencoder is not None
            mean, logvar = self._autoencoder.encode(batch.images.to(self.device, non_blocking=True))
        x0 = mean.to(self.x0_dtype)
        if logvar is not None:
            noise = normal(keys, tuple(x0.shape[1:]), "posterior").to(x0.dtype)
            x0 = x0 + (0.5 * logvar.to(self.device, x0.dtype, non_blocking=True)).exp() * noise
        condition = self._condition(batch)
        lengths = torch.zeros_like(weight) if isinstance(condition, ClassCondition) else condition.mask.sum(1)
        return Encoded(x0, condition, keys, weight, (lengths * weight).sum())

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """What REPA aligns tokens with: [b, N, F] of the very crops that are trained on; of synthetic data noise."""
        if batch.features is not None:
            return batch.features.to(self.device, non_blocking=True)
        if batch.latents is not None:
            height, width = batch.latents.shape[-2:]
            shape = (height * width // self._patch_size**2, self._feature_width)
            return normal(batch.keys.to(self.device, non_blocking=True), shape, "features").to(self.x0_dtype)
        assert batch.images is not None
        assert self._feature_encoder is not None
        rows, columns = (side // (self._downsample * self._patch_size) for side in batch.images.shape[-2:])
        return self._feature_encoder.encode(batch.images.to(self.device, non_blocking=True), rows, columns)

    def _condition(self, batch: Batch) -> TextCondition | SizedTextCondition | ClassCondition:
        if self._classes is not None:
            # Rows without a sample (weight 0) have label -1, which no table holds: they get the null label.
            labels = batch.labels.to(self.device, non_blocking=True)
            return ClassCondition(torch.where(labels < 0, self._classes, labels))
        if batch.text_states is not None and batch.text_mask is not None:
            text = TextCondition(
                batch.text_states.to(self.device, non_blocking=True),
                batch.text_mask.to(self.device, non_blocking=True),
            )
        else:
            text = self._encode_text(batch.captions, batch.bucket.text_length if batch.bucket else None)
        if not self._sized or batch.sizes is None:
            return text
        return SizedTextCondition(*text, batch.sizes.to(self.device, non_blocking=True))

    @torch.no_grad()
    def _encode_text(self, captions: list[str], length: int | None = None) -> TextCondition:
        assert self._text_encoder is not None
        states, mask = self._text_encoder.encode(captions, length)
        if states.device != self.device:  # from the CPU: by pinned memory, so that the copy waits for no other work
            states, mask = (part.pin_memory().to(self.device, non_blocking=True) for part in (states, mask))
        return TextCondition(states, mask)

    def encode_prompts(self, prompts: list[str]) -> TextCondition | ClassCondition:
        """Captions, or class numbers as text; "" is no condition."""
        if self._classes is None:
            return self._ahead.begin(partial(self._encode_text, prompts))()
        for prompt in prompts:
            if prompt and not (prompt.isdecimal() and int(prompt) < self._classes):
                raise DataError(f'prompt "{prompt}": the model knows classes, give a number below {self._classes}')
        labels = [int(prompt) if prompt else self._classes for prompt in prompts]
        return ClassCondition(torch.tensor(labels, device=self.device))

    def decode(self, latents: Tensor) -> Tensor:
        assert self._autoencoder is not None
        return self._autoencoder.decode(latents)
