"""Images from prompts: each a function of (seed, its number, prompt) alone; shared out over the ranks."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.order import position_keys

from ..diffusion.random import normal
from ..diffusion.route import Route
from ..diffusion.sampling import Predict, Sampler, guided
from ..files import write_atomically


@dataclass(frozen=True)
class Generator:
    """Prompts -> images by the weights that the model has now.

    encode_prompts: prompts -> what the model is conditioned on; "" is no condition. decode: latents -> [-1, 1]. route:
    guidance leads away from a pass of the same prompts by this route of the model; None: from one of "".
    """

    model: nn.Module
    encode_prompts: Callable[[list[str]], Any]
    decode: Callable[[Tensor], Tensor]
    latent_shape: tuple[int, int, int]
    sampler: Sampler
    guidance: float
    guidance_channels: int | None
    device: torch.device
    route: Route | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Tensor:
        """uint8 [n, H, W, 3] on the CPU."""
        return to_uint8(self.pixels(prompts, numbers, seed))

    @torch.no_grad()
    def pixels(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Tensor:
        """float32 [n, C, H, W] in [-1, 1]; NaN are the images whose latents are not finite.

        A sharded model is called equally often whatever the prompts are.
        """
        keys, noise = initial_noise(seed, numbers, self.latent_shape, self.device)
        latents = self.sampler(self._predict(list(prompts), keys), noise, keys)
        finite = latents.isfinite().flatten(1).all(1)[:, None, None, None]
        return self.decode(latents).float().clamp(-1, 1).where(finite, torch.nan)

    def _predict(self, prompts: list[str], keys: Tensor) -> Predict:
        """With guidance two passes, one after the other: their captions or their tokens differ in number."""
        condition = self.encode_prompts(prompts)
        if self.route is None:
            weaker = _pass(self.model, self.encode_prompts([""] * len(prompts)))
        else:
            weaker = _pass(self.model, condition, partial(self.route.kept_at, keys=keys))
        return guided(_pass(self.model, condition), weaker, self.guidance, self.guidance_channels)


def _pass(model: nn.Module, condition: Any, kept: Callable[[Tensor, Tensor], Tensor] | None = None) -> Predict:
    """kept: of x and t, the tokens that go through the model's route."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        routed = {} if kept is None else {"kept": kept(x, t)}
        return model(x, t, condition, **routed)[0].to(x.dtype)

    return predict


def images_from_prompts(
    generate: Generator, prompts: Sequence[str], seed: int, group: dist.ProcessGroup, batch_size: int = 32
) -> np.ndarray:
    """uint8 [len(prompts), H, W, 3], on every rank.

    Each rank computes its part; all run the same number of batches, because sharded weights are gathered together.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    share = -(-len(prompts) // world)
    numbers = [min(i, len(prompts) - 1) for i in range(rank * share, (rank + 1) * share)]
    parts_of_mine = [numbers[start : start + batch_size] for start in range(0, share, batch_size)]
    mine = torch.cat([generate([prompts[i] for i in part], part, seed) for part in parts_of_mine])
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts)[: len(prompts)].numpy()


def to_uint8(pixels: Tensor) -> Tensor:
    """[n, C, H, W] in [-1, 1] -> uint8 [n, H, W, C] on the CPU; NaN is black."""
    return (pixels * 127.5 + 127.5).nan_to_num(0.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def initial_noise(
    seed: int, numbers: Sequence[int], latent_shape: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys int64 [n] and starting noise [n, C, h, w] float32 of images by their numbers."""
    keys = torch.from_numpy(position_keys(seed, np.array(numbers, dtype=np.int64))).to(device)
    return keys, normal(keys, latent_shape, "noise").float()


def save_grid(images: np.ndarray, path: Path, columns: int | None = None, min_side: int = 64) -> None:
    """uint8 [n, H, W, 3] -> a PNG of a grid; images smaller than min_side pixels are enlarged."""
    n, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    enlarge = max(1, -(-min_side // height))
    gap = 2
    cell_h, cell_w = height * enlarge + gap, width * enlarge + gap
    grid = np.full((rows * cell_h + gap, columns * cell_w + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * cell_h + gap, (i % columns) * cell_w + gap
        large = image.repeat(enlarge, 0).repeat(enlarge, 1)
        grid[top : top + height * enlarge, left : left + width * enlarge] = large
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    matplotlib.image.imsave(image, grid, format="png")
    write_atomically(path, image.getvalue())
