"""The benchmarks of speed at tiny sizes, on the way that `make gpu-check` takes, and the set that it names."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import choices, proxies, train_step
from tests.helpers.paths import ROOT
from trainer.config.load import load_config

# The compiler looks at .grad of what it traces, and silences this warning in a way that "error" overrules.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch, "compile", torch.compile)  # a dry run replaces it
    yield
    torch._dynamo.reset()


def run(module: Any, patch: pytest.MonkeyPatch, output: Path, *arguments: str) -> dict[str, Any]:
    patch.setattr(sys, "argv", ["benchmark", "--dry-run", "--output", str(output), *arguments])
    module.main()
    return json.loads(output.read_text())


def test_gpu_check_names_every_case() -> None:
    [named] = re.findall(r"^STEPS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named.split() == list(train_step.ON_GPU)


@pytest.mark.parametrize("name", [*train_step.ON_CPU, *train_step.ON_GPU])
def test_cases_are_configs_of_one_micro_batch(name: str) -> None:
    case = (train_step.ON_CPU | train_step.ON_GPU)[name]
    config = load_config(case.config, [*case.overrides, f"train.global_batch_size={case.rows}"])
    assert config.objective.repa_weight == 0
    assert config.train.micro_batch_size is None


def test_steps_beside_those_of_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("mmdit_0.18b", "pixart_0.61b", "dit_xl_2")
    for name in names[1:]:  # tracing takes a second a variant
        monkeypatch.setitem(train_step.ON_GPU, name, train_step.ON_GPU[name]._replace(variants=train_step.EAGER))
    options = [part for name in names for part in ("--case", name)]
    found = run(train_step, monkeypatch, tmp_path / "steps.json", *options)
    assert found["machine"]["date"]
    assert list(found["cases"]) == list(names)
    for name, case in found["cases"].items():
        variants = train_step.ON_GPU[name].variants
        assert set(case["variants"]) == set(variants)
        best = "ours_compiled" if "ours_compiled" in variants else "ours"
        assert set(case[f"{best}_is_so_many_times_as_fast_as"]) == {*variants} - {best}
        assert case["micro_batch"] == 2
        assert all(figures["images_per_s"] > 0 for figures in case["variants"].values())
        assert case["compiled_again_after_warm_up"] == 0
    # Equal shapes, but for key biases in both attentions of both blocks, which softmax ignores.
    ours, theirs = (found["cases"]["pixart_0.61b"]["variants"][name]["parameters"] for name in ("ours", "diffusers"))
    assert theirs == ours + 2 * 2 * 144


def test_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_step.ON_GPU, "uvit_h_2", train_step.ON_GPU["uvit_h_2"]._replace(variants=("ours",)))
    run(train_step, monkeypatch, tmp_path / "steps.json", "--case", "uvit_h_2", "--profile", str(tmp_path))
    assert "aten::mm" in (tmp_path / "uvit_h_2_ours.txt").read_text()
    assert json.loads((tmp_path / "uvit_h_2_ours.json").read_text())["traceEvents"]


def test_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(choices, monkeypatch, tmp_path / "choices.json", "--repeats", "1")["milliseconds"]
    # A CPU has flash attention for whole rows alone.
    assert found["float32"]["attention"].keys() == {"sdpa", "sdpa_padded", "varlen", "math", "math_padded"}
    assert found["update"].keys() == {"averages", "adamw"}


def test_stacked_models_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    case = proxies.CASES["dry_run"]
    config = load_config(case.config, list(case.overrides))
    assert proxies.stacked(config, 1).keys() == {"one_after_another", "stacked", "stacked_over_one_after_another"}


@pytest.mark.parametrize("name", proxies.CASES)
def test_proxies_are_configs(name: str) -> None:
    case = proxies.CASES[name]
    assert load_config(case.config, list(case.overrides)).data.synthetic
    assert case.trials % max(case.workers) == 0
