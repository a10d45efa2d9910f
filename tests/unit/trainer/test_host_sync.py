"""Nothing in a training step waits for the device: seen in steps on the CPU, and in the sources.

On a GPU torch tells by itself (tests/gpu). Here every operation by which a number comes to the host is refused while
steps are taken; what no operation shows, a copy to the host's memory, is looked for in the sources.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.config import TextEncoderConfig
from data.debug import ensure_debug_assets
from data.encoders.text import load_text_encoder
from models.attention import visible
from models.attention_probe import Choice
from tests.helpers.host_sync import NoWait
from tests.helpers.paths import ROOT
from tests.helpers.steps import built
from tests.helpers.varlen import varlen_on_cpu
from trainer.ema import EMA
from trainer.loop import train_step


def take_steps(folder: Path, kind: str, *overrides: str) -> None:
    """Three steps, the second one with health figures; the first one makes what is made once."""
    settings = ["train.global_batch_size=4", "train.micro_batch_size=2", "train.log_every=2", *overrides]
    with built(f"{kind}_debug_mup.yaml", folder, *settings, "optim.spike_threshold=6") as run:
        batches, steps = run.batches(), []
        for _ in range(3):
            steps.append(next(batches))
            run.state.step += 1
        run.state.step = 0
        train_step(run, steps[0])
        with NoWait():
            train_step(run, steps[1])
            train_step(run, steps[2])


@pytest.mark.parametrize("kind", ["mmdit", "pixart", "dit", "uvit"])
@pytest.mark.slow
def test_steps_read_nothing_back(kind: str, tmp_path: Path) -> None:
    repa = () if kind == "uvit" else ("objective.repa_weight=0.5", "objective.repa_layer=1")
    take_steps(tmp_path, kind, *repa)


@pytest.mark.parametrize("kind", ["mmdit", "pixart"])
@pytest.mark.slow
def test_steps_of_packed_rows_read_nothing_back(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the kernel of these tests, which reads the lengths as a GPU's does on the device."""
    monkeypatch.setattr("trainer.build.engine.attention_choice", lambda *_: Choice("varlen", {}))
    with varlen_on_cpu():
        take_steps(tmp_path, kind)


@pytest.mark.slow
def test_a_length_that_is_read_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.build.engine.attention_choice", lambda *_: Choice("varlen", {}))
    monkeypatch.setattr("models.mmdit.visible", lambda mask, before: visible(mask & (mask.sum().item() > 0), before))
    with varlen_on_cpu(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        take_steps(tmp_path, "mmdit")


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "width"), [("debug/t5", 64), ("minilm", 384)])
def test_encoding_captions_reads_nothing_back(folder: str, width: int) -> None:
    """With and without padding: a mask that masks nothing is where transformers would look."""
    ensure_debug_assets()
    encoder = load_text_encoder(
        TextEncoderConfig(path=f".cache/{folder}", width=width, max_length=32), "cpu", torch.bfloat16
    )
    encoder.encode(["what is made once"])
    with NoWait():
        encoder.encode(["a red circle", "a much longer caption of a blue square", "a red circle"])
        encoder.encode(["one alone is not padded"])


def _reads_norm(self: EMA, step: int, skipped: Tensor) -> None:
    if skipped > 0:
        return


def _reads_mask(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x[x.isfinite()].reshape(x.shape) * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("trainer.ema.EMA.update", _reads_norm),
        ("trainer.state.time_sums", lambda t, losses, weight: torch.full((2, 8), losses.sum().item())),
        ("torch.nn.GELU.forward", lambda self, x: x if torch.equal(x, x) else -x),
        ("models.mmdit.modulate", _reads_mask),
    ],
)
@pytest.mark.slow
def test_a_wait_is_seen(place: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, fault)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense|equal|index by a mask"):
        take_steps(tmp_path, "mmdit")


# ------------------------------------------------------------------------------------------------------ in the sources

# What runs in a step: whole files, or some functions of a file.
STEP: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(f"models/{name}.py" for name in ("layers", "attention", "mmdit", "pixart", "dit", "uvit", "repa")),
    **dict.fromkeys(f"trainer/diffusion/{name}.py" for name in ("flow", "ddpm", "random", "repa")),
    "trainer/ema.py": None,
    "trainer/step.py": None,
    "trainer/loop.py": ("train_step", "forward_backward"),
    "trainer/state.py": ("packed", "unpacked", "of_micro_batch", "of_step", "skipped_step", "add_step", "add_reads"),
    "trainer/parallel/single.py": ("backward", "_add_gradients", "step", "_cast_weights"),
    "trainer/parallel/update.py": None,
    "trainer/parallel/cuda_graph.py": None,
    "trainer/parallel/fsdp.py": ("backward", "step", "_norm", "master_shards", "_gradient_shards"),
    "trainer/recovery/spikes.py": ("limit", "update"),
    "trainer/monitor/mup_health.py": ("before", "after", "time_sums"),
    "trainer/input/encoding.py": ("begin", "encode", "_encode", "features", "_condition"),
    "trainer/input/stream.py": None,
}
_TO_HOST = ("cpu", "numpy", "item", "tolist", "synchronize", "nonzero")


def waits(source: str, functions: tuple[str, ...] | None) -> Iterator[str]:
    """Calls that copy to the host, or from it while the host waits."""
    tree = ast.parse(source)
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and (not functions or n.name in functions)]
    missing = set(functions or ()) - {function.name for function in found}
    assert not missing, f"no such function: {missing}"
    calls = {call for function in found for call in ast.walk(function) if isinstance(call, ast.Call)}
    for call in sorted(calls, key=lambda call: call.lineno):
        if not isinstance(call.func, ast.Attribute):
            continue
        text = ast.unparse(call)
        if call.func.attr in _TO_HOST or "'cpu'" in text:
            yield f"{call.lineno}: {text}"
        if call.func.attr == "to" and re.search(r"self\._?device", text) and "non_blocking=True" not in text:
            yield f"{call.lineno}: {text}"


@pytest.mark.parametrize("path", STEP)
def test_sources_copy_nothing_to_the_host(path: str) -> None:
    assert not list(waits((ROOT / path).read_text(), STEP[path]))


@pytest.mark.parametrize(
    "fault",
    ["norm.cpu()", "x.to('cpu', copy=True)", "torch.cuda.synchronize()", "loss.item()", "batch.x.to(self.device)"],
)
def test_a_copy_in_the_sources_is_seen(fault: str) -> None:
    source = textwrap.dedent(f"""
        def step(self, x):
            y = x.to(self._device, non_blocking=True)
            return {fault}

        def save(self, x):
            return x.cpu()
    """)
    assert [line.partition(":")[0] for line in waits(source, ("step",))] == ["4"]
