"""Shards of images and captions -> shards of latents, text states and REPA's features, which training reads instead.

python launch/precompute.py --config mmdit_0.18b_mup --output latents/train data.shards=shards
torchrun --nproc-per-node 8 launch/precompute.py --config ... --samples-per-shard 1000     processes share the work
python launch/precompute.py --config ... --dry-run                                          terabytes and GPU-hours

After a stop the same command goes on, with any number of processes; the bytes that it writes are the same.
"""

import argparse
import os
import time
from pathlib import Path

import torch

from data.config import NONE
from data.encoders.autoencoder import Autoencoder, load_autoencoder
from data.encoders.dino import load_feature_encoder
from data.encoders.joined import load_text_encoders
from data.errors import DataError
from data.index import open_index
from data.precomputed_write import Precompute
from launch.common import command, run
from launch.processes import end_with_torchrun
from trainer.config.keys import plain
from trainer.config.load import load_config, parse
from trainer.config.schema import TrainConfig
from trainer.config.stages import stages_of
from trainer.errors import ConfigError
from trainer.parallel.precision import DTYPES, at_least_fp32, precision_of, without_fp8


def prepare(config: TrainConfig, arguments: argparse.Namespace) -> Precompute:
    """Load the encoders and open the index. Raises ConfigError or DataError."""
    if config.data.synthetic:
        raise ConfigError("data.shards is synthetic: give the shards to precompute")
    if config.autoencoder.path == NONE:
        raise ConfigError("autoencoder.path is none: there are no latents to precompute, pixels are read as they are")
    index = open_index(config.data)
    if index.dataset is not None:
        raise DataError(f"data.shards: {index.dataset.where} was precomputed already; give shards of images")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    precision = without_fp8(precision_of(config.parallel.precision, device))
    dtype = DTYPES[precision]
    # As in training: the autoencoder in fp32 at least, whose latents last for the whole run.
    autoencoder = load_autoencoder(config.autoencoder, device, at_least_fp32(precision))
    assert isinstance(autoencoder, Autoencoder)
    classes, objective = config.label_classes, config.objective
    align = config.projector is not None if arguments.repa_features is None else arguments.repa_features
    return Precompute(
        index=index,
        data=config.data,
        autoencoder=autoencoder,
        text_encoder=load_text_encoders(config.text_encoder, device, dtype) if classes is None else None,
        classes=classes,
        prefix=arguments.output,
        per_shard=arguments.samples_per_shard,
        flips=arguments.flips,
        batch_size=arguments.batch_size,
        precision=precision,
        feature_encoder=(
            load_feature_encoder(objective.repa_encoder, objective.repa_width, device, dtype) if align else None
        ),
        tokens_a_side=config.latent_size // config.model.patch_size,
    )


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="PREFIX-000000.tar, ...")
    parser.add_argument("--dry-run", action="store_true", help="print what the whole set takes and write nothing")
    parser.add_argument("--images-per-s", type=float, help="rate per process for --dry-run; measured unless given")
    parser.add_argument(
        "--flips", action="store_true", help="store latents of the flipped images as well, for data.flip"
    )
    parser.add_argument(
        "--repa-features",
        action=argparse.BooleanOptionalAction,
        help="store the features that REPA aligns tokens with as well (default: where objective.repa_weight is not 0)",
    )
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        metavar="N",
        help="samples per output shard (default: one output shard per input shard)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images, and captions, that are encoded together (default: 32)"
    )
    parser.add_argument(
        "--stage", type=int, default=1, metavar="N", help="for which stage of the run, by its resolution (default: 1)"
    )
    arguments = parser.parse_args()
    for name in ("samples_per_shard", "batch_size", "images_per_s"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    stages = stages_of(load_config(arguments.config, arguments.overrides))
    if not 1 <= arguments.stage <= len(stages):
        parser.error(f"--stage {arguments.stage}: the run has stages 1 to {len(stages)}")
    # Overrides once more: the images are given in place of the stage's own shards, which are to be made.
    config = parse(plain(stages[arguments.stage - 1].alone()), arguments.config, arguments.overrides)
    end_with_torchrun()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.dry_run and rank > 0:
        return 0
    task = prepare(config, arguments)
    if arguments.dry_run:
        print(task.estimate(arguments.images_per_s))
        return 0
    begin = time.perf_counter()
    holes = task.run(rank, world, lambda text: print(text, flush=True))
    reasons = "".join(f", {count} x {reason}" for reason, count in holes.most_common())
    print(f"process {rank} of {world}: done in {time.perf_counter() - begin:.1f} s{reasons}")
    return 0


if __name__ == "__main__":
    run(main)
