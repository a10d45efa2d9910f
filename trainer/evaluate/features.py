"""Features of a set of images that is shared out over the ranks: of the reference, and of the generated."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import DataError
from data.files import temporary_beside
from data.image_sets import ImageSet, read_npz

from .inception import Features
from .metrics import Moments, Statistics, check_statistics


class Network(Protocol):
    """Inception, or one that has no more than pooled features. fingerprint: its identity. widths: of its pooled and
    spatial features."""

    fingerprint: str
    widths: tuple[int, int]

    def __call__(self, images: Tensor) -> Features:
        """images: uint8 [b, H, W, 3]."""
        ...


class SetFeatures(NamedTuple):
    """pooled and spatial: statistics over all ranks' images, on all ranks; None where not asked for. rows: pooled
    features [n, d], and probabilities: [n, 1008], by the images' numbers, on rank 0 alone."""

    pooled: Statistics | None = None
    spatial: Statistics | None = None
    rows: Tensor | None = None
    probabilities: Tensor | None = None


class Wanted(NamedTuple):
    """What is kept of the features."""

    pooled: bool = False
    spatial: bool = False
    rows: bool = False
    probabilities: bool = False


class Tally:
    """Takes in this rank's images, a batch at a time."""

    def __init__(self, network: Network, wanted: Wanted, device: torch.device) -> None:
        self._network, self._wanted = network, wanted
        pooled, spatial = network.widths
        self._pooled = Moments(pooled, device)
        self._spatial = Moments(spatial, device) if wanted.spatial else None
        self._rows: dict[int, Tensor] = {}
        self._probabilities: dict[int, Tensor] = {}

    def update(self, numbers: Sequence[int], images: Tensor) -> None:
        """images: uint8 [b, H, W, 3], of which the first len(numbers) count: the others fill up the shape."""
        features, count = self._network(images), len(numbers)
        self._pooled.update(features.pooled[:count])
        if self._spatial is not None:
            self._spatial.update(features.spatial[:count])
        if self._wanted.rows:
            self._rows |= zip(numbers, features.pooled[:count].cpu(), strict=True)
        if self._wanted.probabilities and features.probabilities is not None:
            self._probabilities |= zip(numbers, features.probabilities[:count].cpu(), strict=True)

    def finish(self, name: str, group: dist.ProcessGroup) -> SetFeatures:
        """Merge what all ranks have taken in. MetricError that calls the set by its name."""
        for moments in (self._pooled, self._spatial):
            if moments is not None:
                moments.all_reduce()
        return SetFeatures(
            self._pooled.statistics(name) if self._wanted.pooled else None,
            self._spatial.statistics(name) if self._spatial is not None else None,
            gather_rows(self._rows, group) if self._wanted.rows else None,
            gather_rows(self._probabilities, group) if self._wanted.probabilities else None,
        )


def gather_rows(rows: Mapping[int, Tensor], group: dist.ProcessGroup) -> Tensor | None:
    """Rows of all ranks by number -> [n, d] in the order of the numbers, on rank 0; None elsewhere."""
    numbers = sorted(rows)
    mine = (numbers, torch.stack([rows[i] for i in numbers]).numpy() if numbers else None)
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(mine, parts if dist.get_rank(group) == 0 else None, dst=0, group=group)
    if dist.get_rank(group) != 0:
        return None
    order = np.argsort(np.concatenate([numbers for numbers, _ in parts]), kind="stable")
    return torch.from_numpy(np.concatenate([values for _, values in parts if values is not None])[order])


def batches_of(count: int, size: int) -> list[range]:
    """0 .. count - 1 in batches; the same ones whatever the number of processes."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def filled_up(images: np.ndarray, size: int) -> Tensor:
    """[size, H, W, 3]: the last image is repeated, since equal bits need equal shapes, and an equal layout in memory:
    with channels first, as a decoder leaves them, convolutions take another way."""
    return torch.from_numpy(np.ascontiguousarray(np.concatenate([images, *[images[-1:]] * (size - len(images))])))


def image_set_features(
    images: ImageSet,
    side: int,
    network: Network,
    wanted: Wanted,
    batch_size: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> SetFeatures:
    """Features of a reference set, each rank a share of its batches."""
    tally = Tally(network, wanted, device)
    for batch in batches_of(len(images), batch_size)[dist.get_rank(group) :: dist.get_world_size(group)]:
        tally.update(batch, filled_up(images.pixels(batch, side), batch_size))
    return tally.finish(images.name, group)


def published_statistics(path: Path, spatial: bool) -> SetFeatures:
    """Statistics of an .npz with mu and sigma (and mu_s and sigma_s, as ADM's). DataError where they are not there."""
    names = ["mu", "sigma", *(["mu_s", "sigma_s"] if spatial else [])]
    arrays = read_npz(path, "reference", names, "lacks statistics", "mu and sigma, and mu_s and sigma_s for sfid")
    try:
        tensors = [torch.from_numpy(np.asarray(array, np.float64)) for array in arrays]
    except (ValueError, TypeError) as error:
        raise DataError(f"reference: {path} has other things than numbers for statistics ({error})") from None
    pairs = [Statistics(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]
    statistics = [check_statistics(pair, f"reference: {path}") for pair in pairs]
    return SetFeatures(statistics[0], statistics[1] if spatial else None)


def cached(path: Path, make: Callable[[], SetFeatures], group: dist.ProcessGroup) -> SetFeatures:
    """What make() gives, kept in a file that rank 0 writes; a file that is there is read instead, by all ranks."""
    there: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(there, path.is_file(), group=group)
    if all(there):
        return _read(path)
    made = make()
    if dist.get_rank(group) == 0:
        with temporary_beside(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **_arrays(made))
    return made


def _arrays(features: SetFeatures) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, suffix in (("pooled", ""), ("spatial", "_s")):
        if (statistics := getattr(features, name)) is not None:
            arrays |= {f"mu{suffix}": statistics.mean.numpy(), f"sigma{suffix}": statistics.covariance.numpy()}
    return arrays | ({} if features.rows is None else {"rows": features.rows.numpy()})


def _read(path: Path) -> SetFeatures:
    with np.load(path, allow_pickle=False) as file:
        held = {name: torch.from_numpy(file[name]) for name in file.files}
    pooled = Statistics(held["mu"], held["sigma"]) if "mu" in held else None
    spatial = Statistics(held["mu_s"], held["sigma_s"]) if "mu_s" in held else None
    return SetFeatures(pooled, spatial, held.get("rows"))
