"""Which image tokens go through a model's route (models.model_config.RouteConfig), in training and to guide samples."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .random import at_time, subset


@dataclass(frozen=True)
class Route:
    """patch_size: latent pixels along a side of a token. number: image tokens -> how many of them are kept. blocks: of
    the route, from 0."""

    patch_size: int
    number: Callable[[int], int]
    blocks: range

    def kept(self, x0: Tensor, keys: Tensor) -> Tensor:
        """Latents [b, C, h, w], keys int64 [b] -> int64 [b, K], rising: a function of each row's key alone."""
        tokens = x0.shape[-2] * x0.shape[-1] // self.patch_size**2
        return subset(keys, tokens, self.number(tokens), "route")

    def kept_at(self, x: Tensor, t: Tensor, keys: Tensor) -> Tensor:
        """As kept, drawn anew at each time t [b] of a sampler, so that no place of the image is always left out."""
        return self.kept(x, at_time(keys, t))
