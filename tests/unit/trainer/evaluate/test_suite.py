"""Suites: their files, what they refuse, what makes two of them comparable; sets of images and prompts."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.debug import ensure_debug_assets
from data.errors import DataError
from data.image_sets import (
    Prompt,
    as_read_back,
    image_files,
    open_image_set,
    open_npz_images,
    read_images,
    read_prompts,
    write_images,
)
from examples import coco_prompts
from models.flops import forward_flops
from trainer.config.load import load_config
from trainer.config.yaml_files import CONFIG_DIR
from trainer.errors import ConfigError
from trainer.evaluate.features import published_statistics
from trainer.evaluate.results import claim
from trainer.evaluate.suite import SuiteConfig, digest, load_suite, split_overrides

MINIMAL: dict[str, Any] = {
    "metrics": ["fid"], "prompts": "p.txt", "reference": "r.npz", "network": "n.pt", "guidance": 2.0,
    "ddpm": {"sampler": "ancestral", "steps": 250},
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "evaluate").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_suites_are_valid(path: Path) -> None:
    """Each with the paths that its user has to give."""
    name, suite = load_suite(path.stem, ["reference=r.npz", "network=n.pt"])
    assert name == path.stem
    assert load_suite(str(path), ["reference=r.npz", "network=n.pt"])[1] == suite


def test_the_protocols_of_the_paper() -> None:
    imagenet = load_suite("imagenet_fid50k", ["reference=r.npz", "network=n.pt"])[1]
    assert imagenet.ddpm is not None
    assert (imagenet.count, imagenet.ddpm.sampler, imagenet.ddpm.steps, imagenet.guidance) == (
        50_000,
        "ancestral",
        250,
        1,
    )
    assert imagenet.resize == "tf1_bilinear"
    assert (imagenet.prompts, imagenet.vae) == ("random_classes", "stabilityai/sd-vae-ft-mse")
    for name in ("mjhq_30k", "coco_30k"):
        suite = load_suite(name)[1]
        assert suite.ddpm is not None
        assert (suite.count, suite.reference_count, suite.ddpm.steps, suite.guidance) == (30_000, 30_000, 20, 4.5)
        assert (suite.resize, suite.image_format, suite.jpeg_quality) == ("bicubic", "jpeg", 75)
    assert load_suite("geneval")[1].images_per_prompt == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stepz=3", "stepz: unknown key"),
        ("guidence=3", 'guidence: unknown key; did you mean "guidance"?'),
        ("reference=null", "reference: fid needs one: give reference=PATH"),
        ("network=null", "network: fid needs one"),
        ("metrics=[clip_score]", "clip: clip_score needs one"),
        ("metrics=[geneval]", "detector: geneval needs one"),
        ("metrics=[fd_dinov2]", "dino: fd_dinov2 needs one"),
        ("metrics=[cmmd]", "cmmd_clip: cmmd needs one"),
        ("metrics=[dpg_bench]", "vqa: dpg_bench needs one"),
        ("metrics=[fidd]", "metrics.0: Input should be"),
        ("ddpm=null", "at least one of them must say sampler and steps"),
        ("ddpm.sampler=euler", "ddpm.sampler: Input should be"),
        ("batch_size=0", "batch_size must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps(MINIMAL))
    with pytest.raises(ConfigError, match=r"mine\.yaml with overrides") as error:
        load_suite(str(tmp_path / "mine.yaml"), [override])
    assert said in str(error.value)


def test_classes_have_no_questions() -> None:
    with pytest.raises(ValueError, match="prompts: classes has no questions"):
        SuiteConfig.model_validate(MINIMAL | {"metrics": ["dpg_bench"], "prompts": "classes", "vqa": "blip"})


def test_suites_apply_to_configs() -> None:
    suite = SuiteConfig.model_validate(MINIMAL)
    config = suite.applied(load_config("dit_debug_mup"), ["parallel.shard=0"])
    assert (config.sample.sampler, config.sample.steps, config.sample.guidance) == ("ancestral", 250, 2.0)
    assert config.parallel.precision == "bf16"
    with pytest.raises(ConfigError, match=r"objective.kind rectified_flow: give rectified_flow.steps=N"):
        suite.applied(load_config("mmdit_debug_mup"))
    with pytest.raises(ConfigError, match="images of 256 pixels, the checkpoint makes 32"):
        suite.model_copy(update={"resolution": 256}).applied(load_config("dit_debug_mup"))


def test_overrides_go_where_they_belong() -> None:
    ours = ["guidance=3", "ddpm.steps=5", "resolution=8"]
    theirs = ["text_encoder.path=a", "parallel.shard=1", "autoencoder.path=b"]
    assert split_overrides([*ours, *theirs]) == (ours, theirs)
    changes_figures = ("parallel.precision=fp32", "text_encoder.max_length=5", "autoencoder.scale=1")
    for wrong in ("model.width=3", "sample.steps=3", "optim.lr=1", *changes_figures):
        with pytest.raises(ConfigError, match="no key of a suite"):
            split_overrides([wrong])


def test_protocol_hash_is_of_choices_and_contents() -> None:
    suite = SuiteConfig.model_validate(MINIMAL)

    def hash_of(changes: dict[str, Any], contents: str = "c") -> str:
        return digest(suite.model_copy(update=changes).protocol({"network": contents}))

    base = hash_of({})
    assert base == hash_of({"network": "/elsewhere/n.pt", "reference": "moved.npz"})
    changes = ({"guidance": 2.5}, {"resize": "bilinear"}, {"image_format": "jpeg"}, {"seed": 1}, {"count": 9})
    assert len({base, hash_of({}, "other"), *(hash_of(change) for change in changes)}) == 7


def test_a_hash_of_before_guidance_had_a_choice_is_the_same() -> None:
    suite = SuiteConfig.model_validate(MINIMAL)
    assert "guidance_by" not in suite.protocol({})
    assert suite.model_copy(update={"guidance_by": "route"}).protocol({})["guidance_by"] == "route"


def test_an_output_folder_holds_one_evaluation(tmp_path: Path) -> None:
    identity = {"suite": "a", "protocol_hash": "b"}
    (tmp_path / "new").mkdir()
    claim(tmp_path / "new", identity)
    claim(tmp_path / "new", identity)
    with pytest.raises(DataError, match="another checkpoint, or by another protocol"):
        claim(tmp_path / "new", {**identity, "protocol_hash": "c"})
    (tmp_path / "other.tar").touch()
    with pytest.raises(DataError, match="holds other files"):
        claim(tmp_path, identity)


# ----------------------------------------------------------------------------------------------------- images, prompts
def test_prompt_files(tmp_path: Path) -> None:
    files = {
        "a.txt": "one\r\n\n two \n",
        "b.jsonl": '{"prompt": "one", "tag": "colors"}\n{"caption": "two"}\n',
        "c.json": '{"id1": {"prompt": "one", "category": "x"}, "id2": {"prompt": "two"}}',
        "d.json": '[{"prompt": "one"}, {"prompt": "two"}]',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert [prompt.text for prompt in read_prompts(str(tmp_path / name), "prompts")] == ["one", "two"]
    assert read_prompts(str(tmp_path / "b.jsonl"), "prompts")[0].facts["tag"] == "colors"
    (tmp_path / "lines.jsonl").write_text('{"prompt": "one\u2028line"}\n', encoding="utf-8")  # JSON allows it
    (tmp_path / "lines.txt").write_text("one\u2028line\n", encoding="utf-8")
    for name in ("lines.jsonl", "lines.txt"):
        assert [prompt.text for prompt in read_prompts(str(tmp_path / name), "prompts")] == ["one\u2028line"]
    shards = read_prompts(str(ensure_debug_assets() / "val-000000.tar"), "prompts")
    assert len(shards) == 64
    assert shards[0].text.startswith("a ")
    for name, text, said in (("e.jsonl", '{"text": "x"}', "entry 1 has no"), ("f.json", "{", "cannot be read")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=f"prompts: .*{said}"):
            read_prompts(str(tmp_path / name), "prompts")


def test_prompts_of_coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A caption for each image that the suite's reference takes, in its order."""
    numbers = [42, 73, 581]
    captions = [
        {"image_id": n, "id": 10 * n - i, "caption": f"caption {i}\nof {n} "} for n in numbers for i in range(5)
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    (tmp_path / "images").mkdir()
    for number in numbers:
        Image.new("RGB", (8, 8)).save(tmp_path / f"images/COCO_val2014_{number:012d}.jpg")

    def written(count: int, annotations: str = "captions.json") -> list[Any]:
        arguments = ["--annotations", tmp_path / annotations, "--images", tmp_path / "images", "--count", count]
        monkeypatch.setattr(
            "sys.argv", ["coco_prompts.py", *map(str, arguments), "--overwrite", "--output", str(tmp_path / "o.jsonl")]
        )
        assert coco_prompts.main() == 0
        return [(prompt.text, prompt.facts["image"]) for prompt in read_prompts(str(tmp_path / "o.jsonl"), "prompts")]

    every = [(f"caption 4 of {number}", f"COCO_val2014_{number:012d}.jpg") for number in numbers]
    assert written(3) == every
    taken = [path.name for path in image_files(tmp_path / "images", "reference", 2)]
    assert len(taken) == 2
    assert written(2) == [each for each in every if each[1] in taken]
    with pytest.raises(DataError, match="holds 3 images, 4 are wanted"):
        written(4)
    (tmp_path / "images/none.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none\.png has no caption"):
        written(4)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match=r"other\.json cannot be read .*captions_val2014\.json"):
        written(3, "other.json")


def test_equal_and_long_prompts_keep_their_images(tmp_path: Path) -> None:
    """Images are found by number: equal prompts do not overwrite each other, and none is cut."""
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    prompts = [Prompt("a/b " * 300, {}), Prompt("same", {}), Prompt("same", {"tag": "colors"})]
    write_images(tmp_path / "x.tar", [7, 8, 9], images, prompts, "png", 95)
    assert np.array_equal(read_images(tmp_path / "x.tar", range(7, 10)), images)
    write_images(tmp_path / "y.tar", [7, 8, 9], images, prompts, "jpeg", 75)
    kept = read_images(tmp_path / "y.tar", range(7, 10))
    assert np.array_equal(as_read_back(images, "jpeg", 75), kept)
    assert not np.array_equal(kept, as_read_back(images, "png", 75))
    held = open_image_set(str(tmp_path / "x.tar"), "reference")
    assert held.captions()[:2] == [prompts[0].text.strip(), "same"]
    with pytest.raises(DataError, match="holds other images"):
        read_images(tmp_path / "x.tar", range(6, 9))
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 3])
    with pytest.raises(DataError, match=r"cut\.tar (cannot be read|holds other images)"):
        read_images(tmp_path / "cut.tar", range(7, 10))


def test_reference_images(tmp_path: Path) -> None:
    """Of a folder: the square in the centre, and a fixed subset."""
    for number in range(6):
        pixels = np.full((8, 12, 3), 200, np.uint8)
        pixels[:, 2:10] = 10 * number
        (tmp_path / f"set/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"set/{number % 2}/{number}.png")
    images = open_image_set(str(tmp_path / "set"), "reference")
    assert [int(p.max()) for p in images.pixels(range(6), 8)] == [0, 20, 40, 10, 30, 50]  # the border is cut off
    assert images.pixels([0], 4).shape == (1, 4, 4, 3)
    some = [open_image_set(str(tmp_path / "set"), "reference", 3) for _ in range(2)]
    assert len(some[0]) == 3
    assert some[0].fingerprint == some[1].fingerprint != images.fingerprint
    with pytest.raises(DataError, match="holds 6 images, 7 are wanted"):
        open_image_set(str(tmp_path / "set"), "reference", 7)
    with pytest.raises(DataError, match="have no captions"):
        images.captions()
    (tmp_path / "set/0/0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"image 0 cannot be read \(image: unreadable\)"):
        images.pixels([0], 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither images"):
        open_image_set(str(tmp_path / "empty"), "reference")


def test_published_statistics(tmp_path: Path) -> None:
    mean, covariance = np.zeros(4), np.eye(4)
    images = np.zeros((5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance, arr_0=images)
    features = published_statistics(tmp_path / "adm.npz", spatial=True)
    assert features.pooled is not None
    assert features.spatial is not None
    assert open_npz_images(tmp_path / "adm.npz", "reference").pixels([1], 8).shape == (1, 8, 8, 3)
    np.savez(tmp_path / "bare.npz", mu=mean, sigma=covariance)
    with pytest.raises(DataError, match=r"bare\.npz.*mu_s.*for sfid"):
        published_statistics(tmp_path / "bare.npz", spatial=True)
    with pytest.raises(DataError, match="has no images"):
        open_npz_images(tmp_path / "bare.npz", "reference")
    with pytest.raises(DataError, match=r"absent\.npz cannot be read"):
        published_statistics(tmp_path / "absent.npz", spatial=False)
    whole = (tmp_path / "adm.npz").read_bytes()
    np.save(tmp_path / "array.npy", mean)
    np.savez(tmp_path / "words.npz", mu=["a"], sigma=["b"])
    damaged = {"cut": whole[: len(whole) // 2], "empty": b"", "array": (tmp_path / "array.npy").read_bytes()}
    for name, data in damaged.items():
        (tmp_path / f"{name}.npz").write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}\.npz cannot be read"):
            published_statistics(tmp_path / f"{name}.npz", spatial=False)
        with pytest.raises(DataError, match=rf"{name}\.npz cannot be read"):
            open_npz_images(tmp_path / f"{name}.npz", "reference")
    with pytest.raises(DataError, match=r"words\.npz has other things than numbers"):
        published_statistics(tmp_path / "words.npz", spatial=False)
    np.savez(tmp_path / "nan.npz", mu=mean * np.nan, sigma=covariance)
    with pytest.raises(DataError, match="NaN"):
        published_statistics(tmp_path / "nan.npz", spatial=False)


def test_costs_on_the_page_are_the_formula() -> None:
    page = (CONFIG_DIR.parent / "docs/evaluate.md").read_text()
    rows = [
        line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| \w+ \| \w+_[\w.]+ \| \d+ ", line)
    ]
    assert len(rows) == 9
    for name, checkpoint, images, steps, guidance, hours in rows:
        suite = load_suite(name, ["reference=r.npz", "network=n.pt"])[1]
        c = load_config(checkpoint)
        sampling = getattr(suite, c.objective.kind)
        count = suite.count or 553 * suite.images_per_prompt
        assert (int(images), int(steps), float(guidance)) == (count, sampling.steps, suite.guidance)
        text = 0 if c.label_classes else c.text_encoder.max_length
        forward = forward_flops(c.model, c.autoencoder.channels, c.text_encoder.width, c.image_tokens, text)
        passes = 1 if suite.guidance == 1 else 2
        expected = count * sampling.steps * passes * forward / (989e12 * 0.3) / 3600
        assert hours == f"{expected:.2g}", (name, checkpoint)
