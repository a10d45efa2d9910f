"""Metrics against computations that share no line with them, and what they say of degenerate input."""

import math

import numpy as np
import pytest
import torch

from trainer.evaluate import metrics
from trainer.evaluate.metrics import MetricError, Moments, Statistics


def correlated(n: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix + shift


A, B = correlated(300, 24, 1), correlated(400, 24, 2, 0.3)


def test_moments_in_batches_are_those_of_the_whole() -> None:
    x = correlated(257, 16, 3) + 1e6  # far from 0: a sum of squares would lose nine digits
    moments = Moments(16)
    for part in x.split([100, 1, 56, 100]):
        moments.update(part)
    mean, covariance = moments.statistics()
    assert moments.count == 257
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-6)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The trace of the root from the eigenvalues of the product itself, which is not symmetric."""
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(c_a @ c_b).astype(complex)).sum().real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c_a) + np.trace(c_b) - 2 * roots)


def test_fid_is_that_of_an_independent_computation() -> None:
    ours = metrics.fid(metrics.statistics_of(A), metrics.statistics_of(B))
    assert ours == pytest.approx(frechet(A.numpy(), B.numpy()), rel=1e-6, abs=1e-6)
    assert ours > 0.1


def test_fid_of_one_dimension_has_a_closed_form() -> None:
    a = Statistics(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    b = Statistics(torch.tensor([3.0]).double(), torch.tensor([[9.0]]).double())
    assert metrics.fid(a, b) == pytest.approx((3 - 1) ** 2 + (3 - 2) ** 2, abs=1e-12)


@pytest.mark.parametrize("n", [20, 300])
def test_fid_of_a_set_with_itself_is_nothing(n: int) -> None:
    """With fewer images than features too: their covariance is singular."""
    statistics = metrics.statistics_of(correlated(n, 64, 5))
    assert metrics.fid(statistics, statistics) < 1e-9


def test_kid_is_that_of_an_independent_computation() -> None:
    """All pairs one by one, on the subsets that the seed says."""
    a, b = A[:, :8], B[:, :8]
    score = metrics.kid(a, b, subset_size=60, seed=7)
    generator = torch.Generator().manual_seed(7)
    order_a, order_b = torch.randperm(300, generator=generator), torch.randperm(400, generator=generator)
    values = []
    for part in range(5):
        x, y = (s[o[part * 60 : part * 60 + 60]].numpy() for s, o in ((a, order_a), (b, order_b)))
        kernel = [[(float(np.dot(p, q)) / 8 + 1) ** 3 for q in [*x, *y]] for p in [*x, *y]]
        table = np.array(kernel)
        same_x = sum(table[i, j] for i in range(60) for j in range(60) if i != j) / (60 * 59)
        same_y = sum(table[60 + i, 60 + j] for i in range(60) for j in range(60) if i != j) / (60 * 59)
        values.append(same_x + same_y - 2 * table[:60, 60:].mean())
    assert score.value == pytest.approx(np.mean(values), rel=1e-6)
    assert score.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5), rel=1e-6)


def test_kid_is_unbiased() -> None:
    """Of two samples of one distribution it is 0 within its error; a biased estimate would be well above."""
    score = metrics.kid(correlated(2000, 8, 11), correlated(2000, 8, 12), subset_size=50)
    assert score.standard_error is not None
    assert abs(score.value) < 4 * score.standard_error
    assert metrics.kid(A, B, subset_size=300).standard_error is None


def test_cmmd_is_that_of_an_independent_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's equation, all pairs one by one."""
    a, b = ([row / np.linalg.norm(row) for row in x.numpy()] for x in (A[:60], B[:80]))

    def mean(xs: list[np.ndarray], ys: list[np.ndarray]) -> float:
        pairs = [math.exp(-float(np.square(x - y).sum()) / (2 * 10**2)) for x in xs for y in ys]
        return math.fsum(pairs) / len(pairs)

    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert expected > 0.1
    assert metrics.cmmd(A[:60], B[:80]) == pytest.approx(expected, rel=1e-9)
    assert metrics.cmmd(A, A) == pytest.approx(0, abs=1e-9)
    monkeypatch.setattr(metrics, "_CHUNK", 7)
    assert metrics.cmmd(5 * A[:60], B[:80]) == pytest.approx(expected, rel=1e-9), "whatever the embeddings' lengths"
    with pytest.raises(MetricError, match="an embedding is zero"):
        metrics.cmmd(torch.cat([A, torch.zeros_like(A[:1])]), B)


def test_inception_score_is_that_of_an_independent_computation() -> None:
    p = torch.softmax(3 * correlated(103, 10, 8), dim=1)
    score = metrics.inception_score(p, splits=4)
    values = []
    for rows in (range(25), range(25, 50), range(50, 75), range(75, 103)):
        part = p.numpy()[list(rows)]
        marginal = part.mean(0)
        values.append(
            math.exp(
                np.mean([sum(q * math.log(q / m) for q, m in zip(r, marginal, strict=True) if q > 0) for r in part])
            )
        )
    assert score.value == pytest.approx(np.mean(values), rel=1e-6)
    assert score.standard_error == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-6)
    assert metrics.inception_score(torch.eye(10).repeat(4, 1), splits=2).value == pytest.approx(10)


@pytest.mark.slow
def test_precision_and_recall_are_those_of_an_independent_computation() -> None:
    real, generated = A[:, :4].numpy(), 0.6 * B[:, :4].numpy()

    def share(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(manifold - m, axis=1))[3] for m in manifold]
        return float(
            np.mean([any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points])
        )

    precision, recall = metrics.precision_recall(torch.tensor(real), torch.tensor(generated))
    assert precision == pytest.approx(share(generated, real), abs=1e-6)
    assert recall == pytest.approx(share(real, generated), abs=1e-6)
    assert precision > recall  # the generated set is narrower than the real one
    assert metrics.precision_recall(A, A) == (1.0, 1.0)


def test_distances_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metrics.precision_recall(A, B)
    monkeypatch.setattr(metrics, "_CHUNK", 7)
    assert metrics.precision_recall(A, B) == whole


def test_clip_score() -> None:
    images = torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, -2.0]])
    texts = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    values = [100.0, 100 / math.sqrt(2), -100.0]
    score = metrics.clip_score(images, texts)
    assert score.value == pytest.approx(np.mean(values), abs=1e-6)
    assert score.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), abs=1e-6)


NAN = A.clone()
NAN[3, 4] = float("nan")
CONSTANT = A[:1].repeat(50, 1)
ONE = A[:1]


@pytest.mark.parametrize(("bad", "word"), [(NAN, "NaN"), (CONSTANT, "constant"), (ONE, "too few")])
@pytest.mark.parametrize("metric", ["fid", "kid", "cmmd", "inception_score", "precision_recall", "clip_score"])
def test_degenerate_input_is_named(metric: str, bad: torch.Tensor, word: str) -> None:
    calls = {
        "fid": lambda: metrics.statistics_of(bad, "generated"),
        "kid": lambda: metrics.kid(A, bad, subset_size=20),
        "cmmd": lambda: metrics.cmmd(A, bad),
        "inception_score": lambda: metrics.inception_score(torch.softmax(bad, 1), splits=2),
        "precision_recall": lambda: metrics.precision_recall(A, bad),
        "clip_score": lambda: metrics.clip_score(bad, bad),
    }
    if metric == "clip_score" and word == "too few":
        bad = A[:0]
    with pytest.raises(MetricError, match=word):
        calls[metric]()


def test_streamed_degenerate_input_is_named() -> None:
    for bad, word in ((NAN, "NaN"), (CONSTANT, "constant"), (ONE, "too few")):
        moments = Moments(24)
        moments.update(bad)
        with pytest.raises(MetricError, match=f"generated.*{word}"):
            moments.statistics("generated")


def test_features_of_two_networks_do_not_compare() -> None:
    for call in (
        lambda: metrics.fid(metrics.statistics_of(A), metrics.statistics_of(B[:, :5])),
        lambda: metrics.kid(A, B[:, :5], 100),
        lambda: metrics.cmmd(A, B[:, :5]),
        lambda: metrics.precision_recall(A, B[:, :5]),
    ):
        with pytest.raises(MetricError, match="one network"):
            call()
    with pytest.raises(MetricError, match="probabilities"):
        metrics.inception_score(A)
    with pytest.raises(MetricError, match="pair up"):
        metrics.clip_score(A, A[:-1])
