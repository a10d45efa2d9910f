"""The encoders, which are not trained: they make of a Batch the tensors that the model sees, and of latents images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from data.config import NONE, TextEncoderConfig
from data.encoders.autoencoder import load_autoencoder
from data.encoders.dino import load_feature_encoder
from data.encoders.joined import AnyTextEncoder, join_text_encoders, load_text_encoders, naming_text_encoder
from data.encoders.text import TextEncoder, load_text_encoder
from data.errors import DataError
from data.precomputed_format import Dataset
from models.layers import ClassCondition, PooledTextCondition, SizedTextCondition, TextCondition

from ..collectives import on_rank_0
from ..config.schema import TrainConfig
from ..diffusion.random import normal
from ..parallel.broadcast import spread
from ..parallel.mesh import World
from ..parallel.precision import DTYPES, at_least_fp32, precision_of
from ..step import Encoded
from .stream import Background


def read_text_encoder(config: TrainConfig, world: World, dtype: torch.dtype) -> AnyTextEncoder:
    """The text encoder, or several as one, whole or sharded. Of several ranks the first one reads it for all."""
    cfg = config.text_encoder
    device = torch.device(cfg.device) if cfg.device else world.device
    if world.size == 1:
        return load_text_encoders(cfg, device, dtype)
    parts = [_read_one(cfg, number, world, device, dtype) for number in range(len(cfg.models))]
    return join_text_encoders(cfg, tuple(parts))


def _read_one(
    cfg: TextEncoderConfig, number: int, world: World, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    """Text encoder `number` of a config on several ranks."""

    def load(where: torch.device | str, shapes_only: bool = False) -> TextEncoder:
        with naming_text_encoder(number):
            return load_text_encoder(cfg.models[number], where, dtype, shapes_only)

    read = on_rank_0(world, lambda: load("cpu"))
    encoder = load(device, shapes_only=True)
    identity: list[Any] = [(read.fingerprint, read.weights) if read else None]
    dist.broadcast_object_list(identity, src=0, group=world.control)
    spread(read.model if read else None, encoder.model, device, cfg.shard)
    encoder.fingerprint, encoder.weights = identity[0]
    if cfg.shard:
        encoder.mark_sharded()
    return encoder


class Encoders:
    """Autoencoder, text encoder and the image encoder of REPA, whichever of them the config and the data need.

    Synthetic data bring latents and text states with them, so that nothing is loaded. So do precomputed shards
    (`dataset`), for which the encoders that the config names are loaded all the same: sample grids need them.
    align: load REPA's encoder as well, if the config has one; where the features are precomputed, only to compare it
    with the one that made them.
    """

    def __init__(self, config: TrainConfig, world: World, dataset: Dataset | None = None, align: bool = False) -> None:
        precision = precision_of(config.parallel.precision, world.device)
        dtype, self.x0_dtype = DTYPES[precision], at_least_fp32(precision)
        self.device = world.device
        self._dataset = dataset
        self._classes, self._sized = config.label_classes, config.model.micro_conditions
        self._autoencoder = self._text_encoder = self._feature_encoder = None
        self._pooled_width = config.text_encoder.total_pooled
        self._feature_width = config.objective.repa_width
        self._patch_size, self._downsample = config.model.patch_size, config.autoencoder.downsample
        online = not config.data.synthetic and dataset is None
        repa_path = config.objective.repa_encoder
        if align and config.projector is not None and (online or (dataset is not None and repa_path != NONE)):
            self._feature_encoder = load_feature_encoder(repa_path, self._feature_width, world.device, dtype)
        if online or (dataset is not None and config.autoencoder.path != NONE):
            self._autoencoder = load_autoencoder(config.autoencoder, world.device, self.x0_dtype)
        if self._classes is None and (online or (dataset is not None and config.text_encoder.path != NONE)):
            self._text_encoder = read_text_encoder(config, world, dtype)
        if dataset is not None:
            for part, fingerprint in self._loaded_fingerprints().items():
                dataset.check_encoder(part, fingerprint)
            self._feature_encoder = None  # the features come with the data
        in_thread = "cpu" in (world.device.type, config.text_encoder.device)
        self._background = Background(world.device, in_thread)
        self.steps_ahead = 1 if online or world.device.type == "cuda" else 0
        """How many steps are encoded, or copied to the GPU, before they are trained on; 0 where that is no work."""
        self.without_images = None
        """Why no images can be sampled, where none can."""
        if config.data.synthetic:
            self.without_images = "synthetic data have no captions"
        elif self._autoencoder is None or (self._classes is None and self._text_encoder is None):
            self.without_images = "autoencoder.path and text_encoder.path are needed for them"

    def _loaded(self) -> dict[str, Any]:
        parts = {
            "autoencoder": self._autoencoder,
            "text_encoder": self._text_encoder,
            "repa_encoder": self._feature_encoder,
        }
        return {part: encoder for part, encoder in parts.items() if encoder is not None}

    def _loaded_fingerprints(self) -> dict[str, str]:
        return {part: encoder.fingerprint for part, encoder in self._loaded().items()}

    def fingerprints(self) -> dict[str, str]:
        """Identities of the encoders by name: of those that are loaded, with digests of their weights, or of those that
        made the precomputed shards."""
        if self._dataset is not None:
            return self._dataset.fingerprints
        weights = {f"{part}_weights": encoder.weights for part, encoder in self._loaded().items()}
        return self._loaded_fingerprints() | {part: digest for part, digest in weights.items() if digest is not None}

    def begin(self, batch: Batch) -> Callable[[], Encoded]:
        """Begin to encode a micro-batch; the function that is returned waits for the result."""
        return self._background.begin(partial(self._encode, batch))

    def encode(self, batch: Batch) -> Encoded:
        """A micro-batch on the device."""
        return self.begin(batch)()

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
        """What REPA aligns the N tokens of each image with, [b, N, F]: features of the very crops that are trained on;
        noise where the data are synthetic."""
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

    def _condition(self, batch: Batch) -> TextCondition | SizedTextCondition | PooledTextCondition | ClassCondition:
        if self._classes is not None:
            # A row without a sample (weight 0) has label -1, which is no row of the embedding: it gets the null label.
            labels = batch.labels.to(self.device, non_blocking=True)
            return ClassCondition(torch.where(labels < 0, self._classes, labels))
        if batch.text_states is not None and batch.text_mask is not None:
            text = TextCondition(
                batch.text_states.to(self.device, non_blocking=True),
                batch.text_mask.to(self.device, non_blocking=True),
            )
            if batch.text_pooled is not None:
                text = PooledTextCondition(*text, batch.text_pooled.to(self.device, non_blocking=True))
            elif self._pooled_width:  # of synthetic text
                keys = batch.keys.to(self.device, non_blocking=True)
                text = PooledTextCondition(*text, normal(keys, (self._pooled_width,), "pooled").to(text.states.dtype))
        else:
            text = self._encode_text(batch.captions, batch.bucket.text_length if batch.bucket else None)
        if not self._sized or batch.sizes is None:
            return text
        return SizedTextCondition(text.states, text.mask, batch.sizes.to(self.device, non_blocking=True))

    @torch.no_grad()
    def _encode_text(self, captions: list[str], length: int | None = None) -> TextCondition | PooledTextCondition:
        assert self._text_encoder is not None
        text = self._text_encoder.encode_pooled(captions, length)
        if text[0].device != self.device:  # from the CPU: pinned, so that the host does not wait for the GPU
            states, mask, pooled = (part.pin_memory().to(self.device, non_blocking=True) for part in text)
        else:
            states, mask, pooled = text
        return PooledTextCondition(states, mask, pooled) if self._pooled_width else TextCondition(states, mask)

    def encode_prompts(self, prompts: list[str]) -> TextCondition | PooledTextCondition | ClassCondition:
        """Conditions of captions, or of class numbers written as text; "" stands for no condition.

        Raises DataError for a prompt that is no class of the model.
        """
        if self._classes is None:
            return self._background.begin(partial(self._encode_text, prompts))()
        for prompt in prompts:
            if prompt and not (prompt.isdecimal() and int(prompt) < self._classes):
                raise DataError(f'prompt "{prompt}": the model knows classes, give a number below {self._classes}')
        labels = [int(prompt) if prompt else self._classes for prompt in prompts]
        return ClassCondition(torch.tensor(labels, device=self.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b, C, h, w] -> images [b, 3, H, W], clamped to [-1, 1]."""
        assert self._autoencoder is not None
        return self._autoencoder.decode(latents)
