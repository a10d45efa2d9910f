"""Products in fp8: the numbers they are, the devices that have them, and runs that train with them."""

import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.fp8 import judge
from models.layers import TokenLinear
from tests.helpers.steps import built
from trainer.config.keys import key_class
from trainer.loop import train_step
from trainer.parallel import float8
from trainer.parallel.float8 import fp8_multiply, fp8_problem
from trainer.parallel.precision import multiplies, without_fp8
from trainer.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FP8, BF16 = "parallel.precision=fp8", "parallel.precision=bf16"
SMALL = "train.global_batch_size=4"


# ---------------------------------------------------------------------- the numbers


def rounded(x: Tensor, dim: int) -> Tensor:
    """To E4M3, at the largest power of two that keeps what lies along `dim` within 448."""
    scale = (448 / x.float().abs().amax(dim, keepdim=True)).log2().floor().exp2()
    return (x.float() * scale).to(torch.float8_e4m3fn).float() / scale


@pytest.mark.slow
def test_rows_are_rounded_to_e4m3() -> None:
    """Output and both gradients; the number of tokens, 21, is no multiple of 16."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, gradient = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 7, 64), (96, 64), (96,), (3, 7, 96))
    )
    x, weight, bias = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    output = fp8_multiply(CPU)(x, weight, bias)
    found = torch.autograd.grad(output, [x, weight, bias], gradient)
    with torch.no_grad():
        rows, flat = gradient.flatten(0, 1), x.flatten(0, 1)
        expected = (rounded(flat, 1) @ rounded(weight, 1).T).bfloat16() + bias
        torch.testing.assert_close(output.flatten(0, 1), expected, rtol=0.01, atol=0.01)
        assert not torch.allclose(
            output.flatten(0, 1).float(), flat.float() @ weight.float().T + bias, rtol=0.01, atol=0.01
        )
        torch.testing.assert_close(
            found[0].flatten(0, 1), (rounded(rows, 1) @ rounded(weight, 0)).bfloat16(), rtol=0.01, atol=0.01
        )
        torch.testing.assert_close(found[1], (rounded(rows, 0).T @ rounded(flat, 0)).bfloat16(), rtol=0.01, atol=0.01)
        torch.testing.assert_close(found[2], gradient.sum((0, 1)), rtol=0.01, atol=0.01)


class Unscaled(torch.autograd.Function):
    """fp8 without scales: gradients of a large batch lie below the smallest number that E4M3 has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].to(torch.float8_e4m3fn).to(gradients[0].dtype)


def unscaled_multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is None
    return Unscaled.apply(Unscaled.apply(x) @ Unscaled.apply(weight).T)


@pytest.mark.slow
def test_small_gradients_keep_their_digits() -> None:
    """2^-20 times the gradient gives 2^-20 times the gradients, to the bit. Planted: without scales they vanish."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 16, 32), (64, 32), (3, 16, 64))
    )
    inputs = [x.requires_grad_(), weight.requires_grad_()]

    def gradients(multiply: float8.Multiply, scale: float) -> list[Tensor]:
        return [each / scale for each in torch.autograd.grad(multiply(x, weight, None), inputs, scale * gradient)]

    product = fp8_multiply(CPU)
    pairs = zip(gradients(product, 1.0), gradients(product, 2.0**-20), strict=True)
    assert all(torch.equal(large, small) for large, small in pairs)
    assert any(large.any() for large in gradients(unscaled_multiply, 1.0))
    assert not any(small.any() for small in gradients(unscaled_multiply, 2.0**-20))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_one_graph_serves_any_number_of_tokens() -> None:
    """Traced forward and backward, as for a GPU; nothing breaks the graph, and the numbers are those of eager mode."""
    torch._dynamo.reset()
    counters.clear()
    layer = TokenLinear(32, 64, dtype=torch.bfloat16)
    layer.multiply = fp8_multiply(CPU)
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    for tokens in (5, 16, 21):
        x = torch.randn(3, tokens, 32, dtype=torch.bfloat16)
        found = [
            torch.autograd.grad(call(x).float().square().sum(), tuple(layer.parameters())) for call in (layer, compiled)
        ]
        assert all(torch.equal(eager, traced) for eager, traced in zip(*found, strict=True))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_the_rest_is_bf16() -> None:
    assert (without_fp8("fp8"), without_fp8("fp32")) == ("bf16", "fp32")
    assert not multiplies("fp8", CPU)


# ---------------------------------------------------------------------- the devices


def test_torchao_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    problem = fp8_problem.__wrapped__(CPU)
    assert problem is not None
    assert re.match(r"torchao is missing .*: pip install -e '\.\[fp8\]'$", problem)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, tuple[int, int]], None]:
    def be(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return be


def test_cards_without_fp8(card: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    problem_of = fp8_problem.__wrapped__
    card("NVIDIA A100", (8, 0))
    assert problem_of(GPU) == "NVIDIA A100 has compute capability 8.0, and fp8 needs 8.9 (Ada, Hopper, Blackwell)"
    card("NVIDIA H100", (9, 0))  # but this machine has none: the product fails
    assert str(problem_of(GPU)).startswith("NVIDIA H100: ")
    monkeypatch.setattr(float8, "_largest_error", lambda *_: 0.04)
    assert problem_of(GPU) is None
    for wrong in (0.3, float("nan")):
        monkeypatch.setattr(float8, "_largest_error", lambda *_, wrong=wrong: wrong)
        assert str(problem_of(GPU)).startswith("NVIDIA H100 multiplies wrongly")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert str(problem_of(GPU)).endswith("written for NVIDIA's GPUs")


def test_the_probe_measures_an_error() -> None:
    assert 0.01 < float8._largest_error(fp8_multiply(CPU), CPU) < 0.05
    assert float8._largest_error(lambda x, weight, bias: x @ weight.T * 1.2, CPU) > 0.1


# ---------------------------------------------------------------------- the runs


def state_of(run: Run) -> dict[str, Tensor]:
    state = {f"{key}/{name}": t for name, tensors in run.engine.state().items() for key, t in tensors.items()}
    return {key: tensor.clone() for key, tensor in (state | run.ema.tensors() | run.state.tensors()).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("saves", "loads"), [(BF16, FP8), (FP8, BF16)])
def test_a_checkpoint_of_one_goes_on_in_the_other(saves: str, loads: str, tmp_path: Path) -> None:
    """All that it holds comes back to the bit; only the steps after it are computed otherwise."""
    assert key_class("parallel.precision") == "runtime"
    after, saved = [], dict[str, Tensor]()
    for number, precision in enumerate((saves, loads, saves)):
        with built("mmdit_debug_mup.yaml", tmp_path / str(number), precision, "train.global_batch_size=4") as run:
            batches = [*islice(run.batches(), 3)]
            extra = run.ema.tensors() | run.state.tensors()
            if number == 0:
                for each in batches[:2]:
                    train_step(run, each)
                saved = state_of(run)
                (tmp_path / "checkpoint").mkdir()
                run.engine.save(tmp_path / "checkpoint", extra).result()
                continue
            run.engine.load(tmp_path / "checkpoint", extra)
            loaded = state_of(run)
            assert loaded.keys() == saved.keys()
            assert all(torch.equal(loaded[key], saved[key]) for key in saved)
            train_step(run, batches[2])
            after.append(state_of(run))
    weights = [key for key in saved if key.startswith("model/")]
    assert any(not torch.equal(after[0][key], after[1][key]) for key in weights)
    assert all(torch.allclose(after[0][key], after[1][key], rtol=0, atol=0.02) for key in weights)


@pytest.mark.slow
@pytest.mark.parametrize("recomputing", ["none", "selective"])
def test_fsdp2_and_one_process_without_it_are_equal(recomputing: str, tmp_path: Path) -> None:
    """Bit for bit, as in other precisions, and whatever is computed again."""
    states = []
    for number, offload in enumerate(("true", "false")):
        more = (f"parallel.cpu_offload={offload}", f"parallel.activation_checkpointing={recomputing}")
        with built("mmdit_debug_mup.yaml", tmp_path / str(number), FP8, SMALL, *more) as run:
            for micro_batches in islice(run.batches(), 3):
                train_step(run, micro_batches)
            states.append(state_of(run))
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []


def losses(folder: Path, precision: str, steps: int = 24) -> list[float]:
    with built("mmdit_debug_mup.yaml", folder, precision, "text_encoder.max_length=8", "optim.lr=8e-3") as run:
        found = []
        for micro_batches in islice(run.batches(), steps):
            before = run.state.totals[0].item()
            train_step(run, micro_batches)
            found.append(run.state.totals[0].item() - before)
        return found


@pytest.mark.slow
def test_it_learns_as_bf16_does(tmp_path: Path) -> None:
    """The mean of the last losses, on synthetic data: the gate's own figures come from benchmarks/fp8.py."""
    ends = {precision: sum(losses(tmp_path / precision, precision)[-8:]) / 8 for precision in (BF16, FP8)}
    assert ends[FP8] == pytest.approx(ends[BF16], rel=0.01)
    assert ends[FP8] != ends[BF16]


def test_the_gate() -> None:
    base = [0.30, 0.31, 0.32]  # a deviation of 0.01
    near = judge({"bf16": base, "fp8": [0.305, 0.315, 0.325]})
    assert near["passed"]
    assert near["difference"] == pytest.approx(0.005)
    assert near["deviation"] == pytest.approx(0.01)
    for far in ([0.311, 0.321, 0.331], [0.28, 0.29, 0.30], [0.30, 0.31, float("nan")]):
        assert not judge({"bf16": base, "fp8": far})["passed"]
