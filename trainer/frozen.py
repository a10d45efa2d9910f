"""The parts that are not trained: a Batch becomes the tensors that the model sees, and the model's become images."""

import torch
from torch import Tensor

from data.batch import Batch
from data.config import DataError
from data.encoders import load_autoencoder, load_text_encoder
from models.layers import ClassCondition, SizedTextCondition, TextCondition

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
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        precision = precision_of(config, world)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
        self.x0_dtype = torch.float64 if precision == "fp64" else torch.float32
        self._device = world.device
        self.synthetic = config.data.synthetic
        self._classes, self._sized = config.label_classes, config.model.micro_conditions
        self._text_encoder = None
        if not self.synthetic:
            self._autoencoder = load_autoencoder(config.autoencoder, world.device, self.x0_dtype)
            if self._classes is None:
                self._text_encoder = load_text_encoder(config.text_encoder, world.device, dtype)

    def fingerprints(self) -> dict[str, str]:
        if self.synthetic:
            return {}
        text = {} if self._text_encoder is None else {"text_encoder": self._text_encoder.fingerprint}
        return {"autoencoder": self._autoencoder.fingerprint, **text}

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
        lengths = torch.zeros_like(weight) if isinstance(condition, ClassCondition) else condition.mask.sum(1)
        return Encoded(x0, condition, keys, weight, (lengths * weight).sum())

    def _condition(self, batch: Batch) -> TextCondition | SizedTextCondition | ClassCondition:
        if self._classes is not None:
            # Rows without a sample (weight 0) have label -1, which no table holds: they get the null label.
            labels = batch.labels.to(self._device, non_blocking=True)
            return ClassCondition(torch.where(labels < 0, self._classes, labels))
        if batch.text_states is not None and batch.text_mask is not None:
            text = TextCondition(
                batch.text_states.to(self._device, non_blocking=True),
                batch.text_mask.to(self._device, non_blocking=True),
            )
        else:
            text = self._encode_text(batch.captions, batch.cell.text_length if batch.cell else None)
        if not self._sized or batch.sizes is None:
            return text
        return SizedTextCondition(*text, batch.sizes.to(self._device, non_blocking=True))

    @torch.no_grad()
    def _encode_text(self, captions: list[str], length: int | None = None) -> TextCondition:
        assert self._text_encoder is not None
        return TextCondition(*self._text_encoder.encode(captions, length))

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
