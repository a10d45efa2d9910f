"""The parts that are not trained: a Batch becomes the tensors that the model sees, and the model's become images."""

import torch
from torch import Tensor

from data.batch import Batch
from data.config import DataError
from data.encoders import load_autoencoder, load_feature_encoder, load_text_encoder
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

    With synthetic data neither is loaded: latents and text states come with the batch.
    align: also the encoder of REPA, where the config has one.
    """

    def __init__(self, config: TrainConfig, world: World, align: bool = False) -> None:
        precision = precision_of(config, world)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
        self.x0_dtype = torch.float64 if precision == "fp64" else torch.float32
        self._device = world.device
        self.synthetic = config.data.synthetic
        self._classes = config.label_classes
        self._text_encoder = self._feature_encoder = None
        self._feature_width = config.objective.repa_width
        self._patch_size, self._downsample = config.model.patch_size, config.autoencoder.downsample
        if not self.synthetic:
            if align and config.projector is not None:
                path = config.objective.repa_encoder
                self._feature_encoder = load_feature_encoder(path, self._feature_width, world.device, dtype)
            self._autoencoder = load_autoencoder(config.autoencoder, world.device, self.x0_dtype)
            if self._classes is None:
                self._text_encoder = load_text_encoder(config.text_encoder, world.device, dtype)

    def fingerprints(self) -> dict[str, str]:
        if self.synthetic:
            return {}
        text = {} if self._text_encoder is None else {"text_encoder": self._text_encoder.fingerprint}
        features = {} if self._feature_encoder is None else {"repa_encoder": self._feature_encoder.fingerprint}
        return {"autoencoder": self._autoencoder.fingerprint, **text, **features}

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoded:
        """A micro-batch on the device."""
        keys = batch.keys.to(self._device, non_blocking=True)
        weight = batch.weight.to(self._device, non_blocking=True)
        if batch.latents is not None:
            x0 = batch.latents.to(self._device, self.x0_dtype, non_blocking=True)
        else:
            assert batch.images is not None
            mean, logvar = self._autoencoder.encode(batch.images.to(self._device, non_blocking=True))
            x0 = mean.to(self.x0_dtype)
            if logvar is not None:
                noise = normal(keys, tuple(x0.shape[1:]), "posterior").to(x0.dtype)
                x0 = x0 + (0.5 * logvar.to(x0.dtype)).exp() * noise
        condition = self._condition(batch)
        lengths = condition.mask.sum(1) if isinstance(condition, TextCondition) else torch.zeros_like(weight)
        return Encoded(x0, condition, keys, weight, (lengths * weight).sum())

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """What REPA aligns tokens with: [b, N, F] of the very crops that are trained on; of synthetic data noise."""
        if batch.latents is not None:
            height, width = batch.latents.shape[-2:]
            shape = (height * width // self._patch_size**2, self._feature_width)
            return normal(batch.keys.to(self._device, non_blocking=True), shape, "features").to(self.x0_dtype)
        assert batch.images is not None
        assert self._feature_encoder is not None
        rows, columns = (side // (self._downsample * self._patch_size) for side in batch.images.shape[-2:])
        return self._feature_encoder.encode(batch.images.to(self._device, non_blocking=True), rows, columns)

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
        return self._autoencoder.decode(latents)
