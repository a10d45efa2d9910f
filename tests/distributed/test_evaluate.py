"""launch/evaluate.py on 1, 2 and 3 processes and after a kill; train.evaluate_every beside the same run without it."""

import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import exact, train
from tests.helpers.forked import finished, under_torchrun
from tests.helpers.tiny_networks import pinned, save_clip, save_detector, save_inception
from trainer.monitor.metrics import read_metrics

COUNT, BATCH = 22, 4
ROUTE = ("model.depth=3", "model.route.share=0.5", "model.route.start=1", "model.route.end=2")
STEPS = (*ROUTE, "train.steps=4", "train.checkpoint_every=2", "train.validate_every=2", "train.sample_every=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, and a suite with small networks for all metrics."""
    folder = tmp_path_factory.mktemp("evaluate")
    suite = {
        "metrics": ["fid", "sfid", "kid", "inception_score", "precision_recall", "clip_score"],
        "prompts": ".cache/debug/val-000000.tar",
        "count": COUNT,
        "batch_size": BATCH,
        "rectified_flow": {"steps": 2},
        "guidance": 2.0,
        "precision": "fp32",
        "reference": ".cache/debug/train-000000.tar",
        "reference_count": 30,
        **pinned(save_inception(folder / "inception.pt")),
        "clip": str(save_clip(folder / "clip")),
        "kid_subset_size": 10,
        "inception_splits": 2,
    }
    (folder / "tiny.yaml").write_text(json.dumps(suite))  # JSON is YAML
    (folder / "jpeg.yaml").write_text(json.dumps({**suite, "image_format": "jpeg"}))
    facts = [
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
        {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
    ]
    (folder / "metadata.json").write_text(json.dumps(facts))
    geneval = {
        "metrics": ["geneval"],
        "prompts": str(folder / "metadata.json"),
        "images_per_prompt": 2,
        "batch_size": 3,
        "detector": str(save_detector(folder / "detector", ["clock", "dog"])),
    }
    common = {key: suite[key] for key in ("rectified_flow", "guidance", "precision", "clip")}
    (folder / "objects.yaml").write_text(json.dumps(common | geneval | {"guidance_by": "route"}))
    train(2, folder / "run", *STEPS)
    return folder


def command(folder: Path, output: Path, *arguments: str) -> list[str]:
    return [
        "launch/evaluate.py", "--checkpoint", str(folder / "run"), "--suite", str(folder / "tiny.yaml"),
        "--output", str(output), *arguments,
    ]  # fmt: skip


def refused(folder: Path, output: Path, *arguments: str) -> str:
    """What the command says where it ends without a traceback; later options win."""
    done = finished(*command(folder, output, *arguments))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


def evaluate(folder: Path, processes: int, output: Path, *arguments: str) -> dict[str, Any]:
    done = finished(*command(folder, output, *arguments), processes=processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads((output / "results.json").read_text())


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("*.tar"))}


def test_every_number_of_processes_measures_the_same(folder: Path) -> None:
    """The same images bit for bit, the same figures to 1e-9; each image once, with its whole prompt."""
    one = evaluate(folder, 1, folder / "one")
    images = shards(folder / "one")
    assert one["checkpoint"] == {**one["checkpoint"], "run": "run", "step": 4, "weights": "ema"}
    assert set(one["metrics"]) == {"fid", "sfid", "kid", "inception_score", "precision", "recall", "clip_score"}
    assert one["metrics"]["kid"]["standard_error"] > 0
    members = []
    for data in images.values():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members += tar.getnames()
    assert members == [f"{number:08d}.{kind}" for number in range(COUNT) for kind in ("png", "txt")]
    for processes in (2, 3):
        other = evaluate(folder, processes, folder / str(processes))
        assert shards(folder / str(processes)) == images
        assert other["protocol_hash"] == one["protocol_hash"]
        for key, score in one["metrics"].items():
            assert other["metrics"][key]["value"] == pytest.approx(score["value"], abs=1e-9, rel=1e-9), key


def test_geneval_on_two_processes(folder: Path) -> None:
    """Images with the facts of their prompts, guided by the model's route; verdicts of all ranks are counted."""
    objects = ("--suite", str(folder / "objects.yaml"))
    one, two = (evaluate(folder, n, folder / f"objects{n}", *objects) for n in (1, 2))
    assert shards(folder / "objects1") == shards(folder / "objects2")
    assert one["metrics"] == two["metrics"]
    assert set(one["metrics"]) == {"geneval", "geneval_single_object", "geneval_counting"}
    with tarfile.open(folder / "objects2/images-000000.tar") as tar:
        assert sorted(tar.getnames())[:3] == ["00000000.json", "00000000.png", "00000000.txt"]
        member = tar.extractfile("00000002.json")
        assert member is not None
        assert json.load(member)["include"] == [{"class": "clock", "count": 2}]


def test_whose_images_these_are(folder: Path) -> None:
    """Live weights make other images; a folder of images of other weights of the same run and step is not measured."""
    live = evaluate(folder, 1, folder / "live", "--weights", "live")
    assert live["checkpoint"]["weights"] == "live"
    assert live["metrics"]["fid"] != evaluate(folder, 1, folder / "one")["metrics"]["fid"]
    train(1, folder / "twin/run", *STEPS, "train.seed=1")
    twin = ("--checkpoint", str(folder / "twin/run"))
    assert "holds an evaluation of another checkpoint" in refused(folder, folder / "one", *twin)
    moved = (folder / "run/checkpoints/step_00000004").rename(folder / "moved")
    try:
        lone = [word for word in command(folder, folder, "--checkpoint", str(moved))
                if word not in ("--output", str(folder))]  # fmt: skip
        done = finished(*lone)
    finally:
        moved.rename(folder / "run/checkpoints/step_00000004")
    assert "lies in no run's folder: give --output" in done.stderr
    assert "Traceback" not in done.stderr


def test_killed_and_resumed(folder: Path) -> None:
    """With its torchrun; nothing lost, nothing twice."""
    output = folder / "killed"
    with under_torchrun(*command(folder, output), processes=2) as evaluation:
        deadline = time.monotonic() + 240
        while not shards(output):
            assert evaluation.code() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        evaluation.kill()
    before = shards(output)
    results = evaluate(folder, 1, output)
    kept = sum(
        len(range(COUNT)[BATCH * number :][:BATCH]) for number in range(6) if f"images-{number:06d}.tar" in before
    )
    assert results["seconds"]["images_made"] == COUNT - kept < COUNT
    assert shards(output) == shards(folder / "one")
    assert results["metrics"] == json.loads((folder / "one/results.json").read_text())["metrics"]


def test_evaluation_does_not_disturb_training(folder: Path) -> None:
    """Two processes: losses, norms and validation bit for bit as without it; its figures are in metrics and plots."""
    settings = ("train.evaluate_every=2", f"train.evaluate_suite={folder / 'jpeg.yaml'}")
    plain = read_metrics(folder / "run")
    with_figures = train(2, folder / "watched", *STEPS, *settings)
    figures = ("val_fid", "val_kid", "val_clip_score")
    measured = [record for record in with_figures if figures[0] in record]
    assert [record["step"] for record in measured] == [2, 4]
    assert all(set(figures) <= record.keys() for record in measured)
    assert measured[0]["val_fid"] != measured[1]["val_fid"]
    afterwards = evaluate(folder, 1, folder / "jpeg", "--suite", str(folder / "jpeg.yaml"))[
        "metrics"
    ]  # the same weights
    for key in figures:
        assert measured[1][key] == pytest.approx(afterwards[key.removeprefix("val_")]["value"], rel=1e-9), key
    bare = [
        {k: v for k, v in r.items() if k.startswith(("val_loss", "val_set")) or not k.startswith("val_")}
        for r in with_figures
    ]
    assert exact(bare) == exact(plain)
    assert (folder / "watched/evaluation.png").stat().st_size > 10_000
    assert plain[-1].keys() >= {"val_loss_ema_t0.0625", "val_loss_ema_t0.9375"}
