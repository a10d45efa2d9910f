"""Export a checkpoint as a folder that diffusers loads (or under official names); import published weights.

python launch/export.py --checkpoint runs/demo --output exported
python launch/export.py --import DiT-XL-2-256x256.pt --config dit_xl_2_mup.yaml --output imported
torchrun ... launch/train.py --config dit_xl_2_mup.yaml run.init_from=imported
"""

from pathlib import Path

from launch.common import command, open_checkpoint, run
from launch.processes import importing
from trainer.config.load import load_config
from trainer.errors import ConfigError


def main() -> int:
    parser = command(__doc__, config=False)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--checkpoint", type=Path, help="export this checkpoint, or the newest of a run folder")
    way.add_argument("--import", dest="source", type=Path, help="import these weights: a file, or a folder of files")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--config", help="import: config of the run that will start from the weights")
    parser.add_argument("--weights", choices=("ema", "live"), default="ema", help="export: which weights")
    parser.add_argument("--format", choices=("diffusers", "official"), default="diffusers", help="export: whose names")
    parser.add_argument(
        "--encoders", choices=("copy", "reference"), default="copy", help="export: copied into the folder, or by id"
    )
    parser.add_argument(
        "--pipeline", choices=("auto", "own"), default="auto", help="export: diffusers' own where it samples the same"
    )
    parser.add_argument("--max-shard-gib", type=float, default=5.0, help="export: largest file of weights (default: 5)")
    arguments = parser.parse_args()
    if (arguments.config is None) != (arguments.source is None):
        parser.error("--config goes with --import, and --import needs it")
    if arguments.max_shard_gib <= 0:
        parser.error(f"--max-shard-gib must be positive, got {arguments.max_shard_gib}")
    if arguments.output.exists():
        raise ConfigError(f"--output {arguments.output} exists already: name a new folder, or remove it")
    if arguments.source is not None:
        config = load_config(arguments.config, arguments.overrides)
        with importing():
            from export.read import import_weights

        print(import_weights(config, arguments.source, arguments.output))
        return 0
    checkpoint, meta, config = open_checkpoint(arguments.checkpoint, arguments.overrides)
    with importing():
        from export.write import export_checkpoint

    message = export_checkpoint(
        checkpoint, meta, config, arguments.output,
        weights=arguments.weights, form=arguments.format, encoders=arguments.encoders,
        own_pipeline=arguments.pipeline == "own", max_shard_gib=arguments.max_shard_gib,
    )  # fmt: skip
    print(message)
    return 0


if __name__ == "__main__":
    run(main)
