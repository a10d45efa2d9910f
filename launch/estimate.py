"""Memory, FLOPs, traffic, time and cost of a config on a cluster, without a GPU: from one step in a simulated world.

python launch/estimate.py --config mmdit_18b_mup.yaml --gpus 256 [--json] [section.key=value ...]

Exits 0 where the run fits into the GPU's memory, 1 where it does not. Two things were measured on no GPU: what CUDA,
NCCL and the allocator hold beside the tensors (3 GiB are reserved), and the encoders' working memory before a step.
"""

import json

from launch.common import command, run
from trainer.config.load import load_config
from trainer.errors import ConfigError


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpu-memory-gb", type=float, default=80.0, help="of each GPU (default: 80)")
    parser.add_argument("--gpu-tflops", type=float, default=989.0, help="peak in bf16, not sparse (default: 989)")
    parser.add_argument("--mfu", type=float, default=0.35, help="model FLOP/s over peak, expected or measured (0.35)")
    parser.add_argument("--price", type=float, default=2.5, help="dollars per GPU-hour (default: 2.5)")
    parser.add_argument("--network-gb-s", type=float, default=50.0, help="GB/s per GPU between nodes (400 Gbit/s: 50)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    a = parser.parse_args()
    if min(a.gpus, a.gpu_memory_gb, a.gpu_tflops, a.mfu, a.network_gb_s) <= 0 or a.mfu > 1 or a.price < 0:
        raise ConfigError("--gpus, --gpu-memory-gb, --gpu-tflops, --mfu (at most 1) and --network-gb-s are positive")
    config = load_config(a.config, a.overrides)
    from trainer.estimate.report import Cluster, describe, estimate

    cluster = Cluster(a.gpus, a.gpu_memory_gb, a.gpu_tflops, a.mfu, a.price, a.network_gb_s)
    found = estimate(config, cluster)
    print(json.dumps(found, indent=1) if a.json else describe(found, cluster))
    return 0 if found["memory_gib"]["fits"] or found["memory_cached_gib"]["fits"] else 1


if __name__ == "__main__":
    run(main)
