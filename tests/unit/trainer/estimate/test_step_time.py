"""The time of a step against runs that others have published, and what it must obey."""

import dataclasses

import pytest

from trainer.build.flops import image_flops
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.estimate.cluster import CARDS, Cluster
from trainer.estimate.step_time import Work, step_time

T5_XXL = 4.76e9
HALF = "train.micro_batch_size=1"  # of 256 px: 64 images of 32 px, half of a GPU's share


def mfu(config: TrainConfig, cluster: Cluster, encoding_flops: float = 0.0) -> float:
    step = step_time(config, cluster, Work(config), encoding_flops)
    images = config.train.global_batch_size / cluster.gpus
    return images * image_flops(config) / step.step_s / (cluster.card.peak_tflops * 1e12)


@pytest.mark.slow
def test_flux_12b() -> None:
    """torchtitan, pull request 2452: Flux-dev of 12 B at 256 px with 512 text tokens, encoders beside it, everything
    recomputed, on 4 GB200 of one node: 587 TFLOP/s, 26.1 % of 2,250. The stand-in has its width and its 11.8 B."""
    config = load_config(
        "mmdit_18b_mup.yaml",
        [
            "model.width=3072",
            "model.depth=35",
            "model.head_dim=128",
            "text_encoder.max_length=512",
            "data.text_lengths=[]",
            "objective.repa_weight=0",
            "train.global_batch_size=128",
            "parallel.activation_checkpointing=full",
            "parallel.compile=true",
        ],
    )
    assert mfu(config, Cluster(4, CARDS["b200"], 4), 2 * T5_XXL * 512) == pytest.approx(0.261, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "recompute", "measured"),
    # NVIDIA-NeMo/DFM, docs/performance-summary.md, DGX-H100, TFLOP/s a GPU: Automodel's FSDP2, and Megatron-Core (whose
    # 128 GPUs share each sample among 8).
    [(8, "full", 175.88), (64, "full", 228.85), (128, "none", 325.77)],
)
def test_wan_14b(gpus: int, recompute: str, measured: float) -> None:
    """A video of 37,440 tokens on each GPU. The stand-in has WAN's width, depth, heads and cross-attention."""
    config = load_config(
        "pixart_0.61b_mup.yaml",
        "model.width=5120 model.depth=40 model.head_dim=128 model.mlp_ratio=3 mup.base_width=1280 data.resolution=3104 "
        f"text_encoder.max_length=512 data.text_lengths=[] train.global_batch_size={gpus} "
        f"parallel.activation_checkpointing={recompute} "
        "parallel.compile=true".split(),
    )
    assert 989 * mfu(config, Cluster(gpus)) == pytest.approx(measured, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1024, 4096])
def test_18b_on_256_gpus_by_its_topology(batch: int) -> None:
    """Shards within a node reduce their gradients over one network card each, which costs most; larger groups differ by
    hops alone. No step is shorter than its network."""
    overrides = ["objective.repa_weight=0", f"train.global_batch_size={batch}"]
    config = load_config("mmdit_18b_mup.yaml", overrides)
    work, found = Work(config), {}
    for shard in (8, 32, 256):
        variant = config.model_copy(update={"parallel": config.parallel.model_copy(update={"shard": shard})})
        found[shard] = step_time(variant, Cluster(256), work)
        assert found[shard].step_s >= found[shard].network.seconds
        assert found[shard].sum_s > found[shard].slower_s >= found[shard].arithmetic_s
    assert found[8].step_s > found[32].step_s > found[256].step_s
    assert found[8].network.seconds > 1.4 * found[32].network.seconds


@pytest.mark.slow
def test_prefetching_hides_the_network() -> None:
    for ahead in (0, 1):
        config = load_config("mmdit_debug_mup.yaml", [f"parallel.prefetch={ahead}"])
        step = step_time(config, Cluster(8), Work(config))
        assert step.step_s == (step.slower_s if ahead else step.sum_s)


def test_mfu_replaces_the_arithmetic() -> None:
    config = load_config("mmdit_debug_mup.yaml")
    work, cluster = Work(config), Cluster(1, mfu=0.5)
    expected = 8 * image_flops(config) / (989e12 * 0.5)
    assert step_time(config, cluster, work).step_s == pytest.approx(expected)
    assert step_time(config, dataclasses.replace(cluster, mfu=None), work).step_s > expected


@pytest.mark.parametrize("card", ["a100", "mi300x"])
def test_a_card_without_fp8_is_refused(card: str) -> None:
    config = load_config("mmdit_debug_mup.yaml", ["parallel.precision=fp8"])
    with pytest.raises(ConfigError, match="fp8 runs on h100, h200, b200, not on this card"):
        step_time(config, Cluster(1, CARDS[card]), Work(config))


@pytest.mark.slow
def test_fp8_makes_a_large_model_faster() -> None:
    small = ["model.depth=2", "text_encoder.max_length=128", "data.text_lengths=[]", "objective.repa_weight=0"]
    small += ["train.micro_batch_size=64", "train.global_batch_size=64", "parallel.compile=true"]
    steps = {}
    for precision in ("bf16", "fp8"):
        config = load_config("mmdit_2b_mup.yaml", [*small, f"parallel.precision={precision}"])
        steps[precision] = step_time(config, Cluster(1, CARDS["h200"]), Work(config))
    assert 0.5 < steps["fp8"].passes.products / steps["bf16"].passes.products < 0.7
    assert steps["fp8"].passes.elementwise > steps["bf16"].passes.elementwise
    assert 0.7 < steps["fp8"].step_s / steps["bf16"].step_s < 0.95


FREED = ("train.global_batch_size=256", "parallel.reshard_after_forward=true")


@pytest.mark.slow
def test_micro_batches_cost_their_gathers() -> None:
    one, two = (load_config("mmdit_debug_mup.yaml", [*FREED, *rows]) for rows in ([], [HALF]))
    whole, halves = (step_time(config, Cluster(2), Work(config)) for config in (one, two))
    assert halves.network.collectives["allgather"].calls == 2 * whole.network.collectives["allgather"].calls
    assert halves.update_s > whole.update_s
    assert sum(halves.passes) > sum(whole.passes)
