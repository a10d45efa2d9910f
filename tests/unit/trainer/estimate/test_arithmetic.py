"""The operations that are noted on the meta device, and the roofline that is made of them."""

import dataclasses
import json
from collections import Counter

import pytest

from tests.helpers.paths import ROOT
from trainer.build.float8 import token_linears
from trainer.build.flops import image_flops
from trainer.build.meta import meta_inputs, meta_model
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.estimate.arithmetic import (
    COMPILED,
    STREAMED,
    Attention,
    Elementwise,
    Operation,
    Passes,
    Product,
    count_passes,
    parameter_bytes,
    pass_time,
    products_flops,
)
from trainer.estimate.cluster import CARDS
from trainer.estimate.step_time import Work

KINDS = ("mmdit", "pixart", "dit", "uvit")


def passes_of(config: TrainConfig, rows: int) -> Passes:
    """With a mask, where the model has one: the kernel in use on a CPU packs nothing."""
    return count_passes(meta_model(config), meta_inputs(config, rows))


def moved(counts: Counter[Operation]) -> int:
    return sum(op.bytes * times for op, times in counts.items() if isinstance(op, Elementwise))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_the_flops_of_the_formulas(kind: str) -> None:
    config = load_config(f"{kind}_debug_mup.yaml")
    passes = passes_of(config, 3)
    forward = products_flops(passes.blocks) + products_flops(passes.rest)
    assert forward == 3 * image_flops(config) // 3
    attention = sum(op.flops * n for op, n in passes.backward.items() if isinstance(op, Attention))
    backward = products_flops(passes.backward) - attention + attention * 2 / 2.5
    assert 0.9 * 2 * forward < backward <= 2 * forward  # the first layers need no gradient of their input
    assert products_flops(passes.blocks) > 0.5 * forward


def test_the_projector_of_repa_is_counted() -> None:
    config = load_config("mmdit_debug_mup.yaml", ["objective.repa_weight=0.5", "objective.repa_layer=1"])
    passes = passes_of(config, 1)
    assert products_flops(passes.blocks) + products_flops(passes.rest) == image_flops(config) // 3


@pytest.mark.slow
def test_a_mask_keeps_attention_from_the_flash_kernel() -> None:
    blocks = {kind: passes_of(load_config(f"{kind}_debug_mup.yaml"), 1).blocks for kind in KINDS}
    kernels = {kind: {op.kernel for op in ops if isinstance(op, Attention)} for kind, ops in blocks.items()}
    assert kernels == {"mmdit": {"efficient"}, "pixart": {"flash", "efficient"}, "dit": {"flash"}, "uvit": {"flash"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "kernel"),
    [("auto", "flash"), ("varlen", "flash"), ("flash3", "flash3"), ("efficient", "efficient"), ("cudnn", "cudnn")],
)
def test_attention_is_that_of_the_kernel_that_a_gpu_takes(asked: str, kernel: str) -> None:
    """Of the same FLOPs, whether rows are packed or masked."""
    config = load_config("mmdit_debug_mup.yaml", [f"parallel.attention={asked}"])
    passes, masked = Work(config).passes(2), passes_of(config, 2)
    counts = passes.blocks + passes.backward
    assert {op.kernel for op in counts if isinstance(op, Attention)} == {kernel}
    for phase in ("blocks", "rest", "backward"):
        assert products_flops(getattr(passes, phase)) == products_flops(getattr(masked, phase))
    rates = CARDS["h100"].attention_tflops
    assert rates["efficient"] < rates["flash"] < rates["flash3"]


def test_activation_checkpointing_computes_the_blocks_again() -> None:
    passes = passes_of(load_config("mmdit_debug_mup.yaml"), 2)
    assert passes.recomputed("none") == Counter()
    assert passes.recomputed("full") == passes.blocks
    assert products_flops(passes.recomputed("selective")) == 0
    assert moved(passes.recomputed("selective")) == moved(passes.blocks)


@pytest.mark.slow
def test_a_block_moves_what_was_counted_by_hand() -> None:
    """115 reads and writes of each token's features in eager mode, forward and backward, by reading models/mmdit.py;
    the last block has 0.72 of another's. Compiled, it moves what benchmarks/lowered.py counted."""
    overrides = ["text_encoder.max_length=128", "data.text_lengths=[]", "objective.repa_weight=0", "model.depth=3"]
    config = load_config("mmdit_2b_mup.yaml", overrides)
    passes, features = passes_of(config, 8), 8 * (256 + 128) * 1728 * 2
    eager = (moved(passes.blocks) + moved(passes.backward)) / features / 2.72
    assert eager == pytest.approx(115, rel=0.1)
    block = json.loads((ROOT / "benchmarks" / "results" / "lowered_mmdit_2b.json").read_text())["blocks"]["Block"]
    compiled = block["forward"]["triton_d"] + block["backward"]["triton_d"]
    assert pytest.approx(compiled / eager, rel=0.04) == COMPILED


def test_products_lose_what_tiles_and_waves_leave_idle() -> None:
    card = CARDS["h100"]
    whole = Product(132 * 128, 2560, 8192)  # ten waves of full tiles
    assert whole.seconds(card) == pytest.approx(whole.flops / (card.matmul_tflops * 1e12), rel=0.01)
    # A row more is a row of tiles more; a few rows cost the reading of the weights.
    assert Product(132 * 128 + 1, 2560, 8192).seconds(card) > whole.seconds(card)
    skinny = Product(16, 8192, 8192)
    assert skinny.seconds(card) > 2 * 8192**2 / (card.memory_gb_s * 1e9) > skinny.flops / (card.matmul_tflops * 1e12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fp8_multiplies_the_blocks_tokens(kind: str) -> None:
    """The same products in each phase, of which those of a TokenLinear are in fp8, once forward and twice backward;
    what is rounded moves more bytes."""
    config, bf16 = (
        load_config(f"{kind}_debug_mup.yaml", [f"parallel.precision={precision}"]) for precision in ("fp8", "bf16")
    )
    passes, plain = Work(config).passes(2), Work(bf16).passes(2)
    layers = len(token_linears(meta_model(config)))
    for phase, times in (("blocks", 1), ("rest", 0), ("backward", 2)):
        counts, others = getattr(passes, phase), getattr(plain, phase)
        assert products_flops(counts) == products_flops(others)
        assert sum(n for op, n in counts.items() if isinstance(op, Product) and op.fp8) == times * layers
        assert sum(n for op, n in counts.items() if isinstance(op, Product)) == sum(
            n for op, n in others.items() if isinstance(op, Product)
        )
        assert not any(op.fp8 for op in others if isinstance(op, Product))
        assert moved(counts) > moved(others) if times else moved(counts) == moved(others)


def test_fp8_products_are_as_fast_as_the_card() -> None:
    product = Product(132 * 128, 2560, 8192)
    for name in ("h100", "h200", "b200"):
        card = CARDS[name]
        assert card.fp8_tflops is not None
        gain = card.fp8_tflops / card.matmul_tflops
        assert product.seconds(card) / product._replace(fp8=True).seconds(card) == pytest.approx(gain, rel=0.05)
        assert 1.7 < gain < 2


def test_compiling_leaves_the_products_alone() -> None:
    passes = passes_of(load_config("dit_debug_mup.yaml"), 4)
    eager, compiled = (pass_time(passes, CARDS["h100"], "none", on) for on in (False, True))
    assert compiled.elementwise < eager.elementwise
    assert compiled[:2] == eager[:2]
    full = pass_time(passes, CARDS["h100"], "full", True)
    assert all(more > less for more, less in zip(full, compiled, strict=True))


def test_bytes_of_a_parameter() -> None:
    """Of a GPU alone: 10 by each of two gathers, 6 and 8 by the reduction, 52 by the update; 12 by accumulation."""
    assert parameter_bytes(1, 1, True, 1) == 2 * 10 + 14 + 52
    assert parameter_bytes(1, 4, True, 1) == 4 * 34 + 3 * 12 + 52
    assert parameter_bytes(1, 1, False, 1) == 10 + 14 + 52
    assert parameter_bytes(64, 1, True, 1) < 0.3 * parameter_bytes(1, 1, True, 1)
    assert parameter_bytes(8, 1, True, 2) == parameter_bytes(8, 1, True, 1) + 12 / 8


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "milliseconds"), [(16, 102), (32, 154), (40, 180), (64, 255), (128, 457), (160, 555)])
def test_the_step_of_2b_is_that_of_an_independent_count(rows: int, milliseconds: float) -> None:
    """A model of its own by hand-written formulas for one H200, 128 text tokens, compiled, within a tenth."""
    config = load_config(
        "mmdit_2b_mup.yaml", ["text_encoder.max_length=128", "data.text_lengths=[]", "objective.repa_weight=0"]
    )
    model, card = meta_model(config), dataclasses.replace(CARDS["h200"], matmul_tflops=790.0)
    passes = count_passes(model, meta_inputs(config, rows))
    numbers = sum(p.numel() for p in model.parameters())
    update = numbers * parameter_bytes(1, 1, True, 1) / (STREAMED * card.memory_gb_s * 1e9)
    assert 1e3 * (sum(pass_time(passes, card, "none", True)) + update) == pytest.approx(milliseconds, rel=0.1)
