"""Activation checkpointing and compiled units: same gradients and names, less memory, few graphs, no silent eager."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx.experimental import _config as shapes

from benchmarks.memory import activation_bytes
from models.attention import kernel_restored, use_kernel
from models.backbone import build_model
from models.layers import ClassCondition, TextCondition
from tests.helpers import varlen
from tests.helpers.varlen import varlen_on_cpu
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.errors import CompileError
from trainer.mup.apply import apply_multipliers, init_parameters
from trainer.parallel import activation_checkpointing, compile
from trainer.parallel.activation_checkpointing import checkpoint_activations
from trainer.parallel.compile import compile_units, inductor_options

# The compiler looks at .grad of what it traces, and silences this warning in a way that "error" overrules.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
BACKBONES = ("mmdit", "mmdit, options", "pixart", "dit", "uvit")
OPTIONS = ["model.positions=rope", "model.mlp=swiglu", "model.single_depth=2"]
# (samples, latent height, text tokens): 7 token counts.
SHAPES = ((2, 32, 6), (2, 16, 6), (4, 32, 8), (2, 24, 5), (3, 20, 6), (2, 32, 4), (2, 28, 9))


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    """compile_units sets what holds for the process: given back here."""
    limit, duck = torch._dynamo.config.recompile_limit, shapes.use_duck_shape
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit, shapes.use_duck_shape = limit, duck
    torch._dynamo.reset()


def build(kind: str, *more: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[nn.Module]]:
    """A debug model of 4 blocks (U-ViT: 2 and 1 and 2) with no weight at zero, and its units; with REPA's projector
    where the backbone can have it."""
    kind, _, options = kind.partition(", ")
    more = (*(OPTIONS if options else ()), *more)
    repa = ["objective.repa_weight=1", "objective.repa_layer=1"] if kind != "uvit" else []
    repa += ["objective.repa_width=16", "objective.repa_hidden=24"]
    config = load_config(f"{kind}_debug_mup.yaml", ["text_encoder.width=16", "model.depth=4", *repa, *more])
    model, table = build_model(config.model, 3, 16, config.projector), build_mup_table(config)
    apply_multipliers(model, table)
    init_parameters(model, table, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype), model.shard_units()


def inputs(kind: str, shape: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    batch, height, length = shape
    generator = torch.Generator().manual_seed(batch * height * length)
    x = torch.randn(batch, 3, height, 32, generator=generator, dtype=dtype)
    t = torch.rand(batch, generator=generator)
    if kind in ("dit", "uvit"):
        return x, t, ClassCondition(torch.arange(batch))
    mask = torch.arange(length).expand(batch, -1) < length - 1
    return x, t, TextCondition(torch.randn(batch, length, 16, generator=generator, dtype=dtype), mask)


def gradients(model: nn.Module, given: tuple[Any, ...]) -> dict[str, Tensor]:
    """Of a loss that reads the features of a block in the middle, too."""
    model.zero_grad()
    prediction, features = model(*given, features_at=1)
    (prediction.square().mean() + features.square().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_checkpointing_changes_no_gradient_and_no_name(kind: str, mode: Any) -> None:
    plain, other = build(kind)[0], build(kind)
    checkpoint_activations(other[1], mode)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in other[0].named_parameters()]
    expected, found = (gradients(model, inputs(kind, SHAPES[0])) for model in (plain, other[0]))
    assert expected.keys() == dict(plain.named_parameters()).keys()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BACKBONES)
def test_saved_bytes_fall(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(mode: Any) -> int:
        model, units = build(kind, dtype=dtype)
        checkpoint_activations(units, mode)
        return activation_bytes(lambda: model(*inputs(kind, SHAPES[0], dtype)))

    none, selective, full = (saved(mode) for mode in ("none", "selective", "full"))
    assert full < 0.6 * selective
    assert selective < 0.75 * none
    monkeypatch.setattr(activation_checkpointing, "_KEPT", [])  # keeps nothing: no more than full
    assert saved("selective") == full


@pytest.mark.parametrize(("kind", "mode"), [("mmdit", "selective"), ("mmdit, options", "full"), ("pixart", "none")])
def test_seven_token_counts_share_graphs(kind: str, mode: Any) -> None:
    """Also with a branch scale (a float on the blocks), with tokens that equal the width at first (64), and in the
    first block, whose input is a view in some backbones."""
    plain, (model, units) = build(kind, "mup.base_depth=2")[0], build(kind, "mup.base_depth=2")
    checkpoint_activations(units, mode)
    compile_units(units, pytest.fail, backend="eager")
    for shape in SHAPES:
        given = inputs(kind, shape)
        expected, found = gradients(plain, given), gradients(model, given)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)
    classes = len({type(unit) for unit in units})
    assert classes <= counters["stats"]["unique_graphs"] <= 2 * classes
    assert not counters["graph_break"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["mmdit", "pixart"])
def test_packed_attention_is_kept_for_the_backward_pass(kind: str, mode: Any) -> None:
    """Its output is computed once in each block, and twice under full checkpointing; gradients are those of a mask."""
    calls = []

    def counted(*inputs: Any) -> Any:
        calls.append(len(inputs))
        return varlen.forward(*inputs)

    expected, (model, units) = gradients(build(kind)[0], inputs(kind, SHAPES[0])), build(kind)
    checkpoint_activations(units, mode)
    with varlen_on_cpu(counted):
        found = gradients(model, inputs(kind, SHAPES[0]))
    assert len(calls) == (2 if mode == "full" else 1) * len(units)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)


@pytest.mark.parametrize(("kind", "mode"), [("mmdit", "selective"), ("mmdit, options", "none"), ("pixart", "none")])
def test_packed_rows_share_graphs(kind: str, mode: Any) -> None:
    """Of seven token counts, forward and backward, traced by autograd as for inductor."""
    plain, (model, units) = build(kind)[0], build(kind)
    checkpoint_activations(units, mode)
    compile_units(units, pytest.fail, backend="aot_eager")
    for shape in SHAPES:
        given = inputs(kind, shape)
        expected = gradients(plain, given)
        with varlen_on_cpu():
            found = gradients(model, given)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)
    classes = len({type(unit) for unit in units})
    assert classes <= counters["stats"]["unique_graphs"] <= 2 * classes
    assert not counters["graph_break"]


@pytest.mark.parametrize("kernel", ["math", "efficient"])
def test_a_named_kernel_is_compiled(kernel: Any) -> None:
    """On a CPU `math` gives what eager mode does, and `efficient`, which a CPU has not, is asked for."""
    plain, (model, units) = build("mmdit")[0], build("mmdit")
    told: list[str] = []
    compile_units(units, told.append, backend="eager")
    given = inputs("mmdit", SHAPES[0])
    expected = gradients(plain, given)
    with kernel_restored():
        use_kernel(kernel)
        if kernel == "efficient":
            with pytest.raises(RuntimeError, match="No viable backend"):
                gradients(model, given)
            assert "cannot be compiled here" in told[0], "eagerly it fails as well"
        else:
            found = gradients(model, given)
            assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)


def test_branch_scale_reaches_the_graph() -> None:
    given = inputs("dit", SHAPES[0])
    outputs = []
    for more in ((), ("mup.base_depth=1",)):
        model, units = build("dit", *more)
        compile_units(units, pytest.fail, backend="eager")
        outputs.append((model(*given)[0], build("dit", *more)[0](*given)[0]))
    assert all(torch.allclose(compiled, eager, rtol=1e-9) for compiled, eager in outputs)
    assert not torch.allclose(outputs[0][0], outputs[1][0], rtol=1e-3)


def test_a_static_shape_ends_the_run_instead_of_running_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """What dynamic=True is there for: without it each token count is a graph of its own, up to the limit."""
    compile_static = partial(torch.compile, dynamic=False)
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic, **rest: compile_static(forward, **rest))
    monkeypatch.setattr(compile, "_MOST_GRAPHS", 3)
    model, units = build("dit")
    compile_units(units, pytest.fail, backend="eager")
    with pytest.raises(CompileError, match=r"parallel\.compile: Block was compiled 3 times"):
        all(model(*inputs("dit", shape)) for shape in SHAPES)


def test_inductor_computes_what_eager_does() -> None:
    plain, (model, units) = build("dit", "model.depth=2")[0], build("dit", "model.depth=2")
    checkpoint_activations(units, "selective")
    compile_units(units, pytest.fail)
    given = inputs("dit", SHAPES[0])
    expected, found = gradients(plain, given), gradients(model, given)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-8, atol=1e-10) for name in expected)


def test_what_the_compiler_fails_on_runs_eagerly_and_says_so_once() -> None:
    """As where Triton is not installed, or a C compiler is missing."""

    def failing(graph: Any, example_inputs: Any) -> Any:
        raise RuntimeError("Cannot find a working triton installation\nand more")

    plain, (model, units) = build("mmdit")[0], build("mmdit")
    told: list[str] = []
    compile_units(units, told.append, backend=failing)
    given = inputs("mmdit", SHAPES[0])
    expected, found = gradients(plain, given), gradients(model, given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model(*given)
    assert len(told) == len({type(unit) for unit in units})
    assert "Block cannot be compiled here (Cannot find a working triton installation) and runs eagerly" in told[0]


def test_inductor_alone_is_told_of_joined_streams_and_of_no_option_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any] | None] = []
    torch_compile = torch.compile

    def compiling(forward: Any, options: dict[str, Any] | None, **more: Any) -> Any:
        given.append(options)
        return torch_compile(forward, options=options, **more)  # refuses an option that it does not know

    monkeypatch.setattr(torch, "compile", compiling)
    units = [unit for kind in ("dit", "mmdit") for unit in build(kind, "model.depth=1")[1]]
    for backend in ("inductor", "eager"):
        compile_units(units, pytest.fail, backend=backend)
    assert given == [{}, {"max_pointwise_cat_inputs": 1, "max_complex_pointwise_cat_inputs": 1}, None, None]
    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["max_pointwise_cat_inputs"])
    assert inductor_options(units[1]) == {"max_pointwise_cat_inputs": 1}
