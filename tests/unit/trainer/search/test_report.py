"""What a study says: best region, edge, cost, the page in a browser, and the target's YAML."""

import random
from pathlib import Path

import matplotlib.image
import pytest

from tests.helpers import browser
from tests.helpers.studies import fill, search
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.search.cost import Cost, Size, cost_of
from trainer.search.definition import Published, load_search
from trainer.search.live_table import Table
from trainer.search.page import write_page
from trainer.search.report import make_report
from trainer.search.space import Point
from trainer.search.study import Study
from trainer.search.transfer import write_target

TARGET = """extends: mmdit_debug_mup.yaml
train: {steps: 80, global_batch_size: 16}
model: {width: 128, depth: 4}
optim: {weight_decay: 0.1, betas: [0.9, 0.99]}
data: {resolution: 16}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """60 trials whose loss is a valley around lr 0.01; above 0.04 they diverge; warm-up does nothing."""
    chance = random.Random(0)

    def loss(point: Point) -> float | None:
        lr = float(point["optim.lr"] or 0)
        clip = {0.3: 0.02, 1.0: 0.0, 3.0: 0.01}[float(point["optim.clip_norm"] or 0)]
        return (
            None if lr > 0.04 else 0.2 + 0.1 * (lr / 0.01 - 1) ** 2 * (0.01 / lr) ** 0.5 + clip + chance.gauss(0, 0.003)
        )

    filled = Study.open(search(tmp_path_factory.mktemp("runs"), "optim.weight_decay=0.1", trials=60))
    fill(filled, loss)
    return filled


@pytest.mark.slow
def test_report(study: Study) -> None:
    report = make_report(study)
    assert report.best.value == min(t.value for t in report.trials if t.value is not None)
    keys = {key.dimension.key: key for key in report.keys}
    lr = keys["optim.lr"]
    assert lr.region is not None
    assert 4e-3 < lr.region.low < lr.region.value < lr.region.high < 3e-2
    assert lr.edge is not None
    assert lr.edge[0] <= 0.04 < lr.edge[1]
    assert lr.octaves_to_edge is not None
    assert 1 < lr.octaves_to_edge < 4
    assert lr.importance == max(key.importance or 0 for key in report.keys)
    assert keys["optim.betas"].region is None, "values without an order"
    assert keys["optim.warmup_steps"].edge is None or keys["optim.warmup_steps"].octaves_to_edge is None
    for picture in report.pictures.values():
        assert matplotlib.image.imread(picture).std() > 0.05, "something is drawn"


@pytest.mark.skipif(browser.browser() is None, reason=browser.why_not() or "")
@pytest.mark.slow
def test_page_in_a_browser(study: Study, tmp_path: Path) -> None:
    page, image = write_page(make_report(study)), tmp_path / "page.png"
    browser.screenshot(page, image, 1100, 2600)
    pixels = matplotlib.image.imread(image)[..., :3]
    assert pixels.shape[:2] == (2600, 1100)
    drawn = (pixels < 0.9).any(axis=(1, 2))
    assert drawn.mean() > 0.4, "the page is filled from top to bottom"
    orange = (abs(pixels - [0.894, 0.631, 0.106]).max(axis=2) < 0.1).sum()
    assert orange > 200, "the best trial's mark is on the page"


def test_a_best_value_at_an_end_is_said_everywhere(tmp_path: Path) -> None:
    small = Study.open(search(tmp_path, trials=3, space={"optim.lr": {"choices": [1e-3, 3e-3, 1e-2]}}))
    fill(small, lambda p: float(p["optim.lr"] or 0))
    warning = "optim.lr 0.001 lies at the lower end of its range (0.001 to 0.01)"
    (tmp_path / "target.yaml").write_text(TARGET)
    assert f"warning: {warning}" in Table(small).summary()
    assert warning in write_page(make_report(small)).read_text()
    told = write_target(small, str(tmp_path / "target.yaml"), tmp_path / "found.yaml")
    assert warning in told[0]


def test_a_study_whose_trials_all_diverged_says_what_to_do(tmp_path: Path) -> None:
    small = Study.open(search(tmp_path, trials=2, space={"optim.lr": {"choices": [1e-3, 1e-2]}}))
    fill(small, lambda _: None)
    assert "warning: all trials diverged: lower the range of optim.lr" in Table(small).summary()
    with pytest.raises(ConfigError, match=r"all 2 trials of .* diverged, .* lower the range of optim\.lr"):
        make_report(small)


def test_page_without_the_pictures_that_need_many_trials(tmp_path: Path) -> None:
    small = Study.open(search(tmp_path, trials=2, space={"optim.lr": {"choices": [1e-3, 1e-2]}}))
    with pytest.raises(ConfigError, match="has no finished trial yet"):
        make_report(small)
    fill(small, lambda p: float(p["optim.lr"] or 0))
    text = write_page(make_report(small)).read_text()
    assert "too few trials" in text
    assert 'id="importance"' not in text


# ------------------------------------------------------------------------------------------------------------ transfer
def test_transfer(study: Study, tmp_path: Path) -> None:
    target, output = tmp_path / "target.yaml", tmp_path / "new" / "found.yaml"
    target.write_text(TARGET)
    said = "\n".join(write_target(study, str(target), output))
    best = make_report(study).best
    config = load_config(str(output))
    assert config.optim.lr == best.point["optim.lr"]
    assert config.optim.clip_norm == best.point["optim.clip_norm"]
    assert list(config.optim.betas) in ([0.9, 0.95], [0.9, 0.99])
    assert (config.train.steps, config.model.width) == (80, 128)
    text = output.read_text()
    for part in (
        str(study.folder),
        f"trial: {best.number},",
        "commit: abc",
        "sha256 def",
        "table of the target: sha256",
    ):
        assert part in text, part
    for warning in (
        "horizon: 20 steps (160 images) in the proxy, 80 (1.28e+03) in the target",
        "batch: 8 in the proxy, 16 in the target",
        "depth: 2 in the proxy, 4 in the target",
        "time shift: 1 in the proxy, 0.5 in the target",
        "data.resolution: 32 in the proxy, 16 in the target: the data differ",
    ):
        assert f"warning: {warning}" in said, warning
        assert f"# warning: {warning}" in text
    assert "optim.betas" not in "".join(line for line in said.splitlines() if line.startswith("warning")), "searched"
    decay = config.optim.weight_decay
    assert decay == 0.1, "a suggestion is not applied"
    assert "optim.weight_decay=0.025" in said  # as many e-foldings in 80 steps as in 20


def test_transfer_leaves_what_the_target_is_made_of(study: Study, tmp_path: Path) -> None:
    """Even where it may write over a file: else the target and its parent would extend each other."""
    parent, target = tmp_path / "parent.yaml", tmp_path / "target.yaml"
    parent.write_text(TARGET)
    target.write_text("extends: parent.yaml\n")
    for output, message in ((target, "is the target, which the new config extends"), (parent, "extends itself")):
        with pytest.raises(ConfigError, match=message):
            write_target(study, str(target), output)
    assert (parent.read_text(), target.read_text()) == (TARGET, "extends: parent.yaml\n")


def test_batch_rule(study: Study, tmp_path: Path) -> None:
    target = tmp_path / "target.yaml"
    lr = float(make_report(study).best.point["optim.lr"] or 0)
    for batch, expected in ((16, f"optim.lr={lr * 2**0.5:.4g}"), (128, "none for 16 x the batch")):
        target.write_text(f"extends: mmdit_debug_mup.yaml\ntrain: {{global_batch_size: {batch}}}\n")
        assert any(expected in line for line in write_target(study, str(target), tmp_path / "found.yaml"))


def test_equal_runs_give_no_warning(study: Study, tmp_path: Path) -> None:
    target = tmp_path / "target.yaml"
    target.write_text("extends: mmdit_debug_mup.yaml\nmodel: {width: 128}\noptim: {weight_decay: 0.1}\n")
    [line] = write_target(study, str(target), tmp_path / "found.yaml")
    assert "found.yaml: " in line


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mup: {base_width: 64}", "mup.base_width: 32 in the proxy, 64 in"),
        ("mup: {parametrization: sp}", "mup.parametrization: mup in the proxy, sp in"),
        ("train: {steps: 5}", "optim.warmup_steps"),
    ],
)
def test_targets_that_do_not_fit(target: str, message: str, study: Study, tmp_path: Path) -> None:
    path, output = tmp_path / "target.yaml", tmp_path / "found.yaml"
    path.write_text(f"extends: mmdit_debug_mup.yaml\n{target}\n")
    warm = next(
        t.number for t in study.trials() if t.value and t.value < 0.3 and int(t.point["optim.warmup_steps"] or 0) > 5
    )
    with pytest.raises(ConfigError) as caught:
        write_target(study, str(path), output, warm)
    assert message in str(caught.value)
    assert not output.exists()


def test_a_trial_by_number(study: Study, tmp_path: Path) -> None:
    second = sorted(t.value for t in study.trials() if t.value is not None)[1]
    number = next(t.number for t in study.trials() if t.value == second)
    write_target(study, "mmdit_debug_mup.yaml", tmp_path / "found.yaml", number)
    assert f"trial: {number}, val_loss_ema {second:.6g}, chosen by hand" in (tmp_path / "found.yaml").read_text()
    with pytest.raises(ConfigError, match="trial 99 is none of the finished ones"):
        write_target(study, "mmdit_debug_mup.yaml", tmp_path / "other.yaml", 99)


# ---------------------------------------------------------------------------------------------------------------- cost
def test_cost_of_the_papers_pixart_search() -> None:
    found = load_search("search/pixart_0.04b.yaml")
    cost = cost_of(found, found.proxy(), load_config("pixart_0.61b_mup.yaml"))
    assert cost.published_share is not None
    assert f"{cost.published_share:.2%}" == "5.46%"
    assert f"{cost.formula_share:.2%}" == "5.35%"
    text = cost.describe()
    assert "5.46%" in text
    assert "5.35%" in text


def test_cost_of_the_papers_mmdit_search() -> None:
    proxy = Size("proxy", 512, 178_000_000, 1024, 30_000, 1.0)
    target = Size("target", 5120, 17_700_000_000, 1024, 200_000, 100.0)
    cost = Cost(80, proxy, target, Published(0.18e9, 18e9, "not published"))
    assert cost.published_share == pytest.approx(0.12)
    assert cost.flops_share == pytest.approx(0.8)
    assert "not published" in cost.describe()
    assert "3 %" not in cost.describe()


def test_true_flops_count_attention_and_both_passes() -> None:
    config = load_config("mmdit_debug_mup.yaml")
    size = Size.of(config)
    assert size.images == 20 * 8
    assert size.flops > 6 * size.parameters * size.images, "every parameter meets many tokens"
