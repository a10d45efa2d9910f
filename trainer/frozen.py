"""The parts that are not trained: a Batch becomes the tensors that the model sees, and the model's become images."""

import torch
from torch import Tensor

from data.batch import Batch
from data.config import NONE, DataError
from data.dataset import Dataset
from data.encoders import load_autoencoder, load_text_encoder
from models.layers import ClassCondition, TextCondition

from .config import TrainConfig
from .diffusion.random import normal
from .parallel.fsdp import Precision
from .parallel.mesh import World
from .state import Encoded


def precision_of(config: TrainConfig, world: World) -> Precision:
    return config.parallel.precision or ("bf16" if world.device.type == "cuda" else "fp32")


class FrozenParts:
    """Autoencoder and text encoder: what turns a Batch into tensors that the model sees, and back.

    With synthetic data neither is loaded: latents and text states come with the batch. So they do with precomputed
    shards (`dataset`): there an encoder is loaded where the config has one, for the sample grids.
    """

    def __init__(self, config: TrainConfig, world: World, dataset: Dataset | None = None) -> None:
        precision = precision_of(config, world)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
        self.x0_dtype = torch.float64 if precision == "fp64" else torch.float32
        self._device = world.device
        self._dataset = dataset
        self._classes = config.label_classes
        self._autoencoder = self._text_encoder = None
        own = not config.data.synthetic and dataset is None
        if own or (dataset is not None and config.autoencoder.path != NONE):
            self._autoencoder = load_autoencoder(config.autoencoder, world.device, self.x0_dtype)
        if self._classes is None and (own or (dataset is not None and config.text_encoder.path != NONE)):
            self._text_encoder = load_text_encoder(config.text_encoder, world.device, dtype)
        if dataset is not None:
            for part, fingerprint in self._loaded_fingerprints().items():
                dataset.check_encoder(part, fingerprint)
        self.without_images = None
        """Why no images can be sampled, where none can."""
        if config.data.synthetic:
            self.without_images = "synthetic data have no captions"
        elif self._autoencoder is None or (self._classes is None and self._text_encoder is None):
            self.without_images = "autoencoder.path and text_encoder.path are needed for them"

    def _loaded_fingerprints(self) -> dict[str, str]:
        loaded = {"autoencoder": self._autoencoder, "text_encoder": self._text_encoder}
        return {part: encoder.fingerprint for part, encoder in loaded.items() if encoder is not None}

    def fingerprints(self) -> dict[str, str]:
        return self._loaded_fingerprints() if self._dataset is None else self._dataset.fingerprints

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoded:
        """A micro-batch on the device."""
        keys = batch.keys.to(self._device, non_blocking=True)
        weight = batch.weight.to(self._device, non_blocking=True)
        if batch.latents is not None:
            mean, logvar = batch.latents.to(self._device, non_blocking=True), batch.logvar
        else:
            assert batch.images is not None
            assert self._autoencoder is not None
            mean, logvar = self._autoencoder.encode(batch.images.to(self._device, non_blocking=True))
        x0 = mean.to(self.x0_dtype)
        if logvar is not None:
            noise = normal(keys, tuple(x0.shape[1:]), "posterior").to(x0.dtype)
            x0 = x0 + (0.5 * logvar.to(self._device, x0.dtype, non_blocking=True)).exp() * noise
        condition = self._condition(batch)
        lengths = condition.mask.sum(1) if isinstance(condition, TextCondition) else torch.zeros_like(weight)
        return Encoded(x0, condition, keys, weight, (lengths * weight).sum())

    def _condition(self, batch: Batch) -> TextCondition | ClassCondition:
        if self._classes is not None:
            # Rows without a sample (weight 0) have label -1, which no table holds: they get the null label.
            labels = batch.labels.to(self._device, non_blocking=True)
            return ClassCondition(torch.where(labels < 0, self._classes, labels))
        if batch.text_states is not None and batch.text_mask is not None:
            return TextCondition(
                batch.text_states.to(self._device, non_blocking=True),
                batch.text_mask.to(self._device, non_blocking=True),
            )
        return self._encode_text(batch.captions)

    @torch.no_grad()
    def _encode_text(self, captions: list[str]) -> TextCondition:
        assert self._text_encoder is not None
        return TextCondition(*self._text_encoder.encode(captions))

    def encode_prompts(self, prompts: list[str]) -> TextCondition | ClassCondition:
        """Captions, or class numbers as text; "" is no condition."""
        if self._classes is None:
            return self._encode_text(prompts)
        for prompt in prompts:
            if prompt and not (prompt.isdecimal() and int(prompt) < self._classes):
                raise DataError(f'prompt "{prompt}": the model knows classes, give a number below {self._classes}')
        labels = [int(prompt) if prompt else self._classes for prompt in prompts]
        return ClassCondition(torch.tensor(labels, device=self._device))

    def decode(self, latents: Tensor) -> Tensor:
        assert self._autoencoder is not None
        return self._autoencoder.decode(latents)
