"""A prepared suite measures images that it is handed: GenEval with small models, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.debug import ensure_debug_assets
from data.errors import DataError
from tests.helpers.tiny_networks import pinned, save_clip, save_detector, save_inception
from trainer.diffusion.sampling import Euler
from trainer.evaluate import detector, evaluation
from trainer.evaluate.evaluation import Evaluation, prepare
from trainer.evaluate.generate import Generator
from trainer.evaluate.metrics import MetricError, statistics_of
from trainer.evaluate.suite import SuiteConfig
from trainer.parallel.mesh import World

LINES = (
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "clock", "count": 1}], "prompt": "a b"},
    {"tag": "colors", "include": [{"class": "clock", "count": 1, "color": "red"}], "prompt": "a red clock"},
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_CACHE", tmp_path / "cache")


def ready(world: World, **keys: Any) -> Evaluation:
    suite = SuiteConfig.model_validate({"guidance": 1.0, "rectified_flow": {"steps": 1}, "batch_size": 2, **keys})
    return prepare(suite, 32, None, world.device, world.control)


def noise(evaluation: Evaluation, batch: int) -> np.ndarray:
    generator = np.random.default_rng(batch)
    return generator.integers(0, 256, (len(evaluation.batches[batch]), 32, 32, 3), dtype=np.uint8)


@pytest.mark.slow
def test_geneval_with_small_models(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From images to scores; with the thresholds down everything that is asked for is found, save the colour."""
    monkeypatch.setattr(detector, "SHORT", 64)
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    made = ready(
        world,
        metrics=["geneval"],
        prompts=str(tmp_path / "metadata.jsonl"),
        images_per_prompt=2,
        clip=str(save_clip(tmp_path / "clip")),
        detector=str(save_detector(tmp_path / "detector", ["clock", "dog"])),
    )
    assert [prompt.text for prompt in made.prompts] == [line["prompt"] for line in LINES for _ in range(2)]
    none = made.measure(lambda batch: noise(made, batch))
    assert {key: score.value for key, score in none.items()} == {
        "geneval": 0, "geneval_single_object": 0, "geneval_two_object": 0, "geneval_colors": 0,
    }  # fmt: skip
    monkeypatch.setattr("trainer.evaluate.geneval._CONFIDENCE", 0.0)
    found = made.measure(lambda batch: noise(made, batch))
    assert found["geneval_single_object"].value == found["geneval_two_object"].value == 1
    (tmp_path / "metadata.jsonl").write_text(json.dumps({**LINES[0], "tag": "size"}) + "\n")
    with pytest.raises(DataError, match=r"metadata\.jsonl: entry 1: tag 'size'"):
        ready(world, **made.suite.model_dump(include={"metrics", "prompts", "clip", "detector"}))


@pytest.mark.slow
def test_features_of_the_reference_are_kept(tmp_path: Path, world: World) -> None:
    """Measured once; a set against itself has no distance; constant images and a missing output layer are named."""
    shards = str(ensure_debug_assets() / "val-000000.tar")
    network = save_inception(tmp_path / "inception.pt")
    keys = {
        "metrics": ["fid", "kid"],
        "prompts": shards,
        "reference": shards,
        **pinned(network),
        "kid_subset_size": 32,
        "batch_size": 7,
    }
    made = ready(world, **keys)
    [file] = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns
    again = ready(world, **keys)
    assert file.stat().st_mtime_ns == written
    images = evaluation.open_image_set(shards, "reference")
    assert made.inception is not None
    whole = statistics_of(made.inception(torch.from_numpy(images.pixels(range(64), 32))).pooled)
    assert made.reference.pooled is not None
    for ours, expected in zip(made.reference.pooled, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)  # rows that fill up the last batch count not
    for each in (made, again):
        figures = each.measure(lambda batch, each=each: images.pixels(each.batches[batch], 32))
        assert figures["fid"].value < 1e-6
        assert abs(figures["kid"].value) < 0.1
    with pytest.raises(MetricError, match="generated images: the images are constant"):
        made.measure(lambda batch: np.zeros((len(made.batches[batch]), 32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="knows no classes"):
        ready(world, **{**keys, "prompts": "classes", "count": 4})
    with pytest.raises(DataError, match="has 64 prompts, 65 images"):
        ready(world, **keys, count=65)
    few = f"count: 9 images are too few for kid, which needs at least {made.suite.kid_subset_size}"
    with pytest.raises(DataError, match=few):
        ready(world, **keys, count=9)
    with pytest.raises(DataError, match=r"reference: .*: 9 images are too few for kid"):
        ready(world, **{**keys, "reference_count": 9})


@pytest.mark.slow
def test_published_reference(tmp_path: Path, world: World) -> None:
    """Statistics of the file for FID, its images for precision and recall; another file is another protocol."""
    shards = str(ensure_debug_assets() / "val-000000.tar")
    keys: dict[str, Any] = {"prompts": shards, **pinned(save_inception(tmp_path / "inception.pt"))}
    own = ready(world, metrics=["fid"], reference=shards, **keys)
    assert own.reference.pooled is not None
    pixels = evaluation.open_image_set(shards, "reference").pixels(range(64), 32)
    mean, covariance = (part.numpy() for part in own.reference.pooled)
    file = tmp_path / "published.npz"
    np.savez(file, mu=mean, sigma=covariance, arr_0=pixels)
    keys |= {"metrics": ["fid", "precision_recall"], "reference": str(file)}
    made = ready(world, **keys)
    figures = made.measure(lambda batch: pixels[list(made.batches[batch])])
    assert figures["fid"].value < 1e-6
    assert figures["precision"].value == figures["recall"].value == 1
    np.savez(file, mu=mean + 1, sigma=covariance, arr_0=pixels)
    assert ready(world, **keys).contents["reference"] != made.contents["reference"]


class Blend(torch.nn.Module):
    """A velocity that depends on image, time and prompt."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x * t[:, None, None, None] + condition[:, None, None, None], None


def test_an_image_is_a_function_of_its_number_seed_and_prompt() -> None:
    """Whatever else is in the batch, and wherever in it."""
    generate = Generator(
        Blend(), lambda prompts: torch.tensor([len(p) / 10 for p in prompts]), lambda x: x, (3, 4, 4), Euler(4, 1.0),
        2.0, None, torch.device("cpu"),
    )  # fmt: skip
    three = generate(["a", "bb", "a"], [5, 6, 7], seed=1)
    assert three.shape == (3, 4, 4, 3)
    assert torch.equal(three[1:], generate(["bb", "a"], [6, 7], seed=1))
    assert not torch.equal(three[0], three[2])  # one prompt, two numbers
    assert not torch.equal(three[0], generate(["a"], [5], seed=2)[0])
    assert not torch.equal(three[0], generate(["aaa"], [5], seed=1)[0])


def test_images_that_are_not_finite_are_named(tmp_path: Path, world: World) -> None:
    """In the latents and in what the autoencoder makes of them; NaN would be black, and measured."""
    (tmp_path / "prompts.txt").write_text("aaaa\nbb\n!\n")
    made = ready(world, metrics=["clip_score"], prompts=str(tmp_path / "prompts.txt"),
                 clip=str(save_clip(tmp_path / "clip")))  # fmt: skip

    def generator(bad: float, decode: Any) -> Generator:
        return Generator(
            Blend(), lambda prompts: torch.tensor([bad if p == "!" else 0.1 for p in prompts]), decode, (3, 4, 4),
            Euler(4, 1.0), 1.0, None, torch.device("cpu"),
        )  # fmt: skip

    for bad, decode in (
        (torch.nan, lambda x: x),
        (torch.inf, lambda x: x.clamp(-1, 1)),
        (-9.0, lambda x: torch.where(x > 2, torch.nan, x)),
    ):
        broken = generator(bad, decode)
        assert made.make(broken, 0).shape == (2, 4, 4, 3)
        with pytest.raises(MetricError, match="generated images: image 2 is not finite"):
            made.make(broken, 1)
        assert broken(["!"], [0], 0).dtype == torch.uint8, "a sample grid shows it all the same"
    assert made.make(generator(0.2, lambda x: x), 1).std() > 1


@pytest.mark.slow
def test_classes(tmp_path: Path, world: World) -> None:
    """In turn, or drawn for each number whatever the count is."""

    def classes(**keys: Any) -> list[int]:
        suite = SuiteConfig.model_validate({"guidance": 1, "rectified_flow": {"steps": 1}, "metrics": ["clip_score"],
                                            "clip": str(save_clip(tmp_path / "clip")), **keys})  # fmt: skip
        return [int(prompt.text) for prompt in prepare(suite, 32, 10, world.device, world.control).prompts]

    assert classes(prompts="classes", count=12) == [*range(10), 0, 1]
    drawn = classes(prompts="random_classes", count=5000)
    assert (
        drawn[:40] == classes(prompts="random_classes", count=40) != classes(prompts="random_classes", count=40, seed=1)
    )
    counts = np.bincount(drawn, minlength=10)
    assert 4 < np.square(counts - 500).sum() / 500 < 30, "as chi squared of nine degrees"


def test_batches_fall_to_ranks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch counts once over the ranks, and all ranks take as many turns."""
    suite = SuiteConfig(metrics=("clip_score",), prompts="p", clip="c", guidance=1.0, rectified_flow=None, ddpm={
        "sampler": "ddim", "steps": 1}, batch_size=4)  # fmt: skip  # pyright: ignore[reportArgumentType]
    made = Evaluation(
        suite, [evaluation.Prompt("", {})] * 22, {}, evaluation.Wanted(), evaluation.SetFeatures(), None, None, None,
        torch.device("cpu"), None,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    for batches in (None, [0, 3, 5], [2]):
        turns = []
        for rank in range(4):
            monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
            monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
            turns.append(list(made.own_batches(batches)))
        assert len({len(turn) for turn in turns}) == 1
        assert sorted(batch for turn in turns for batch, counts in turn if counts) == list(batches or range(6))
