"""parallel.precision fp8: which products it narrows, to what, what it leaves as it is, and what it refuses."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from models.backbone import Backbone
from models.layers import TokenLinear
from trainer.build.engine import build_engine, build_mup_table
from trainer.build.float8 import check_fp8_is_compiled, multiply_in_fp8, token_linears
from trainer.build.meta import meta_model
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.parallel.float8 import fp8_multiply
from trainer.parallel.mesh import World

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FP8, BF16 = "parallel.precision=fp8", "parallel.precision=bf16"
MLP = {"mlp.fc1", "mlp.fc2"}
ATTENTION = {"attention.qkv", "attention.out"}
# Within a block: query, key and value, attention's output, the MLP; of cross-attention, too.
NARROWED = {
    "mmdit": {f"{stream}.{part}" for stream in ("image", "text") for part in ("qkv", "out", *MLP)} | {"text.kv"},
    "pixart": ATTENTION | MLP | {f"cross_attention.{part}" for part in ("q", "kv", "out")},
    "dit": ATTENTION | MLP,
    "uvit": ATTENTION | MLP,
}


def debug_model(kind: str) -> Backbone:
    return meta_model(load_config(f"{kind}_debug_mup.yaml", [BF16]))


def narrowed(model: nn.Module) -> set[str]:
    """The names, within their blocks, of the layers that fp8 multiplies."""
    return {re.sub(r"^((in_|out_)?blocks\.\d+|mid_block)\.", "", name) for name in token_linears(model)}


# ---------------------------------------------------------------------- what is narrowed


@pytest.mark.parametrize("kind", NARROWED)
def test_products_of_the_blocks_tokens_and_nothing_else(kind: str, world: World) -> None:
    config = load_config(f"{kind}_debug_mup.yaml", [FP8])
    model = debug_model(kind)
    assert narrowed(model) == NARROWED[kind]
    multiply_in_fp8(model, build_mup_table(config), world)
    assert len({id(vars(linear)["multiply"]) for linear in token_linears(model).values()}) == 1
    others = [
        module for module in model.modules() if isinstance(module, nn.Linear) and module not in [*narrowing(model)]
    ]
    assert others
    assert not any("multiply" in vars(module) for module in others)


def narrowing(model: nn.Module) -> list[TokenLinear]:
    return [*token_linears(model).values()]


def replace_final(model: Any) -> None:
    model.final = TokenLinear(64, 48)


def replace_embedding(model: Any) -> None:
    model.patch_embed = TokenLinear(48, 64)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(replace_final, r"final\.weight \(output\)"), (replace_embedding, r"patch_embed\.weight \(input\)")],
)
def test_the_ends_of_the_model_are_refused(fault: Callable[[Any], None], message: str, world: World) -> None:
    """Planted: a layer that fp8 must not touch is declared to be one of the tokens'."""
    model, table = debug_model("mmdit"), build_mup_table(load_config("mmdit_debug_mup.yaml", [FP8]))
    fault(model)
    assert narrowed(model) != NARROWED["mmdit"]
    with pytest.raises(TypeError, match=message):
        multiply_in_fp8(model, table, world)


def test_modulation_is_refused() -> None:
    """Its weights are hidden ones of a block, as the others: it is told by what it multiplies."""
    layer = TokenLinear(32, 64, dtype=torch.bfloat16)
    layer.multiply = fp8_multiply(CPU)
    assert layer(torch.randn(2, 3, 32, dtype=torch.bfloat16)).shape == (2, 3, 64)
    with pytest.raises(TypeError, match=r"modulation is no TokenLinear"):
        layer(torch.randn(2, 32, dtype=torch.bfloat16))


def test_a_backbone_without_token_linears_is_refused(world: World) -> None:
    model = debug_model("dit")
    model.blocks = nn.ModuleList()
    with pytest.raises(ConfigError, match="DiT has no TokenLinear"):
        multiply_in_fp8(model, build_mup_table(load_config("dit_debug_mup.yaml")), world)


# ---------------------------------------------------------------------- what stays as it was


def test_the_table_and_the_first_weights_are_those_of_bf16(world: World) -> None:
    one, other = (load_config("mmdit_debug_mup.yaml", [precision]) for precision in (FP8, BF16))
    table = build_mup_table(one)
    assert table.to_json() == build_mup_table(other).to_json()
    fp8, bf16 = build_engine(one, table, world), build_engine(other, table, world)
    assert fp8.optimizer_settings() == bf16.optimizer_settings()
    assert all(torch.equal(weight, bf16.master_shards()[name]) for name, weight in fp8.master_shards().items())
    for engine in (fp8, bf16):
        assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
        assert {shard.dtype for shard in engine.master_shards().values()} == {torch.float32}


# ---------------------------------------------------------------------- what it refuses


def test_sizes_that_the_hardware_has_not_are_named(world: World) -> None:
    sizes = ["model.width=72", "model.head_dim=12", "mup.base_width=36"]
    config = load_config("mmdit_debug_mup.yaml", [FP8, *sizes])
    with pytest.raises(ConfigError, match=r"blocks\.0\.image\.qkv\.weight is 216 x 72, .* multiples of 16"):
        build_engine(config, build_mup_table(config), world)


def test_every_rank_is_told_of_a_device_without_fp8(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setattr("trainer.build.float8.fp8_problem", lambda device: "torchao is missing")
    config = load_config("mmdit_debug_mup.yaml", [FP8])
    with pytest.raises(ConfigError, match=r"^parallel\.precision fp8: torchao is missing; or set .*=bf16$"):
        build_engine(config, build_mup_table(config), world)


def test_a_gpu_compiles() -> None:
    gpu: Any = SimpleNamespace(device=GPU)
    cpu: Any = SimpleNamespace(device=CPU)
    eager = load_config("mmdit_debug_mup.yaml", [FP8, "parallel.compile=false"])
    with pytest.raises(ConfigError, match=r"fp8 needs parallel\.compile on a GPU"):
        check_fp8_is_compiled(eager, gpu)
    check_fp8_is_compiled(eager, cpu)
    check_fp8_is_compiled(load_config("mmdit_debug_mup.yaml", [FP8]), gpu)
    check_fp8_is_compiled(load_config("mmdit_debug_mup.yaml", [BF16, "parallel.compile=false"]), gpu)


def test_deepspeed_has_none() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.precision fp8 needs parallel\.engine fsdp2"):
        load_config("mmdit_debug_mup.yaml", [FP8, "parallel.engine=zero"])
