"""Images from prompts: each a function of (seed, its number, prompt) alone; shared out over the ranks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.order import position_keys
from trainer.diffusion.random import normal
from trainer.diffusion.sampling import Predict, Sampler, guided


def images_from_prompts(
    model: nn.Module,
    encode_prompts: Callable[[list[str]], Any],
    decode: Callable[[Tensor], Tensor],
    prompts: Sequence[str],
    latent_shape: tuple[int, int, int],
    sampler: Sampler,
    seed: int,
    guidance: float,
    guidance_channels: int | None,
    device: torch.device,
    group: dist.ProcessGroup,
    batch_size: int = 32,
) -> np.ndarray:
    """uint8 [len(prompts), H, W, 3], on every rank.

    encode_prompts: prompts -> what the model is conditioned on; "" is no condition.
    Each rank computes its part; all run the same number of batches, because sharded weights are gathered together.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    share = -(-len(prompts) // world)
    numbers = [min(i, len(prompts) - 1) for i in range(rank * share, (rank + 1) * share)]
    images: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, share, batch_size):
            part = numbers[start : start + batch_size]
            keys, noise = initial_noise(seed, part, latent_shape, device)
            conditional = _predict(model, encode_prompts([prompts[i] for i in part]))
            unconditional = _predict(model, encode_prompts([""] * len(part)))
            latents = sampler(guided(conditional, unconditional, guidance, guidance_channels), noise, keys)
            pixels = (decode(latents).float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
            images.append(pixels.permute(0, 2, 3, 1).cpu())  # [b, H, W, 3]
    mine = torch.cat(images)
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts)[: len(prompts)].numpy()


def initial_noise(
    seed: int, numbers: Sequence[int], latent_shape: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys int64 [n] and starting noise [n, C, h, w] float32 of images by their numbers."""
    keys = torch.from_numpy(position_keys(seed, np.array(numbers, dtype=np.int64))).to(device)
    return keys, normal(keys, latent_shape, "noise").float()


def _predict(model: nn.Module, condition: Any) -> Predict:
    return lambda x, t: model(x, t, condition)[0].to(x.dtype)


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
    matplotlib.image.imsave(path, grid)
