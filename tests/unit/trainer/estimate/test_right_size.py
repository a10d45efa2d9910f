"""Does the size suit the data: the paper's optimum, or that of a forecast."""

import json
from pathlib import Path

import pytest

from tests.unit.trainer.forecast.test_track import config_of, data
from trainer.config.load import load_config
from trainer.estimate.right_size import PAPER, describe_size, right_size


def test_paper_at_the_compute_of_its_own_example() -> None:
    """At 1.5e21 FLOPs it has 958 M parameters; 1024 tokens an image, batch 1024 there."""
    config = load_config("mmdit_18b_mup.yaml")
    found = right_size(config)
    flops = 6 * found.parameters * found.images * config.image_tokens  # its C = 6 N D
    assert found.source == PAPER
    assert found.parameters == pytest.approx(958e6 * (flops / 1.5e21) ** 0.5681, rel=0.15)


def test_forecast_goes_first(tmp_path: Path) -> None:
    path = tmp_path / "forecast.json"
    path.write_text(json.dumps(data(config_of(tmp_path), optimal_parameters=5e6, optimal_images=2e6)))
    found = right_size(config_of(tmp_path, f"run.forecast={path}"))
    assert (found.parameters, found.images_per_parameter) == (5e6, 0.4)
    text = describe_size(
        {
            "images_per_parameter": 0.1,
            "source": found.source,
            "best_parameters": found.parameters,
            "best_images_per_parameter": found.images_per_parameter,
        }
    )
    assert "this run has 4.0 times fewer" in text
    assert "order of magnitude" not in text
