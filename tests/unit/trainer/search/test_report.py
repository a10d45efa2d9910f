"""What a study says: best region, edge, cost, fit, and the page in a browser."""

import math
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
from trainer.search.report import describe_factors, make_report
from trainer.search.study import Study
from trainer.search.transfer import write_target


@pytest.mark.slow
def test_report(study: Study) -> None:
    report = make_report(study)
    assert report.best.value == min(t.value for t in report.trials if t.value is not None)
    keys = {key.dimension.key: key for key in report.keys}
    lr = keys["optim.lr"]
    assert lr.region is not None
    assert 4e-3 < lr.region.low < lr.region.value < lr.region.high < 3e-2
    assert report.lr_fit is not None
    assert report.lr_fit.region == lr.region
    assert abs(math.log2(lr.region.value / 0.01)) < 0.15, "the fit, which the steep side does not draw down"
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


@pytest.mark.slow
def test_a_best_value_at_an_end_is_said_everywhere(tmp_path: Path) -> None:
    small = Study.open(search(tmp_path, trials=3, space={"optim.lr": {"choices": [1e-3, 3e-3, 1e-2]}}))
    fill(small, lambda p: float(p["optim.lr"] or 0))
    warning = "optim.lr 0.001 lies at the lower end of its range (0.001 to 0.01)"
    assert f"warning: {warning}" in Table(small).summary()
    assert warning in write_page(make_report(small)).read_text()
    told = write_target(small, "mmdit_debug_mup.yaml", tmp_path / "found.yaml")
    assert any(warning in line for line in told)


def test_a_study_whose_trials_all_diverged_says_what_to_do(tmp_path: Path) -> None:
    small = Study.open(search(tmp_path, trials=2, space={"optim.lr": {"choices": [1e-3, 1e-2]}}))
    fill(small, lambda _: None)
    assert "warning: all trials diverged: lower the range of optim.lr" in Table(small).summary()
    with pytest.raises(ConfigError, match=r"all 2 trials of .* diverged, .* lower the range of optim\.lr"):
        make_report(small)


@pytest.mark.slow
def test_page_without_the_pictures_that_need_many_trials(tmp_path: Path) -> None:
    small = Study.open(search(tmp_path, trials=2, space={"optim.lr": {"choices": [1e-3, 1e-2]}}))
    with pytest.raises(ConfigError, match="has no finished trial yet"):
        make_report(small)
    fill(small, lambda p: float(p["optim.lr"] or 0))
    text = write_page(make_report(small)).read_text()
    assert "too few trials" in text
    assert "no minimum of a fit: 1 of the learning rates came near the best loss" in text
    assert 'id="importance"' not in text


@pytest.mark.slow
def test_factors_are_a_table_with_the_spread_of_the_best_tenth(tmp_path: Path) -> None:
    keys = ("mup.factors.attention.lr", "mup.factors.time.lr", "mup.factors.time.init")
    space = {key: {"log_uniform": [0.125, 8.0]} for key in keys} | {"optim.lr": {"log_uniform": [1e-3, 1e-1]}}
    study = Study.open(search(tmp_path, trials=40, space=space, sampler="trust_region", start={"optim.lr": 1e-2}))
    fill(study, lambda p: 9 + abs(math.log2(float(p[keys[0]] or 0) / 2)) + abs(math.log2(float(p[keys[1]] or 0))))
    report = make_report(study)
    attention = report.factors["attention"]["lr"]
    ranked = sorted(report.trials, key=lambda t: t.value or 0.0)
    best = [float(t.point[keys[0]] or 0) for t in ranked[:4]]
    assert attention.best == best[0]
    assert attention.spread == (min(best), max(best))
    head, *rows = describe_factors(report)
    assert head.split() == ["factor", "lr", "init"]
    assert [row.split()[0] for row in rows] == ["attention", "time"]
    assert rows[0].split(maxsplit=1)[1] == f"{best[0]:.3g} ({min(best):.3g} to {max(best):.3g})", "no init"
    assert rows[1].index(f"{report.factors['time']['init'].best:.3g} (") == head.index("init")
    page = write_page(report).read_text()
    assert f'<pre id="factors">{head}\n{rows[0]}\n{rows[1]}</pre>' in page
    box = report.trials[-1].attributes["trust_region"]
    assert f"trust_region, the last box {box['side']:.0%} of each range about trial {box['centre']}" in page


# ---------------------------------------------------------------------------------------------------------------- cost
@pytest.mark.slow
def test_cost_of_the_papers_pixart_search() -> None:
    found = load_search("search/pixart_0.04b.yaml")
    cost = cost_of(found, found.proxy(), load_config("pixart_0.61b_mup.yaml"))
    assert cost.published_share is not None
    assert f"{cost.published_share:.2%}" == "5.46%"
    assert f"{cost.formula_share:.2%}" == "5.35%"
    text = cost.describe()
    assert "5.46%" in text
    assert "5.35%" in text
    assert "points: grid sampler over 1 key\n" in text


def test_cost_of_the_papers_mmdit_search() -> None:
    proxy = Size("proxy", 512, 178_000_000, 1024, 30_000, 1024 * 30_000, 1.0)
    target = Size("target", 5120, 17_700_000_000, 1024, 200_000, 1024 * 200_000, 100.0)
    cost = Cost(80, proxy, target, Published(0.18e9, 18e9, "not published"), "random", 4)
    assert cost.published_share == pytest.approx(0.12)
    assert cost.flops_share == pytest.approx(0.8)
    assert "not published" in cost.describe()
    assert "3 %" not in cost.describe()


def test_true_flops_count_attention_and_both_passes() -> None:
    config = load_config("mmdit_debug_mup.yaml")
    size = Size.of(config)
    assert size.images == 20 * 8
    assert size.flops > 6 * size.parameters * size.images, "every parameter meets many tokens"
