"""The model of collectives against rates that others have measured."""

import dataclasses

import pytest

from trainer.estimate.cluster import (
    CARDS,
    Cluster,
    Group,
    all_reduce_seconds,
    gather_seconds,
    replica_group,
    shard_group,
)

GB = 1e9


def bus(seconds: float, size: float, ranks: int) -> float:
    """nccl-tests' "bus rate" in GB/s: of an all-gather, or of an all-reduce, whose bytes count twice."""
    return size * (ranks - 1) / ranks / seconds / GB


@pytest.mark.parametrize(
    ("card", "group", "size", "measured"),
    [
        ("h100", Group(1, 8), 2**31, 370),  # NVIDIA/nccl-tests#212 and nccl#1455: rings of 2 to 8 GPUs, 365 to 370
        ("h100", Group(32, 8), 2**31, 340),  # NVIDIA/nccl#1218: all_gather_perf of 2 GiB on 32 nodes
        ("a100", Group(1, 8), 2**31, 240),  # NVIDIA/nccl#1712
    ],
)
def test_all_gathers_run_at_published_rates(card: str, group: Group, size: int, measured: float) -> None:
    assert bus(gather_seconds(CARDS[card], group, size), size, group.size) == pytest.approx(measured, rel=0.25)


def test_all_reduces_run_at_published_rates() -> None:
    """NVIDIA/nccl-tests#119: three nodes of 8 A100 and 4 cards of 200 Gbit/s, 85 to 96 GB/s."""
    card, size = dataclasses.replace(CARDS["a100"], nic_gb_s=CARDS["a100"].nic_gb_s / 2), 2**27
    assert bus(all_reduce_seconds(card, Group(3, 8), size) / 2, size, 24) == pytest.approx(90, rel=0.25)


def test_groups_lie_as_the_mesh_places_them() -> None:
    cluster = Cluster(256)
    assert [shard_group(cluster, shard) for shard in (1, 4, 8, 32)] == [(1, 1), (1, 4), (1, 8), (4, 8)]
    assert [replica_group(cluster, shard) for shard in (1, 4, 8, 32)] == [(32, 8), (32, 2), (32, 1), (8, 1)]
    assert replica_group(Cluster(8), 2) == (1, 4)
    assert replica_group(cluster, 256).size == 1


def test_a_network_is_slower_than_nvlink_and_helps_the_more_cards_it_has() -> None:
    card = CARDS["h100"]
    within, across, lone = (gather_seconds(card, Group(*group), GB) for group in ((1, 8), (4, 8), (8, 1)))
    assert within < across < lone
    assert lone == pytest.approx(GB * 7 / 8 / (card.nic_gb_s * GB), rel=0.01)
    assert gather_seconds(card, Group(1, 1), GB) == all_reduce_seconds(card, Group(1, 1), GB) == 0


def test_small_messages_cost_their_hops() -> None:
    """A kilobyte costs 31 nodes and 7 GPUs by the hierarchical way, not 255 ranks of a ring."""
    card = CARDS["h100"]
    assert 31 * 14e-6 < gather_seconds(card, Group(32, 8), 1e3) < 31 * 14e-6 + 7 * 3.4e-6 + 20e-6
    assert all_reduce_seconds(card, Group(32, 8), 1e3) < gather_seconds(card, Group(32, 8), 1e3)


def test_cards_get_faster() -> None:
    rates = [CARDS[name].matmul_tflops * CARDS[name].memory_gb_s for name in ("a100", "h100", "h200", "b200")]
    assert rates == sorted(rates)
    assert all(card.matmul_tflops < card.peak_tflops for card in CARDS.values())
