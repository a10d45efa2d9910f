"""Distances between sets of images, on features of a fixed network: FID (sFID, FD-DINOv2), KID, CMMD, Inception score,
precision and recall, CLIP score. All in float64. Degenerate input is a MetricError.

Features are tensors [n, d] of one network, on any device, of images in any order unless said otherwise.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import DataError

_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0
_CHUNK = 2048  # rows of a distance matrix that are held at once
_RELATIVE_SPREAD = 1e-6  # features that differ by less, relative to their size, are of images that are all equal


class MetricError(DataError):
    """Features that a metric has no value for: too few images, constant ones, numbers that are not finite."""


class Score(NamedTuple):
    """A metric and, where it is a mean over parts, the standard error of that mean."""

    value: float
    standard_error: float | None = None


class Statistics(NamedTuple):
    """Mean [d] and covariance [d, d] of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor


class Moments:
    """Streaming mean and covariance of features, float64, as one pass over all of them in one process gives."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=device)  # sum of outer products about it

    def update(self, features: Tensor) -> None:
        """Take in features [n, width]."""
        x = features.to(self._mean)
        mean = x.mean(0)
        self._merge(len(x), mean, (x - mean).T @ (x - mean))

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Chan, Golub and LeVeque (1979): exact, and no cancellation however far the mean is from 0."""
        total, shift = self.count + count, mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total

    def all_reduce(self) -> None:
        """Merge what the ranks have taken in; the result is on all of them."""
        counts = torch.tensor([self.count], dtype=torch.float64, device=self._mean.device)
        dist.all_reduce(counts)
        total = max(1.0, float(counts))
        mean = self._mean * (self.count / total)
        dist.all_reduce(mean)
        shift = self._mean - mean
        self._scatter += torch.outer(shift, shift) * self.count
        dist.all_reduce(self._scatter)
        self._mean, self.count = mean, int(total)

    def statistics(self, name: str = "images") -> Statistics:
        """MetricError (which calls the set by its name) where the images are fewer than two, or constant."""
        if self.count < 2:
            raise MetricError(f"{name}: a covariance needs at least 2 images, these are too few: {self.count}")
        covariance = self._scatter / (self.count - 1)
        return check_statistics(Statistics(self._mean.cpu(), covariance.cpu()), name)


def check_statistics(statistics: Statistics, name: str) -> Statistics:
    """The same statistics; MetricError where a Gaussian cannot be made of them."""
    mean, covariance = statistics
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise MetricError(f"{name}: mean {tuple(mean.shape)} and covariance {tuple(covariance.shape)} do not fit")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise MetricError(f"{name}: the features hold NaN or infinity")
    if float(covariance.trace()) <= (_RELATIVE_SPREAD**2) * float(mean.square().sum()):
        raise MetricError(f"{name}: the images are constant, all features are equal")
    return statistics


def statistics_of(features: Tensor, name: str = "images") -> Statistics:
    """Statistics of features [n, d] that are all there."""
    features = _checked(features, name, 2)
    moments = Moments(features.shape[1], features.device)
    moments.update(features)
    return moments.statistics(name)


def fid(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two Gaussians (Heusel et al., 2017): |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    With C = R Rᵀ the trace of the root is the sum of the singular values of R_aᵀ R_b: no root is taken of an
    eigenvalue that is rounding noise, so that singular covariances (fewer images than features) keep their digits.
    """
    if len(a.mean) != len(b.mean):
        raise MetricError(f"features of {len(a.mean)} and of {len(b.mean)} numbers are not of one network")
    root = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    return max(0.0, float(distance))


def _root(covariance: Tensor) -> Tensor:
    """R [d, rank] with covariance = R Rᵀ; directions whose variance is rounding noise are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def kid(
    a: Tensor, b: Tensor, subset_size: int = 1000, seed: int = 0, names: tuple[str, str] = ("first set", "second set")
) -> Score:
    """Kernel distance (Bińkowski et al., 2018): unbiased MMD² under the kernel (xᵀy / d + 1)³.

    The mean over as many disjoint subsets of `subset_size` images of each set as there are; which ones is a function
    of the sizes and the seed. Disjoint, so that the standard error is one. A single subset has none.
    """
    a, b = (_checked(x, name, subset_size) for x, name in zip((a, b), names, strict=True))
    if a.shape[1] != b.shape[1]:
        raise MetricError(f"features of {a.shape[1]} and of {b.shape[1]} numbers are not of one network")
    if subset_size < 2:
        raise MetricError(f"KID needs subsets of at least 2 images, {subset_size} are too few")
    generator = torch.Generator().manual_seed(seed)
    parts = [x[torch.randperm(len(x), generator=generator).to(x.device)].split(subset_size) for x in (a, b)]
    pairs = [(x, y) for x, y in zip(*parts, strict=False) if len(x) == len(y) == subset_size]
    return _mean_of([_squared_mmd(x, y) for x, y in pairs])


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Of equally many [m, d], unbiased: no sample is compared with itself within a set."""
    m = len(x)

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return (p @ q.T / p.shape[1] + 1) ** 3

    within = sum((k.sum() - k.trace()) / (m * (m - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())


def cmmd(a: Tensor, b: Tensor, names: tuple[str, str] = ("first set", "second set")) -> float:
    """CLIP's maximum mean discrepancy (Jayasumana et al., 2024): 1000 x MMD² of embeddings brought to length 1, under
    the kernel exp(-|x - y|² / (2 · 10²)).

    The estimate of least variance, which is biased: each embedding is compared with itself, too.
    """
    a, b = (_checked(x, name, 2) for x, name in zip((a, b), names, strict=True))
    if a.shape[1] != b.shape[1]:
        raise MetricError(f"features of {a.shape[1]} and of {b.shape[1]} numbers are not of one network")
    norms = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    if float(torch.cat(norms).min()) == 0:
        raise MetricError("cmmd: an embedding is zero")
    a, b = a / norms[0], b / norms[1]

    def kernel(x: Tensor, y: Tensor) -> float:
        """The mean over all pairs."""
        total = math.fsum(float((d / (-2 * _CMMD_SIGMA**2)).exp().sum()) for d in _squared_distances(x, y))
        return total / (len(x) * len(y))

    return _CMMD_SCALE * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def inception_score(probabilities: Tensor, splits: int = 10) -> Score:
    """exp(mean KL(p(y|x) || p(y))) (Salimans et al., 2016), over `splits` equal parts in the order of the images.

    probabilities: [n, classes], rows sum to 1. What n leaves over after the division goes to the last part.
    """
    p = _checked(probabilities, "generated images", 2 * splits)
    if not torch.allclose(p.sum(1), torch.ones(len(p)).to(p), atol=1e-3) or bool((p < 0).any()):
        raise MetricError("inception_score: rows must be probabilities, that is not negative and of sum 1")
    size = len(p) // splits
    scores = []
    for i in range(splits):
        part = p[i * size : (i + 1) * size if i < splits - 1 else len(p)]
        scores.append(
            math.exp(float((torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))).sum(1).mean()))
        )
    return _mean_of(scores)


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    Precision: share of the generated images that lie in a real image's ball, whose radius is the distance to its k-th
    nearest real neighbour; recall with the two sets exchanged.
    """
    real, generated = _checked(real, "real images", k + 1), _checked(generated, "generated images", k + 1)
    if real.shape[1] != generated.shape[1]:
        raise MetricError(f"features of {real.shape[1]} and of {generated.shape[1]} numbers are not of one network")
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: Tensor, manifold: Tensor, k: int) -> float:
    """Share of the points that lie in the ball of at least one point of the manifold."""
    # The nearest is the point itself, at 0; hence k + 1.
    radii = torch.cat([d.kthvalue(k + 1, dim=1).values for d in _squared_distances(manifold, manifold)])
    return float(torch.cat([(d <= radii).any(1) for d in _squared_distances(points, manifold)]).double().mean())


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """[_CHUNK, len(y)] at a time."""
    for rows in x.split(_CHUNK):
        yield (rows.square().sum(1)[:, None] + y.square().sum(1) - 2 * rows @ y.T).clamp(min=0)


def clip_score(images: Tensor, texts: Tensor) -> Score:
    """100 x cosine of CLIP embeddings [n, d] of images and of their own captions, mean over the pairs.

    Not cut off at 0, as Hessel et al. (2021) do and the paper's code does not.
    """
    images, texts = _checked(images, "images", 1), _checked(texts, "captions", 1, constant=True)
    if images.shape != texts.shape:
        raise MetricError(f"clip_score: images {tuple(images.shape)} and captions {tuple(texts.shape)} must pair up")
    norms = images.norm(dim=1) * texts.norm(dim=1)
    if float(norms.min()) == 0:
        raise MetricError("clip_score: an embedding is zero")
    return _mean_of((100 * (images * texts).sum(1) / norms).tolist())


def _mean_of(parts: list[float]) -> Score:
    """The mean of independent parts with its standard error."""
    mean = math.fsum(parts) / len(parts)
    if len(parts) == 1:
        return Score(mean)
    variance = math.fsum((part - mean) ** 2 for part in parts) / (len(parts) - 1)
    return Score(mean, math.sqrt(variance / len(parts)))


def _checked(features: Tensor, name: str, at_least: int, constant: bool = False) -> Tensor:
    """float64 [n, d]; MetricError where a metric has no value for them. constant: may all be equal."""
    if features.ndim != 2:
        raise MetricError(f"{name}: features must be [images, numbers], got {tuple(features.shape)}")
    if len(features) < at_least:
        raise MetricError(f"{name}: too few images, {len(features)} where at least {at_least} are needed")
    x = features.double()
    if not x.isfinite().all():
        raise MetricError(f"{name}: the features hold NaN or infinity")
    spread = x.amax(0) - x.amin(0)
    if not constant and len(x) > 1 and float(spread.max()) <= _RELATIVE_SPREAD * float(x.abs().max()):
        raise MetricError(f"{name}: the images are constant, all features are equal")
    return x
