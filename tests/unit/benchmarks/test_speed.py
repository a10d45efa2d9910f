"""The benchmarks of speed at tiny sizes, on the way that `make gpu-check` takes, and the set that it names."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import choices, estimates, modelled, proxies, train_step
from tests.helpers.paths import ROOT
from tests.helpers.traces import attention_faults
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.estimate.memory import Memory
from trainer.estimate.simulation import profile

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
    assert (case.rows is None) == (name in train_step.ON_GPU), "a GPU's rows follow from its memory"
    config = train_step.configured(case, ())
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
        assert case["micro_batch"] == case["rows_at_first"] == 2
        for variant, figures in case["variants"].items():
            assert ("MODEL" in figures) == variant.startswith("ours")
        model = case["variants"]["ours"]["MODEL"]
        assert model["measured_over_model"] == case["variants"]["ours"]["step_time_s"] / model["step_time_s"] > 0
        assert all(figures["images_per_s"] > 0 for figures in case["variants"].values())
        assert case["compiled_again_after_warm_up"] == 0
    # Equal shapes, but for key biases in both attentions of both blocks, which softmax ignores.
    ours, theirs = (found["cases"]["pixart_0.61b"]["variants"][name]["parameters"] for name in ("ours", "diffusers"))
    assert theirs == ours + 2 * 2 * 144


def test_rows_are_as_many_as_memory_holds() -> None:
    """Beside the idle models that are on the device as well."""
    case = train_step.tiny(train_step.ON_GPU["dit_xl_2"])._replace(rows=16)
    config = train_step.configured(case, ())
    memory = Memory(profile(config, 1), build_mup_table(config), 0, config.parallel)
    state = memory.profile.parameters + memory.profile.optimizer + memory.profile.ema
    usable = memory.total(1, 24, False)
    assert estimates.rows_that_fit(config, usable, 1) == 24
    assert estimates.rows_that_fit(config, usable + 3 * state, 4) == 24
    assert estimates.rows_that_fit(config, usable + 3 * state - 1, 4) == 16, "a multiple of 8"
    assert estimates.rows_that_fit(config, memory.total(1, 5, False), 1) == 5
    assert estimates.rows_that_fit(config, state, 2) == 0


def test_rows_are_halved_until_they_fit() -> None:
    tried = []

    def figures(case: train_step.Case) -> dict[str, Any]:
        tried.append(case.rows)
        if case.rows is None or case.rows > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return {"micro_batch": case.rows}

    case = train_step.ON_GPU["mmdit_2b"]._replace(rows=40)
    assert train_step.halving(case, figures) == {"rows_at_first": 40, "micro_batch": 10}
    assert tried == [40, 20, 10]


def test_a_case_of_a_gpu_is_not_measured_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--output", str(tmp_path / "x.json"), "--case", "mmdit_2b"])
    with pytest.raises(SystemExit, match="2"):
        train_step.main()


def test_the_model_of_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a card that holds more are more, and those of a test are told in the same form."""
    monkeypatch.setitem(train_step.ON_GPU, "dit_xl_2", train_step.tiny(train_step.ON_GPU["dit_xl_2"]))
    arguments = ["benchmark", "--card", "h200", "--case", "dit_xl_2", "--output", str(tmp_path / "model.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    modelled.main()
    case = json.loads((tmp_path / "model.json").read_text())["cases"]["dit_xl_2"]
    assert case["micro_batch"] > 8
    assert set(case["steps"]) == {"ours", "ours_compiled"}
    assert case["steps"]["ours"]["step_time_s"] > case["steps"]["ours_compiled"]["step_time_s"] > 0


@pytest.mark.parametrize(
    ("name", "card"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"), ("Tesla T4", None)],
)
def test_a_device_is_a_card(name: str, card: str | None) -> None:
    assert estimates.card_named(name) == card


FLASH = [
    {"name": "aten::_flash_attention_forward", "cat": "cpu_op"},
    {"name": "void pytorch_flash::flash_fwd_kernel<traits>", "cat": "kernel"},
    {"name": "void pytorch_flash::flash_bwd_dq_dk_dv_loop_kernel<traits>", "cat": "kernel"},
    {"ph": "M"},
]


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        (FLASH, None),
        ([*FLASH, {"name": "aten::_efficient_attention_forward", "cat": "cpu_op"}], "is not flash"),
        ([*FLASH, {"name": "aten::_scaled_dot_product_efficient_attention", "cat": "cpu_op"}], "is not flash"),
        ([*FLASH, {"name": "fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "cat": "kernel"}], "fmha_cutlassF"),
        (FLASH[:2], "named bwd"),
        ([], "named fwd, of none"),
    ],
)
def test_a_trace_names_a_flash_kernel(events: list[dict[str, Any]], fault: str | None) -> None:
    """What `make gpu-check` looks for in the traces of the shipped configs."""
    faults = attention_faults(events)
    assert (not faults) if fault is None else any(fault in each for each in faults)


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
    assert bool(case.graph_workers) == (name == "gpu")
    assert set(case.graph_workers) <= set(case.workers)


def test_proxies_with_graphs_are_rows_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the search, since a CPU has no graphs."""
    asked = []

    def run_study(case: proxies.Case, workers: int, folder: Path) -> tuple[float, list[float]]:
        config = load_config(case.config, [*case.overrides, f"run.dir={folder}"])
        asked.append((workers, config.parallel.cuda_graph))
        return (2.0 if config.parallel.cuda_graph else 4.0) / workers, [1.0] * case.trials

    monkeypatch.setattr(proxies, "run_study", run_study)
    found = proxies.side_by_side(proxies.CASES["gpu"])
    assert asked == [(1, False), (2, False), (4, False), (8, False), (1, True), (4, True)]
    assert list(found["workers"]) == ["1", "2", "4", "8", "1, cuda_graph", "4, cuda_graph"]
    assert found["best_over_first"] == 8
