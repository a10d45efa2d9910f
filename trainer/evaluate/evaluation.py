"""A suite, ready to measure: its prompts, its reference, its networks. It makes no images: it is handed them."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data.errors import DataError
from data.image_sets import ImageSet, Prompt, as_read_back, open_image_set, open_npz_images, read_prompts
from data.order import position_keys, uniforms

from . import dpg_bench, metrics
from .clip import Clip
from .detector import Detector
from .embeddings import ClipImages, Dino
from .features import (
    Network,
    SetFeatures,
    Tally,
    Wanted,
    batches_of,
    cached,
    filled_up,
    gather_rows,
    image_set_features,
    published_statistics,
)
from .generate import Generator, to_uint8
from .geneval import check_facts, is_correct, scores
from .inception import Inception
from .metrics import MetricError, Score
from .suite import AGAINST_REFERENCE, CLASSES, ON_FEATURES, RANDOM_CLASSES, Metric, SuiteConfig, digest
from .vqa import Blip

_CACHE = Path(".cache/evaluate")  # features of reference images


class Embedded(NamedTuple):
    """A network whose features of the generated images are compared with those of the reference: by Fréchet distance
    where `wanted` says pooled, by CMMD where it says rows."""

    network: Network
    wanted: Wanted
    reference: SetFeatures


@dataclass(frozen=True)
class Evaluation:
    """contents: fingerprints of what the suite's paths hold, by what they are ("prompts", "network", "reference")."""

    suite: SuiteConfig
    prompts: list[Prompt]
    """One prompt per image, untruncated."""
    contents: Mapping[str, str]
    wanted: Wanted
    reference: SetFeatures
    inception: Inception | None
    clip: Clip | None
    detector: Detector | None
    device: torch.device
    group: dist.ProcessGroup
    embedded: Mapping[str, Embedded] = field(default_factory=dict)
    """By the name of the metric."""
    vqa: Blip | None = None

    @property
    def batches(self) -> list[range]:
        """Numbers of the images that are made together."""
        return batches_of(len(self.prompts), self.suite.batch_size)

    def own_batches(self, batches: Sequence[int] | None = None) -> Iterator[tuple[int, bool]]:
        """(batch, whether it counts) for each batch that this rank makes. Batch i of `batches` (None: of all) falls to
        rank i mod W.

        All ranks get equally many, because they gather sharded weights together: a rank that has no batch left makes
        the last one again, which does not count.
        """
        batches = range(len(self.batches)) if batches is None else batches
        size = dist.get_world_size(self.group)
        for first in range(0, len(batches), size):
            place = first + dist.get_rank(self.group)
            yield batches[min(place, len(batches) - 1)], place < len(batches)

    def make(self, generate: Generator, batch: int) -> np.ndarray:
        """Images uint8 [b, H, W, 3] of a batch, made at the suite's batch size whatever b is.

        Called equally often on all ranks; MetricError on all of them where one has made an image that is not finite.
        """
        numbers = [*self.batches[batch]]
        filled = numbers + numbers[-1:] * (self.suite.batch_size - len(numbers))
        pixels = generate.pixels([self.prompts[i].text for i in filled], filled, self.suite.seed)[: len(numbers)]
        finite = pixels.isfinite().flatten(1).all(1).tolist()
        broken: list[Any] = [None] * dist.get_world_size(self.group)
        mine = [number for number, is_finite in zip(numbers, finite, strict=True) if not is_finite]
        dist.all_gather_object(broken, mine, group=self.group)
        if found := sorted({number for part in broken for number in part}):
            raise MetricError(
                f"generated images: image {found[0]} is not finite (of the last batches, {len(found)} are not): the "
                "weights have diverged, or precision is too narrow for them; try precision=fp32, or an older checkpoint"
            )
        return to_uint8(pixels).numpy()

    def as_kept(self, images: np.ndarray) -> np.ndarray:
        """What images uint8 [b, H, W, 3] are once they have been kept in the suite's format and read back."""
        return as_read_back(images, self.suite.image_format, self.suite.jpeg_quality)

    def measure(self, images_of: Callable[[int], np.ndarray]) -> dict[str, Score]:
        """The figures, on rank 0 (elsewhere {}), of images_of(batch), uint8 [b, H, W, 3], for this rank's batches.

        MetricError where the images are degenerate.
        """
        tally = None if self.inception is None else Tally(self.inception, self.wanted, self.device)
        others = {name: Tally(one.network, one.wanted, self.device) for name, one in self.embedded.items()}
        pairs: dict[int, torch.Tensor] = {}
        judged: dict[int, bool] = {}
        answered: dict[int, list[bool]] = {}
        for batch in (batch for batch, counts in self.own_batches() if counts):
            numbers = self.batches[batch]
            whole = filled_up(images_of(batch), self.suite.batch_size)
            for each in ([] if tally is None else [tally]) + list(others.values()):
                each.update(numbers, whole)
            if "clip_score" in self.suite.metrics:
                pairs |= self._embedded(numbers, whole)
            if self.detector is not None:
                for number in numbers:
                    detections = self.detector(whole[number - numbers[0]])
                    judged[number] = is_correct(detections, self.prompts[number].facts)
            if self.vqa is not None:
                for number in numbers:
                    questions = [question["text"] for question in self.prompts[number].facts["questions"]]
                    answers = self.vqa(whole[number - numbers[0]], questions)
                    answered[number] = [answer == "yes" for answer in answers]
        features = SetFeatures() if tally is None else tally.finish("generated images", self.group)
        of_others = {name: one.finish("generated images", self.group) for name, one in others.items()}
        embeddings = gather_rows(pairs, self.group) if "clip_score" in self.suite.metrics else None
        verdicts: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(verdicts, (judged, answered), group=self.group)
        if dist.get_rank(self.group) != 0:
            return {}
        figures = self._on_features(features) | self._on_embeddings(of_others)
        if embeddings is not None:
            figures["clip_score"] = metrics.clip_score(*embeddings.chunk(2, dim=1))
        whole_judged, whole_answered = (
            {n: v for part in parts for n, v in part.items()} for parts in zip(*verdicts, strict=True)
        )
        return figures | self._on_prompts(whole_judged, whole_answered)

    def _on_prompts(self, judged: Mapping[int, bool], answered: Mapping[int, list[bool]]) -> dict[str, Score]:
        """What images show of what their prompts ask for. judged, answered: of all images, by number."""
        each, prompts = self.suite.images_per_prompt, self.prompts
        figures: dict[str, Score] = {}
        if self.detector is not None:
            tags = [prompt.facts["tag"] for prompt in prompts]
            figures |= scores([(tag, number // each, judged[number]) for number, tag in enumerate(tags)])
        if self.vqa is not None:
            figures |= dpg_bench.scores(
                [(number // each, prompt.facts["questions"], answered[number]) for number, prompt in enumerate(prompts)]
            )
        return figures

    def _on_embeddings(self, features: Mapping[str, SetFeatures]) -> dict[str, Score]:
        figures: dict[str, Score] = {}
        for name, one in features.items():
            reference = self.embedded[name].reference
            if one.pooled is not None and reference.pooled is not None:
                figures[name] = Score(metrics.fid(one.pooled, reference.pooled))
            if one.rows is not None and reference.rows is not None:
                rows, real = one.rows.to(self.device), reference.rows.to(self.device)
                figures[name] = Score(metrics.cmmd(real, rows, names=("reference", "generated images")))
        return figures

    def _embedded(self, numbers: range, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Image and caption embeddings side by side, by number."""
        assert self.clip is not None
        texts = [self.prompts[number].text for number in numbers]
        texts += texts[-1:] * (len(images) - len(texts))
        both = torch.cat([self.clip.images(images), self.clip.texts(texts)], dim=1).cpu()
        return dict(zip(numbers, both[: len(numbers)], strict=True))

    def _on_features(self, features: SetFeatures) -> dict[str, Score]:
        suite, reference = self.suite, self.reference
        figures: dict[str, Score] = {}
        if features.pooled is not None and reference.pooled is not None:
            figures["fid"] = Score(metrics.fid(features.pooled, reference.pooled))
        if features.spatial is not None and reference.spatial is not None:
            figures["sfid"] = Score(metrics.fid(features.spatial, reference.spatial))
        if features.probabilities is not None:
            figures["inception_score"] = metrics.inception_score(features.probabilities, suite.inception_splits)
        if features.rows is not None and reference.rows is not None:
            rows, real = features.rows.to(self.device), reference.rows.to(self.device)
            if "kid" in suite.metrics:
                figures["kid"] = metrics.kid(real, rows, suite.kid_subset_size, names=("reference", "generated images"))
            if "precision_recall" in suite.metrics:
                precision, recall = metrics.precision_recall(real, rows, suite.neighbours)
                figures |= {"precision": Score(precision), "recall": Score(recall)}
        return figures


def prepare(
    suite: SuiteConfig, side: int, classes: int | None, device: torch.device, group: dist.ProcessGroup
) -> Evaluation:
    """Read and check all that a suite needs, and measure its reference. Called on all ranks.

    side: of the generated images in pixels. classes: of a model of class labels. DataError where something is missing.
    """
    prompts = _prompts(suite, classes)
    _check_count(suite, len(prompts), "count", suite.metrics)
    wanted_metrics = set(suite.metrics)
    wanted = Wanted(
        pooled="fid" in wanted_metrics,
        spatial="sfid" in wanted_metrics,
        rows=bool(wanted_metrics & {"kid", "precision_recall"}),
        probabilities="inception_score" in wanted_metrics,
    )
    contents = {"prompts": digest([[prompt.text, dict(prompt.facts)] for prompt in prompts])}
    inception = clip = detector = None
    reference = SetFeatures()
    if wanted_metrics & ON_FEATURES:
        assert suite.network is not None
        inception = Inception(suite.network, suite.resize, device, suite.network_sha256)
        if wanted.probabilities and not inception.has_probabilities:
            raise DataError(
                f"network: {suite.network} has no output layer, which inception_score needs: use NVIDIA's "
                "inception-2015-12-05.pt, or leave inception_score out of metrics"
            )
        contents["network"] = inception.fingerprint
    if wanted_metrics & AGAINST_REFERENCE & ON_FEATURES:
        assert inception is not None
        reference, contents["reference"] = _reference(suite, side, inception, wanted, device, group)
    embedded: dict[str, Embedded] = {}
    for name, network, kept in _embedders(suite, device):
        of_reference, contents["reference"] = _embedded_reference(suite, side, network, kept, device, group)
        embedded[name], contents[name] = Embedded(network, kept, of_reference), network.fingerprint
    if suite.clip is not None and wanted_metrics & {"clip_score", "geneval"}:
        clip = Clip(suite.clip, device)
        contents["clip"] = clip.fingerprint
    if "geneval" in wanted_metrics:
        assert suite.detector is not None
        assert clip is not None
        detector = Detector(suite.detector, clip, device)
        contents["detector"] = detector.fingerprint
        for number, prompt in enumerate(prompts[:: suite.images_per_prompt], 1):
            check_facts(prompt.facts, f"prompts: {suite.prompts}: entry {number}")
        detector.check_names([item["class"] for prompt in prompts for item in prompt.facts["include"]])
    vqa = None
    if "dpg_bench" in wanted_metrics:
        assert suite.vqa is not None
        vqa = Blip(suite.vqa, device)
        contents["vqa"] = vqa.fingerprint
    return Evaluation(
        suite, prompts, contents, wanted, reference, inception, clip, detector, device, group, embedded, vqa
    )


def _embedders(suite: SuiteConfig, device: torch.device) -> Iterator[tuple[str, Network, Wanted]]:
    """(metric, its network, what is kept of its features) of the metrics that are not on Inception's."""
    if "fd_dinov2" in suite.metrics:
        assert suite.dino is not None
        yield "fd_dinov2", Dino(suite.dino, device), Wanted(pooled=True)
    if "cmmd" in suite.metrics:
        assert suite.cmmd_clip is not None
        yield "cmmd", ClipImages(suite.cmmd_clip, device), Wanted(rows=True)


def _prompts(suite: SuiteConfig, classes: int | None) -> list[Prompt]:
    """One prompt per image; the images of a prompt follow one another."""
    if suite.prompts in (CLASSES, RANDOM_CLASSES):
        if classes is None:
            raise DataError("prompts: the checkpoint's model reads captions and knows no classes: give a prompt file")
        if suite.count is None:
            raise DataError("count: how many images of classes must be given")
        labels = np.arange(suite.count) % classes
        if suite.prompts == RANDOM_CLASSES:
            keys = position_keys(suite.seed, np.arange(suite.count, dtype=np.int64))
            labels = (uniforms(keys, "class of an image") * classes).astype(np.int64)
        return [Prompt(str(label), {}) for label in labels]
    read = dpg_bench.read_questions if "dpg_bench" in suite.metrics else read_prompts
    prompts = read(suite.prompts, "prompts")
    each = suite.images_per_prompt
    count = len(prompts) * each if suite.count is None else suite.count
    if not 0 < count <= len(prompts) * each:
        raise DataError(
            f"prompts: {suite.prompts} has {len(prompts)} prompts, {count} images of {each} each are wanted"
        )
    return [prompts[number // each] for number in range(count)]


def _check_count(suite: SuiteConfig, count: int, name: str, of: Collection[Metric]) -> None:
    """Before hours of making images: DataError where they are too few for a metric."""
    least = {
        "fid": 2, "sfid": 2, "kid": suite.kid_subset_size, "inception_score": 2 * suite.inception_splits,
        "precision_recall": suite.neighbours + 1, "fd_dinov2": 2, "cmmd": 2,
    }  # fmt: skip
    for metric in of:
        if count < least.get(metric, 1):
            raise DataError(f"{name}: {count} images are too few for {metric}, which needs at least {least[metric]}")


def _measured(
    suite: SuiteConfig,
    images: ImageSet,
    side: int,
    network: Network,
    wanted: Wanted,
    device: torch.device,
    group: dist.ProcessGroup,
) -> SetFeatures:
    """Features of reference images, kept from one evaluation to the next."""
    identity = [images.fingerprint, side, suite.resize, suite.batch_size, network.fingerprint, wanted]
    make = partial(image_set_features, images, side, network, wanted, suite.batch_size, device, group)
    return cached(_CACHE / f"{digest(identity)}.npz", make, group)


def _reference_images(suite: SuiteConfig) -> ImageSet:
    assert suite.reference is not None
    images = open_image_set(suite.reference, "reference", suite.reference_count)
    _check_count(suite, len(images), images.name, AGAINST_REFERENCE.intersection(suite.metrics))
    return images


def _embedded_reference(
    suite: SuiteConfig, side: int, network: Network, wanted: Wanted, device: torch.device, group: dist.ProcessGroup
) -> tuple[SetFeatures, str]:
    """As _reference, of a network of which no statistics are published: an .npz is read for its images."""
    assert suite.reference is not None
    path = Path(suite.reference).expanduser()
    if path.suffix == ".npz":
        images, identity = open_npz_images(path, "reference"), _identity(path)
    else:
        images = _reference_images(suite)
        identity = images.fingerprint
    return _measured(suite, images, side, network, wanted, device, group), identity


def _identity(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reference(
    suite: SuiteConfig, side: int, inception: Inception, wanted: Wanted, device: torch.device, group: dist.ProcessGroup
) -> tuple[SetFeatures, str]:
    """(features of the reference, fingerprint)."""
    assert suite.reference is not None
    wanted = wanted._replace(probabilities=False)
    if not suite.reference.endswith(".npz"):
        images = _reference_images(suite)
        return _measured(suite, images, side, inception, wanted, device, group), images.fingerprint
    path = Path(suite.reference).expanduser()
    features = published_statistics(path, wanted.spatial)
    if wanted.rows:  # ADM's file has images beside its statistics, and precision and recall are of those
        images = open_npz_images(path, "reference")
        rows = _measured(suite, images, side, inception, Wanted(rows=True), device, group).rows
        features = features._replace(rows=rows)
    return features, _identity(path)
