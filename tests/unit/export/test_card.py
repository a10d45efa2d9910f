"""The card of an exported folder says what is known, says what is not, and takes no secret and no path along; and a
push delivers the folder, whose token stands nowhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image

from export.card import _grid, _told, public
from export.push import push
from tests.helpers.exports import config_of, random_checkpoint, run_export
from tests.helpers.hub import serve_hub
from trainer.checkpoint.meta import META, read_meta, seal
from trainer.errors import ConfigError
from trainer.evaluate.val_loss import LEVELS, figures

TOKEN = "hf_" + "SeCrEt" * 6
PRIVATE = "/mnt/alice/private"


def of_a_run(folder: Path, kind: str, *overrides: str) -> Path:
    """A run folder with a checkpoint of step 20, and what a run writes beside it, some of it past the checkpoint."""
    checkpoint = folder / "checkpoints" / "step_00000020"
    random_checkpoint(checkpoint, config_of(kind, "run.name=apples", "train.steps=100", *overrides))
    (checkpoint / META).write_text(seal({**read_meta_of(checkpoint), "step": 20, "fingerprints": {"data": "d1d1"}}))
    (folder / "mup.json").write_text("{}")
    lines: list[dict[str, float]] = [{"step": step, "loss": 9.0 / step} for step in range(1, 31)]
    for line in lines[4::5]:
        line |= figures("val_loss", [8.0 / line["step"]] * LEVELS) | figures(
            "val_loss_ema", [7.0 / line["step"]] * LEVELS
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples").mkdir()
    for step, colour in ((10, "red"), (20, "green"), (30, "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / "samples" / f"step_{step:08d}.png")
    (folder / "samples" / "prompts.txt").write_text("a red `cross`\nhf_" + "a" * 30 + "\n")
    return folder


def read_meta_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / META).read_bytes())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "run"
    shards = f"[{{shards: '{PRIVATE}/train-{{000..009}}.tar', weight: 2}}, {{shards: 'hf://datasets/me/apples/a.tar'}}]"
    return of_a_run(folder, "mmdit", f"data.sources={shards}", f"data.index_cache={PRIVATE}/index")


def test_a_card_of_a_run_tells_what_is_known(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run_export(monkeypatch, "--checkpoint", run_folder, "--output", out, "--license", "apache-2.0")
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0", "pipeline_tag": "text-to-image", "library_name": "diffusers",
        "tags": ["diffusion", "mup", "mmdit"], "datasets": ["me/apples"],
    }  # fmt: skip
    meta = read_meta(run_folder / "checkpoints" / "step_00000020")
    images = 20 * meta["config"]["train"]["global_batch_size"]
    for told in (
        "# apples", "| steps | 20 |", f"| images seen | {images:,} |", "- `train-{000..009}.tar`, weight 2",
        "- `hf://datasets/me/apples/a.tar`, weight 1", "`d1d1`", f"| `optim.lr` | {meta['config']['optim']['lr']} |",
        "Where they come from is not recorded.", "| step | val_loss | val_loss_ema |\n", "| 20 | 0.4 | 0.35 |\n",
        "![Samples of the EMA weights at step 20](samples.png)", "- `a red 'cross'`", meta["mup"]["sha256"],
    ):  # fmt: skip
        assert told in card.content, (told, card.content)
    assert "| 25 |" not in card.content, "past the checkpoint"
    assert PRIVATE not in card.content
    assert "hf_aaa" not in card.content
    with Image.open(out / "samples.png") as grid, Image.open(out / "loss.png") as curve:
        assert grid.getpixel((0, 0)) == (0, 128, 0)
        assert curve.size[0] > 300
    told_config = yaml.safe_load(card.content.split("```yaml\n")[1].split("```")[0])
    assert told_config["data"]["index_cache"] == "index"
    assert told_config["model"] == meta["config"]["model"]


def test_a_card_says_what_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_checkpoint(tmp_path / "alone", config_of("dit"))
    run_export(monkeypatch, "--checkpoint", tmp_path / "alone", "--output", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    front = card.data.to_dict()
    assert "license" not in front
    assert (front["pipeline_tag"], "class-conditional" in front["tags"]) == ("unconditional-image-generation", True)
    for told in (
        "No licence was given", "| images seen | unknown |", "| commit | `unknown` |", "No validation losses are known",
        "No samples of the run are known", "Fingerprint of the data: `unknown`",
    ):  # fmt: skip
        assert told in card.content, (told, card.content)
    assert not list((tmp_path / "out").glob("*.png"))


def test_base_hyperparameters_come_from_the_transfer_that_fits(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = read_meta(run_folder / "checkpoints" / "step_00000020")
    head = f"# study: {PRIVATE}/study, mmdit_debug_mup with model.width=64\n# trial: 7, val_loss_ema 0.5\n"

    def refused(table: str, lr: float) -> str:
        text = f"{head}# muP table of the target: sha256 {table}\nextends: mmdit_debug_mup.yaml\noptim:\n  lr: {lr}\n"
        (tmp_path / "found.yaml").write_text(text)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            run_export(
                monkeypatch, "--checkpoint", run_folder, "--output", tmp_path / "out",
                "--transferred", tmp_path / "found.yaml",
            )  # fmt: skip
        except ConfigError as error:
            assert not (tmp_path / "out").exists()
            return str(error)
        return ""

    lr = meta["config"]["optim"]["lr"]
    assert "of another model" in refused("0" * 64, lr)
    assert f"has other values: optim.lr {lr * 2}, {lr} in the run" in refused(meta["mup"]["sha256"], lr * 2)
    assert refused(meta["mup"]["sha256"], lr) == ""
    text = (tmp_path / "out" / "README.md").read_text()
    assert "They come from a search on a smaller proxy" in text
    assert "study: study, mmdit_debug_mup with model.width=64\ntrial: 7, val_loss_ema 0.5\n" in text
    assert PRIVATE not in text


def test_a_card_shows_the_run_folder_s_own_samples_alone(tmp_path: Path) -> None:
    run, samples, out = tmp_path / "run", tmp_path / "run" / "samples", tmp_path / "samples.png"
    samples.mkdir(parents=True)
    for place, colour in ((samples / "step_00000010.png", "red"), (tmp_path / "private.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(place)
    (tmp_path / "private.txt").write_text("a secret")
    (samples / "step_4.png").write_text("not one of the run's")
    (samples / "step_00000012.png").write_text("damaged")
    (samples / "step_00000014.png").symlink_to(tmp_path / "private.png")
    (samples / "prompts.txt").symlink_to(tmp_path / "private.txt")
    assert _grid(run, 9, out) == (None, [])
    assert _grid(run, 20, out) == (10, [])
    with Image.open(out) as grid:
        assert grid.getpixel((0, 0)) == (255, 0, 0)
    samples.rename(tmp_path / "private")
    samples.symlink_to(tmp_path / "private")
    assert _grid(run, 20, out) == (None, [])


def test_an_account_keeps_its_prose_and_loses_its_folders() -> None:
    account = (
        "study: /mnt/alice/my runs/study, my/alice/proxy.yaml with model.width=64 data.shards=/mnt/alice/a.tar\n"
        "warning: 4 images/s 1/2 ~/alice/b ../alice/c (/alice/d) file:///alice/e https://me:pw@host/f/g, k=/alice/h\n"
        "warning: /mnt/alice/my runs/study/horizon.json is old"
    )
    assert _told(account) == (
        "study: study, proxy.yaml with model.width=64 data.shards=a.tar\n"
        "warning: 4 images/s 1/2 b c (d) e https://host/f/g, k=h\n"
        "warning: study/horizon.json is old"
    )


def test_public_takes_out_folders_and_secrets() -> None:
    given = {
        "shards": "/a/b.tar",
        "path": "google/t5-v1_1-xl",
        "captions": "https://me:hunter2@host/c?X-Amz-Signature=1",
    }
    assert public(given) == {"shards": "b.tar", "path": "google/t5-v1_1-xl", "captions": "https://host/c"}
    local = ["file:///home/alice/a.tar", "FILE:/home/alice/a.tar", "local:///home/alice/a.tar", "~/alice/a.tar"]
    assert public(local) == ["a.tar"] * 4
    assert public("simplecache::file:///home/alice/a.tar") == "simplecache::a.tar"
    assert public("zip://b::/home/alice/a.zip") == "zip://b::a.zip"
    assert public({"path": "./models/t5", "prompts": ["a cat/dog"]}) == {"path": "t5", "prompts": ["a cat/dog"]}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """huggingface_hub without the environment of the tests, which forbids the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub of the tests takes files by the older way
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return monkeypatch


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own call of its client
def test_a_push_delivers_the_folder(
    run_folder: Path, tmp_path: Path, online: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with serve_hub(TOKEN) as hub:
        online.setattr(constants, "ENDPOINT", hub.url)
        run_export(online, "--checkpoint", run_folder, "--output", out, "--push", "me/apples", "--private")
    (created,) = hub.created
    assert (created["name"], created["organization"], created["visibility"]) == ("apples", "me", "private")
    written = {f"me/apples/{path.relative_to(out)}": path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert hub.files == written
    assert hub.stored, "the weights go as a large file"
    told = capfd.readouterr()
    assert f"pushed to {hub.url}/me/apples" in told.out
    assert TOKEN not in told.out + told.err
    assert not any(TOKEN.encode() in content for content in written.values())


def test_a_private_push_never_lands_in_a_public_repository(tmp_path: Path, online: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("mine")
    with serve_hub(TOKEN) as hub:
        online.setattr(constants, "ENDPOINT", hub.url)
        hub.repositories |= {"me/open": "public", "me/closed": "private"}
        with pytest.raises(ConfigError, match=r"me/open is not private .* nothing was sent") as caught:
            push(tmp_path, "me/open", True, TOKEN)
        assert "hf upload" not in str(caught.value)
        assert hub.files == {}
        for repo in ("me/closed", "me/new"):
            push(tmp_path, repo, True, TOKEN)
        push(tmp_path, "me/open", False, TOKEN)
    assert sorted(hub.files) == [f"me/{name}/README.md" for name in ("closed", "new", "open")]
    assert hub.repositories["me/new"] == "private"


def test_a_push_that_fails_says_why_and_keeps_the_folder(
    run_folder: Path, tmp_path: Path, online: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, repo: str = "me/apples", *more: str) -> str:
        with pytest.raises(ConfigError) as caught:
            run_export(online, "--checkpoint", run_folder, "--output", tmp_path / name, "--push", repo, *more)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None or caught.value.__suppress_context__, "a traceback would quote it"
        return str(caught.value)

    assert "no user/name" in refused("a", "apples")
    assert "no user/name" in refused("a", "me/../b")
    assert "is a folder of this machine" in refused("a", "me/b", "--encoders", "reference")
    with serve_hub("another") as hub:
        online.setattr(constants, "ENDPOINT", hub.url)
        told = refused("without_rights")
    assert f"{hub.url} does not give this token the right to write there" in told
    assert "(403: no right to write, asked as Bearer ${HF_TOKEN})" in told
    assert f"Then send it by `hf upload me/apples {tmp_path / 'without_rights'} .`" in told
    unreached = refused("without_network", "me/apples", "--private")  # the hub is gone
    assert f"{hub.url}: [Errno 111]" in unreached
    assert f"`hf upload me/apples {tmp_path / 'without_network'} . --private`" in unreached
    assert (tmp_path / "without_network" / "README.md").is_file()
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("a")
    online.setattr(constants, "HF_HUB_OFFLINE", False)
    online.setattr(huggingface_hub, "get_token", lambda: None)
    assert "give it in HF_TOKEN" in refused("a")
    assert not (tmp_path / "a").exists(), "asked before anything is written"
    output = capfd.readouterr()
    assert TOKEN not in output.out + output.err + told + unreached
