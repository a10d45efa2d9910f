"""Which attention kernel a run takes, what it tells of it, and what a simulated one stands for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from models.attention import kernel_in_use, kernel_restored, use_kernel
from models.attention_probe import Choice
from tests.helpers.steps import QUIET
from trainer.build import attention
from trainer.build.attention import attention_choice, describe, simulated_kernel
from trainer.build.inputs import open_inputs
from trainer.build.run import _checkpoint_meta, build_run
from trainer.config.load import load_config
from trainer.config.stages import stage_at
from trainer.parallel.mesh import World

REJECTED = "varlen", "the output differs"


@pytest.fixture
def gpu_world(world: World) -> World:
    return replace(world, device=torch.device("cuda"))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments of each probe, none of which finds a fault."""
    calls: list[Any] = []

    def choose(*arguments: Any) -> Choice:
        calls.append(arguments)
        return Choice(arguments[0], {})

    monkeypatch.setattr(attention, "_choose", choose)
    return calls


@pytest.mark.parametrize(
    ("overrides", "kernel", "dtype"),
    [
        ([], "varlen", torch.bfloat16),
        (["parallel.precision=fp32"], "efficient", torch.float32),
        (["parallel.precision=fp64"], "math", torch.float64),
        (["parallel.attention=efficient"], "efficient", torch.bfloat16),
        (["parallel.attention=cudnn"], "cudnn", torch.bfloat16),
        (["parallel.attention=flash3"], "flash3", torch.bfloat16),
    ],
)
def test_a_gpu_takes_what_it_can(
    overrides: list[str], kernel: str, dtype: torch.dtype, gpu_world: World, tried: list[Any]
) -> None:
    config = load_config("mmdit_debug_mup.yaml", ["model.width=96", *overrides])
    assert attention_choice(config, gpu_world) == Choice(kernel, {})  # pyright: ignore[reportArgumentType]
    assert tried == [(kernel, gpu_world.device, dtype, 6, 16)]


def test_all_ranks_take_the_kernel_that_works_on_each(
    gpu_world: World, tried: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    worst = Choice("efficient", dict([REJECTED]))  # pyright: ignore[reportArgumentType]

    def together(action: Callable[[], Choice], group: dist.ProcessGroup) -> list[Choice]:
        assert group is gpu_world.control
        return [action(), worst, action()]

    monkeypatch.setattr(attention, "together", together)
    choice = attention_choice(load_config("mmdit_debug_mup.yaml", []), gpu_world)
    assert choice == worst
    assert describe(choice) == [
        "warning: attention kernel varlen is not used: the output differs",
        "attention kernel: efficient",
    ]


def test_a_cpu_takes_torchs_own_choice_and_says_so(world: World, tried: list[Any]) -> None:
    config = load_config("mmdit_debug_mup.yaml", [])
    assert describe(attention_choice(config, world)) == ["attention kernel: sdpa"]
    config = load_config("mmdit_debug_mup.yaml", ["parallel.attention=varlen"])
    assert describe(attention_choice(config, world)) == [
        "warning: attention kernel varlen is not used: it needs a GPU",
        "attention kernel: sdpa",
    ]
    assert tried == []


@pytest.mark.slow
def test_the_choice_is_told_at_the_start_and_kept_in_checkpoints(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("engine", "run"):
        monkeypatch.setattr(f"trainer.build.{module}.attention_choice", lambda *_: Choice("math", dict([REJECTED])))
    config = load_config("dit_debug_mup.yaml", [*QUIET, f"run.dir={tmp_path}"])
    with kernel_restored():
        run = build_run(config, world)
        assert kernel_in_use() == "math"
        assert _checkpoint_meta(open_inputs(config, stage_at(config, 0), world, None, ()))["attention"] == "math"
        run.metrics.close()
        assert run.lock is not None
        run.lock.close()
    told = capsys.readouterr().out
    assert "warning: attention kernel varlen is not used: the output differs\nattention kernel: math\n" in told


@pytest.mark.parametrize(
    ("override", "kernel"),
    [
        ("precision=null", "varlen"),
        ("precision=fp32", "sdpa"),
        ("attention=flash3", "varlen"),
        ("attention=efficient", "sdpa"),
    ],
)
def test_a_simulated_gpu_packs_where_a_real_one_does(override: str, kernel: str) -> None:
    with simulated_kernel(load_config("mmdit_debug_mup.yaml", [f"parallel.{override}"])) as simulated:
        use_kernel(simulated)
        assert kernel_in_use() == kernel
    assert kernel_in_use() == "sdpa"
