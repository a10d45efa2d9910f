"""Memory, FLOPs, traffic, time and cost of a config on a cluster, without a GPU: from one step in a simulated world.

python launch/estimate.py --config mmdit_18b_mup.yaml --gpus 256 [--card h200] [--json] [section.key=value ...]

Exits 0 where the run fits into the GPU's memory, 1 where it does not; a run of stages is priced stage by stage. Time is
a MODEL: the slower of arithmetic and network, with published rates of the card; no GPU has confirmed it. Two things are
in no figure: what CUDA, NCCL and the allocator hold beside the tensors (3 GiB are reserved), and the encoders' working
memory before a step.
"""

import argparse
import dataclasses
import json

from launch.common import command, run
from launch.processes import importing
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.estimate.cluster import CARDS, Cluster


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--card", choices=CARDS, default="h100", help="kind of GPU (default: h100, of 80 GB)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs that share NVLink (default: 8)")
    parser.add_argument("--gpu-memory-gb", type=float, help="of each GPU, where it is not the card's")
    parser.add_argument("--gpu-tflops", type=float, help="peak in bf16, not sparse, where it is not the card's")
    parser.add_argument("--network-gb-s", type=float, help="GB/s per GPU between nodes, where it is not the card's")
    parser.add_argument("--mfu", type=float, help="model FLOP/s over peak, where measured: in place of the arithmetic")
    parser.add_argument("--price", type=float, default=2.5, help="dollars per GPU-hour (default: 2.5)")
    parser.add_argument("--plan", action="store_true", help="compare settings: the five fastest that fit, to paste")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    a = parser.parse_args()
    given = (a.gpus, a.gpus_per_node, a.gpu_memory_gb, a.gpu_tflops, a.network_gb_s, a.mfu)
    if any(value is not None and value <= 0 for value in given) or (a.mfu or 0) > 1 or a.price < 0:
        raise ConfigError("--gpus, --gpus-per-node and the rates are positive, --mfu is at most 1, --price at least 0")
    config = load_config(a.config, a.overrides)
    with importing():
        from trainer.estimate.plan import Planner, describe_plans
        from trainer.estimate.report import describe, estimate
        from trainer.estimate.stages import describe_stages, estimate_stages

    cluster = cluster_of(a)
    if a.plan and config.stages:
        raise ConfigError("--plan compares settings of one stage: add stages=[] and the keys of the stage you mean")
    if a.plan:
        planner = Planner(config, cluster)
        plans = planner.best()
        text = describe_plans(plans, cluster) if plans else planner.what_would_fit()
        print(json.dumps([plan.data(cluster) for plan in plans], indent=1) if a.json else text)
        return 0 if plans else 1
    if config.stages:
        found = estimate_stages(config, cluster)
        text, fits = describe_stages(found, cluster), found["run"]
    else:
        fits = found = estimate(config, cluster)
        text = describe(found, cluster)
    print(json.dumps(found, indent=1) if a.json else text)
    return 0 if fits["memory_gib"]["fits"] or fits["memory_cached_gib"]["fits"] else 1


def cluster_of(a: argparse.Namespace) -> Cluster:
    """The cluster that the options describe."""
    card = CARDS[a.card]
    peak = a.gpu_tflops or card.peak_tflops
    card = dataclasses.replace(
        card,
        peak_tflops=peak,
        matmul_tflops=card.matmul_tflops * peak / card.peak_tflops,
        memory_gb=a.gpu_memory_gb or card.memory_gb,
        nic_gb_s=a.network_gb_s or card.nic_gb_s,
    )
    return Cluster(a.gpus, card, a.gpus_per_node, a.mfu, a.price)


if __name__ == "__main__":
    run(main)
